"""Makes an unsharded copy of a layer: its class without FSDP's, whole parameters without values, no hooks.

Schemes that need the layer (`reset`, `per_layer_type`) get this copy, and so give the same whole value on every rank and every mesh.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch
from torch import nn

from ckptsurgeon.models.target.sharding import is_sharded, own_class


def plain_layer(module: nn.Module) -> nn.Module:
    """The module itself if none of its tensors is sharded; else a copy of it and its submodules, with whole tensors on meta for the sharded
    ones. Other attributes are shared. The module is unchanged.

    >>> layer = nn.Linear(3, 2)
    >>> plain_layer(layer) is layer
    True
    """
    if not any(is_sharded(tensor) for tensor in (*module.parameters(), *module.buffers())):
        return module
    return _copied(module)


def _copied(module: nn.Module) -> nn.Module:
    kind: Any = own_class(module)
    copy: nn.Module = kind.__new__(kind)
    attributes = {
        name: OrderedDict() if isinstance(value, OrderedDict) and "hooks" in name else value for name, value in vars(module).items()
    }
    attributes["_parameters"] = {name: _whole(tensor) for name, tensor in module._parameters.items()}
    attributes["_buffers"] = {name: _whole(tensor) for name, tensor in module._buffers.items()}
    attributes["_modules"] = {name: None if child is None else _copied(child) for name, child in module._modules.items()}
    vars(copy).update(attributes)
    return copy


def _whole(tensor: torch.Tensor | None) -> torch.Tensor | None:
    if tensor is None or not is_sharded(tensor):
        return tensor
    whole = torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device="meta")
    return nn.Parameter(whole, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else whole
