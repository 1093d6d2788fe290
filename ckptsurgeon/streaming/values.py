"""Changes of value or layout by torch, a chunk at a time: casts, which count their losses, and making a strided tensor dense.

torch is imported inside the functions: a merge that only moves bytes never loads it. Chunks are whole elements.

Losses are exact: every value is the sum of two float64, so that integers beyond 2**53 are compared exactly. A 64-bit integer is a multiple
of 2**32 and a rest; any other real value is one float64. The difference of two such sums rounds at most once, and is zero only where the
values are equal.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from math import isfinite, prod
from typing import TYPE_CHECKING, Any

from ckptsurgeon.dtypes import BY_CODE, BY_TORCH, widens
from ckptsurgeon.errors import CastError
from ckptsurgeon.report import Cast
from ckptsurgeon.rules.patterns import compile_pattern
from ckptsurgeon.tensors import TensorMeta

if TYPE_CHECKING:
    import torch

    Sum = tuple[torch.Tensor, torch.Tensor | None]  # float64, of which the second is None for zeros

Buffer = bytes | bytearray | memoryview
# Elements that are computed at a time: few enough to stay in a processor's cache, many enough that calling torch costs little.
PIECE = 1 << 17
_SATURATES = "F8_E4M3"  # infinities included
_POSITIVE = "F8_E8M0"
_HALF = 1 << 32
_MOST = (1 << 63) - 1


def tensor_from(data: Buffer, dtype: str) -> torch.Tensor:
    """A one-dimensional tensor of the dtype with safetensors' code `dtype`, over `data` itself where torch can work there."""
    import torch

    kind = getattr(torch, BY_CODE[dtype].torch)
    if not len(data):
        return torch.empty(0, dtype=kind)
    if memoryview(data).readonly:
        data = bytearray(data)
    found = torch.frombuffer(data, dtype=kind)
    # torch takes alignment for granted (its vector instructions crash without), and a legacy file has none.
    return found if found.data_ptr() % kind.itemsize == 0 else torch.frombuffer(bytearray(data), dtype=kind)


def code_of(tensor: torch.Tensor) -> str:
    """The code of a tensor's dtype."""
    return BY_TORCH[str(tensor.dtype).removeprefix("torch.")].code


def memory_of(tensor: torch.Tensor) -> memoryview:
    """A tensor's elements as read-only bytes, densely in row-major order, without NumPy and for every dtype.

    A dense CPU tensor is not copied: the view shows its memory, and keeps it alive.
    """
    dense = tensor.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
    size = dense.numel() * dense.element_size()
    if not size:
        return memoryview(b"")
    import ctypes

    buffer: Any = (ctypes.c_ubyte * size).from_address(dense.data_ptr())
    buffer.owner = dense
    return memoryview(buffer).cast("B").toreadonly()


def densify(tensor: TensorMeta, data: bytearray) -> bytearray:
    """The dense bytes of a tensor, strided or lazily changed, whose elements lie within `data`, the first one at its start."""
    import torch

    if not prod(tensor.shape):
        return bytearray()
    lazy = () if tensor.span is None else tensor.span.lazy
    found = tensor_from(data, tensor.dtype).as_strided(tensor.shape, tensor.stride)
    found = found.conj() if "conj" in lazy else found
    return bytearray(memory_of(torch._neg_view(found) if "neg" in lazy else found))


def cast(key: str, parts: Iterable[Buffer], source: str, target: str, casts: list[Cast]) -> Iterator[Buffer]:
    """A tensor's bytes, part by part (each a whole number of elements), cast from dtype code `source` to `target`.

    What was lost is added to `casts` when the last part is taken.
    """
    import torch

    kind = getattr(torch, BY_CODE[target].torch)
    total = Cast(key, source, target)
    for part in parts:
        whole = tensor_from(part, source)
        for start in range(0, whole.numel(), PIECE):
            before = whole[start : start + PIECE]
            # That an imaginary part is left out, of which torch warns, is counted here.
            with warnings.catch_warnings(action="ignore") if before.is_complex() else nullcontext():
                after = before.to(kind)
            total = added(total, losses(before, after, total))
            yield memory_of(after)
    casts.append(total)


