"""Compares a written file with the plan, bitwise and without torch, after opening it again.

Copied tensors are compared byte for byte with their source, computed ones by the SHA-256 of the bytes that were written. A source's record
that was copied whole is held against its own CRC in the same pass, since both sides have the same bytes then. Bytes that the file shares on
disk with just the source that they must come from need not be compared.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

from ckptsurgeon import formats
from ckptsurgeon.errors import VerificationError
from ckptsurgeon.formats.layout import WEIGHTS, Stored
from ckptsurgeon.progress import Advance, nobody
from ckptsurgeon.storage import copying
from ckptsurgeon.storage.files import OpenFile
from ckptsurgeon.storage.opening import OpenFiles, open_regular
from ckptsurgeon.storage.pieces import runs
from ckptsurgeon.streaming.checksums import append
from ckptsurgeon.streaming.in_threads import in_threads
from ckptsurgeon.streaming.reading import Reader
from ckptsurgeon.streaming.step_values import Ranges, Shared
from ckptsurgeon.tensors import Span, TensorMeta

_DIFFER = "its bytes differ"


@dataclass(frozen=True)
class Expected:
    """A tensor that the file must hold: copied from `ranges` of files, or a `copy` of a source tensor in pieces, or computed, with the
    SHA-256 `digest`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    ranges: Ranges | None
    digest: str | None
    copy: TensorMeta | None = None

    def records(self) -> list[Span]:
        """The ranges that are whole records of their files and have a checksum there."""
        return [each for each in self.ranges or () if each.checksum() is not None]


@dataclass(frozen=True, slots=True)
class _Pair:
    """Two ranges of `nbytes` bytes that must be equal: of the written file, and of `span`, which is the `number`th range of a tensor."""

    name: str
    number: int
    span: Span
    written: tuple[OpenFile, int]
    source: tuple[OpenFile, int]
    nbytes: int
    counted: bool  # whether all of the range is compared, and has a checksum


def prove(
    path: str,
    expected: Sequence[Expected],
    entries: Mapping[str, Any],
    reader: Reader,
    around: Any = WEIGHTS,
    advance: Advance = nobody,
    shared: Sequence[Shared] = (),
) -> list[Span]:
    """Raises VerificationError, naming every key, where the file or folder at `path` is not exactly what the plan says.

    Returns the sources' records that are copied as they are but are not what their own checksums say. `around` is the value that contains
    the state_dict; `advance` gets the number of bytes that were just compared; those that are `shared` are not read.
    """
    archive = formats.read(path)
    state_dict = archive.state_dicts[0]
    problems: list[str] = []
    others: dict[str, TensorMeta] = {}
    if around != WEIGHTS:
        problems += [f"{place}: is not what was to be there" for place in _differences("", around, formats.read_tree(path).value, others)]
    tensors = {**state_dict.tensors, **others}
    names = {item.name: None for item in expected}
    problems += [f"{name}: is not in the file" for name in names if name not in tensors]
    problems += [f"{name}: is in the file, and not in the plan" for name in tensors if name not in names]
    if repr(_plain(state_dict.entries)) != repr(_plain(entries)):  # repr, since a NaN is not equal to itself
        problems.append("the values that are no tensors differ")
    wrong: dict[str, str] = {}
    crcs: dict[tuple[str, int, Span], int] = {}

    def pairs() -> Iterator[_Pair]:
        for item in expected:
            tensor = tensors.get(item.name)
            if tensor is None:
                continue
            if (tensor.dtype, tensor.shape) != (item.dtype, item.shape):
                wrong[item.name] = f"is {tensor.dtype} {tensor.shape}, not {item.dtype} {item.shape}"
                continue
            written = tuple(runs(tensor))
            file = files[written[0].file] if written else next(iter(files.values()))
            start = written[0].offset if written else 0
            if len(written) > 1 or not tensor.as_stored:  # every tensor is written in one piece
                wrong[item.name] = _DIFFER
            elif item.ranges is None:
                if not _same(file, start, tensor.nbytes, item, reader, advance):
                    wrong[item.name] = _DIFFER
            elif sum(each.nbytes for each in item.ranges) != tensor.nbytes:
                wrong[item.name] = _DIFFER
            else:
                yield from _pairs(item, file, start, reader, shared)

    with OpenFiles() as opened:
        files = {stamp.path: opened.add(open_regular(stamp.path)) for stamp in archive.files}
        with in_threads(_compare, pairs()) as compared:
            for pair, crc in compared:
                if crc is None:
                    wrong[pair.name] = _DIFFER
                elif pair.counted:
                    append(crcs, (pair.name, pair.number, pair.span), crc, pair.nbytes)
                advance(pair.nbytes)
    problems += [f"{item.name}: {wrong[item.name]}" for item in expected if item.name in wrong]
    if problems:
        raise VerificationError(
            "what was written is not what was planned; nothing was kept",
            path=path,
            problems=tuple(problems),
            hint="run it again; if it stays so, check the disk and report it",
        )
    return [span for (_, _, span), crc in crcs.items() if crc != span.checksum()]


