"""Changes of value or layout by torch, a chunk at a time: casts, which count their losses, and making a strided tensor dense.

torch is imported inside the functions: a merge that only moves bytes never loads it. Chunks are whole elements.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from math import isfinite, prod
from typing import TYPE_CHECKING, Any

from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.errors import CastError
from ckptsurgeon.report import Cast
from ckptsurgeon.rules.patterns import compile_pattern
from ckptsurgeon.streaming.losses import added, floats, losses
from ckptsurgeon.tensors import TensorMeta

if TYPE_CHECKING:
    import torch

Buffer = bytes | bytearray | memoryview
# Elements that are computed at a time: few enough to stay in a processor's cache, many enough that calling torch costs little.
PIECE = 1 << 17


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
