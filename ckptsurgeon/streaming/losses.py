"""The exact losses of a cast: every value is the sum of two float64, so that integers beyond 2**53 are compared exactly.

A 64-bit integer is a multiple of 2**32 and a rest; any other real value is one float64. The difference of two such sums rounds at most
once, and is zero only where the values are equal.
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from ckptsurgeon.dtypes import BY_CODE, widens
from ckptsurgeon.report import Cast

if TYPE_CHECKING:
    import torch

    Sum = tuple[torch.Tensor, torch.Tensor | None]  # float64, of which the second is None for zeros

_SATURATES = "F8_E4M3"  # infinities included
_POSITIVE = "F8_E8M0"
_HALF = 1 << 32
_MOST = (1 << 63) - 1


def added(total: Cast, part: Cast) -> Cast:
    """The losses of a tensor so far, and of one more part of it."""
    return replace(
        total,
        largest_error=max(total.largest_error, part.largest_error),
        changed=total.changed + part.changed,
        overflowed=total.overflowed + part.overflowed,
        truncated=total.truncated + part.truncated,
    )


def losses(before: torch.Tensor, after: torch.Tensor, of: Cast) -> Cast:
    """The losses of the cast `of` from `before` to `after`, both flat. The error is that of a real or imaginary part."""
    return losses_of_finite(before, after, of) or losses_of_any(before, after, of)


def losses_of_finite(before: torch.Tensor, after: torch.Tensor, of: Cast) -> Cast | None:
    """The losses of a cast between floats where nothing overflows or is not finite, or of one that loses nothing; else None."""
    import torch

    if widens(of.source_dtype, of.target_dtype):
        return Cast(of.key, of.source_dtype, of.target_dtype)
    if not before.is_floating_point() or BY_CODE[of.target_dtype].kind != "float" or of.target_dtype == _POSITIVE or not before.numel():
        return None
    # A value less the nearest one of a narrower dtype has no more digits than the value: the difference is exact.
    exact = torch.float64 if before.dtype == torch.float64 else torch.float32
    error = floats(after, exact).sub_(floats(before, exact))
    least, most = torch.aminmax(error)
    largest = max(abs(float(least)), abs(float(most)))
    bound = _limit(after.dtype) - torch.finfo(after.dtype).max if of.target_dtype == _SATURATES else math.inf
    if not largest < bound:
        return None
    assert error.numel() <= 1 << 24  # a sum of so many ones is exact in float32, and faster than counting
    return Cast(of.key, of.source_dtype, of.target_dtype, largest, int(error.ne_(0).sum()) if largest else 0)


def losses_of_any(before: torch.Tensor, after: torch.Tensor, of: Cast) -> Cast:
    """The losses of any cast."""
    import torch

    changed, overflowed, truncated = (torch.zeros(before.shape, dtype=torch.bool) for _ in range(3))
    largest = 0.0
    for old, new in _real_parts(before, after):
        over = torch.zeros_like(changed) if new is None else _overflowed(old, new, of)
        cut = old != 0 if new is None else _truncated(old, of) & ~over
        error, same = _difference(old, new)
        counted = error[_finite(old) & ~over]
        largest = max(largest, float(counted.max()) if counted.numel() else 0.0)
        changed, overflowed, truncated = changed | ~same, overflowed | over, truncated | cut
    return Cast(of.key, of.source_dtype, of.target_dtype, largest, int(changed.sum()), int(overflowed.sum()), int(truncated.sum()))


def _real_parts(before: torch.Tensor, after: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
    """What is to be held against what; None stands for an imaginary part that the other dtype has no place for."""
    if not before.is_complex():
        return [(before, after.real if after.is_complex() else after)]
    return [(before.real, after.real), (before.imag, after.imag)] if after.is_complex() else [(before.real, after), (before.imag, None)]


def _overflowed(before: torch.Tensor, after: torch.Tensor, of: Cast) -> torch.Tensor:
    """Finite values that became infinite, saturated or wrapped, and whatever no integer can stand for."""
    import torch

    kind = BY_CODE[of.target_dtype].kind
    if kind == "bool":
        return torch.zeros(before.shape, dtype=torch.bool)
    if kind != "int":
        value = wide(before)
        beyond = (value.abs() >= _limit(after.dtype)) & (wide(after) != value)
        return (_finite(before) & ~_finite(after)) | beyond | ((value < 0) & (wide(after) > 0))
    info = torch.iinfo(after.dtype)
    if before.is_floating_point():
        # 2**63 itself is a float, the largest integer below it is not.
        whole = wide(before).trunc()
        return ~_finite(before) | (whole < float(info.min)) | (whole >= float(info.max) + 1.0)
    if before.dtype == torch.uint64:  # as signed, what is beyond 2**63 is below zero
        return (before.view(torch.int64) < 0) | (before.view(torch.int64) > min(info.max, _MOST))
    return (before.long() < info.min) | (before.long() > min(info.max, _MOST))


def _truncated(before: torch.Tensor, of: Cast) -> torch.Tensor:
    """Values that lose their fraction to an integer, or all but their truth to a boolean."""
    import torch

    kind = BY_CODE[of.target_dtype].kind
    value = wide(before)
    if kind == "bool":
        return (value != 0) & (value != 1)
    return (value != value.trunc()) if kind == "int" else torch.zeros(before.shape, dtype=torch.bool)


def _difference(before: torch.Tensor, after: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The absolute difference, and where the two are the same, NaN like NaN."""
    if after is None:
        return wide(before).abs(), before == 0
    (high, low), (other, more) = _sum(before), _sum(after)
    error = high - other
    for rest, sign in ((low, 1), (more, -1)):
        if rest is not None:
            error = error.add(rest, alpha=sign)
    if not (before.is_floating_point() and after.is_floating_point()):
        return error.abs(), error == 0
    return error.abs(), (high == other) | ((high != high) & (other != other))