def _differences(place: str, expected: Any, written: Any, tensors: dict[str, TensorMeta]) -> Iterator[str]:
    """The places where a written value differs from the expected one. The tensors that `Stored` stands for are added to `tensors`."""
    if type(expected) is Stored:
        if expected.name is not None and type(written) is TensorMeta:
            tensors[expected.name] = written
    elif isinstance(expected, Mapping) and type(written) is dict and list(expected) == list(written):
        for name, value in expected.items():
            yield from _differences(f"{place}.{name}" if place else str(name), value, written[name], tensors)
    elif type(expected) in (list, tuple) and type(written) is type(expected) and len(written) == len(expected):
        for index, (value, item) in enumerate(zip(expected, written, strict=True)):
            yield from _differences(f"{place}.{index}", value, item, tensors)
    elif isinstance(expected, Mapping) or type(expected) is not type(written) or repr(expected) != repr(written):
        yield place


def _plain(value: Any) -> Any:
    """The value with all mappings as dicts, which is what a file holds."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


def _pairs(item: Expected, file: OpenFile, position: int, reader: Reader, shared: Sequence[Shared]) -> Iterator[_Pair]:
    """A copied tensor's ranges in parts, each beside its bytes in the written file, where the tensor begins at `position`; without those
    that are shared."""
    for number, each in enumerate(item.ranges or ()):
        source, start = reader.locate(each)
        distance = position - start
        left = list(_unshared(shared, source, position, position + each.nbytes, distance))
        counted = each.checksum() is not None and left == [(position, position + each.nbytes)]
        for begin, end in left:
            for offset, nbytes in copying.parts(begin - distance, end - begin):
                yield _Pair(item.name, number, each, (file, offset + distance), (source, offset), nbytes, counted)
        position += each.nbytes


def _unshared(shared: Sequence[Shared], source: OpenFile, start: int, stop: int, distance: int) -> Iterator[tuple[int, int]]:
    """The parts of a range of the written file, but for those that it shares with just the bytes of `source` that lie `distance` before."""
    for each in shared[bisect_right(shared, start, key=lambda each: each.stop) :]:
        if each.start >= stop:
            break
        if each.source is source and each.distance == distance:
            if start < each.start:
                yield start, each.start
            start = min(each.stop, stop)
    if start < stop:
        yield start, stop


def _compare(pair: _Pair) -> int | None:
    return copying.common_crc(*pair.written, *pair.source, pair.nbytes, wanted=pair.counted)


def _same(file: OpenFile, position: int, nbytes: int, item: Expected, reader: Reader, advance: Advance) -> bool:
    """Whether the `nbytes` bytes at `position` of the written file are a tensor that is not ranges of files."""
    if item.copy is not None:
        end, buffer = position + nbytes, bytearray()  # a bytearray is compared thirty times as fast as a memoryview or bytes with one
        for part in reader.parts(item.copy):
            size = memoryview(part).nbytes
            if len(buffer) != size:
                buffer = bytearray(size)
            if position + size > end or not file.fill(buffer, position) or buffer != part:
                return False
            position += size
            advance(size)
        return position == end
    digest = sha256()
    for chunk in copying.chunks(file, position, nbytes):
        digest.update(chunk)
        advance(len(chunk))
    return digest.hexdigest() == item.digest
