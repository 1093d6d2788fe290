"""Bytes from file to file without bringing them into Python's memory; and over files: checksums and comparison, by small buffers.

Rule: offsets and lengths in, nothing is known of tensors. Memory is a fixed few megabytes whatever the length.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager

from ckptsurgeon.errors import StaleError, UnreadableError
from ckptsurgeon.storage import platform

BUFFER = 4 << 20


def copy_range(source: int, source_offset: int, output: int, output_offset: int, nbytes: int) -> None:
    """Copy `nbytes` bytes between two open files.

    OSError where the output can't be written, UnreadableError where the source can't be read, StaleError where it ends early.
    """
    done = 0
    while done < nbytes:
        copied = platform.copy_in_kernel(source, output, nbytes - done, source_offset + done, output_offset + done)
        if not copied:
            break  # by hand, which also tells whether the file ended: some file systems answer 0 instead of an error
        done += copied
    for chunk in chunks(source, source_offset + done, nbytes - done):
        write_at(output, chunk, output_offset + done)
        done += len(chunk)


@contextmanager
def naming(path: str) -> Iterator[None]:
    """Tell which file it was that could not be read, or ended early."""
    try:
        yield
    except (StaleError, UnreadableError) as error:
        error.path = error.path or path
        raise


def write_at(output: int, data: bytes | bytearray | memoryview, offset: int) -> None:
    """Write all of `data` at `offset`."""
    view = memoryview(data).cast("B")
    while len(view):
        written = platform.write(output, view, offset)
        view, offset = view[written:], offset + written


def chunks(source: int, offset: int, nbytes: int) -> Iterator[memoryview]:
    """The bytes from `offset`, a whole buffer at a time, the last one shorter; each view is good until the next one."""
    buffer = memoryview(bytearray(min(nbytes, BUFFER)))
    while nbytes:
        view = buffer[: min(nbytes, BUFFER)]
        read_at(source, view, offset)
        yield view
        offset += len(view)
        nbytes -= len(view)


def read_at(source: int, buffer: bytearray | memoryview, offset: int) -> None:
    """Read from `offset` until `buffer` is full. StaleError where the file ends before."""
    if not _fill(source, buffer, offset):
        raise StaleError("became shorter while it was read", hint="run it again when nothing writes to it")


def checksum(source: int, offset: int, nbytes: int) -> int:
    """The CRC-32 of `nbytes` bytes from `offset`."""
    crc = 0
    for chunk in chunks(source, offset, nbytes):
        crc = zlib.crc32(chunk, crc)
    return crc


def equal_ranges(one: int, one_offset: int, other: int, other_offset: int, nbytes: int) -> bool:
    """Whether two files have the same `nbytes` bytes there."""
    size = min(nbytes, BUFFER)
    first, second = bytearray(size), bytearray(size)
    while nbytes:
        if nbytes < size:
            size = nbytes
            first, second = bytearray(size), bytearray(size)
        if not _fill(one, first, one_offset) or not _fill(other, second, other_offset) or first != second:
            return False
        one_offset, other_offset, nbytes = one_offset + size, other_offset + size, nbytes - size
    return True


def _fill(source: int, buffer: bytearray | memoryview, offset: int) -> bool:
    view = memoryview(buffer)
    while len(view):
        try:
            got = platform.read_into(source, view, offset)
        except OSError as error:
            raise UnreadableError(f"could not be read ({error.strerror})", hint="check the disk") from error
        if not got:
            return False
        view, offset = view[got:], offset + got
    return True
