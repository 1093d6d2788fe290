"""Holds a file against a target afresh: against a model by loading it there, against anything else by names, dtypes and shapes.

Every entry of a torch zip file is held against its checksum too, in a second thread beside the rest.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import TYPE_CHECKING

from ckptsurgeon import formats
from ckptsurgeon.api import _opening
from ckptsurgeon.api._opening import Target
from ckptsurgeon.errors import CheckpointError, FormatError, PlanError, SettingsError, VerificationError
from ckptsurgeon.formats.archive_tree import tensors_of
from ckptsurgeon.formats.registry import named
from ckptsurgeon.hints import shortened
from ckptsurgeon.parameter_types import Given
from ckptsurgeon.planning import roots
from ckptsurgeon.planning.fits import NOTHING, fits
from ckptsurgeon.progress import phase
from ckptsurgeon.report import Finding, Verification
from ckptsurgeon.rules.loading_code import Taken
from ckptsurgeon.streaming import checksums
from ckptsurgeon.streaming.checksums import Checksums
from ckptsurgeon.streaming.reading import Reader
from ckptsurgeon.tensors import Checkpoint

if TYPE_CHECKING:
    from torch import nn


def verify_written(
    path: str,
    target: Target,
    device: str,
    *,
    finite: bool = False,
    inputs: tuple[str, ...] = (),
    seed: int = 0,
    root: str | None = None,
    shown: str | None = None,
) -> Verification:
    """Verify the file at `path`. With `shown` (the name it is to take), a failure is raised as VerificationError instead of returned."""
    checkpoint = _opening.open_source(path, root=root, target=target.checkpoint)
    within = checksums.entries_in(checkpoint)
    with checksums.checking_files(() if shown is not None else checkpoint.files, within) as held:
        found = (
            _by_names(checkpoint, target.checkpoint) if target.build is None else _loaded(checkpoint, target, device, finite, inputs, seed)
        )
        if finite and not found.bitwise:  # no value was looked at, but the file has them
            found = replace(found, findings=(*found.findings, *non_finite(checkpoint)))
    found = replace(found, findings=(*found.findings, *_damage(held, checkpoint, found)))
    found = replace(found, root=checkpoint.root)
    if shown is not None and not found.ok:
        problems = tuple(f"{finding.key}: {finding.message}" if finding.key else finding.message for finding in errors(found))
        raise VerificationError("what was written does not load as it should; nothing was kept", path=shown, problems=problems[:20])
    return found


def held_in_place(target: Given, asked: bool) -> nn.Module | None:
    """The live model whose own values are compared: where that is `asked`, or the model is spread over ranks; else None.

    Raises:
        SettingsError: it is asked of what is no live model.
    """
    known = isinstance(target, (str, os.PathLike, Checkpoint, Target))
    if not known:
        from torch import nn

        if isinstance(target, nn.Module):
            from ckptsurgeon.models.target.sharding import over_ranks

            return target if asked or over_ranks(target) else None
    if asked:
        raise SettingsError("compares what a live model holds, and the target is none", key="--in-place", hint="give the model itself")
    return None


def verify_held(path: str, model: nn.Module, *, root: str | None, finite: bool, conversions: bool) -> Verification:
    """Hold what a live model holds against a file; all ranks that it is spread over come here together. Rank 0 reads the file's checksums.

    Raises as `verify`, on all ranks.
    """
    from ckptsurgeon.models.sharded.ranks import Ranks
    from ckptsurgeon.models.target.sharding import own_class
    from ckptsurgeon.models.target.skeleton import checkpoint_of
    from ckptsurgeon.models.verify.in_place import verify_in_place

    ranks, name = Ranks.of(model), own_class(model).__name__
    with ranks.step() as step, ExitStack() as stack:
        with ranks.step():
            goal = checkpoint_of(model, name)
            goal = goal if conversions else _opening.without_conversions(goal)
            checkpoint = _opening.open_source(path, root=root, target=goal)
            reader = stack.enter_context(Reader([checkpoint]))
            files, within = (checkpoint.files, checksums.entries_in(checkpoint)) if ranks.rank == 0 else ((), None)
            held = stack.enter_context(checksums.checking_files(files, within))
        found = verify_in_place(checkpoint, model, reader, ranks, finite=finite, conversions=conversions)
        stack.close()
        step.tell = tuple(_damage(held, checkpoint, found))
    return replace(found, findings=(*found.findings, *step.told[0]), root=checkpoint.root, target=name)


def errors(found: Verification) -> tuple[Finding, ...]:
    """The findings that make a no."""
    return tuple(finding for finding in found.findings if finding.level == "error")


def unreadable(error: FormatError, path: str) -> Verification:
    """A no for a file that can't be read, where entries of it are not what their checksums say. Raises `error` where all are."""
    found: list[Finding] = []
    with suppress(CheckpointError):  # it is no zip archive, or one whose directory is damaged
        held = checksums.check_file_now(error.path or path)
        found += checksums.findings_of(held, (), "" if held.path == path else f"{os.path.basename(held.path)}: ")
    if not any(finding.level == "error" for finding in found):
        raise error
    note = Finding("unreadable", f"nothing was loaded or compared, since the file {error.reason}", level="note")
    return Verification("none", 0, (*found, note), bitwise=False)


