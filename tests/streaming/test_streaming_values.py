"""Casts: what they give and what they lose, judged by torch on whole tensors and by Python's exact fractions."""

from __future__ import annotations

import math
import warnings
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import examples

from ckptsurgeon.dtypes import BY_CODE, TABLE
from ckptsurgeon.errors import CastError
from ckptsurgeon.report import Cast
from ckptsurgeon.streaming import values
from ckptsurgeon.streaming.values import cast, count_non_finite, densify, memory_of, non_finite, refuse_losses, reported, tensor_from
from ckptsurgeon.tensors import Span, TensorMeta


def dtype_of(code: str) -> torch.dtype:
    found: torch.dtype = getattr(torch, BY_CODE[code].torch)
    return found


def run(tensor: torch.Tensor, source: str, target: str, part: int = 1 << 20) -> tuple[bytes, Cast]:
    data, casts = memory_of(tensor), list[Cast]()
    size = BY_CODE[source].size * part
    parts = [data[start : start + size] for start in range(0, len(data), size)]
    made = b"".join(cast("key", parts, source, target, casts))
    (found,) = casts
    return made, found


def close(number: float, expected: float) -> bool:
    return number == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("target", ["F16", "BF16", "F8_E4M3", "F8_E5M2", "F64", "I64", "I32", "U8", "BOOL", "C64"])
@pytest.mark.parametrize("source", ["F32", "F64", "F16", "BF16", "I64", "U8", "BOOL", "F8_E5M2"])
def test_the_bytes_are_torchs(source: str, target: str) -> None:
    given = (torch.arange(-20, 300, dtype=torch.float64) / 4).to(dtype_of(source))
    made, _ = run(given, source, target, part=37)
    assert made == memory_of(given.to(dtype_of(target)))


@settings(max_examples=examples(150), deadline=None)
@given(
    numbers=st.lists(st.floats(width=32), min_size=1, max_size=30),
    target=st.sampled_from(["F16", "BF16", "F64", "F8_E5M2", "F8_E4M3"]),
    part=st.integers(1, 31),
)
def test_float_losses_are_exactly_what_torch_loses(numbers: list[float], target: str, part: int) -> None:
    given = torch.tensor(numbers, dtype=torch.float32)
    after = given.to(dtype_of(target)).to(torch.float64).tolist()
    _, found = run(given, "F32", target, part)
    most = 464.0 if target == "F8_E4M3" else math.inf
    kept = [(a, b) for a, b in zip(given.tolist(), after, strict=True) if math.isfinite(a) and math.isfinite(b) and abs(a) < most]
    assert Fraction(found.largest_error) == max((abs(Fraction(a) - Fraction(b)) for a, b in kept), default=0) or close(
        found.largest_error, float(max(abs(Fraction(a) - Fraction(b)) for a, b in kept))
    )
    limit = {"F8_E4M3": 464.0}.get(target, math.inf)  # saturates at 448, whose neighbour would be 480
    lost = [
        (math.isfinite(a) and not math.isfinite(b)) or (abs(a) >= limit and abs(b) < abs(a))
        for a, b in zip(given.tolist(), after, strict=True)
    ]
    assert found.overflowed == lost.count(True)
    assert found.changed == sum(not (a == b or (a != a and b != b)) for a, b in zip(given.tolist(), after, strict=True))
    assert found.truncated == 0


@settings(max_examples=examples(150), deadline=None)
@given(
    numbers=st.lists(st.floats(allow_nan=True, allow_infinity=True) | st.integers(-(1 << 40), 1 << 40).map(float), min_size=1, max_size=30),
    target=st.sampled_from(["I64", "I32", "I16", "I8", "U8", "U16", "U32", "U64"]),
)
def test_float_to_integer_overflow_and_truncation(numbers: list[float], target: str) -> None:
    info = torch.iinfo(dtype_of(target))
    _, found = run(torch.tensor(numbers, dtype=torch.float64), "F64", target, part=7)
    fits = [math.isfinite(number) and info.min <= math.trunc(number) <= info.max for number in numbers]
    assert found.overflowed == fits.count(False)
    assert found.truncated == sum(number != math.trunc(number) for number, good in zip(numbers, fits, strict=True) if good)


@settings(max_examples=examples(100), deadline=None)
@given(
    numbers=st.lists(st.integers(-(1 << 63), (1 << 63) - 1), min_size=1, max_size=20),
    target=st.sampled_from(["I32", "I8", "U8", "U32", "U64"]),
)
def test_integer_to_integer_overflow(numbers: list[int], target: str) -> None:
    info = torch.iinfo(dtype_of(target))
    _, found = run(torch.tensor(numbers, dtype=torch.int64), "I64", target)
    assert found.overflowed == sum(not info.min <= number <= info.max for number in numbers)
    assert found.truncated == 0


