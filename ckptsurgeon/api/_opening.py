"""Turns an argument (a path, a spec, a model, a state_dict, a checkpoint) into a `Checkpoint`, and for a model a function that builds it.

torch is imported only for a model or a state_dict in memory. Nothing is compared or decided here.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from io import BytesIO
from typing import TYPE_CHECKING

from ckptsurgeon import formats
from ckptsurgeon.errors import FormatError, PlanError, RootError, SettingsError, TargetError, UnreadableError
from ckptsurgeon.hints import Unmissable
from ckptsurgeon.parameter_types import Given, Note, Path
from ckptsurgeon.storage.memory import file_in_memory
from ckptsurgeon.tensors import Archive, Checkpoint

if TYPE_CHECKING:
    from torch import nn

    from ckptsurgeon.planning.plan_types import PlanTarget


def silent(_note: str) -> None:
    """The default of `note=`: drops the note."""


def unmissable(note: Note) -> Note:
    """A `note` callback whose notes `-q` does not hide: for code that a file names, and not the call itself."""
    return lambda words: note(Unmissable(words))


def is_code(target: str) -> bool:
    """Whether a target's text names code to import, such as `module:Net`, and is no file that exists."""
    if ":" not in target:
        return False
    from ckptsurgeon.models.target.spec import looks_like_spec

    return looks_like_spec(target) and not os.path.exists(target)


@dataclass(frozen=True)
class Target:
    """A target: its names and shapes, and, when it is a model, what builds a fresh one on the CPU from a seed, or on meta."""

    checkpoint: Checkpoint
    build: Callable[[int], nn.Module] | None = None
    build_meta: Callable[[], nn.Module] | None = None

    @property
    def any_model(self) -> Callable[..., nn.Module] | None:
        """A function that builds a model with the target's modules: on meta where possible, or, called with `real=True`, with values.
        None where the target is no model."""
        build, build_meta = self.build, self.build_meta
        return build and (lambda real=False: build_meta() if build_meta is not None and not real else build(0))


def read(source: Path | BytesIO) -> Archive:
    """The header of the file or folder at a path, or of a file in memory, with every root in it."""
    return formats.read(file_in_memory(source) if isinstance(source, BytesIO) else os.fspath(source))


def look(source: Given) -> Given:
    """The header of the file at a path; any other argument as it is. So an unreadable file is an error before a model is imported."""
    if isinstance(source, BytesIO):
        return read(source)
    if not isinstance(source, (str, os.PathLike)):
        return source
    text = os.fspath(source)
    if is_code(text):
        raise TargetError("is a model, where a checkpoint file is needed", path=text, hint="give the file first and the model last")
    try:
        return read(text)
    except (FormatError, UnreadableError) as error:
        from ckptsurgeon.models.target.slips import meant_specs

        if specs := meant_specs(text):
            error.hint = f"give the file first and the model last; the model is {' or '.join(map(shlex.quote, specs))}"
        raise


def look_on_disk(source: Given) -> Given:
    """As `look`, for a source that a plan names by its path; PlanError for a file in memory."""
    opened = look(source)
    if isinstance(opened, (Archive, Checkpoint)) and any(file.data is not None for file in opened.files):
        words = "lies in memory, and a plan names its sources by path"
        raise PlanError(words, path=opened.path, hint="write it to a file and give its path")
    return opened


def name_of(target: Given) -> str:
    """The name of a target that was not opened: its path or spec as given, or its class."""
    if isinstance(target, (str, os.PathLike)):
        return os.fspath(target)
    return target.path if isinstance(target, Checkpoint) else type(target).__name__


def open_source(source: Given, *, root: str | None = None, target: Checkpoint | None = None, parts: bool = False) -> Checkpoint:
    """A source as a checkpoint: a file, or its header as `look` returns it, under the given or best root; a `Checkpoint` as it is.

    `parts`: as `roots.choose`.
    """
    if isinstance(source, Checkpoint):
        if root is not None and root != source.root:
            raise RootError(
                f"was opened under the root {source.root!r}, not {root!r}", path=source.path, hint="open it again under that root"
            )
        return source
    opened = look(source)
    if isinstance(opened, Archive):
        from ckptsurgeon.planning import roots

        try:
            return _with_shard(roots.choose(opened, root=root, target=target, parts=parts))
        except RootError:
            from ckptsurgeon.formats import registry

            source_format = registry.named(opened.format)
            tree = None if root is None or not (source_format.pickled or source_format.holds_folder) else formats.tree_of(opened).value
            state_dict = None if tree is None else roots.at_path(tree, root or "")
            if state_dict is None:
                raise
            return roots.checkpoint(opened, state_dict)
    raise TargetError(
        f"a {type(source).__name__} is no source that can be read from disk", hint="give a path or a Checkpoint; `transfer` takes more"
    )


