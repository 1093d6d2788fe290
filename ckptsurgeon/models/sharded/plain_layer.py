"""A layer as it would be on one machine: its class without FSDP's, whole parameters without values, no hooks.

Schemes that ask the layer itself (`reset`, `per_layer_type`) get this one, and so give every rank, on every mesh, the same whole value.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from ckptsurgeon.models.target.sharding import is_sharded, own_class


def plain_layer(module: nn.Module) -> nn.Module:
    """The module itself where nothing of it, or below it, is sharded; else such a copy of it and of all below, whose sharded tensors are
    whole ones on meta. Other attributes are shared, and the module is unchanged.

    >>> layer = nn.Linear(3, 2)
    >>> plain_layer(layer) is layer
    True
    """
    if not any(is_sharded(tensor) for tensor in (*module.parameters(), *module.buffers())):
        return module
    return _copied(module)


def _copied(module: nn.Module) -> nn.Module:
    kind: Any = own_class(module)
    made: nn.Module = kind.__new__(kind)
    own = {name: OrderedDict() if isinstance(value, OrderedDict) and "hooks" in name else value for name, value in vars(module).items()}
    own["_parameters"] = {name: _whole(one) for name, one in module._parameters.items()}
    own["_buffers"] = {name: _whole(one) for name, one in module._buffers.items()}
    own["_modules"] = {name: None if child is None else _copied(child) for name, child in module._modules.items()}
    vars(made).update(own)
    return made


def _whole(tensor: torch.Tensor | None) -> torch.Tensor | None:
    if tensor is None or not is_sharded(tensor):
        return tensor
    whole = torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device="meta")
    return nn.Parameter(whole, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else whole
