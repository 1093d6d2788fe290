"""Blocks of a model's tensors with their memory on this rank, and cutting a block into bands."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ckptsurgeon.storage.pieces import Block

BAND = 16 << 20  # bytes of a block that are in memory at a time


@dataclass(frozen=True)
class Part:
    """A block of the tensor `key` and this rank's memory for it, which has the block's shape."""

    key: str
    block: Block
    memory: torch.Tensor


def bands(block: Block, itemsize: int, nbytes: int = BAND) -> Iterator[Block]:
    """A block cut along its first dimensions into blocks of at most `nbytes` bytes (or of one element), in row-major order.

    >>> list(bands(((0, 3), (2, 4)), itemsize=4, nbytes=16))
    [((0, 2), (2, 4)), ((2, 3), (2, 4))]
    """
    sizes = [stop - start for start, stop in block]
    row = itemsize
    for size in sizes[1:]:
        row *= size
    if not sizes or row * sizes[0] <= nbytes:
        yield block
        return
    (start, stop), rest = block[0], block[1:]
    if row > nbytes and rest:
        for index in range(start, stop):
            for band in bands(rest, itemsize, nbytes):
                yield ((index, index + 1), *band)
        return
    step = max(1, nbytes // row)
    for index in range(start, stop, step):
        yield ((index, min(index + step, stop)), *rest)


def narrowed(tensor: torch.Tensor, block: Block, origin: Block | None = None) -> torch.Tensor:
    """A view of a block of a tensor. If `tensor` is itself only a block, `origin` says which.

    >>> narrowed(torch.tensor([7, 8]), ((3, 4),), origin=((2, 4),)).tolist()
    [8]
    """
    for dim, (start, stop) in enumerate(block):
        first = 0 if origin is None else origin[dim][0]
        tensor = tensor.narrow(dim, start - first, stop - start)
    return tensor
