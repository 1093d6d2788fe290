"""Turns what a person gives (a path, a spec, a model, a state_dict, a checkpoint) into a `Checkpoint`, and for a model the way to build it.

torch is imported only when a model or a live state_dict is given. Nothing is compared or decided here.
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
    """Where nobody listens."""


def unmissable(note: Note) -> Note:
    """A listener whose notes `-q` does not hide: for code that not the call itself names, but a file."""
    return lambda words: note(Unmissable(words))


def is_code(target: str) -> bool:
    """Whether a target's text names code to import, such as `module:Net`, and no file that is there."""
    if ":" not in target:
        return False
    from ckptsurgeon.models.target.spec import looks_like_spec

    return looks_like_spec(target) and not os.path.exists(target)


@dataclass(frozen=True)
class Target:
    """A target: its names and shapes, and, when it is a model, how to make a fresh one on the CPU from a seed (or on meta)."""

    checkpoint: Checkpoint
    build: Callable[[int], nn.Module] | None = None
    build_meta: Callable[[], nn.Module] | None = None

    @property
    def any_model(self) -> Callable[[], nn.Module] | None:
        """The cheapest way to a model with the target's modules, whatever its values; None where the target is no model."""
        build = self.build
        return self.build_meta or (None if build is None else lambda: build(0))


def read(given: Path | BytesIO) -> Archive:
    """The header of the file or folder at a path, or of a file in memory, with every root in it."""
    return formats.read(file_in_memory(given) if isinstance(given, BytesIO) else os.fspath(given))


def look(given: Given) -> Given:
    """A path's header, anything else as it is: a file that can't be read is told before a model is imported."""
    if isinstance(given, BytesIO):
        return read(given)
    if not isinstance(given, (str, os.PathLike)):
        return given
    text = os.fspath(given)
    if is_code(text):
        raise TargetError("is a model, where a checkpoint file is needed", path=text, hint="give the file first and the model last")
    try:
        return read(text)
    except (FormatError, UnreadableError) as error:
        from ckptsurgeon.models.target.slips import meant_specs

        if found := meant_specs(text):
            error.hint = f"give the file first and the model last; the model is {' or '.join(map(shlex.quote, found))}"
        raise


def look_on_disk(given: Given) -> Given:
    """What `look` sees, where it is to be found again by its path; PlanError for a file in memory."""
    found = look(given)
    if isinstance(found, (Archive, Checkpoint)) and any(file.data is not None for file in found.files):
        words = "lies in memory, and a plan names its sources by path"
        raise PlanError(words, path=found.path, hint="write it to a file and give its path")
    return found


def name_of(target: Given) -> str:
    """What a target that was not opened is called: its path or spec as it was given, or its class."""
    if isinstance(target, (str, os.PathLike)):
        return os.fspath(target)
    return target.path if isinstance(target, Checkpoint) else type(target).__name__


def open_source(given: Given, *, root: str | None = None, target: Checkpoint | None = None, parts: bool = False) -> Checkpoint:
    """A source as a checkpoint: a file, or what `look` saw of it, under its named or best root, or a `Checkpoint` as it is.

    `parts`: as `roots.choose`.
    """
    if isinstance(given, Checkpoint):
        if root is not None and root != given.root:
            raise RootError(
                f"was opened under the root {given.root!r}, not {root!r}", path=given.path, hint="open it again under that root"
            )
        return given
    found = look(given)
    if isinstance(found, Archive):
        from ckptsurgeon.planning import roots

        try:
            return _with_shard(roots.choose(found, root=root, target=target, parts=parts))
        except RootError:
            from ckptsurgeon.formats import registry

            form = registry.named(found.format)
            tree = None if root is None or not (form.pickled or form.holds_folder) else formats.tree_of(found).value
            named = None if tree is None else roots.at_place(tree, root or "")
            if named is None:
                raise
            return roots.checkpoint(found, named)
    raise TargetError(
        f"a {type(given).__name__} is no source that can be read from disk", hint="give a path or a Checkpoint; `transfer` takes more"
    )


