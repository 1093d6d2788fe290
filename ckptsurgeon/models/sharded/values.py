"""Blocks of a model's tensors with their memory on this rank, and the values of which each rank uses its own blocks.

A value that is in a file, unchanged or up to a cast, is `Stored`: each block is read by itself, directly into the model's memory, and no
other byte. Any other value is computed whole, narrowed to this rank's blocks and kept as `Ready`, before anything is changed.
"""

from __future__ import annotations

import ctypes
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.report import Cast
from ckptsurgeon.storage.pieces import Block
from ckptsurgeon.streaming.reading import Reader
from ckptsurgeon.streaming.values import added, cast, memory_of, tensor_from
from ckptsurgeon.tensors import TensorMeta

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


@dataclass(frozen=True)
class Stored:
    """The value of the target's `key`, which is in files with the dtype of `meta`."""

    key: str
    meta: TensorMeta
    reader: Reader

    def into(self, part: Part) -> None:
        """Read a block into memory, with a cast if its dtype is not the file's."""
        memory, kind = part.memory, getattr(torch, BY_CODE[self.meta.dtype].torch)
        if not memory.numel():
            return
        plain = memory.device.type == "cpu" and memory.is_contiguous() and not memory.is_conj() and not memory.is_neg()
        if plain and memory.dtype == kind:
            view: Any = (ctypes.c_ubyte * (memory.numel() * memory.element_size())).from_address(memory.data_ptr())
            self.reader.block_into(self.meta, part.block, memoryview(view).cast("B"))
            memory.view(-1)[:0].zero_()  # bumps the version counter, so that autograd notices the change
            return
        for band, values in self._bands(part.block):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torch warns of a discarded imaginary part, which `lost` counts
                narrowed(memory, band, part.block).copy_(values.to(memory.dtype))

    def lost(self, block: Block, dtype: str) -> Cast:
        """What a cast of a block to `dtype` (safetensors' code) loses; the values are not kept."""
        total = Cast(self.key, self.meta.dtype, dtype)
        for _, values in self._bands(block):
            of_band: list[Cast] = []
            for _ in cast(self.key, [memory_of(values)], self.meta.dtype, dtype, of_band):
                pass
            total = added(total, of_band[0])
        return total

    def _bands(self, block: Block) -> Iterator[tuple[Block, torch.Tensor]]:
        """A block's values, a band of rows at a time if rows can be read by themselves."""
        for band in bands(block, BY_CODE[self.meta.dtype].size) if self.meta.as_stored else [block]:
            data = self.reader.block(self.meta, band)
            yield band, tensor_from(data, self.meta.dtype).view([stop - start for start, stop in band])


@dataclass(frozen=True)
class Ready:
    """A value whose blocks for this rank are in memory."""

    blocks: Sequence[tuple[Block, torch.Tensor]]

    def into(self, part: Part) -> None:
        """Copy a block."""
        part.memory.copy_(next(values for block, values in self.blocks if block == part.block))


Value = Stored | Ready