@pytest.mark.parametrize(
    ("given", "source", "target", "overflowed", "truncated"),
    [
        (torch.tensor([70000.0]), "F32", "F16", 1, 0),
        (torch.tensor([65504.0]), "F32", "F16", 0, 0),
        (torch.tensor([1.9]), "F32", "I64", 0, 1),
        (torch.tensor([-0.5]), "F32", "U8", 0, 1),
        (torch.tensor([1234.0]), "F32", "I64", 0, 0),
        (torch.tensor([2.0**63]), "F32", "I64", 1, 0),
        (torch.tensor([-(2.0**63)]), "F32", "I64", 0, 0),
        (torch.tensor([float("nan"), float("inf")]), "F32", "I64", 2, 0),
        (torch.tensor([float("nan"), float("inf")]), "F32", "F16", 0, 0),
        (torch.tensor([500.0]), "F32", "F8_E4M3", 1, 0),
        (torch.tensor([448.0, 463.0]), "F32", "F8_E4M3", 0, 0),
        (torch.tensor([float("inf"), -float("inf")]), "F32", "F8_E4M3", 2, 0),
        (torch.tensor([float("inf"), -float("inf"), 1e9]), "F32", "F8_E5M2", 1, 0),
        (torch.tensor([-2.0, 2.0]), "F32", "F8_E8M0", 1, 0),
        (torch.tensor([0.0, 1.0]), "F32", "BOOL", 0, 0),
        (torch.tensor([2.0, 0.5, float("nan")]), "F32", "BOOL", 0, 3),
        (torch.tensor([True, False]), "BOOL", "F16", 0, 0),
        (torch.tensor([True, False]), "BOOL", "I64", 0, 0),
        (torch.tensor([2, 1]), "I64", "BOOL", 0, 1),
        (torch.tensor([70000, 3]), "I64", "F16", 1, 0),
        (torch.tensor([1 + 0j, 2 + 0j]), "C64", "F32", 0, 0),
        (torch.tensor([1 + 1j, 2 + 0j]), "C64", "F32", 0, 1),
        (torch.tensor([1 + 1j, 2.5 + 0j]), "C64", "I32", 0, 2),
        (torch.tensor([1e300 + 1j], dtype=torch.complex128), "C128", "C64", 1, 0),
        (torch.tensor([1e300], dtype=torch.float64), "F64", "C64", 1, 0),
        (torch.tensor([1e300], dtype=torch.float64), "F64", "BF16", 1, 0),
    ],
    ids=lambda value: str(value.tolist()) if isinstance(value, torch.Tensor) else str(value),
)
def test_what_counts_as_overflow_and_as_truncation(given: torch.Tensor, source: str, target: str, overflowed: int, truncated: int) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, found = run(given, source, target)
    assert (found.overflowed, found.truncated) == (overflowed, truncated)
    if overflowed or truncated:
        with pytest.raises(CastError):
            refuse_losses([found], [])
        refuse_losses([found], ["key"])
        refuse_losses([found], ["*"])
        assert reported([found]) == (found,)


def test_finite_values_are_counted_the_same_beside_one_that_is_not() -> None:
    """A NaN takes the whole piece off the short way."""
    given = torch.randn(500, generator=torch.Generator().manual_seed(0))
    for target in ("F16", "BF16", "F64", "F8_E5M2"):
        alone, beside = run(given, "F32", target)[1], run(torch.cat([given, torch.tensor([float("nan")])]), "F32", target)[1]
        assert alone == beside
        assert alone.changed == int((given != given.to(dtype_of(target)).float()).sum())


def test_the_largest_error_and_the_count_over_all_parts() -> None:
    given = torch.tensor([1.0, 1.0 + 2**-12, 3.0, 1000.3, 2.0])
    _, found = run(given, "F32", "F16", part=1)
    error = (given.double() - given.half().double()).abs()
    assert found == Cast("key", "F32", "F16", float(error.max()), int((error > 0).sum()))
    _, exact = run(torch.tensor([1.0, 2.0, float("nan"), -0.0]), "F32", "BF16")
    assert reported([exact]) == ()


