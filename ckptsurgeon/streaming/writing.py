"""Writes one file of an output and proves it: values that are made first, then the copies, then checksums and ties."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import sha256
from typing import Any

from ckptsurgeon.errors import OutputError, PlanError, VerificationError
from ckptsurgeon.formats.layout import Layout, OutTensor, Slot
from ckptsurgeon.storage import copying
from ckptsurgeon.storage.local import LocalFile
from ckptsurgeon.streaming.atomic import Temporary
from ckptsurgeon.streaming.proof import Expected, prove
from ckptsurgeon.streaming.reading import Reader
from ckptsurgeon.streaming.step_values import Run
from ckptsurgeon.streaming.values import refuse_losses


def write(run: Run, layout: Layout, tensors: Sequence[OutTensor], temporary: Temporary, proof: bool) -> None:
    """Write a file as it is laid out; with `proof` digests of what is made are kept for it."""
    for offset, data in layout.chunks:
        copying.write_at(temporary.fd, data, offset)
    moved = {slot.index: run.ranges(run.steps[tensors[slot.index].name]) for slot in layout.slots}
    # Values that are made come first: a cast that must not be stops the run before the long copying.
    for slot in layout.slots:
        if moved[slot.index] is None:
            _make(run, slot, tensors[slot.index], temporary, proof)
    order = {key: place for place, key in enumerate(run.steps)}
    run.casts.sort(key=lambda found: order[found.key])
    refuse_losses(run.casts, run.plan.allow_cast)
    for slot in layout.slots:
        position = slot.offset
        for each in moved[slot.index] or ():
            copying.copy_range(*run.reader.locate(each), temporary.fd, position, each.nbytes)
            position += each.nbytes
    _refuse_torn_ties(run, layout, tensors, temporary)
    written = LocalFile(temporary.path, temporary.fd)
    checksums = [copying.checksum(written, slot.offset, slot.nbytes) for slot in layout.slots] if layout.checksums else []
    for slot, crc in zip(layout.slots, checksums, strict=bool(checksums)):
        ranges = moved[slot.index] or ()
        if len(ranges) == 1 and ranges[0].checksum() == crc:
            run.held.add((ranges[0].file, ranges[0].offset))
    for offset, data in layout.tail(checksums):
        copying.write_at(temporary.fd, data, offset)


def _refuse_torn_ties(run: Run, layout: Layout, tensors: Sequence[OutTensor], temporary: Temporary) -> None:
    """Raises PlanError where keys that are one tensor in the target model came by different values: it could hold only one of them."""
    if run.plan.target is None or run.plan.target.kind not in ("model", "skeleton"):
        return
    slots = {tensors[slot.index].name: slot for slot in layout.slots}
    written = LocalFile(temporary.path, temporary.fd)
    number = {tensor.name: tensor.storage for tensor in tensors}
    for group in run.plan.ties:
        first, *rest = [key for key in group if key in number]
        for key in rest:
            one, other = slots.get(first), slots.get(key)
            if number[key] == number[first] or one is None or other is None:
                continue
            if not copying.equal_ranges(written, one.offset, written, other.offset, one.nbytes):
                raise torn(first, key)


def torn(first: str, key: str) -> PlanError:
    """The refusal of two values for one tensor."""
    return PlanError(
        f"is one tensor with {first} in the target, and they would get different values", key=key, hint=f"choose one: drop=[{key!r}]"
    )


def _make(run: Run, slot: Slot, tensor: OutTensor, temporary: Temporary, proof: bool) -> None:
    position, digest = slot.offset, sha256()
    for part in run.parts(run.steps[tensor.name]):
        copying.write_at(temporary.fd, part, position)
        if proof:
            digest.update(part)
        position += memoryview(part).nbytes
    if position != slot.offset + slot.nbytes:
        raise OutputError(f"got {position - slot.offset} bytes where the plan says {slot.nbytes}", key=tensor.name)
    run.digests[tensor.storage] = digest.hexdigest()


def expected_of(run: Run, tensor: OutTensor) -> Expected:
    """What is to stand in the written file for a tensor."""
    step = run.steps[tensor.name]
    ranges = run.ranges(step)
    copy = run.copied(step) if ranges is None else None
    return Expected(tensor.name, tensor.dtype, tensor.shape, ranges, run.digests.get(tensor.storage), copy)


def prove_file(path: str, expected: Sequence[Expected], entries: Mapping[str, Any], reader: Reader, around: Any) -> None:
    """Raises VerificationError, naming every key, where the file is not what was planned; StaleError where a source changed meanwhile."""
    try:
        prove(path, expected, entries, reader, around)
    except VerificationError:
        reader.check_unchanged()  # a source that changed since it was copied is the likelier reason
        raise
