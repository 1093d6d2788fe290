"""Holds the data of a zip archive against the checksums that it keeps: torch.load does not look at them.

Every entry is read once, by small buffers and without torch; nothing is interpreted or kept.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

from ckptsurgeon.errors import StaleError
from ckptsurgeon.formats.files import OpenFile, open_regular, stamp
from ckptsurgeon.formats.zip_directory import DEFLATED, Entry, read_directory
from ckptsurgeon.streaming import copying
from ckptsurgeon.tensors import FileStamp

_ZIP = b"PK\x03\x04"


@dataclass(frozen=True)
class Held:
    """What became of one file: the storages, or other entries by name, whose data is not what its checksum says, and how many entries
    have no checksum (a CRC of zero). `keeps` is False for a format that has none."""

    keeps: bool
    wrong_storages: tuple[str, ...] = ()
    wrong_entries: tuple[str, ...] = ()
    without: int = 0


def hold(seen: FileStamp, alive: Callable[[], None]) -> Held:
    """Read a file as it was `seen`, and hold each entry against its checksum; `alive` is called between buffers and may raise.

    StaleError when the file is no longer what it was.
    """
    with open_regular(seen.path) as file:
        if file.stamp != seen:
            raise _changed(seen.path)
        if file.read(0, min(len(_ZIP), file.size)) != _ZIP:
            return Held(keeps=False)
        storages: list[str] = []
        others: list[str] = []
        without = 0
        with copying.naming(seen.path):
            for entry in read_directory(file).entries.values():
                without += not entry.crc and entry.size > 0
                if entry.crc and not _as_it_says(file, entry, alive):
                    name = entry.name.partition("/")[2]
                    storages += [name[len("data/") :]] if name.startswith("data/") else []
                    others += [] if name.startswith("data/") else [name]
        if stamp(seen.path, os.fstat(file.fd)) != seen:
            raise _changed(seen.path)
    return Held(True, tuple(storages), tuple(others), without)


def _as_it_says(file: OpenFile, entry: Entry, alive: Callable[[], None]) -> bool:
    parts: Iterable[bytes | memoryview] = copying.chunks(file.fd, entry.offset, entry.packed)
    crc = size = 0
    try:
        for part in _inflated(parts) if entry.method == DEFLATED else parts:
            alive()
            crc, size = zlib.crc32(part, crc), size + len(part)
            if size > entry.size:
                return False
    except zlib.error:
        return False
    return (crc, size) == (entry.crc, entry.size)


def _inflated(parts: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    inflate = zlib.decompressobj(-15)
    for part in parts:
        left: bytes | memoryview = part
        while left:
            yield inflate.decompress(left, copying.BUFFER)
            left = inflate.unconsumed_tail
    yield inflate.flush()


def _changed(path: str) -> StaleError:
    return StaleError("changed while it was read", path=path, hint="run it again when nothing writes to it")
