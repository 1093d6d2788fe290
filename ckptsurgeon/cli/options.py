"""The options that several commands share, each defined once, and the functions that read them. Rules keep their order.

This module imports only what `--help` needs; a command imports everything else when it runs.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ckptsurgeon.cli.endings import debug
from ckptsurgeon.cli.output import Show as Show
from ckptsurgeon.cli.output import color
from ckptsurgeon.dtypes import DTYPE_CHOICES, choice
from ckptsurgeon.errors import CheckpointError
from ckptsurgeon.formats.registry import OUTPUTS, WRITTEN
from ckptsurgeon.report import PROOFS
from ckptsurgeon.rules import AUTO

if TYPE_CHECKING:
    from ckptsurgeon.rules.rules import Kind

F = TypeVar("F", bound=Callable[..., Any])
Wrap = Callable[[F], F]
_WRITES = (*OUTPUTS, ".json")
AS_IS = "as-is"  # the one layout that is taken without an adapter
RULES: tuple[Kind, ...] = ("rename", "drop", "keep", "adapt", "init")  # each an option of its own


class Integer(click.IntRange):
    """An integer within limits, named "integer" in messages."""

    name = "integer"


class Number(click.FloatRange):
    """A number within limits, named "number" in messages."""

    name = "number"


class DtypeChoice(click.Choice[str]):
    """One of `DTYPE_CHOICES`, by any of a dtype's names."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """The choice as the library calls it."""
        return super().convert(choice(value), param, ctx)


