"""What casts lose between any two dtypes, held against Python's exact fractions and integers."""

from __future__ import annotations

import math
import struct
import warnings
from fractions import Fraction
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import examples

from ckptsurgeon.dtypes import BY_CODE, TABLE
from ckptsurgeon.report import Cast
from ckptsurgeon.streaming.values import cast, losses_of_any, losses_of_finite, memory_of, tensor_from

Exact = Fraction | float  # a float where it is NaN or infinite
CODES = [row.code for row in TABLE]
PAIRS = [(one, other) for one, other in product(CODES, CODES) if one != other]
# 64 bits that are hard as integers or as floats, whatever dtype reads them.
HARD = [
    *(struct.pack("<q", sign * (1 << power) + step) for sign in (1, -1) for power in (7, 15, 24, 31, 53, 62) for step in (-1, 0, 1)),
    *(struct.pack("<Q", number) for number in (2**63 - 1, 2**63, 2**63 + 1, 2**64 - 1, 2**64 - 1025, 2**53 + 1)),
    *(
        struct.pack("<d", number)
        for number in (0.5, -1.5, 2.0**53, 2.0**63, 2.0**64, -(2.0**63), 65520.0, 464.0, 1e300, math.inf, math.nan)
    ),
    *(struct.pack("<ff", number, -number) for number in (0.0, 1.9, 65519.9, 3.4e38, math.inf, math.nan, 1e-45)),
    *(struct.pack("<eeee", number, 1, -number, 0) for number in (2.0, 65504.0, math.nan)),
]


def exact(value: float) -> Exact:
    return Fraction(value) if math.isfinite(value) else value


def parts_of(tensor: torch.Tensor) -> list[tuple[Exact, Exact]]:
    """Each element's real and imaginary part, exactly."""
    kind = BY_CODE[next(row.code for row in TABLE if row.torch == str(tensor.dtype).removeprefix("torch."))].kind
    if kind == "complex":
        pairs = torch.view_as_real(tensor).double().tolist()
        return [(exact(real), exact(imag)) for real, imag in pairs]
    if kind == "float":
        return [(exact(value), Fraction(0)) for value in tensor.double().tolist()]
    return [(Fraction(int(value)), Fraction(0)) for value in tensor.tolist()]


def same(one: Exact, other: Exact) -> bool:
    return one == other or (one != one and other != other)


def finite(value: Exact) -> bool:
    return isinstance(value, Fraction)


MANTISSA = {"F16": 10, "BF16": 7, "F32": 23, "F64": 52, "F8_E8M0": 0}  # bits; an F8 says its own


def limit(code: str) -> Fraction:
    """Half a step above the largest value of a float dtype, whose neighbour would be the next power's."""
    info = torch.finfo(getattr(torch, BY_CODE[code].torch))
    bits = MANTISSA[code] if code in MANTISSA else int(code.partition("M")[2][0])
    return Fraction(info.max) + Fraction(2) ** (math.frexp(info.max)[1] - 1 - bits) / 2


def expected(before: torch.Tensor, after: torch.Tensor, source: str, target: str) -> tuple[int, int, int, Fraction]:
    kind = BY_CODE[target].kind
    real = {"C64": "F32", "C128": "F64", "C32": "F16"}.get(target, target)
    changed = overflowed = truncated = 0
    largest = Fraction(0)
    for one, other in zip(parts_of(before), parts_of(after), strict=True):
        over = cut = False
        for place, (value, made) in enumerate(zip(one, other, strict=True)):
            gone = place == 1 and BY_CODE[source].kind == "complex" and kind != "complex"
            lost = False
            if gone:
                cut |= value != 0
            elif kind == "int":
                info = torch.iinfo(getattr(torch, BY_CODE[target].torch))
                lost = not isinstance(value, Fraction) or not info.min <= math.trunc(value) <= info.max
                cut |= not lost and value != math.trunc(value)  # type: ignore[arg-type]
            elif kind == "bool":
                cut |= place == 0 and value not in (0, 1)
            elif place == 0 or BY_CODE[source].kind == "complex":
                beyond = not same(value, made) and (not finite(value) or abs(value) >= limit(real)) and value == value
                lost = beyond or (finite(value) and not finite(made)) or (value < 0 < made)
            over |= lost
            if isinstance(value, Fraction) and isinstance(made, Fraction) and not lost:
                largest = max(largest, abs(value - made))
        changed += not (same(one[0], other[0]) and same(one[1], other[1]))
        overflowed, truncated = overflowed + over, truncated + cut
    return changed, overflowed, truncated, largest


