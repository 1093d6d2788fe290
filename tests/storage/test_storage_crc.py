"""CRCs of parts, combined, are zlib's CRC of the whole."""

from __future__ import annotations

import random
import zlib

from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import examples

from ckptsurgeon.streaming.checksums import append, combine

CRCS = st.integers(0, 0xFFFFFFFF)
LENGTHS = st.integers(0, 1 << 42)


@settings(max_examples=examples(300))
@given(data=st.binary(max_size=600), cuts=st.lists(st.integers(0, 600), max_size=6))
def test_any_split_gives_the_crc_of_the_whole(data: bytes, cuts: list[int]) -> None:
    ends = sorted(min(cut, len(data)) for cut in cuts)
    crcs: dict[str, int] = {}
    for start, end in zip([0, *ends], [*ends, len(data)], strict=True):
        append(crcs, "all", zlib.crc32(data[start:end]), end - start)
    assert crcs == {"all": zlib.crc32(data)}


def test_long_parts_too() -> None:
    data = random.Random(0).randbytes((1 << 20) + 13)
    for cut in (1, 65_521, 1 << 19, len(data) - 1):
        assert combine(zlib.crc32(data[:cut]), zlib.crc32(data[cut:]), len(data) - cut) == zlib.crc32(data)


@given(CRCS, CRCS, CRCS, LENGTHS, LENGTHS)
def test_three_parts_of_any_length_can_be_combined_from_either_end(a: int, b: int, c: int, of_b: int, of_c: int) -> None:
    assert combine(combine(a, b, of_b), c, of_c) == combine(a, combine(b, c, of_c), of_b + of_c)
