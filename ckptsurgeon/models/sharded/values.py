"""A target key's value, of which each rank uses its own blocks.

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
from ckptsurgeon.models.sharded.blocks import Part, bands, narrowed
from ckptsurgeon.report import Cast
from ckptsurgeon.storage.pieces import Block
from ckptsurgeon.streaming.losses import added
from ckptsurgeon.streaming.reading import Reader
from ckptsurgeon.streaming.values import cast, memory_of, tensor_from
from ckptsurgeon.tensors import TensorMeta


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
