"""Writes one file of an output and proves it: first the computed values, then the copies with their checksums, then ties."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING, Any
from zlib import crc32

from ckptsurgeon.errors import OutputError, PlanError, VerificationError
from ckptsurgeon.formats.layout import WEIGHTS, Layout, OutFile, OutTensor, Slot
from ckptsurgeon.progress import Advance, Share, nobody, phase
from ckptsurgeon.report import Cast
from ckptsurgeon.storage import copying
from ckptsurgeon.storage.files import OpenFile
from ckptsurgeon.storage.local import LocalFile
from ckptsurgeon.storage.pieces import merged
from ckptsurgeon.streaming.atomic import Temporary
from ckptsurgeon.streaming.checksums import append
from ckptsurgeon.streaming.in_threads import in_threads
from ckptsurgeon.streaming.proof import Expected, prove
from ckptsurgeon.streaming.step_values import Ranges, Run, Shared
from ckptsurgeon.tensors import Span, TensorMeta, contiguous_stride

if TYPE_CHECKING:
    from ckptsurgeon.streaming.journal import Proven

SCRATCH = ".scratch"
WRITING = "writing"  # the phase of both halves
_ALIGNED = 64


def begin(run: Run, file: OutFile, temporary: Temporary, wrote: Advance, proof: bool, share: Share) -> Share:
    """Write a file's header and its computed values; with `proof` their digests are kept.

    `wrote` gets how many bytes of values were just written. `share` is the file's part of the whole output; the rest of it is returned.
    """
    os.ftruncate(temporary.fd, 0)  # holes that are copied are left out, and an interrupted run may have written here
    os.ftruncate(temporary.fd, file.layout.size)
    for offset, data in file.layout.chunks:
        copying.write_at(temporary.fd, data, offset)
    made = [slot for slot in file.layout.slots if run.ranges(run.steps[file.tensors[slot.index].name]) is None]
    nbytes = sum(slot.nbytes for slot in made)
    with phase(WRITING, nbytes, share=share) if made else nullcontext(nobody) as advance:
        for slot in made:
            _make(run, slot, file.tensors[slot.index], temporary, proof, file.layout.checksums, _both(wrote, advance))
    order = {key: position for position, key in enumerate(run.steps)}
    run.casts.sort(key=lambda cast: order[cast.key])
    return share.after(nbytes)


def finish(run: Run, file: OutFile, temporary: Temporary, wrote: Advance, rest: Share) -> None:
    """Copy the tensors that don't change, and write what depends on the data, such as checksums.

    `wrote` gets how many bytes were just copied, without those that are shared. `rest` is as `begin` returns it.
    """
    layout, moved = file.layout, _moved(run, file)
    crcs = _known_crcs(run, file, moved)
    nbytes = sum(each.nbytes for ranges in moved for each in ranges)
    telling = phase(WRITING, nbytes, share=rest) if nbytes else nullcontext(nobody)
    with telling as advance, in_threads(_crc, _copied(run, file, temporary, moved, crcs.copy(), wrote, advance)) as results:
        for part, crc in results:
            append(crcs, part.slot, crc, part.nbytes)
    _refuse_torn_ties(run, file, temporary)
    for offset, data in layout.tail([crcs.get(number, 0) for number in range(len(layout.slots))]):
        copying.write_at(temporary.fd, data, offset)


def _both(first: Advance, second: Advance) -> Advance:
    def tell(nbytes: int) -> None:
        first(nbytes)
        second(nbytes)

    return tell


@dataclass(frozen=True, slots=True)
class _Part:
    """The next bytes of a slot that have been copied: `nbytes` of them, from ranges (file, offset, length)."""

    slot: int
    ranges: Sequence[tuple[OpenFile, int, int]]
    nbytes: int


def _copied(
    run: Run, file: OutFile, temporary: Temporary, moved: Sequence[Ranges], known: Mapping[int, int], wrote: Advance, advance: Advance
) -> Iterator[_Part]:
    """Copy all ranges; after each part its bytes, where their checksum is needed and not `known`."""

    def copy(each: Span, source: OpenFile, offset: int, position: int, nbytes: int) -> None:
        copied = copying.copy_range(source, offset, temporary.fd, position, nbytes, _both(wrote, advance))
        advance(nbytes - copied.nbytes)
        run.nbytes_copied += copied.nbytes
        if copied.start < copied.stop:
            record = (each.file, each.record.offset) if each.record is not None else None
            run.shared.setdefault(file.name, []).append(Shared(copied.start, copied.stop, source, position - offset, record))

    if not file.layout.checksums:
        for each, position in _joined(file.layout, moved):
            copy(each, *run.reader.locate(each), position, each.nbytes)
        return
    for number, (slot, ranges) in enumerate(zip(file.layout.slots, moved, strict=True)):
        position, waiting, nbytes = slot.offset, [], 0
        for each in ranges:
            source, start = run.reader.locate(each)
            for offset, size in [(start, each.nbytes)] if number in known else copying.parts(start, each.nbytes):
                copy(each, source, offset, position, size)
                position += size
                if number not in known:
                    waiting.append((source, offset, size))
                    nbytes += size
                if nbytes >= copying.PART:
                    yield _Part(number, waiting, nbytes)
                    waiting, nbytes = [], 0
        if waiting:
            yield _Part(number, waiting, nbytes)


def _crc(part: _Part) -> int:
    return copying.crc_of(copying.gathered(part.ranges, part.nbytes, copying.IN_CACHE))


def _moved(run: Run, file: OutFile) -> list[Ranges]:
    """For each slot of a file the ranges that are copied there; none where its value is computed."""
    return [run.ranges(run.steps[file.tensors[slot.index].name]) or () for slot in file.layout.slots]


def _joined(layout: Layout, moved: Sequence[Ranges]) -> Iterator[tuple[Span, int]]:
    """The ranges that are copied, each with its offset in the new file; those that are adjacent in both files are one."""
    last, start = None, 0
    for slot, ranges in zip(layout.slots, moved, strict=True):
        position = slot.offset
        for each in ranges:
            both = () if last is None or start + last.nbytes != position else tuple(merged((last, each)))
            if len(both) == 1:
                last = both[0]
            else:
                if last is not None:
                    yield last, start
                last, start = each, position
            position += each.nbytes
    if last is not None:
        yield last, start


def _known_crcs(run: Run, file: OutFile, moved: Sequence[Ranges]) -> dict[int, int]:
    """By slot, the CRC-32s that are known before the copies: those of computed values, and of records that are copied whole.

    A record's is the one that its file gives for it. The proof holds it against the bytes; without a proof a wrong one is copied with them,
    so that `check --full` finds it still.
    """
    known = {}
    for number, (slot, ranges) in enumerate(zip(file.layout.slots, moved, strict=True)):
        crc = ranges[0].checksum() if len(ranges) == 1 else run.crcs.get(file.tensors[slot.index].storage) if not ranges else None
        if crc is not None:
            known[number] = crc
    return known


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
    chunks = [*file.layout.chunks, *file.layout.tail(_checksums(run, file, written, share))]
    if any(written.read(offset, len(data)) != data for offset, data in chunks):
        return False
    run.digests.update({tensor.storage: known.made[tensor.name] for tensor in made})
    try:
        if prove_file(run, file, temporary.path, WEIGHTS, share):
            return False
    except VerificationError:
        return False
    run.held.update(records_of(run, file))
    run.casts.extend(known.casts)
    return True


def _checksums(run: Run, file: OutFile, written: OpenFile, share: Share) -> list[int]:
    """The checksums of a written file's slots, where its format has some: the sources' own, or else those of the bytes that are there."""
    if not file.layout.checksums:
        return []
    known = _known_crcs(run, file, _moved(run, file))
    left = [(number, slot) for number, slot in enumerate(file.layout.slots) if number not in known]
    with phase("computing checksums", sum(slot.nbytes for _, slot in left), share=share) as advance:
        known |= {number: copying.checksum(written, slot.offset, slot.nbytes, advance) for number, slot in left}
    return [known[number] for number in range(len(file.layout.slots))]


def records_of(run: Run, file: OutFile) -> set[tuple[str, int]]:
    """The file and offset of each source record that is copied whole, so that the proof of `file` holds it against its checksum."""
    return {(each.file, each.offset) for tensor in file.tensors for each in expected_of(run, tensor).records()}


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


def _make(run: Run, slot: Slot, tensor: OutTensor, temporary: Temporary, proof: bool, checksum: bool, advance: Advance) -> None:
    position, digest, crc = slot.offset, sha256(), 0
    for part in run.parts(run.steps[tensor.name]):
        copying.write_at(temporary.fd, part, position)
        if proof:
            digest.update(part)
        if checksum:
            crc = crc32(part, crc)
        position += memoryview(part).nbytes
        advance(memoryview(part).nbytes)
    if position != slot.offset + slot.nbytes:
        raise OutputError(f"got {position - slot.offset:,} bytes where the plan says {slot.nbytes:,}", key=tensor.name)
    run.digests[tensor.storage] = digest.hexdigest()
    run.crcs[tensor.storage] = crc


def expected_of(run: Run, tensor: OutTensor) -> Expected:
    """What the written file must hold for a tensor."""
    step = run.steps[tensor.name]
    ranges = run.ranges(step)
    copy = run.copied(step) if ranges is None else None
    return Expected(tensor.name, tensor.dtype, tensor.shape, ranges, run.digests.get(tensor.storage), copy)


def prove_file(run: Run, file: OutFile, path: str, around: Any, share: Share | None, shared: Sequence[Shared] = ()) -> list[Span]:
    """As `proof.prove`, for a file that is written; StaleError where a source changed meanwhile."""
    try:
        nbytes = sum(tensor.nbytes for tensor in file.tensors) if share is None else file.nbytes
        with phase("proving", nbytes, share=share) as advance:
            return prove(path, [expected_of(run, tensor) for tensor in file.tensors], file.entries, run.reader, around, advance, shared)
    except VerificationError:
        run.reader.check_unchanged()  # a source that changed since it was copied is the likelier reason
        raise