def stack(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Several options as one decorator, in the order in which help shows them."""

    def decorate(function: F) -> F:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def shown(function: Callable[..., Any]) -> Callable[..., Any]:
    """Add --json, -v, -q, --color and --debug; the function gets the first three as one `show`."""

    @click.option("--json", "as_json", is_flag=True, help="Answer in JSON (its schema ships in the package).")
    @click.option("-v", "--verbose", is_flag=True, help="Show every key.")
    @click.option(
        "-q",
        "--quiet",
        is_flag=True,
        help="No notes, progress or summaries: nothing on stdout where a file is written or all is well.",
    )
    @color
    @debug
    @wraps(function)
    def run(*args: Any, as_json: bool, verbose: bool, quiet: bool, **kwargs: Any) -> Any:
        show = Show(as_json, verbose, quiet)
        with show.progress():
            return function(*args, show=show, **kwargs)

    return run


def tabled(function: Callable[..., Any]) -> Callable[..., Any]:
    """As `shown`, with --table."""

    @click.option(
        "--table",
        type=click.Choice(["github", "html", "csv"]),
        help="Print the rows as a table and nothing else: Markdown as GitHub has it, HTML, or CSV. With -v a row for every key.",
    )
    @shown
    @wraps(function)
    def run(*args: Any, table: str | None, show: Show, **kwargs: Any) -> Any:
        if table is not None and show.json:
            raise click.UsageError("--json and --table are two forms of output; give one")
        return function(*args, show=replace(show, table=table), **kwargs)

    return run


class Command(click.Command):
    """A command whose help begins with examples and groups its options, as the tables of `help_pages` say."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse as click does, also while a shell completes."""
        if ctx.resilient_parsing:
            from ckptsurgeon.cli.completing import begin

            args = begin(self, ctx, args)
        return super().parse_args(ctx, args)

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """The examples, then what the command does."""
        from ckptsurgeon.cli.help_pages import write_examples

        write_examples(self.name or "", formatter)
        super().format_help_text(ctx, formatter)

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """A section for each group."""
        from ckptsurgeon.cli.help_pages import write_options

        write_options(self, ctx, formatter)


class RuleCommand(Command):
    """A command that remembers the order of its rules, which click forgets between options of different names."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Record the rules in the order in which click's own parser meets them, then parse as usual."""
        if ctx.resilient_parsing:
            return super().parse_args(ctx, args)
        from ckptsurgeon.rules.rules import Rule

        args = as_is_of(args)
        values, _, order = self.make_parser(ctx).parse_args(args=list(args))
        left = {kind: iter(values.get(kind) or ()) for kind in RULES}
        words = [(name, next(left[name])) for name in (option.name for option in order) if name in left]
        ctx.meta["rules"] = tuple(Rule(name, *((word,) if isinstance(word, str) else word)) for name, word in words)
        return super().parse_args(ctx, args)


def as_is_of(args: list[str]) -> list[str]:
    """The words of a command line, `--layout as-is PATTERN` as the one value `as-is=PATTERN`: a word with `*` or `{` that is no file.

    >>> as_is_of(["--layout", "as-is", "enc.**", "a.pt", "--layout", "as-is", "b.pt"])
    ['--layout', 'as-is=enc.**', 'a.pt', '--layout', 'as-is', 'b.pt']
    """
    words: list[str] = []
    for word in args:
        if words[-2:] == ["--layout", AS_IS] and set(word) & set("*{") and not word.startswith("-") and not os.path.exists(word):
            words[-1] += f"={word}"
        else:
            words.append(word)
    return words


def _layouts(_ctx: click.Context, _option: click.Parameter, words: tuple[str, ...]) -> tuple[str, ...] | None:
    for word in words:
        name, equals, pattern = word.partition("=")
        if name != AS_IS or (equals and not pattern):
            raise click.BadParameter(f"{word!r} is no layout to take: write {AS_IS}, or {AS_IS} PATTERN; others are chosen by --adapt")
    return tuple(word.partition("=")[2] or AS_IS for word in words) or None


def _numbers(_ctx: click.Context, _option: click.Parameter, words: tuple[str, ...]) -> dict[str, int] | None:
    numbers_by_name: dict[str, int] = {}
    for word in words:
        name, _, value = word.partition("=")
        try:
            number = int(value)
        except ValueError as error:
            raise click.BadParameter(f"{word!r} sets no variable: write NAME=NUMBER, as in heads=32") from error
        if numbers_by_name.setdefault(name, number) != number:
            raise click.BadParameter(f"{name} is set twice")
    return numbers_by_name or None


def ordered_rules(function: Callable[..., Any]) -> Callable[..., Any]:
    """Pass the rules of a `RuleCommand`, in order, and after them the rules files, as `rules`."""

    @wraps(function)
    def run(*args: Any, rules: tuple[str, ...], **kwargs: Any) -> Any:
        return function(*args, rules=(*click.get_current_context().meta["rules"], *rules), **kwargs)

    return run


def _raise_limits(ctx: click.Context, _option: click.Parameter, words: tuple[str, ...]) -> None:
    from ckptsurgeon.limit_table import limits

    for word in words:
        name, _, value = word.partition("=")
        try:
            ctx.with_resource(limits(**{name: value}))
        except CheckpointError as error:
            raise click.BadParameter(f"{error.reason} ({error.hint})", ctx) from error


def split(paths: tuple[str, ...], average: bool) -> tuple[list[str], str | None]:
    """Sources and target: the last of several paths is the target; a single path and an average have no target."""
    if len(paths) > 2 and ":" in paths[-2] and os.path.splitext(paths[-1])[1] in _WRITES and not os.path.exists(paths[-1]):
        raise click.UsageError(f"{paths[-1]} stands where the target is expected, and does not exist; is it -o {paths[-1]}?")
    if average:
        from ckptsurgeon.api._opening import is_code

        if models := [path for path in paths if is_code(path)]:
            raise click.UsageError(f"--average takes checkpoints only, and {models[0]} is a model; leave it out")
    return ([*paths[:-1]], paths[-1]) if len(paths) > 1 and not average else ([*paths], None)


def mean(average: bool, weights: str | None) -> list[float] | bool | None:
    """The `average=` argument for `--average` and `--weights`."""
    from ckptsurgeon.api._options import facts, refuse_idle

    refuse_idle(facts(average=average), weights=weights)
    if weights is None:
        return average or None
    try:
        return [float(weight) for weight in weights.split(",")]
    except ValueError as error:
        raise click.UsageError(f"--weights are numbers with commas between them, as in 3,1; not {weights!r}") from error


def names(_ctx: click.Context, _option: click.Parameter, word: str | None) -> tuple[str, ...] | str | None:
    """`model`, or the names in a file."""
    from ckptsurgeon.cli.files import name_list

    return word if word in (None, "model") else name_list(word)


limit = click.option(
    "--limit",
    multiple=True,
    metavar="NAME=VALUE",
    expose_value=False,
    callback=_raise_limits,
    help="Read a trusted file beyond the limit that an error named: --limit pickle-bytes=2GB.",
)
root = click.option("--root", metavar="ROOT", help="Which nested dict of the checkpoint holds the state_dict.")
rename = click.option(
    "--rename", nargs=2, multiple=True, metavar="FROM TO", expose_value=False, help="Rename keys: --rename 'fc2.{p}' 'dense2.{p}'."
)
drop = click.option(
    "--drop", multiple=True, metavar="PATTERN", expose_value=False, help="Leave keys out: --drop 'aux.**'; '1:aux.**' of the second source."
)
keep = click.option(
    "--keep",
    multiple=True,
    metavar="PATTERN",
    expose_value=False,
    help="Keep the target's own values: --keep 'head.**', whatever sources have.",
)
adapt = click.option(
    "--adapt",
    nargs=2,
    multiple=True,
    metavar="KEY OP",
    expose_value=False,
    help="Change shapes: --adapt pos_embed interpolate; or link keys: --adapt 'q.{p} + k.{p} -> qk.{p}' concat.",
)
rule_files = click.option("--rules", multiple=True, metavar="RULES.TOML", help="Rules from a file, after those given here.")
reverse = click.option("--reverse", is_flag=True, help="Apply the rules of files in the other direction.")
auto = click.option(
    "--auto", type=click.Choice(AUTO), metavar="safe", help="Apply what can't change a tensor's meaning: dimensions of 1, old names."
)
conversions = click.option(
    "--no-conversions",
    "conversions",
    is_flag=True,
    flag_value=False,
    default=True,
    help="Take names as they are, where TARGET is a model of transformers, whose own loading renames and converts.",
)
average = click.option("--average", is_flag=True, help="The mean of all paths; each is a source, and there is no target.")
weights = click.option("--weights", metavar="WEIGHT,...", help="With --average, a weight for each source: --weights 3,1.")
init = click.option(
    "--init",
    nargs=2,
    multiple=True,
    metavar="PATTERN SCHEME",
    expose_value=False,
    help="Initialise keys that no source gives: --init 'fc3.*' xavier_normal.",
)
dtype = click.option(
    "--dtype", type=DtypeChoice(DTYPE_CHOICES), help="Whose dtype wins, or one for all floating tensors (also fp16, bfloat16 …)."
)
allow_cast = click.option("--allow-cast", multiple=True, metavar="PATTERN", help="Keys whose cast may overflow or truncate.")
dequantize = click.option("--dequantize", is_flag=True, help="Make values of fp8 and int8 codes and the scales beside them.")
seed = click.option("--seed", type=Integer(0), metavar="N", help="The seed of constructors and schemes; 0 if not given.")
min_coverage = click.option(
    "--min-coverage", type=Number(0, 1), metavar="SHARE", help="Least share of tensors and of elements transferred."
)
strict = click.option("--strict", is_flag=True, help="Exit 1 if a key is missing, extra or mismatched and no rule names it.")
output = click.option("-o", "--output", required=True, metavar="OUT", help="The file to write; into a folder (OUT/) go shards.")
overwrite = click.option("--overwrite", is_flag=True, help="Replace OUT when it exists.")
format_ = click.option("--format", type=click.Choice(list(WRITTEN)), help="The format of OUT, in place of what its suffix says.")
tied = click.option("--tied", type=click.Choice(["copy", "alias"]), help="How safetensors stores tied keys; copy if not given.")
max_shard_size = click.option(
    "--max-shard-size", metavar="SIZE", help="Write shards of at most this size, with their index, into the folder OUT: 5GB, 2GiB."
)
resume = click.option("--resume", is_flag=True, help="Continue with the shards that an interrupted run has proven.")
provenance = click.option("--provenance/--no-provenance", default=True, help="Record where the weights come from and what is fresh.")
verified = click.option("--verify/--no-verify", default=None, help="The same as --proof full, and --proof none.")
proof = click.option(
    "--proof",
    type=click.Choice(PROOFS),
    help="What of the output is compared with plan and model, and with checksums: full if not given; copied leaves out what it "
    "shares with the sources on disk.",
)
device = click.option("--device", metavar="DEVICE", help="Where to load a model: cpu (if not given), cuda:0, mps, meta.")
finite = click.option("--finite", is_flag=True, help="Exit 1 if there are NaN or infinite values.")

matching = click.option("--match", is_flag=True, help="Find what the rules leave open by itself, as `ckptsurgeon match` shows it.")
accept_uncertain = click.option("--accept-uncertain", is_flag=True, help="Apply the links that matching is not certain of, too.")
layout = click.option(
    "--layout",
    multiple=True,
    metavar="as-is [PATTERN]",
    callback=_layouts,
    help="Take links whose layout is in doubt as they stand: all, or those whose target key matches.",
)
numbers = click.option(
    "--set",
    "numbers",
    multiple=True,
    metavar="NAME=NUMBER",
    callback=_numbers,
    help="Set a variable of adapters' arguments: --set heads=32, for permute_rope(heads=heads).",
)

known = stack(root, rename, drop, keep, adapt, rule_files, reverse, conversions, numbers)
mapping = stack(root, rename, drop, keep, adapt, rule_files, reverse, auto, conversions, numbers)
accepting = stack(matching, accept_uncertain, layout)
deciding = stack(mapping, accepting, init, average, weights, dtype, allow_cast, dequantize, seed, min_coverage, strict)
writing = stack(output, overwrite, format_, max_shard_size, resume, tied, provenance, verified, proof, device, finite)
