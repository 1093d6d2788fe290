"""Verifies a file against a target: loads it into a fresh model, or, for any other target, compares names, dtypes and shapes.

Every entry of a torch zip file is also compared with its checksum, in a second thread.
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
    entries = checksums.entries_in(checkpoint)
    with checksums.checking_files(() if shown is not None else checkpoint.files, entries) as checked:
        verification = (
            _by_names(checkpoint, target.checkpoint) if target.build is None else _loaded(checkpoint, target, device, finite, inputs, seed)
        )
        if finite and not verification.bitwise:  # no value was looked at, but the file has them
            verification = replace(verification, findings=(*verification.findings, *non_finite(checkpoint)))
    verification = replace(verification, findings=(*verification.findings, *_damage(checked, checkpoint, verification)))
    verification = replace(verification, root=checkpoint.root)
    if shown is not None and not verification.ok:
        problems = tuple(f"{finding.key}: {finding.message}" if finding.key else finding.message for finding in errors(verification))
        raise VerificationError("what was written does not load as it should; nothing was kept", path=shown, problems=problems[:20])
    return verification


def held_in_place(target: Given, asked: bool) -> nn.Module | None:
    """The live model whose current values are compared: with `asked`, or for a model that is spread over ranks; else None.

    Raises:
        SettingsError: `asked`, but the target is no live model.
    """
    opened = isinstance(target, (str, os.PathLike, Checkpoint, Target))
    if not opened:
        from torch import nn

        if isinstance(target, nn.Module):
            from ckptsurgeon.models.target.sharding import over_ranks

            return target if asked or over_ranks(target) else None
    if asked:
        raise SettingsError("compares the values of a live model, but the target is none", key="--in-place", hint="give the model itself")
    return None


def verify_held(path: str, model: nn.Module, *, root: str | None, finite: bool, conversions: bool) -> Verification:
    """Compare a live model's current values with a file; every rank that the model is spread over calls this. Rank 0 checks the checksums.

    Raises the errors of `verify`, on all ranks.
    """
    from ckptsurgeon.models.sharded.ranks import Ranks
    from ckptsurgeon.models.target.sharding import own_class
    from ckptsurgeon.models.target.skeleton import checkpoint_of
    from ckptsurgeon.models.verify.in_place import verify_in_place

    ranks, name = Ranks.of(model), own_class(model).__name__
    with ranks.step() as step, ExitStack() as stack:
        with ranks.step():
            target = checkpoint_of(model, name)
            target = target if conversions else _opening.without_conversions(target)
            checkpoint = _opening.open_source(path, root=root, target=target)
            reader = stack.enter_context(Reader([checkpoint]))
            files, entries = (checkpoint.files, checksums.entries_in(checkpoint)) if ranks.rank == 0 else ((), None)
            checked = stack.enter_context(checksums.checking_files(files, entries))
        verification = verify_in_place(checkpoint, model, reader, ranks, finite=finite, conversions=conversions)
        stack.close()
        step.own = tuple(_damage(checked, checkpoint, verification))
    return replace(verification, findings=(*verification.findings, *step.by_rank[0]), root=checkpoint.root, target=name)


def errors(verification: Verification) -> tuple[Finding, ...]:
    """The findings that make the verification fail."""
    return tuple(finding for finding in verification.findings if finding.level == "error")


def unreadable(error: FormatError, path: str) -> Verification:
    """The failed verification of a file that can't be read because its data is damaged. Raises `error` where all checksums are right."""
    findings: list[Finding] = []
    with suppress(CheckpointError):  # it is no zip archive, or one whose directory is damaged
        checked = checksums.check_file_now(error.path or path)
        findings += checksums.findings_of(checked, (), "" if checked.path == path else f"{os.path.basename(checked.path)}: ")
    if not any(finding.level == "error" for finding in findings):
        raise error
    note = Finding("unreadable", f"nothing was loaded or compared, since the file {error.reason}", level="note")
    return Verification("none", 0, (*findings, note), bitwise=False)


def _loaded(checkpoint: Checkpoint, target: Target, device: str, finite: bool, inputs: tuple[str, ...], seed: int) -> Verification:
    from ckptsurgeon.models.verify.verify import verify_on_device

    build, build_meta = target.build, target.build_meta
    assert build is not None
    builder = build_meta if device == "meta" and build_meta is not None else lambda: build(seed)
    with Reader([checkpoint]) as reader:
        verification = verify_on_device(
            checkpoint, builder, device, read=reader.read, finite=finite, inputs=inputs, conversions=target.checkpoint.naming is not None
        )
        reader.check_unchanged()
    return verification


def _by_names(checkpoint: Checkpoint, target: Checkpoint) -> Verification:
    findings = (*strict_load(checkpoint, target), Finding("names", "names, dtypes and shapes only: the target is no model", None, "note"))
    fresh = (checkpoint.provenance or {}).get("fresh")
    return Verification("none", len(target), findings, bitwise=False, fresh=None if fresh is None else tuple(fresh))


def strict_load(checkpoint: Checkpoint, target: Checkpoint, taken: Taken = NOTHING) -> list[Finding]:
    """Why a checkpoint does not load strictly into a target, from `fits`, and a warning for each dtype that loading casts."""
    findings, loaded = fits(checkpoint, target, taken)
    casts = ((key, meta.dtype, target[key].dtype) for key, meta in loaded.items())
    return findings + [
        Finding("dtype", f"is {source_dtype}, in the target {target_dtype}", key, "warning")
        for key, source_dtype, target_dtype in casts
        if source_dtype != target_dtype
    ]


def _damage(files: Sequence[Checksums], checkpoint: Checkpoint, verification: Verification) -> Iterator[Finding]:
    """The entries whose checksums are wrong, except those that were found when their values were read."""
    reported = {finding.key for finding in verification.findings if finding.code == "checksum"}
    for checked in files:
        where = f"{os.path.basename(checked.path)}: " if len(files) > 1 else ""
        findings = checksums.findings_of(checked, checksums.places_in(checkpoint.tensors), where)
        yield from (finding for finding in findings if finding.key is None or finding.key not in reported)


def non_finite(checkpoint: Checkpoint) -> list[Finding]:
    """A finding for every tensor with NaN or infinite values, or with damaged data. Tensors are streamed through torch."""
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
    """Raises VerificationError for NaN and infinite values in any tensor of the file at `path`; the error names it `shown`."""
    archive = _opening.read(path)
    weights = roots.checkpoint(archive, archive.state_dicts[0], alone=True)
    others = dict(tensors_of(formats.read_tree(path).value)) if named(archive.format).pickled else {}
    spans = {tensor.place for tensor in weights.values()}
    tensors = {**weights, **{name: tensor for name, tensor in others.items() if tensor.place not in spans}}
    findings = non_finite(replace(weights, tensors=tensors))
    if findings:
        problems = shortened(f"{finding.key}: {finding.message}" for finding in findings)
        hint = "take an earlier checkpoint; see which: ckptsurgeon check --finite CKPT"
        raise VerificationError("would hold values that are NaN or infinite; nothing was kept", path=shown, problems=problems, hint=hint)
