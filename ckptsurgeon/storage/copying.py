"""Copies ranges of bytes between files by the kernel, or has the file system share them; computes checksums of ranges and compares them,
through small buffers.

Rule: it takes offsets and lengths, and knows nothing of tensors. It uses a few megabytes of memory, whatever the length.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ckptsurgeon.errors import StaleError
from ckptsurgeon.storage import platform
from ckptsurgeon.storage.files import OpenFile
from ckptsurgeon.storage.platform import BLOCK

Advance = Callable[[int], None]  # gets how many bytes more are done
BUFFER = 4 << 20  # bytes of values that are handed on at once
IN_CACHE = 1 << 19  # bytes that are only looked at: they stay in a core's cache, which makes checksums and comparisons twice as fast
AT_ONCE = 64 << 20  # bytes that the kernel copies between two calls of `advance`
PART = 16 << 20  # bytes of a range that are worked on in one go, where several threads do


_LEAST = 64 << 10  # bytes; fewer are cheaper to copy than to share, or to look through for holes


@dataclass(frozen=True, slots=True)
class Copied:
    """The result of copying a range: the output shares its bytes from `start` to `stop` with the source, `nbytes` were written, and the
    rest are holes."""

    nbytes: int
    start: int = 0
    stop: int = 0


def _no_progress(_nbytes: int) -> None:
    pass


def copy_range(
    source: OpenFile, source_offset: int, output: int, output_offset: int, nbytes: int, advance: Advance = _no_progress
) -> Copied:
    """Copy `nbytes` bytes of a file into the one behind the descriptor `output`, which must have nothing there.

    Whole blocks are shared where the file system can and both offsets have the same remainder modulo 4096. Holes stay holes. `advance` gets
    what is written.

    OSError where the output can't be written, UnreadableError where the source can't be read, StaleError where it ends early.
    """
    first, last, distance = source_offset, source_offset + nbytes, output_offset - source_offset
    with source.held_open() as file:
        start, stop = (first, first) if distance % BLOCK else (-(-first // BLOCK) * BLOCK, last // BLOCK * BLOCK)
        if file.fd is None or stop - start < _LEAST or not platform.share(file.fd, output, stop - start, start, start + distance):
            return Copied(_copy(file, output, first, last, distance, advance))
        written = [_copy(file, output, begin, end, distance, advance) for begin, end in ((first, start), (stop, last))]
        return Copied(sum(written), start + distance, stop + distance)


def _copy(file: OpenFile, output: int, first: int, last: int, distance: int, advance: Advance) -> int:
    """Copy what is stored between two offsets of an open file; the number of bytes. Offsets in the output are larger by `distance`."""
    copied = 0
    for start, stop in ((first, last),) if file.fd is None or last - first < _LEAST else platform.stored(file.fd, first, last):
        copied += stop - start
        while file.fd is not None and start < stop:
            done = platform.copy_in_kernel(file.fd, output, min(stop - start, AT_ONCE), start, start + distance)
            if not done:
                break  # read and write instead, which also finds a file that ended: some file systems return 0 instead of an error
            start += done
            advance(done)
        for chunk in chunks(file, start, stop - start):
            write_at(output, chunk, start + distance)
            start += len(chunk)
            advance(len(chunk))
    if copied < last - first:
        read_at(file, bytearray(1), last - 1)  # beyond its end a file has no holes
    return copied


def write_at(output: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`."""
    view = memoryview(data).cast("B")
    while len(view):
        written = platform.write(output, view, offset)
        view, offset = view[written:], offset + written


def chunks(source: OpenFile, offset: int, nbytes: int) -> Iterator[memoryview]:
    """The bytes from `offset`, to be looked at: a whole buffer at a time, the last one shorter; each view is good until the next one."""
    return gathered([(source, offset, nbytes)], nbytes, IN_CACHE)


def gathered(ranges: Iterable[tuple[OpenFile, int, int]], nbytes: int, size: int) -> Iterator[memoryview]:
    """The bytes of ranges (file, offset, length), one after another, `nbytes` in all, in buffers of `size` bytes like those of `chunks`."""
    buffer = memoryview(bytearray(min(nbytes, size)))
    filled = 0
    for source, offset, length in ranges:
        while length:
            view = buffer[filled : filled + length]
            read_at(source, view, offset)
            filled, offset, length = filled + len(view), offset + len(view), length - len(view)
            if filled == len(buffer):
                yield buffer
                filled = 0
    if filled:
        yield buffer[:filled]


def read_at(source: OpenFile, buffer: bytearray | memoryview, offset: int) -> None:
    """Read from `offset` until `buffer` is full. StaleError where the file ends before."""
    if not source.fill(buffer, offset):
        raise StaleError("became shorter while it was read", path=source.path, hint="run it again when nothing writes to it")


def parts(offset: int, nbytes: int) -> Iterator[tuple[int, int]]:
    """A range in parts of at most `PART` bytes, each by its offset and length. They begin at multiples of it, which file systems like."""
    end = offset + nbytes
    while offset < end:
        stop = min((offset // PART + 1) * PART, end)
        yield offset, stop - offset
        offset = stop


def crc_of(chunks: Iterable[memoryview]) -> int:
    """The CRC-32 of bytes that come in chunks."""
    crc = 0
    for chunk in chunks:
        crc = zlib.crc32(chunk, crc)
    return crc


def checksum(source: OpenFile, offset: int, nbytes: int, advance: Advance = _no_progress) -> int:
    """The CRC-32 of `nbytes` bytes from `offset`."""

    def told() -> Iterator[memoryview]:
        for chunk in chunks(source, offset, nbytes):
            yield chunk
            advance(len(chunk))

    return crc_of(told())


def equal_ranges(left: OpenFile, left_offset: int, right: OpenFile, right_offset: int, nbytes: int) -> bool:
    """Whether two files have the same `nbytes` bytes at these offsets."""
    return common_crc(left, left_offset, right, right_offset, nbytes, wanted=False) is not None


def common_crc(left: OpenFile, left_offset: int, right: OpenFile, right_offset: int, nbytes: int, wanted: bool = True) -> int | None:
    """The CRC-32 of the `nbytes` bytes that two files have at these offsets, or None where they differ; 0 where it isn't `wanted`."""
    size, crc = min(nbytes, IN_CACHE), 0
    first, second = bytearray(size), bytearray(size)
    while nbytes:
        if nbytes < size:
            size = nbytes
            first, second = bytearray(size), bytearray(size)
        if not left.fill(first, left_offset) or not right.fill(second, right_offset) or first != second:
            return None
        if wanted:
            crc = zlib.crc32(first, crc)
        left_offset, right_offset, nbytes = left_offset + size, right_offset + size, nbytes - size
    return crc