def refused_losses(casts: Iterable[Cast], allowed: Iterable[str]) -> list[Cast]:
    """The casts that overflow or truncate, and whose key no pattern of `allowed` names."""
    lossy = [found for found in casts if found.overflowed or found.truncated]
    patterns = [compile_pattern(pattern) for pattern in allowed] if lossy else []
    return [found for found in lossy if not any(pattern.match(found.key) is not None for pattern in patterns)]


def refuse_losses(casts: Iterable[Cast], allowed: Iterable[str]) -> None:
    """Raises CastError for all of `refused_losses` at once."""
    refused = refused_losses(casts, allowed)
    if refused:
        raise CastError(
            "casts that would not keep the values",
            problems=tuple(f"{found.key}: {found.source_dtype} to {found.target_dtype}: {_lost(found)}" for found in refused),
            hint=f"keep the source's dtype: dtype='source', or allow it by name: allow_cast=[{refused[0].key!r}]",
        )


def _lost(found: Cast) -> str:
    counts = ((found.overflowed, "overflow"), (found.truncated, "truncated"))
    return " and ".join(f"{count} value{'s' if count > 1 else ''} {word}" for count, word in counts if count)


def reported(casts: Iterable[Cast]) -> tuple[Cast, ...]:
    """The casts that lost anything."""
    return tuple(found for found in casts if found.changed or found.overflowed or found.truncated)


def count_non_finite(parts: Iterable[Buffer], dtype: str) -> int:
    """How many values of a tensor's bytes (part by part, each whole elements) are NaN or infinite; 0 for integers."""
    if BY_CODE[dtype].kind not in ("float", "complex"):
        return 0
    return sum(non_finite(tensor_from(part, dtype)) for part in parts)


def non_finite(tensor: torch.Tensor) -> int:
    """How many values of a tensor are NaN or infinite; of a complex one, real and imaginary parts are values."""
    import torch

    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    if not tensor.is_floating_point() or not tensor.numel():
        return 0
    count = 0
    rows = tensor.view(-1) if tensor.is_contiguous() else tensor  # never made dense as a whole
    for piece in torch.split(rows, max(1, PIECE * len(rows) // rows.numel())):
        values = floats(piece, torch.float32) if piece.element_size() == 1 else piece
        if not isfinite(float(values.sum())):  # a sum with one of them is one; finite values may also overflow
            count += int(torch.count_nonzero(~torch.isfinite(values)))
    return count


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
        value = before.double()
        beyond = (value.abs() >= _limit(after.dtype)) & (after.double() != value)
        return (_finite(before) & ~_finite(after)) | beyond | ((value < 0) & (after.double() > 0))
    info = torch.iinfo(after.dtype)
    if before.is_floating_point():
        # 2**63 itself is a float, the largest integer below it is not.
        whole = before.double().trunc()
        return ~_finite(before) | (whole < float(info.min)) | (whole >= float(info.max) + 1.0)
    if before.dtype == torch.uint64:  # as signed, what is beyond 2**63 is below zero
        return (before.view(torch.int64) < 0) | (before.view(torch.int64) > min(info.max, _MOST))
    return (before.long() < info.min) | (before.long() > min(info.max, _MOST))


def _truncated(before: torch.Tensor, of: Cast) -> torch.Tensor:
    """Values that lose their fraction to an integer, or all but their truth to a boolean."""
    import torch

    kind = BY_CODE[of.target_dtype].kind
    value = before.double()
    if kind == "bool":
        return (value != 0) & (value != 1)
    return (value != value.trunc()) if kind == "int" else torch.zeros(before.shape, dtype=torch.bool)


def _difference(before: torch.Tensor, after: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """The absolute difference, and where the two are the same, NaN like NaN."""
    if after is None:
        return before.double().abs(), before == 0
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
    return tensor.double(), None


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

    return torch.isfinite(tensor.double()) if tensor.is_floating_point() else torch.ones(tensor.shape, dtype=torch.bool)


def _limit(dtype: torch.dtype) -> float:
    """The least number that no longer rounds to a float dtype's largest value."""
    import torch

    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    step = float((torch.ones(1).to(dtype).view(bits) + 1).view(dtype).double()) - 1  # `finfo.eps` of F8_E5M2FNUZ is half of it
    most = torch.finfo(dtype).max
    return float(most + math.ldexp(step, math.frexp(most)[1] - 2))
