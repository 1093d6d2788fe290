"""The help of a command: two examples after the usage line, and its options in groups; two tables, and the functions that write them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import click

# By heading, in the order in which help shows them, options by their long names. `check.dtype` is the option of one command where others
# of its name stand elsewhere. Every option of every command has exactly one group.
GROUPS: dict[str, str] = {
    "What is shown": "sort tree depth only stat name-status table",
    "Which keys": "root rename drop keep rules reverse no-conversions",
    "Shapes": "adapt auto set",
    "Matching": "match accept-uncertain layout values match.min-coverage forward source-model tolerance",
    "Values": "average weights dtype allow-cast dequantize",
    "Fresh values": "init seed",
    "Learning rates": "lr fresh-lr fresh-scale override layer-decay layers partial",
    "Weight decay": "weight-decay no-decay no-decay-for",
    "What is checked": "against check.finite check.full max-size check.dtype allow",
    "Findings": "select ignore explain github",
    "Settings": "config no-config",
    "Output": "output overwrite format max-shard-size resume tied provenance dry-run",
    "Optimizer state": "with-optimizer optimizer optimizer-names optimizer-root",
    "Proof": "verify proof device input finite full min-coverage strict exit-code",
    "Limits": "limit jobs",
    "General options": "json verbose quiet color debug help",
}
_LAST = "General options"
_COLUMN = 30  # the most columns that the names of options take


class Example(NamedTuple):
    """A command line that works in a copy of `fixtures/`, after those above it; `code` is how it ends."""

    line: str
    words: str = ""
    code: int = 0


# By command, in the order of use; "" is the program's own. Later ones read what earlier ones write. A test runs them all.
EXAMPLES: dict[str, tuple[Example, ...]] = {
    "": (
        Example("ckptsurgeon diff net_params.pkl variants:NetTwoClasses", "what fits?"),
        Example("ckptsurgeon merge net_params.pkl variants:NetTwoClasses -o two.pt", "take it"),
    ),
    "inspect": (
        Example("ckptsurgeon inspect net_params.pkl"),
        Example("ckptsurgeon inspect net_params.pkl --json", "for a program"),
    ),
    "diff": (
        Example("ckptsurgeon diff net_params.pkl variants:NetVariant"),
        Example("ckptsurgeon diff net_params.pkl variants.py:NetDeeper --strict", "exit 1", 1),
    ),
    "match": (
        Example("ckptsurgeon match net_params.pkl variants:NetRenamed", "look"),
        Example("ckptsurgeon match net_params.pkl variants:NetRenamed -o rules.toml"),
    ),
    "plan": (
        Example("ckptsurgeon plan net_params.pkl variants:NetVariant", "look"),
        Example("ckptsurgeon plan net_params.pkl variants:NetVariant -o plan.json \\\n    --rules rules.toml --init 'fc3.*' xavier_normal"),
    ),
    "apply": (
        Example("ckptsurgeon apply plan.json -o out.pt"),
        Example("ckptsurgeon apply plan.json -o out.safetensors", "another format"),
    ),
    "merge": (
        Example("ckptsurgeon merge net_params.pkl variants:NetRenamed -o merged.pt \\\n    --rename 'fc2.{p}' 'dense2.{p}'"),
        Example("ckptsurgeon merge net_params.pkl -o net.safetensors", "one path is converted"),
    ),
    "verify": (
        Example("ckptsurgeon verify merged.pt variants:NetRenamed"),
        Example("ckptsurgeon verify net_params.pkl model:Net --input 1x3x32x32"),
    ),
    "check": (
        Example("ckptsurgeon check ."),
        Example("ckptsurgeon check net.safetensors --against model:Net --finite"),
    ),
    "skeleton": (
        Example("ckptsurgeon skeleton model:Net -o net.json"),
        Example("ckptsurgeon skeleton 'model:Net(num_classes=2)' -o two.json"),
    ),
    "groups": (
        Example("ckptsurgeon groups out.pt variants:NetVariant --lr 1e-3 --fresh-lr 1e-2"),
        Example("ckptsurgeon groups merged.pt variants:NetRenamed --lr 1e-3 \\\n    --override 'fc3.*' 1e-2"),
    ),
    "adapters": (
        Example("ckptsurgeon adapters"),
        Example("ckptsurgeon adapters --json", "for a program"),
    ),
    "guide": (
        Example("ckptsurgeon guide", "the topics"),
        Example("ckptsurgeon guide patterns"),
    ),
    "help": (
        Example("ckptsurgeon help merge"),
        Example("ckptsurgeon help", "the commands"),
    ),
    "completion": (
        Example('eval "$(ckptsurgeon completion bash)"', "in ~/.bashrc"),
        Example("ckptsurgeon completion zsh"),
    ),
}


def write_examples(name: str, formatter: click.HelpFormatter) -> None:
    """Write a command's examples, as a shell takes them; comments stand one below the other."""
    rows = EXAMPLES.get(name, ())
    if not rows:
        return
    widest = max((len(row.line) for row in rows if row.words), default=0)
    formatter.write_paragraph()
    with formatter.indentation():
        margin = " " * formatter.current_indent
        for line, words, _ in rows:
            shown = line.replace("\n", f"\n{margin}")
            formatter.write(f"{margin}{shown.ljust(widest)}  # {words}\n" if words else f"{margin}{shown}\n")


def groups_of(command: click.Command, ctx: click.Context) -> Iterator[tuple[str, list[click.Parameter]]]:
    """The headings of a command's help, each with its options in the table's order; options without a group are in the last."""
    options = {long_name(option): option for option in command.get_params(ctx) if isinstance(option, click.Option)}
    by_heading: dict[str, list[click.Parameter]] = {heading: [] for heading in GROUPS}
    for heading, words in GROUPS.items():
        for word in words.split():
            owner, _, name = word.rpartition(".")
            if name in options and (owner == command.name or (not owner and not _is_elsewhere(command, name))):
                by_heading[heading].append(options.pop(name))
    by_heading[_LAST] += options.values()
    return ((heading, params) for heading, params in by_heading.items() if params)


def _is_elsewhere(command: click.Command, name: str) -> bool:
    return any(f"{command.name}.{name}" in words.split() for words in GROUPS.values())


def long_name(option: click.Parameter) -> str:
    """What an option is called in the table: its first long name, without dashes."""
    return next(name for name in (*option.opts, *option.secondary_opts) if name.startswith("--"))[2:]


def write_options(command: click.Command, ctx: click.Context, formatter: click.HelpFormatter) -> None:
    """Write a section for each group of a command's options, all with columns of one width."""
    sections = {
        heading: [record for param in params if (record := param.get_help_record(ctx)) is not None]
        for heading, params in groups_of(command, ctx)
    }
    widest = max(len(name) for records in sections.values() for name, _ in records)
    for heading, records in sections.items():
        with formatter.section(heading):
            formatter.write_dl([(name.ljust(min(widest, _COLUMN)), words) for name, words in records], _COLUMN)
