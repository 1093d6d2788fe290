"""Inflates a raw deflate stream, a buffer at a time. This is the only place where it is done, so that all commands agree on what is whole.

A stream that is damaged, too short, too long, or followed by other bytes is refused. Nothing is written or held here.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator

from ckptsurgeon.errors import FormatError
from ckptsurgeon.storage.copying import BUFFER


def inflated(parts: Iterable[bytes | memoryview], size: int, path: str, entry: str, at_once: int = BUFFER) -> Iterator[bytes]:
    """The `size` bytes that a deflated zip entry holds, in parts of a few megabytes.

    Args:
        parts: its bytes as they lie in the file, in order.
        path, entry: the file's path and the entry's name, for the error.
        at_once: the bytes of a part, at most.

    Raises:
        FormatError: the stream is not a whole one of `size` bytes, with nothing behind it.

    >>> b"".join(inflated([bytes.fromhex("4b4c4a"), bytes.fromhex("0600")], 3, "it.pt", "data/0"))
    b'abc'
    """
    inflate, total = zlib.decompressobj(-15), 0
    for part in parts:
        left: bytes | memoryview = part
        more = True
        while more:
            try:
                made = inflate.decompress(left, at_once)
            except zlib.error as error:
                raise _bad("is damaged", path, entry) from error
            total += len(made)
            if total > size or inflate.unused_data:
                raise _bad("is longer than it says", path, entry)
            if made:
                yield made
            left = inflate.unconsumed_tail
            more = not inflate.eof and (bool(left) or len(made) == at_once)
    if total != size or not inflate.eof:
        raise _bad("is shorter than it says", path, entry)


def beginning(parts: Iterable[bytes | memoryview], size: int, count: int, path: str, entry: str) -> bytes:
    """The first `count` bytes of the `size` that an entry holds; no more than these are inflated. Arguments and errors as `inflated`."""
    found = b""
    for part in inflated(parts, size, path, entry, at_once=max(count, 1)):
        found += part
        if len(found) >= count:
            break
    return found[:count]


def _bad(what: str, path: str, entry: str) -> FormatError:
    return FormatError(f"has the deflated entry {entry!r}, which {what}", path=path, hint="copy or download it again")
