"""Kernel of `dequantize`: values of codes and scales in float32, some rows at a time where that is asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from ckptsurgeon.adapters.op import Op
from ckptsurgeon.adapters.scales import grid

if TYPE_CHECKING:
    import torch

    from ckptsurgeon.adapters.kernels.layout import Kernel

PIECE = 1 << 20  # elements at a time


def rows_at_a_time(shape: Sequence[int]) -> int:
    """How many rows of a tensor are about a piece."""
    return max(1, PIECE * shape[0] // max(1, _count(shape)))


def _count(shape: Sequence[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def values(codes: torch.Tensor, scale: torch.Tensor, op: Op, shape: Sequence[int], start: int = 0) -> torch.Tensor:
    """The values of codes, the rows from `start` of a tensor of `shape`; `scale` is that of the whole tensor."""
    import torch

    block = op["block"]
    factor = (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).float().reshape(grid(tuple(shape), block))
    for dim, part in enumerate(block):
        first = start if dim == 0 else 0
        if part:
            factor = factor.index_select(dim, torch.arange(first, first + codes.shape[dim]) // part)
    found = codes.float() * factor
    return found * (1 / op["divisor"]) if op["divisor"] != 1 else found  # rounded as bitsandbytes does it


def _dequantized(tensors: list[torch.Tensor], op: Op, _initial: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    import torch

    found = []
    for codes, scale in zip(tensors[::2], tensors[1::2], strict=True):
        out = torch.empty(codes.shape, dtype=torch.float32)
        if not codes.dim():
            out.copy_(values(codes, scale, op, codes.shape))
        step = rows_at_a_time(codes.shape) if codes.dim() else 1
        for start in range(0, len(codes) if codes.dim() else 0, step):
            out[start : start + step] = values(codes[start : start + step], scale, op, codes.shape, start)
        found.append(out)
    return found


KERNELS: dict[str, Kernel] = {"dequantize": _dequantized}
