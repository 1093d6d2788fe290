"""The words that shell completion offers: a table from parameters to functions. Imported only while a shell completes.

Keys and roots are those of the checkpoint on the command line: its header is read, under all limits, and no model is built or imported.
For a file that can't be read nothing is offered. A name with characters that are special to a shell is not offered, since a checkpoint
may come from anybody and the shell puts the word onto the command line.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import click
from click.shell_completion import CompletionItem

from ckptsurgeon.errors import CheckpointError

Words = Callable[[click.Context], Iterable[str]]
_PLAIN = re.compile(r"(?!-)[\w.:@%+=,/-]+", re.ASCII)
_MOST = 2_000  # words that are offered at a time
_FILE = "file"  # as click calls what a shell completes by itself


def _source(ctx: click.Context) -> str | None:
    paths = [path for path in _paths(ctx) if os.path.exists(path)]
    return paths[0] if paths else None


def _target(ctx: click.Context) -> str | None:
    path: str | None = ctx.params.get("target") or ctx.params.get("against")
    paths = _paths(ctx)
    path = path or (paths[-1] if len(paths) > 1 else None)
    return path if path is not None and os.path.exists(path) and not path.endswith(".py") else None


def _paths(ctx: click.Context) -> Sequence[str]:
    checkpoint = ctx.params.get("checkpoint")
    return [checkpoint] if checkpoint else ctx.params.get("paths") or ()


def _keys_of(path: str | None, root: str | None) -> Iterable[str]:
    if path is None:
        return ()
    from ckptsurgeon.formats.sniff import read

    return (
        key
        for state_dict in read(path).state_dicts
        if root in (None, state_dict.root)
        for key in (*state_dict.tensors, *state_dict.entries)
    )


def source_keys(ctx: click.Context) -> Iterable[str]:
    """The keys of the first checkpoint, under `--root` if that is given."""
    return _keys_of(_source(ctx), ctx.params.get("root"))


def target_keys(ctx: click.Context) -> Iterable[str]:
    """The keys of the target, where it is a file."""
    return _keys_of(_target(ctx), None)


def both_keys(ctx: click.Context) -> Iterable[str]:
    """The keys of the source and of the target."""
    return (*source_keys(ctx), *target_keys(ctx))


def roots(ctx: click.Context) -> Iterable[str]:
    """The roots of the first checkpoint."""
    path = _source(ctx)
    if path is None:
        return ()
    from ckptsurgeon.formats.sniff import read

    return [state_dict.root for state_dict in read(path).state_dicts if state_dict.root]


def adapters(_ctx: click.Context) -> Iterable[str]:
    """The adapters' names."""
    from ckptsurgeon.adapters.table import ADAPTERS

    return ADAPTERS


def schemes(_ctx: click.Context) -> Iterable[str]:
    """The init schemes' names."""
    from ckptsurgeon.models.init.scheme_text import SCHEMES

    return SCHEMES


def codes(_ctx: click.Context) -> Iterable[str]:
    """The codes of findings."""
    from ckptsurgeon.finding_codes import TABLE

    return [row.code for row in TABLE]


def formats(_ctx: click.Context) -> Iterable[str]:
    """The formats' names, as `check --allow` takes them."""
    from ckptsurgeon.formats.registry import allowed_by

    return allowed_by()


def limits(_ctx: click.Context) -> Iterable[str]:
    """The limits' names."""
    from ckptsurgeon.limit_table import TABLE

    return [f"{row.name}=" for row in TABLE]


def dtypes(_ctx: click.Context) -> Iterable[str]:
    """The dtypes' names."""
    from ckptsurgeon.dtypes import all_names

    return all_names()


def devices(_ctx: click.Context) -> Iterable[str]:
    """The usual devices."""
    return ("cpu", "cuda:0", "mps", "meta")


def commands(_ctx: click.Context) -> Iterable[str]:
    """The commands' names."""
    from ckptsurgeon.cli.main import COMMANDS

    return COMMANDS


def models(ctx: click.Context) -> Iterable[str]:
    """The models that the Python files of this folder define, as specs, found without importing; none in place of the first path."""
    if "paths" in ctx.params and not ctx.params["paths"]:
        return ()
    from ckptsurgeon.models.target.slips import spec_of
    from ckptsurgeon.models.target.source_names import model_names

    return [spec_of(name, model) for name in sorted(os.listdir(".")) if name.endswith(".py") for model in model_names(name)]


def files(_ctx: click.Context) -> Iterable[str]:
    """No words: the shell itself completes paths."""
    return ()


# For each parameter, the functions that give the words for its values. Parameters in `_PATHS` may be paths, too.
OFFERED: Mapping[str, tuple[Words, ...]] = {
    "root": (roots,),
    "optimizer_root": (roots,),
    "rename": (source_keys, target_keys),
    "drop": (source_keys,),
    "keep": (target_keys,),
    "adapt": (both_keys, adapters),
    "init": (target_keys, schemes),
    "overrides": (source_keys,),
    "layers": (source_keys,),
    "no_decay_for": (source_keys,),
    "allow_cast": (source_keys,),
    "patterns": (source_keys,),
    "select": (codes,),
    "ignore": (codes,),
    "explain": (codes,),
    "allow": (formats,),
    "dtypes": (dtypes,),
    "device": (devices,),
    "name": (commands,),
    "checkpoint": (files,),
    "plan": (files,),
    "paths": (models,),
    "target": (models,),
    "against": (models,),
    "source_model": (models,),
    "output": (files,),
    "rules": (files,),
    "config": (files,),
    "optimizer_from": (files,),
    "optimizer_names": (files,),
}
_PATHS = {"paths", "target", "against", *(name for name, words in OFFERED.items() if files in words)}
_LISTS = {"select", "ignore", "allow", "dtypes"}  # several values with commas between them


def begin(command: click.Command, ctx: click.Context, words: Sequence[str]) -> list[str]:
    """Set the completion of a command's parameters; return the words without a last option that still lacks values."""
    for param in command.params:
        if param.name in OFFERED:
            param._custom_shell_complete = _offered
    names = {name: param for param in command.params if isinstance(param, click.Option) and not param.is_flag for name in param.opts}
    last_option = next((position for position in range(len(words) - 1, -1, -1) if words[position] in names), None)
    if last_option is None or len(words) - last_option - 1 >= names[words[last_option]].nargs:
        return [*words]
    ctx.meta["typed"] = len(words) - last_option - 1
    return [*words[:last_option]]


def _begins_a_path(incomplete: str) -> bool:
    """Whether the path of a file or folder, other than a Python file, begins with this text."""
    folder, start = os.path.split(incomplete)
    try:
        names = os.listdir(folder or ".")
    except OSError:
        return False
    return bool(start or folder) and any(name.startswith(start) and not name.endswith(".py") for name in names)


def _offered(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """The words that are offered for a parameter; none if the checkpoint can't be read."""
    name = param.name or ""
    functions = OFFERED[name]
    number = ctx.meta.get("typed", 0) if isinstance(param, click.Option) else 0
    before, comma, start = incomplete.rpartition(",") if name in _LISTS else ("", "", incomplete)
    items = [CompletionItem(incomplete, type=_FILE)] if name in _PATHS else []
    if items and _begins_a_path(incomplete):
        return items  # a shell that gets words does not complete paths as well
    try:
        offered = functions[number](ctx) if number < len(functions) else ()
        words = dict.fromkeys(word for word in offered if word.startswith(start) and _PLAIN.fullmatch(word))
    except (CheckpointError, OSError):  # the command reports it when it runs
        return items
    return [*items, *(CompletionItem(before + comma + word) for word in list(words)[:_MOST])]
