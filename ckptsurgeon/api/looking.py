"""The verbs that look at one file or target: open, inspect, skeleton. None of them writes."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable
from dataclasses import replace
from io import BytesIO

from ckptsurgeon.api import _opening
from ckptsurgeon.api._opening import silent
from ckptsurgeon.errors import FormatError, RuleError, SettingsError, TargetError
from ckptsurgeon.parameter_types import Given, Note, Path
from ckptsurgeon.shown import Look
from ckptsurgeon.tensors import Archive, Checkpoint

SORTS = ("file", "name", "size")
DEPTH = 3  # levels of a tree


def open(path: Path | BytesIO, *, root: str | None = None) -> Checkpoint:  # the verb's name, as in `cs.open`
    """The state_dict of the file or Hugging Face folder at `path`, or of the file that an `io.BytesIO` holds, without its data.

    Args:
        path: a checkpoint file, a Hugging Face folder, a folder of `torch.distributed.checkpoint`, or an `io.BytesIO` that holds a file.
        root: the nested dict that holds the state_dict, such as `"model"` or `"ema"`, where there are several.

    Returns:
        A mapping from keys to `TensorMeta` (dtype by safetensors' code, shape and stride in elements). It is printed as one line;
        `print(inspect(path).to_text())` prints the table of its tensors.

    Raises:
        CheckpointError: the file can't be read, is no checkpoint, or has several roots and none is named.

    >>> ckpt = open("fixtures/net_params.pkl")
    >>> ckpt["fc3.weight"].shape
    (10, 84)
    """
    return _opening.open_source(path, root=root)


def inspect(
    path: Path | BytesIO,
    patterns: str | Iterable[str] = (),
    *,
    root: str | None = None,
    sort: str = "file",
    tree: bool = False,
    depth: int | None = None,
) -> Archive:
    """What a file holds: every root, what a pickle asked for, what else is there; nothing of it is run and no data is read.

    Args:
        path: a checkpoint file, a Hugging Face folder, a folder of `torch.distributed.checkpoint`, or an `io.BytesIO` that holds a file.
        patterns: show only tensors whose keys match one of them, `["fc.*"]`, or the one pattern. `state_dicts` has all.
        root: show only the nested dict of this name, such as `"model"` or `"ema"`.
        sort: `"file"` shows tensors in the file's order, `"name"` by key, `"size"` by bytes, the largest first.
        tree: show modules with the sums of their tensors, instead of tensors.
        depth: how many levels of modules are shown; 3 by default.

    Returns:
        An `Archive`: its `state_dicts` by root, `globals` that a pickle asked for, what stands `beside`, `metadata`. It is printed as one
        line; `to_text()` is the command line's table.

    Raises:
        CheckpointError: the file can't be read or is no checkpoint.
        RuleError: a pattern is not well formed, or matches no key.
        SettingsError: there is no such order, or `depth` is given without `tree`.

    >>> print(inspect("fixtures/net_params.pkl").to_text())  # doctest: +ELLIPSIS
    fixtures/net_params.pkl: torch-legacy, 249.6 kB
      10 tensors, 62,006 elements, 248.0 kB (10 F32)
        conv1.{weight,bias}  F32  (6, 3, 5, 5), (6,)
    ...
    """
    if depth is not None:
        from ckptsurgeon.api._options import facts, refuse_idle

        refuse_idle(facts(tree=tree), depth=depth)
    if sort not in SORTS:
        raise SettingsError(f"there is no order {sort!r}", key="--sort", hint=f"one of {', '.join(SORTS)}")
    if depth is not None and depth < 1:
        raise SettingsError("a tree has one level at least", key="--depth", hint="give --depth 2")
    archive = _read(path)
    if root is not None:
        archive = replace(archive, chosen=_opening.open_source(archive, root=root, parts=True))
    look = Look((patterns,) if isinstance(patterns, str) else tuple(patterns), sort, (depth or DEPTH) if tree else 0)
    if look.patterns:
        _refuse_no_match(archive, root or "", look)
    return replace(archive, look=look)


def _refuse_no_match(archive: Archive, root: str, look: Look) -> None:
    """Raises RuleError for patterns that match none of the keys that would be shown."""
    from ckptsurgeon.planning.plan_types import viewing_command
    from ckptsurgeon.rules.meant import meant_words
    from ckptsurgeon.rules.patterns import compile_pattern

    keys = [key for state_dict in ([archive.chosen] if archive.chosen is not None else archive.state_dicts) for key in state_dict.tensors]
    problems = []
    for text in look.patterns:
        pattern = compile_pattern(text)
        pattern.learn(keys)
        if not any(map(pattern.test, keys)):
            problems.append(f"{text!r} matches no key{meant_words(text, keys)}")
    if problems:
        raise RuleError(
            problems[0] if len(problems) == 1 else f"{len(problems)} patterns match no key",
            path=archive.path,
            problems=tuple(problems) if len(problems) > 1 else (),
            hint=f"see the names: {viewing_command(archive.path, root, False, None)}",
        )


def _read(path: Path | BytesIO) -> Archive:
    """The header of a file. The error for a model or Python code in its place has the command that saves the model's names."""
    if isinstance(path, str) and _opening.is_code(path):
        words = shlex.join(["ckptsurgeon", "skeleton", path, "-o", "net.json"])
        raise TargetError("is a model, where a checkpoint file is needed", path=path, hint=f"save its names and shapes: {words}")
    try:
        return _opening.read(path)
    except FormatError as error:
        from ckptsurgeon.models.target.slips import meant_specs

        if not isinstance(path, BytesIO) and os.fspath(path).endswith(".py") and (models := meant_specs(os.fspath(path))):
            error.hint = f"save the names and shapes of its model: {shlex.join(['ckptsurgeon', 'skeleton', models[0], '-o', 'net.json'])}"
        raise


def skeleton(target: Given, *, note: Note = silent) -> Checkpoint:
    """A target's names, dtypes and shapes without data: a spec such as `"model:Net"` (built on meta), a model, or a file.

    Args:
        target: a model, a spec such as `"module:Net"`, a skeleton or a checkpoint.
        note: called with each note, a line of text; notes are dropped by default.

    Returns:
        A `Checkpoint` without files: keys, dtypes and shapes.

    Raises:
        TargetError: the target can't be imported or built.

    >>> len(skeleton("fixtures/variants.py:NetVariant"))
    15
    """
    return _opening.open_target(target, note=note).checkpoint
