"""Computing in a wider dtype than that of the values, one block of elements at a time, to use little memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING

from ckptsurgeon.adapters.op import Tensor

if TYPE_CHECKING:
    import torch

BLOCK_ELEMENTS = 1 << 20  # elements at a time


def blocks(shape: Sequence[int], whole: int | None = None) -> Iterator[tuple[slice, ...]]:
    """Slices that cut a tensor along its longest dim (never `whole`) into blocks of about BLOCK_ELEMENTS elements."""
    dims = [dim for dim in range(len(shape)) if dim != whole]
    if not dims:
        yield ()
        return
    longest = max(dims, key=shape.__getitem__)
    step = max(1, BLOCK_ELEMENTS * shape[longest] // max(prod(shape), 1))
    for start in range(0, shape[longest], step):
        yield (*(slice(None),) * longest, slice(start, start + step))


def rows_at_a_time(shape: Sequence[int]) -> int:
    """How many rows of a tensor have about BLOCK_ELEMENTS elements."""
    return max(1, BLOCK_ELEMENTS * shape[0] // max(1, prod(shape)))


def wide(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute in: float32, or float64 where one tensor has 64-bit parts; complex where one is."""
    import torch

    double = any(tensor.dtype in (torch.float64, torch.complex128) for tensor in tensors)
    if any(tensor.is_complex() for tensor in tensors):
        return torch.complex128 if double else torch.complex64
    return torch.float64 if double else torch.float32


def in_words(dtype: torch.dtype) -> str:
    """A dtype as messages name it."""
    return str(dtype).removeprefix("torch.")


def widened(tensor: Tensor) -> Tensor:
    """The tensor in the dtype to compute in."""
    return tensor.to(wide(tensor))