def _loaded(checkpoint: Checkpoint, target: Target, device: str, finite: bool, inputs: tuple[str, ...], seed: int) -> Verification:
    from ckptsurgeon.models.verify.verify import verify_on_device

    build, build_meta = target.build, target.build_meta
    assert build is not None
    builder = build_meta if device == "meta" and build_meta is not None else lambda: build(seed)
    with Reader([checkpoint]) as reader:
        found = verify_on_device(
            checkpoint, builder, device, read=reader.read, finite=finite, inputs=inputs, conversions=target.checkpoint.naming is not None
        )
        reader.check_unchanged()
    return found


def _by_names(checkpoint: Checkpoint, target: Checkpoint) -> Verification:
    findings = (*strict_load(checkpoint, target), Finding("names", "names, dtypes and shapes only: the target is no model", None, "note"))
    fresh = (checkpoint.provenance or {}).get("fresh")
    return Verification("none", len(target), findings, bitwise=False, fresh=None if fresh is None else tuple(fresh))


def strict_load(checkpoint: Checkpoint, target: Checkpoint, taken: Taken = NOTHING) -> list[Finding]:
    """What keeps a checkpoint from loading strictly into a target, as `fits` has it, and a warning for each dtype that loading casts."""
    findings, loaded = fits(checkpoint, target, taken)
    casts = ((key, meta.dtype, target[key].dtype) for key, meta in loaded.items())
    return findings + [Finding("dtype", f"is {own}, in the target {goal}", key, "warning") for key, own, goal in casts if own != goal]


def _damage(files: Sequence[Checksums], checkpoint: Checkpoint, found: Verification) -> Iterator[Finding]:
    """What the checksums of files say of all that is in them, beyond what was found where their values were read."""
    told = {finding.key for finding in found.findings if finding.code == "checksum"}
    for held in files:
        where = f"{os.path.basename(held.path)}: " if len(files) > 1 else ""
        findings = checksums.findings_of(held, checksums.places_in(checkpoint.tensors), where)
        yield from (finding for finding in findings if finding.key is None or finding.key not in told)


def non_finite(checkpoint: Checkpoint) -> list[Finding]:
    """Every tensor with a NaN or an infinite value, streamed through torch, or with data that is damaged."""
    from ckptsurgeon.streaming.values import count_non_finite

    if checkpoint.kind == "skeleton":
        raise PlanError("is a skeleton and has no values that could be NaN", path=checkpoint.path, hint="leave out --finite")
    findings = []
    with Reader([checkpoint]) as reader, phase("reading values", checkpoint.nbytes) as advance:
        for key, tensor in checkpoint.items():
            advance(tensor.nbytes)
            try:
                count = 0 if tensor.place is None else count_non_finite(reader.parts(tensor), tensor.dtype)
            except FormatError as error:
                findings.append(Finding("checksum", error.reason, key))
                continue
            if count:
                findings.append(Finding("non-finite", f"has {count} values that are NaN or infinite", key))
        reader.check_unchanged()
    return findings


def refuse_non_finite(path: str, shown: str) -> None:
    """Raises VerificationError for NaN and infinite values in any tensor of the file at `path`, which is to be named `shown`."""
    archive = _opening.read(path)
    weights = roots.checkpoint(archive, archive.state_dicts[0], alone=True)
    beside = dict(tensors_of(formats.read_tree(path).value)) if named(archive.format).pickled else {}
    known = {tensor.place for tensor in weights.values()}
    every = {**weights, **{place: tensor for place, tensor in beside.items() if tensor.place not in known}}
    found = non_finite(replace(weights, tensors=every))
    if found:
        problems = shortened(f"{finding.key}: {finding.message}" for finding in found)
        hint = "take an earlier checkpoint; see which: ckptsurgeon check --finite CKPT"
        raise VerificationError("would hold values that are NaN or infinite; nothing was kept", path=shown, problems=problems, hint=hint)
