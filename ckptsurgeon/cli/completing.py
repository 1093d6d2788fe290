"""What a shell offers for a word that is being typed: a table from parameters to words. Imported by a shell's completion alone.

Keys and roots are those of the checkpoint on the command line: its header is read, under all limits, and nothing of a model is built or
imported. A file that can't be read offers nothing. A name that a shell could take for anything but a word is not offered: names in a
checkpoint are a stranger's, and what is offered is put onto a command line.
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
    one = ctx.params.get("checkpoint")
    return [one] if one else ctx.params.get("paths") or ()


def _keys_of(path: str | None, root: str | None) -> Iterable[str]:
    if path is None:
        return ()
    from ckptsurgeon.formats.sniff import read

    return (key for one in read(path).state_dicts if root in (None, one.root) for key in (*one.tensors, *one.entries))


def source_keys(ctx: click.Context) -> Iterable[str]:
    """The keys of the first checkpoint, under `--root` if that is given."""
    return _keys_of(_source(ctx), ctx.params.get("root"))


def target_keys(ctx: click.Context) -> Iterable[str]:
    """The keys of the target, where it is a file."""
    return _keys_of(_target(ctx), None)


def both_keys(ctx: click.Context) -> Iterable[str]:
    """The keys of both."""
    return (*source_keys(ctx), *target_keys(ctx))


def roots(ctx: click.Context) -> Iterable[str]:
    """The roots of the first checkpoint."""
    path = _source(ctx)
    if path is None:
        return ()
    from ckptsurgeon.formats.sniff import read

    return [one.root for one in read(path).state_dicts if one.root]


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
    """Devices that a person may have."""
    return ("cpu", "cuda:0", "mps", "meta")


def commands(_ctx: click.Context) -> Iterable[str]:
    """The commands' names."""
    from ckptsurgeon.cli.main import COMMANDS

    return COMMANDS


def models(ctx: click.Context) -> Iterable[str]:
    """The models that the Python files of this folder define, as specs, by their text; none where the checkpoint stands."""
    if "paths" in ctx.params and not ctx.params["paths"]:
        return ()
    from ckptsurgeon.models.target.slips import spec_of
    from ckptsurgeon.models.target.source_names import model_names

    return [spec_of(name, model) for name in sorted(os.listdir(".")) if name.endswith(".py") for model in model_names(name)]


def files(_ctx: click.Context) -> Iterable[str]:
    """Nothing of ours: the shell completes paths."""
    return ()


# By a parameter's name, what is offered for each of its values. Those in `_PATHS` may be paths, too.
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
    """Have a command's parameters offer what the table says; the words without an option at their end that has not all of its values."""
    for param in command.params:
        if param.name in OFFERED:
            param._custom_shell_complete = _offered
    names = {name: param for param in command.params if isinstance(param, click.Option) and not param.is_flag for name in param.opts}
    last = next((place for place in range(len(words) - 1, -1, -1) if words[place] in names), None)
    if last is None or len(words) - last - 1 >= names[words[last]].nargs:
        return [*words]
    ctx.meta["typed"] = len(words) - last - 1
    return [*words[:last]]


def _begins_a_path(incomplete: str) -> bool:
    """Whether a path begins so that is no Python file."""
    folder, begun = os.path.split(incomplete)
    try:
        names = os.listdir(folder or ".")
    except OSError:
        return False
    return bool(begun or folder) and any(name.startswith(begun) and not name.endswith(".py") for name in names)


def _offered(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """What is offered for a word of a parameter; nothing where it can't be told."""
    name = param.name or ""
    ways = OFFERED[name]
    number = ctx.meta.get("typed", 0) if isinstance(param, click.Option) else 0
    before, comma, begun = incomplete.rpartition(",") if name in _LISTS else ("", "", incomplete)
    items = [CompletionItem(incomplete, type=_FILE)] if name in _PATHS else []
    if items and _begins_a_path(incomplete):
        return items  # a shell that gets words completes no paths beside them
    try:
        known = ways[number](ctx) if number < len(ways) else ()
        words = dict.fromkeys(word for word in known if word.startswith(begun) and _PLAIN.fullmatch(word))
    except (CheckpointError, OSError):  # the command tells it, not a shell that completes
        return items
    return [*items, *(CompletionItem(before + comma + word) for word in list(words)[:_MOST])]
