"""Asks torch's load planner which blocks of a model's tensors belong to this rank.

A plain tensor is one block; of a sharded tensor, a rank may have several blocks or none. Nothing is communicated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

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

from ckptsurgeon.models.sharded.values import Part, Stored, narrowed
from ckptsurgeon.models.target.sharding import is_sharded
from ckptsurgeon.streaming.reading import Reader
from ckptsurgeon.tensors import TensorMeta


def whole_tensors(state: Mapping[str, torch.Tensor]) -> Metadata:
    """The metadata, for torch's planner, of a checkpoint in which each of these tensors is one chunk."""
    rows: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    for key, tensor in state.items():
        size = torch.Size(tensor.shape)
        chunk = ChunkStorageMetadata(torch.Size([0] * len(size)), size)
        rows[key] = TensorStorageMetadata(TensorProperties(dtype=tensor.dtype), size, [chunk])
    return Metadata(rows)


def parts_of(plan: LoadPlan, planner: LoadPlanner) -> Iterator[Part]:
    """The parts that torch's plan reads; in the checkpoint each tensor is whole."""
    for item in plan.items:
        block = tuple((start, start + size) for start, size in zip(item.storage_offsets, item.lengths, strict=True))
        yield Part(item.storage_index.fqn, block, planner.resolve_tensor(item).detach())


def own_parts(state: Mapping[str, torch.Tensor]) -> list[Part]:
    """This rank's parts of the tensors.

    >>> [part.block for part in own_parts({"w": torch.zeros(2, 3)})]
    [((0, 2), (0, 3))]
    """
    planner = DefaultLoadPlanner(allow_partial_load=True)
    planner.set_up_planner(dict(state), whole_tensors(state), False)
    return list(parts_of(planner.create_local_plan(), planner))


def spread(tensor: torch.Tensor, value: torch.Tensor | TensorMeta, reader: Reader) -> None:
    """Fill this rank's part of a sharded tensor from a sharded or whole tensor, or from a tensor in the reader's files."""
    if isinstance(value, torch.Tensor) and is_sharded(value):
        with torch.no_grad():
            tensor.copy_(value)
        return
    for part in own_parts({"": tensor}):
        if isinstance(value, TensorMeta):
            Stored(value.name, value, reader).into(part)
        else:
            part.memory.copy_(narrowed(value, part.block))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's whole value on the CPU. For a sharded tensor, all ranks must call this together."""
    sharded: Any = tensor
    with torch.no_grad():
        value: torch.Tensor = sharded.detach().full_tensor() if is_sharded(tensor) else tensor.detach()
    return value.cpu()
