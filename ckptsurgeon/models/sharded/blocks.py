"""Which blocks of a model's tensors are this rank's own, as torch's load planner tells it, and cutting a block into bands.

A plain tensor is one block, the whole; a sharded one may be several, or none. The planner is asked, and nothing is communicated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner

from ckptsurgeon.storage.pieces import Block

BAND = 16 << 20  # bytes of a block that are held at a time


@dataclass(frozen=True)
class Part:
    """A block of the tensor `key` and this rank's memory for it, which has the block's shape."""

    key: str
    block: Block
    memory: torch.Tensor


def whole_tensors(state: Mapping[str, torch.Tensor]) -> Metadata:
    """What torch's planner takes for a checkpoint in which each of these tensors is one chunk."""
    rows: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for key, tensor in state.items():
        size = torch.Size(tensor.shape)
        chunk = ChunkStorageMetadata(torch.Size([0] * len(size)), size)
        rows[key] = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), size, [chunk])
    return Metadata(rows)


def parts_of(plan: LoadPlan, planner: LoadPlanner) -> Iterator[Part]:
    """The parts that a plan of torch's reads, of tensors that are whole in their checkpoint."""
    for item in plan.items:
        block = tuple((start, start + size) for start, size in zip(item.storage_offsets, item.lengths, strict=True))
        yield Part(item.storage_index.fqn, block, planner.resolve_tensor(item).detach())


def own_parts(state: Mapping[str, torch.Tensor]) -> list[Part]:
    """The parts of tensors that are this rank's own.

    >>> [part.block for part in own_parts({"w": torch.zeros(2, 3)})]
    [((0, 2), (0, 3))]
    """
    planner = DefaultLoadPlanner(allow_partial_load=True)
    planner.set_up_planner(dict(state), whole_tensors(state), False)
    return list(parts_of(planner.create_local_plan(), planner))


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
        for at in range(start, stop):
            for band in bands(rest, itemsize, nbytes):
                yield ((at, at + 1), *band)
        return
    step = max(1, nbytes // row)
    for at in range(start, stop, step):
        yield ((at, min(at + step, stop)), *rest)


def narrowed(tensor: torch.Tensor, block: Block, origin: Block | None = None) -> torch.Tensor:
    """The view of a block within a tensor; `origin`: the block that the tensor itself is.

    >>> narrowed(torch.tensor([7, 8]), ((3, 4),), origin=((2, 4),)).tolist()
    [8]
    """
    for dim, (start, stop) in enumerate(block):
        first = 0 if origin is None else origin[dim][0]
        tensor = tensor.narrow(dim, start - first, stop - start)
    return tensor
