"""Writes one file of an output and proves it: first the computed values, then the copies, then ties and checksums."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from hashlib import sha256
from typing import TYPE_CHECKING, Any

from ckptsurgeon.errors import OutputError, PlanError, VerificationError
from ckptsurgeon.formats.layout import WEIGHTS, Layout, OutFile, OutTensor, Slot
from ckptsurgeon.progress import Advance, Share, nobody, phase
from ckptsurgeon.report import Cast
from ckptsurgeon.storage import copying
from ckptsurgeon.storage.local import LocalFile
from ckptsurgeon.streaming.atomic import Temporary
from ckptsurgeon.streaming.moved_ranges import Ranges
from ckptsurgeon.streaming.proof import Expected, prove
from ckptsurgeon.streaming.step_values import Run
from ckptsurgeon.tensors import Span, TensorMeta, contiguous_stride

if TYPE_CHECKING:
    from ckptsurgeon.streaming.journal import Proven

SCRATCH = ".scratch"
WRITING = "writing"  # the phase of both halves
_ALIGNED = 64


def begin(run: Run, file: OutFile, temporary: Temporary, proof: bool, share: Share) -> Share:
    """Write a file's header and its computed values; with `proof` their digests are kept.

    `share` is the file's part of the whole output; the rest of it is returned.
    """
    for offset, data in file.layout.chunks:
        copying.write_at(temporary.fd, data, offset)
    made = [slot for slot in file.layout.slots if run.ranges(run.steps[file.tensors[slot.index].name]) is None]
    nbytes = sum(slot.nbytes for slot in made)
    with phase(WRITING, nbytes, share=share) if made else nullcontext(nobody) as advance:
        for slot in made:
            _make(run, slot, file.tensors[slot.index], temporary, proof, advance)
    order = {key: position for position, key in enumerate(run.steps)}
    run.casts.sort(key=lambda cast: order[cast.key])
    return share.after(nbytes)


def finish(run: Run, file: OutFile, temporary: Temporary, share: Share, rest: Share) -> None:
    """Copy the tensors that don't change, and write what depends on the data, such as checksums. `rest` is as `begin` returns it."""
    layout, moved = file.layout, _moved(run, file)
    nbytes = sum(each.nbytes for ranges in moved for each in ranges)
    with phase(WRITING, nbytes, share=rest) if nbytes else nullcontext(nobody) as advance:
        for slot, ranges in zip(layout.slots, moved, strict=True):
            position = slot.offset
            for each in ranges:
                copying.copy_range(*run.reader.locate(each), temporary.fd, position, each.nbytes, advance)
                position += each.nbytes
    _refuse_torn_ties(run, file, temporary)
    checksums = _checksums(file, temporary, share)
    run.held.update(_held(moved, checksums))
    for offset, data in layout.tail(checksums):
        copying.write_at(temporary.fd, data, offset)


def _moved(run: Run, file: OutFile) -> list[Ranges]:
    """For each slot of a file the ranges that are copied there; none where its value is computed."""
    return [run.ranges(run.steps[file.tensors[slot.index].name]) or () for slot in file.layout.slots]


def _checksums(file: OutFile, temporary: Temporary, share: Share) -> list[int]:
    """The checksums of a written file's slots, where its format has some."""
    if not file.layout.checksums:
        return []
    written = LocalFile(temporary.path, temporary.fd)
    with phase("computing checksums", file.nbytes, share=share) as advance:
        return [copying.checksum(written, slot.offset, slot.nbytes, advance) for slot in file.layout.slots]


def _held(moved: Sequence[Ranges], checksums: Sequence[int]) -> Iterator[tuple[str, int]]:
    """The file and offset of each source record whose own checksum is also that of its copy."""
    for ranges, crc in zip(moved, checksums, strict=False):
        if len(ranges) == 1 and ranges[0].checksum() == crc:
            yield ranges[0].file, ranges[0].offset


def still_proven(run: Run, file: OutFile, temporary: Temporary, known: Proven, share: Share) -> bool:
    """Whether a file that an interrupted run has proven is still what the plan says; all its bytes are compared again.

    The journal's digests of computed values are trusted, since the plan, the sources and this program are the same; except where a model or
    user code computes them, which may have changed.
    """
    made = [tensor for tensor in file.tensors if run.ranges(run.steps[tensor.name]) is None]
    if any(tensor.name not in known.made or run.by_others(run.steps[tensor.name]) for tensor in made):
        return False
    written = LocalFile(temporary.path, temporary.fd)
    if written.size != file.layout.size:
        return False
    checksums = _checksums(file, temporary, share)
    chunks = [*file.layout.chunks, *file.layout.tail(checksums)]
    if any(written.read(offset, len(data)) != data for offset, data in chunks):
        return False
    run.digests.update({tensor.storage: known.made[tensor.name] for tensor in made})
    try:
        prove_file(run, file, temporary.path, WEIGHTS, share)
    except VerificationError:
        return False
    run.held.update(_held(_moved(run, file), checksums))  # only now that the copies are known to be equal to their sources
    run.casts.extend(known.casts)
    return True


