"""Recognises tensors that are sharded over ranks, and gives this rank's part of one.

A sharded tensor is a DTensor of torch: FSDP2, tensor parallelism and combinations of both make nothing else. Nothing is communicated here.
`torch.distributed.tensor`, which takes a second to import, is not imported: if nobody has imported it, there is no such tensor.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ckptsurgeon.errors import ModelError

_TENSORS, _FLAT, _REPLICATED = "torch.distributed.tensor", "torch.distributed.fsdp", "torch.nn.parallel"


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a DTensor: each rank has a part or a copy of it.

    >>> is_sharded(torch.zeros(2))
    False
    """
    return _is(tensor, _TENSORS, "DTensor")


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's part of a sharded tensor, with the same memory; any other tensor itself.

    >>> local(torch.ones(2))
    tensor([1., 1.])
    """
    if not is_sharded(tensor):
        return tensor
    sharded: Any = tensor
    with torch.no_grad():
        part: torch.Tensor = sharded.to_local()
    return part


def over_ranks(model: nn.Module) -> bool:
    """Whether a model is spread over the ranks of a process group: it has sharded tensors, or is in DistributedDataParallel or
    FullyShardedDataParallel. All ranks must then do the same with it.

    >>> over_ranks(nn.Linear(3, 2))
    False
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return False
    wrapped = any(_is(module, _REPLICATED, "DistributedDataParallel") or _is_flat(module) for module in model.modules())
    return wrapped or any(map(is_sharded, (*model.parameters(), *model.buffers())))


def refuse_flat(modules: Iterable[nn.Module]) -> None:
    """ModelError for a model of FSDP's first version, which joins several parameters into flat ones."""
    if any(map(_is_flat, modules)):
        raise ModelError(
            "is in FullyShardedDataParallel, which joins parameters into flat ones",
            hint="shard it by torch.distributed.fsdp.fully_shard(model), or transfer before it is wrapped",
        )


def own_class(module: nn.Module) -> type[nn.Module]:
    """A module's class without the subclass that FSDP2 makes of it.

    >>> own_class(nn.Linear(3, 2)).__name__
    'Linear'
    """
    sharding = getattr(sys.modules.get(_FLAT), "FSDPModule", ())
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, sharding))


def _is_flat(module: nn.Module) -> bool:
    return _is(module, _FLAT, "FullyShardedDataParallel")


def _is(value: object, module: str, name: str) -> bool:
    """Whether a value is an instance of a class of torch; False if the class's module was never imported."""
    kind = getattr(sys.modules.get(module), name, None)
    return isinstance(kind, type) and isinstance(value, kind)