def _with_shard(found: Checkpoint) -> Checkpoint:
    """A checkpoint as it is; of one file that lacks the scales of what may be codes, with what tells that it is a shard."""
    from ckptsurgeon.planning.quantised import lacks_scales

    if len(found.files) != 1 or found.files[0].data is not None or not lacks_scales(found):
        return found
    from ckptsurgeon.formats.folders.hf_shards import shard_of

    return replace(found, shard=shard_of(found.files[0].path))


def open_target(given: Given, *, root: str | None = None, conversions: bool = True, note: Note = silent) -> Target:
    """A target as a checkpoint: a spec such as `module:Net`, a live model or state_dict, a skeleton, or another checkpoint file.

    Without `conversions` its library's are left out. Raises SettingsError where there are none to leave out, TargetError for a spec that
    can't be imported or built, and the readers' errors for a file.
    """
    found = _open_target(given, root, note)
    return found if conversions else replace(found, checkpoint=without_conversions(found.checkpoint))


def without_conversions(target: Checkpoint) -> Checkpoint:
    """A target whose sources' names are taken as they are. SettingsError where they are anyway."""
    if target.naming is None:
        words = "turns off what only a model of transformers 5 has, and the target is none"
        raise SettingsError(words, path=target.path, key="--no-conversions", hint="leave it out")
    return replace(target, naming=None)


def _open_target(given: Given, root: str | None, note: Note) -> Target:
    if isinstance(given, Target):
        return given
    if isinstance(given, Checkpoint):
        return Target(given)
    if isinstance(given, (str, os.PathLike)):
        text = os.fspath(given)
        if is_code(text):
            return _from_spec(text, note)
        from ckptsurgeon.planning import roots

        return Target(_with_shard(roots.choose(_read_target(text), root=root)))
    return _from_live(given, note)


def _read_target(text: str) -> Archive:
    """`read`; what is no checkpoint may be code, written without the name of a model."""
    try:
        return read(text)
    except (FormatError, UnreadableError) as error:
        from ckptsurgeon.models.target.slips import meant_specs

        found = meant_specs(text)
        if found or (text.endswith(".py") and os.path.isfile(text)):
            error.hint = f"is it {' or '.join(map(shlex.quote, found))}?" if found else f"name the model in it: {text}:NAME"
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
    """The target as its model is really built on the CPU: a constructor may catch what fails on meta, and build another shape there."""
    assert target.build is not None
    from ckptsurgeon.models.target.skeleton import checkpoint_of

    real = checkpoint_of(target.build(seed), target.checkpoint.path)
    real = real if target.checkpoint.naming is not None else replace(real, naming=None)
    if real.fingerprint == target.checkpoint.fingerprint:
        return target
    note(f"{target.checkpoint.path} has other tensors on the CPU than on the meta device; those of the CPU are taken")
    return Target(real, target.build, None)


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


def _from_live(given: Given, note: Note) -> Target:
    from torch import nn

    from ckptsurgeon.models.target.build import copied as deep_copy
    from ckptsurgeon.models.target.skeleton import checkpoint_of, checkpoint_of_state_dict, refuse_no_tensors

    if isinstance(given, nn.Module):
        name = type(given).__name__

        def copied(_seed: int) -> nn.Module:
            return deep_copy(given, name)

        return Target(checkpoint_of(given, name, note=note), copied, lambda: given)
    if isinstance(given, Mapping):
        refuse_no_tensors(given, "target")
        return Target(checkpoint_of_state_dict(given))
    raise TargetError(f"a {type(given).__name__} is no target", hint="give a path, a spec such as 'model:Net', a model or a state_dict")


def unused_name(source: Checkpoint, target: Checkpoint) -> str:
    """A name in the current folder for what is merged of the two, which no file has: in the source's format where it can be written and
    holds what the target holds."""
    from ckptsurgeon.formats.registry import WRITTEN, named

    own, other = WRITTEN.get(named(source.format).word), WRITTEN["torch"]
    chosen = own if own is not None and own.suffixes and (own.pickled or not target.entries) else other
    names = (f"merged{number}{chosen.suffixes[0]}" for number in ("", *(f"-{number}" for number in range(2, 1000))))
    return next((name for name in names if not os.path.lexists(name)), f"merged{chosen.suffixes[0]}")
