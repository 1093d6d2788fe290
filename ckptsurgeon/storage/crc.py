"""CRC-32 of bytes that were read part by part, each part by itself, as zlib's `crc32_combine` (which Python lacks) computes it.

Rule: arithmetic alone. A CRC is a polynomial over GF(2) modulo `_MODULUS`, its highest power in the lowest bit.
"""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import TypeVar

_MODULUS = 0xEDB88320
_ONE, _X8 = 1 << 31, 1 << 23  # the polynomials 1 and x ** 8, which is the shift by a byte
K = TypeVar("K")


def _product(first: int, second: int) -> int:
    result = 0
    while second:
        if second & _ONE:
            result ^= first
        second = second << 1 & 0xFFFFFFFF
        first = first >> 1 ^ (_MODULUS if first & 1 else 0)
    return result


def combine(crc: int, following: int, nbytes: int) -> int:
    """The CRC-32 of some bytes and the `nbytes` bytes that follow them, from the CRC-32 of each.

    >>> import zlib
    >>> combine(zlib.crc32(b"check"), zlib.crc32(b"point"), 5) == zlib.crc32(b"checkpoint")
    True
    """
    shift = _X8
    while nbytes:
        if nbytes & 1:
            crc = _product(crc, shift)
        shift, nbytes = _product(shift, shift), nbytes >> 1
    return crc ^ following


def append(crcs: MutableMapping[K, int], key: K, following: int, nbytes: int) -> None:
    """Add the CRC-32 of the next `nbytes` bytes to that of the bytes before them, which `crcs` has under `key` if there are any."""
    crcs[key] = combine(crcs[key], following, nbytes) if key in crcs else following
