"""Inflates a raw deflate stream, a buffer at a time. All commands use this module, so that all accept the same streams.

A stream that is damaged, too short, too long, or followed by other bytes is refused.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

from ckptsurgeon.errors import FormatError
from ckptsurgeon.storage.copying import BUFFER


def inflated(parts: Iterable[bytes | memoryview], size: int, path: str, entry: str, at_once: int = BUFFER) -> Iterator[bytes]:
    """The `size` bytes that the deflated zip entry `entry` holds, in parts of at most `at_once` bytes; `parts` are the compressed bytes.

    >>> b"".join(inflated([bytes.fromhex("4b4c4a"), bytes.fromhex("0600")], 3, "it.pt", "data/0"))
    b'abc'
    """
    inflate, total = zlib.decompressobj(-15), 0
    for part in parts:
        compressed: bytes | memoryview = part
        more = True
        while more:
            try:
                data = inflate.decompress(compressed, at_once)
            except zlib.error as error:
                raise _bad("is damaged", path, entry) from error
            total += len(data)
            if total > size or inflate.unused_data:
                raise _bad("is longer than it says", path, entry)
            if data:
                yield data
            compressed = inflate.unconsumed_tail
            more = not inflate.eof and (bool(compressed) or len(data) == at_once)
    if total != size or not inflate.eof:
        raise _bad("is shorter than it says", path, entry)


def beginning(parts: Iterable[bytes | memoryview], size: int, count: int, path: str, entry: str) -> bytes:
    """The first `count` of the `size` bytes of an entry; no more than these are inflated. Arguments and errors as `inflated`."""
    data = b""
    for part in inflated(parts, size, path, entry, at_once=max(count, 1)):
        data += part
        if len(data) >= count:
            break
    return data[:count]


def _bad(what: str, path: str, entry: str) -> FormatError:
    return FormatError(f"has the deflated entry {entry!r}, which {what}", path=path, hint="copy or download it again")
