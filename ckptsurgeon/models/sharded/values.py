"""A target key's value, of which each rank gets the blocks that are its own.

What lies in a file as it is wanted, or needs a cast alone, is `Stored`: any block of it is read by itself, straight into the model's
memory, and no other byte. All else is computed whole, narrowed to this rank's blocks and kept as `Ready`, before anything is changed.
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
    """The value of the target's `key` that lies in files, in the dtype of `meta`."""

    key: str
    meta: TensorMeta
    reader: Reader

    def into(self, part: Part) -> None:
        """Read a block into memory of any dtype, cast where it is another than the file's."""
        memory, kind = part.memory, getattr(torch, BY_CODE[self.meta.dtype].torch)
        if not memory.numel():
            return
        plain = memory.device.type == "cpu" and memory.is_contiguous() and not memory.is_conj() and not memory.is_neg()
        if plain and memory.dtype == kind:
            view: Any = (ctypes.c_ubyte * (memory.numel() * memory.element_size())).from_address(memory.data_ptr())
            self.reader.block_into(self.meta, part.block, memoryview(view).cast("B"))
            memory.view(-1)[:0].zero_()  # autograd learns that the tensor has changed
            return
        for band, values in self._bands(part.block):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that an imaginary part is left out, which `lost` counts
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
        """A block's values, some rows at a time where they can be read by themselves."""
        for band in bands(block, BY_CODE[self.meta.dtype].size) if self.meta.as_stored else [block]:
            data = self.reader.block(self.meta, band)
            yield band, tensor_from(data, self.meta.dtype).view([stop - start for start, stop in band])


@dataclass(frozen=True)
class Ready:
    """A value of which this rank's blocks are in memory."""

    blocks: Sequence[tuple[Block, torch.Tensor]]

    def into(self, part: Part) -> None:
        """Copy a block."""
        part.memory.copy_(next(values for block, values in self.blocks if block == part.block))


Value = Stored | Ready