def check(data: bytes, source: str, target: str, part: int) -> None:
    size = BY_CODE[source].size
    data = data[: len(data) // size * size]
    if BY_CODE[source].kind == "bool":
        data = bytes(byte & 1 for byte in data)
    casts = list[Cast]()
    parts = [data[start : start + part * size] for start in range(0, len(data), part * size)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = tensor_from(bytearray(data), source)
        made = b"".join(bytes(one) for one in cast("key", parts, source, target, casts))
        after = before.to(getattr(torch, BY_CODE[target].torch))
    assert made == b"".join(bytes(memory_of(after[start : start + part])) for start in range(0, len(after), part)) or not finite_all(before)
    after = tensor_from(bytearray(made), target)
    (found,) = casts
    changed, overflowed, truncated, largest = expected(before, after, source, target)
    assert (found.changed, found.overflowed, found.truncated) == (changed, overflowed, truncated), (before, after)
    try:
        assert found.largest_error == pytest.approx(float(largest), rel=1e-15, abs=0), (before, after)
    except OverflowError:
        assert found.largest_error == math.inf
    assert (found.largest_error == 0) == (largest == 0)


def finite_all(tensor: torch.Tensor) -> bool:
    """What an integer gets of a float that it can't hold is torch's own affair, and differs with its vector instructions."""
    return not (tensor.is_floating_point() or tensor.is_complex())


@pytest.mark.parametrize(("source", "target"), PAIRS, ids="-".join)
def test_every_pair_of_dtypes_at_its_limits(source: str, target: str) -> None:
    check(b"".join(HARD), source, target, part=7)


@settings(max_examples=examples(600), deadline=None)
@given(
    pair=st.sampled_from(PAIRS),
    data=st.lists(st.sampled_from(HARD) | st.binary(min_size=8, max_size=8), min_size=2, max_size=12).map(b"".join),
    part=st.integers(1, 9),
)
def test_every_pair_of_dtypes_on_any_bits(pair: tuple[str, str], data: bytes, part: int) -> None:
    check(data, *pair, part)


FLOATS = [(source, target) for source, target in PAIRS if {BY_CODE[source].kind, BY_CODE[target].kind} == {"float"}]
# Bits of every float: signed zeros, subnormals, infinities, NaNs with and without a payload, and numbers around the limits.
FLOAT_HARD = [
    bytes([low]) * 7 + bytes([high]) for low in (0, 1, 0xFF) for high in (0, 1, 0x3C, 0x43, 0x47, 0x7B, 0x7C, 0x7F, 0x80, 0xFC, 0xFF)
]


@settings(max_examples=examples(600), deadline=None)
@given(
    pair=st.sampled_from(FLOATS),
    data=st.lists(st.sampled_from([*HARD, *FLOAT_HARD]) | st.binary(min_size=8, max_size=8), max_size=12).map(b"".join),
    finite=st.booleans(),
)
def test_the_short_way_gives_what_the_long_one_gives(pair: tuple[str, str], data: bytes, finite: bool) -> None:
    before = tensor_from(data, pair[0])
    after = before.to(getattr(torch, BY_CODE[pair[1]].torch))
    if finite:  # so that the short way is taken
        kept = torch.isfinite(before.double()) & torch.isfinite(after.double())
        before, after = (one.view(getattr(torch, f"uint{8 * one.element_size()}"))[kept].view(one.dtype) for one in (before, after))
    short = losses_of_finite(before, after, Cast("key", *pair))
    assert short is None or short == losses_of_any(before, after, Cast("key", *pair))


def test_what_rounds_to_the_largest_value_of_a_dtype_does_not_overflow() -> None:
    """59,392 is nearer to 57,344 than to what would come after it; torch's own step for this dtype is half of what it is."""
    before = torch.tensor([59392.0, 57344.0], dtype=torch.float16)
    found = losses_of_any(before, before.to(torch.float8_e5m2fnuz), Cast("key", "F16", "F8_E5M2FNUZ"))
    assert (found.overflowed, found.changed, found.largest_error) == (0, 1, 2048.0)


def test_the_short_way_is_taken() -> None:
    before = torch.tensor([1 / 3, -0.0, 1e-45, 447.0])
    for source, target in (("F32", "F16"), ("F32", "BF16"), ("F32", "F8_E4M3"), ("F64", "F32"), ("BF16", "F32"), ("F8_E5M2", "F16")):
        given = before.to(getattr(torch, BY_CODE[source].torch))
        assert losses_of_finite(given, given.to(getattr(torch, BY_CODE[target].torch)), Cast("key", source, target)) is not None


def test_an_integer_beyond_2_to_the_53_is_told_as_what_it_is() -> None:
    casts = list[Cast]()
    b"".join(bytes(one) for one in cast("k", [struct.pack("<q", 2**53 + 1)], "I64", "F64", casts))
    b"".join(bytes(one) for one in cast("k", [struct.pack("<Q", 2**63 - 1)], "U64", "I64", casts))
    b"".join(bytes(one) for one in cast("k", [struct.pack("<Q", 2**63)], "U64", "I64", casts))
    assert [(one.changed, one.largest_error, one.overflowed) for one in casts] == [(1, 1.0, 0), (0, 0.0, 0), (1, 0.0, 1)]