def scratch(run: Run, tensors: Sequence[OutTensor]) -> OutFile:
    """A file for the tensors that are not one span of a source file: computed ones, and those of several ranges.

    Keys that are one tensor in the target and come from different storages are among them, so that their values are compared.
    """
    storage = {tensor.name: tensor.storage for tensor in tensors}
    torn_keys = {key for group in run.plan.ties for key in group if len({storage[key] for key in group if key in storage}) > 1}
    left = [tensor for tensor in tensors if tensor.name in torn_keys or _one_span(run, tensor) is None]
    slots, position = [], 0
    for index, tensor in enumerate(left):
        slots.append(Slot(position, tensor.nbytes, index))
        position += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
    return OutFile(SCRATCH, left, {}, Layout(tuple(slots), (), position))


def _one_span(run: Run, tensor: OutTensor) -> Span | None:
    """The span of a file on disk that a tensor is; None for any other."""
    ranges = run.ranges(run.steps[tensor.name])
    return ranges[0] if ranges is not None and len(ranges) == 1 and ranges[0].packed is None else None


def located(run: Run, tensors: Sequence[OutTensor], file: OutFile, path: str) -> list[TensorMeta]:
    """Each tensor with the span of its bytes: in its source, or in the scratch file at `path`."""
    slots = {file.tensors[slot.index].name: slot for slot in file.layout.slots}
    metas = []
    for tensor in tensors:
        slot, span = slots.get(tensor.name), None
        if slot is not None:
            span = Span(path, slot.offset, slot.nbytes, tensor.name)
        elif (span := _one_span(run, tensor)) is not None:
            run.reader.locate(span)  # opened as it was when its header was read
        metas.append(TensorMeta(tensor.name, tensor.dtype, tensor.shape, contiguous_stride(tensor.shape), span))
    return metas


def made_in(run: Run, file: OutFile) -> tuple[dict[str, str], list[Cast]]:
    """The digests of a file's computed tensors, and the losses of their casts."""
    made = {tensor.name: run.digests[tensor.storage] for tensor in file.tensors if tensor.storage in run.digests}
    return made, [cast for cast in run.casts if cast.key in made]


def _refuse_torn_ties(run: Run, file: OutFile, temporary: Temporary) -> None:
    """Raises PlanError where keys that are one tensor in the target model have different values, of which it could hold only one."""
    if run.plan.target is None or run.plan.target.kind not in ("model", "skeleton"):
        return
    slots = {file.tensors[slot.index].name: slot for slot in file.layout.slots}
    written = LocalFile(temporary.path, temporary.fd)
    number = {tensor.name: tensor.storage for tensor in file.tensors}
    for group in run.plan.ties:
        first, *rest = [key for key in group if key in number] or [""]  # all of a group are in one file
        for key in rest:
            first_slot, second_slot = slots.get(first), slots.get(key)
            if number[key] == number[first] or first_slot is None or second_slot is None:
                continue
            if not copying.equal_ranges(written, first_slot.offset, written, second_slot.offset, first_slot.nbytes):
                raise torn(first, key)


def torn(first: str, key: str) -> PlanError:
    """The error for two values of one tensor."""
    return PlanError(
        f"is one tensor with {first} in the target, and they would get different values", key=key, hint=f"choose one: drop=[{key!r}]"
    )


def _make(run: Run, slot: Slot, tensor: OutTensor, temporary: Temporary, proof: bool, advance: Advance) -> None:
    position, digest = slot.offset, sha256()
    for part in run.parts(run.steps[tensor.name]):
        copying.write_at(temporary.fd, part, position)
        if proof:
            digest.update(part)
        position += memoryview(part).nbytes
        advance(memoryview(part).nbytes)
    if position != slot.offset + slot.nbytes:
        raise OutputError(f"got {position - slot.offset:,} bytes where the plan says {slot.nbytes:,}", key=tensor.name)
    run.digests[tensor.storage] = digest.hexdigest()


def expected_of(run: Run, tensor: OutTensor) -> Expected:
    """What the written file must hold for a tensor."""
    step = run.steps[tensor.name]
    ranges = run.ranges(step)
    copy = run.copied(step) if ranges is None else None
    return Expected(tensor.name, tensor.dtype, tensor.shape, ranges, run.digests.get(tensor.storage), copy)


def prove_file(run: Run, file: OutFile, path: str, around: Any, share: Share | None) -> None:
    """Raises VerificationError, naming every key, where the file is not what was planned; StaleError where a source changed meanwhile."""
    try:
        nbytes = sum(tensor.nbytes for tensor in file.tensors) if share is None else file.nbytes
        with phase("proving", nbytes, share=share) as advance:
            prove(path, [expected_of(run, tensor) for tensor in file.tensors], file.entries, run.reader, around, advance)
    except VerificationError:
        run.reader.check_unchanged()  # a source that changed since it was copied is the likelier reason
        raise