def _with_shard(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint; for a single file with the `shard` that says whether it is one of several."""
    if len(checkpoint.files) != 1 or checkpoint.files[0].data is not None:
        return checkpoint
    from ckptsurgeon.formats.folders.hf_shards import shard_of

    return replace(checkpoint, shard=shard_of(checkpoint.files[0].path))


def open_target(target: Given, *, root: str | None = None, conversions: bool = True, note: Note = silent) -> Target:
    """A target as a checkpoint: a spec such as `module:Net`, a live model or state_dict, a skeleton, or another checkpoint file.

    With `conversions=False` the name conversions of transformers are left out.

    Raises:
        SettingsError: `conversions=False` for a target that has none.
        TargetError: a spec that can't be imported or built.
        FormatError, UnreadableError: a file that can't be read.
    """
    opened = _open_target(target, root, note)
    return opened if conversions else replace(opened, checkpoint=without_conversions(opened.checkpoint))


def without_conversions(target: Checkpoint) -> Checkpoint:
    """The target without the name conversions of transformers. Raises SettingsError where it has none."""
    if target.naming is None:
        words = "turns off what only a model of transformers 5 has, and the target is none"
        raise SettingsError(words, path=target.path, key="--no-conversions", hint="leave it out")
    return replace(target, naming=None)


def _open_target(target: Given, root: str | None, note: Note) -> Target:
    if isinstance(target, Target):
        return target
    if isinstance(target, Checkpoint):
        return Target(target)
    if isinstance(target, (str, os.PathLike)):
        text = os.fspath(target)
        if is_code(text):
            return _from_spec(text, note)
        from ckptsurgeon.planning import roots

        return Target(_with_shard(roots.choose(_read_target(text), root=root)))
    return _from_live(target, note)


def _read_target(text: str) -> Archive:
    """As `read`; the error for a file that is no checkpoint names the models that may be meant, if it is Python code."""
    try:
        return read(text)
    except (FormatError, UnreadableError) as error:
        from ckptsurgeon.models.target.slips import meant_specs

        specs = meant_specs(text)
        if specs or (text.endswith(".py") and os.path.isfile(text)):
            error.hint = f"is it {' or '.join(map(shlex.quote, specs))}?" if specs else f"name the model in it: {text}:NAME"
        raise


def open_planned(planned: PlanTarget, note: Note = silent) -> Target:
    """The target that a plan names; PlanError for a model that was in memory when the plan was made."""
    from ckptsurgeon.models.target.spec import looks_like_spec

    if planned.kind == "model" and not looks_like_spec(planned.spec):
        raise PlanError(
            f"was made for a {planned.spec} in memory, which it can't bring back",
            hint="plan with a spec such as 'model:Net' as the target, or call merge with the model",
        )
    if planned.kind != "model" and is_code(planned.spec):
        raise PlanError(f"was made for a {planned.kind}, and its target is code", path=planned.spec, hint="plan again: ckptsurgeon plan …")
    return open_target(planned.spec, root=planned.root or None, note=note)


def as_built(target: Target, seed: int, note: Note) -> Target:
    """The target as it is built on the CPU: a constructor may handle an error on meta and build other shapes there."""
    assert target.build is not None
    from ckptsurgeon.models.target.skeleton import checkpoint_of

    built = checkpoint_of(target.build(seed), target.checkpoint.path)
    built = built if target.checkpoint.naming is not None else replace(built, naming=None)
    if built.fingerprint == target.checkpoint.fingerprint:
        return target
    note(f"{target.checkpoint.path} has other tensors on the CPU than on the meta device; those of the CPU are taken")
    return Target(built, target.build, None)


def _from_spec(text: str, note: Note) -> Target:
    from ckptsurgeon.models.target.spec import parse

    spec = parse(text)
    from ckptsurgeon.models.target.build import build, build_meta
    from ckptsurgeon.models.target.skeleton import checkpoint_of

    def fresh(seed: int) -> nn.Module:
        return build(spec, seed, silent)

    def on_meta() -> nn.Module:
        return build_meta(spec, silent)

    return Target(checkpoint_of(build_meta(spec, note), text, note=note), fresh, on_meta)


def _from_live(target: Given, note: Note) -> Target:
    from torch import nn

    from ckptsurgeon.models.target.build import copied as deep_copy
    from ckptsurgeon.models.target.skeleton import checkpoint_of, checkpoint_of_state_dict, refuse_no_tensors

    if isinstance(target, nn.Module):
        name = type(target).__name__

        def copied(_seed: int) -> nn.Module:
            return deep_copy(target, name)

        return Target(checkpoint_of(target, name, note=note), copied, lambda: target)
    if isinstance(target, Mapping):
        refuse_no_tensors(target, "target")
        return Target(checkpoint_of_state_dict(target))
    raise TargetError(f"a {type(target).__name__} is no target", hint="give a path, a spec such as 'model:Net', a model or a state_dict")


def unused_name(source: Checkpoint, target: Checkpoint) -> str:
    """A free file name in the current folder for the merged output: in the source's format where that can be written and can hold the
    target's entries, else in torch's."""
    from ckptsurgeon.formats.registry import WRITTEN, named

    source_format, torch_format = WRITTEN.get(named(source.format).word), WRITTEN["torch"]
    chosen = (
        source_format
        if source_format is not None and source_format.suffixes and (source_format.pickled or not target.entries)
        else torch_format
    )
    names = (f"merged{number}{chosen.suffixes[0]}" for number in ("", *(f"-{number}" for number in range(2, 1000))))
    return next((name for name in names if not os.path.lexists(name)), f"merged{chosen.suffixes[0]}")