def test_complex_parts_count_apart() -> None:
    given = torch.tensor([1 + 2**-30 * 1j, 1 / 3 + 1j / 7], dtype=torch.complex128)
    _, found = run(given, "C128", "C64")
    error = torch.view_as_real(given) - torch.view_as_real(given.to(torch.complex64)).double()
    assert found.largest_error == float(error.abs().max())


def test_all_refused_keys_are_named_at_once() -> None:
    casts = [Cast("a:b", "F32", "F16", overflowed=2), Cast("c", "F32", "I64", truncated=1), Cast("fine", "F32", "F16", 0.1, 3)]
    with pytest.raises(CastError) as caught:
        refuse_losses(casts, [])
    assert caught.value.problems == ("a:b: F32 to F16: 2 values overflow", "c: F32 to I64: 1 value truncated")
    assert "allow_cast=[a:b]" in (caught.value.hint or "").replace("'", "")
    with pytest.raises(CastError) as caught:
        refuse_losses(casts, ["a*"])
    assert len(caught.value.problems) == 1
    refuse_losses(casts, ["a*", "c"])


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.code)
def test_memory_of_and_back(row: object) -> None:
    code, size = row.code, row.size  # type: ignore[attr-defined]
    raw = bytes(i % 2 for i in range(6 * size))
    tensor = tensor_from(raw, code)
    assert tensor.numel() == 6
    assert memory_of(tensor) == raw
    assert memory_of(tensor.view(2, 3).t().t()) == raw
    assert tensor_from(b"", code).numel() == 0
    turned = bytearray(memory_of(tensor.view(2, 3).t()))
    meta = TensorMeta("k", code, (3, 2), (1, 3), Span("f", 0, 6 * size, "s"))
    assert densify(meta, bytearray(raw)) == turned


def test_memory_of_a_conjugate_view_are_the_conjugates() -> None:
    tensor = torch.tensor([1 + 2j, 3 - 4j])
    assert memory_of(tensor.conj()) == memory_of(torch.tensor([1 - 2j, 3 + 4j]))
    assert memory_of(tensor.conj().imag) == memory_of(torch.tensor([-2.0, 4.0]))


@pytest.mark.parametrize("row", [row for row in TABLE if row.kind in ("float", "complex")], ids=lambda row: row.code)
def test_non_finite_values_are_counted_in_every_float(row: object) -> None:
    code = row.code  # type: ignore[attr-defined]
    given = torch.tensor([1.0, float("nan"), 2.0, float("nan")]).to(dtype_of(code))
    assert count_non_finite([memory_of(given)[: 2 * row.size], memory_of(given)[2 * row.size :]], code) == 2  # type: ignore[attr-defined]
    assert count_non_finite([memory_of(torch.ones(3).to(dtype_of(code)))], code) == 0


@settings(max_examples=examples(300), deadline=None)
@given(
    code=st.sampled_from([row.code for row in TABLE if row.kind in ("float", "complex")]),
    data=st.lists(st.sampled_from(sorted({0, 1, 0x3C, 0x7B, 0x7C, 0x7F, 0x80, 0xFC, 0xFF})) | st.integers(0, 255), max_size=200).map(bytes),
    piece=st.integers(1, 40),
    columns=st.integers(1, 5),
)
def test_non_finite_values_are_counted_as_torch_tells_them(code: str, data: bytes, piece: int, columns: int) -> None:
    size = BY_CODE[code].size * columns
    data = data[: len(data) // size * size]
    given = tensor_from(data, code).view(-1, columns)
    parts = torch.view_as_real(given) if given.is_complex() else given
    expected = int((~torch.isfinite(parts.double())).sum())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(values, "PIECE", piece)
        assert non_finite(given) == non_finite(given.t()) == expected
        assert count_non_finite([data[start : start + size] for start in range(0, len(data), size)], code) == expected


def test_a_sum_of_finite_values_that_overflows_is_no_infinity() -> None:
    for dtype in (torch.float16, torch.float32, torch.bfloat16, torch.float64):
        assert non_finite(torch.full((70_000,), torch.finfo(dtype).max, dtype=dtype)) == 0
    assert non_finite(torch.tensor([2.0, math.inf, -math.inf, math.nan])) == 3  # whose sum is a NaN
    assert non_finite(torch.tensor([1 + 1j, complex(math.nan, math.inf)]).conj()) == 2
    assert non_finite(torch.arange(5)) == non_finite(torch.tensor(1.0)) == 0


def test_pieces_do_not_change_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    given = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 1e5
    whole = run(given, "F32", "F16")
    monkeypatch.setattr(values, "PIECE", 13)
    assert run(given, "F32", "F16", part=101) == whole