def _sum(tensor: torch.Tensor) -> Sum:
    """Two float64 whose sum is exactly the value."""
    import torch

    if tensor.dtype == torch.int64:
        rest = tensor.fmod(_HALF)  # of the value's own sign
        return (tensor - rest).double(), rest.double()
    if tensor.dtype == torch.uint64:
        bits = tensor.view(torch.int64)
        return ((bits >> 32) & (_HALF - 1)).double() * _HALF, (bits & (_HALF - 1)).double()
    return wide(tensor), None


def wide(tensor: torch.Tensor) -> torch.Tensor:
    """The same values as float64, which holds all but 64-bit integers exactly."""
    return tensor.double()


def floats(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same values in a wider float dtype; those of an 8-bit float by a table, since torch converts them one by one."""
    import torch

    if tensor.element_size() > 1:
        return tensor.to(dtype)
    return _table(tensor.dtype, dtype).index_select(0, tensor.reshape(-1).view(torch.uint8).int()).view(tensor.shape)


@cache
def _table(narrow: torch.dtype, dtype: torch.dtype) -> torch.Tensor:
    """The values of all 256 codes of an 8-bit float."""
    import torch

    return torch.arange(256, dtype=torch.uint8).view(narrow).to(dtype)


def _finite(tensor: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.isfinite(wide(tensor)) if tensor.is_floating_point() else torch.ones(tensor.shape, dtype=torch.bool)


def _limit(dtype: torch.dtype) -> float:
    """The least number that no longer rounds to a float dtype's largest value."""
    import torch

    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    step = float((torch.ones(1).to(dtype).view(bits) + 1).view(dtype).double()) - 1  # `finfo.eps` of F8_E5M2FNUZ is half of it
    most = torch.finfo(dtype).max
    return float(most + math.ldexp(step, math.frexp(most)[1] - 2))
