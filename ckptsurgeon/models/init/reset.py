"""The scheme `reset`: the value that a module's own `reset_parameters` gives, without building the rest of the model.

`reset_parameters` runs on a copy of that module on the CPU, under a forked random state, so neither the model nor torch's random state
changes; the module may be on meta. The copy's tensors are overwritten first, so that a tensor which `reset_parameters` does not set is
recognised and refused.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import nn

from ckptsurgeon.errors import RuleError
from ckptsurgeon.models.target import user_code
from ckptsurgeon.models.target.build import forked


def reset_value(module: nn.Module, key: str, seed: int, leaf: str | None = None) -> torch.Tensor:
    """The tensor that `key` names in `module` after `module.reset_parameters()`, on the CPU, in the module's own dtype and shape.

    Args:
        module: the layer that owns the key. Its children are reset only if its `reset_parameters` does so.
        seed: seeds the random state under which it runs. All tensors of a module come from runs with the same seed.
        leaf: the tensor's name in the layer; by default the key's last segment.

    Raises:
        RuleError: the module has no `reset_parameters`, or it does not set this tensor, or sets it to NaN.
        TargetError: `reset_parameters` fails, or the module can't be copied.

    >>> reset_value(nn.LayerNorm(2), "norm.weight", 0)
    tensor([1., 1.])
    """
    kind, hint = type(module).__name__, f"name another scheme: init={{{key!r}: 'zeros'}}, or model for the constructor's value"
    if not callable(getattr(module, "reset_parameters", None)):
        raise RuleError(f"its layer, a {kind}, has no reset_parameters", key=key, hint=hint)
    name = leaf or key.rpartition(".")[2]
    value = _run(module, name, seed, 0)
    if value is None:
        raise RuleError(f"the {kind}'s reset_parameters leaves no such tensor", key=key, hint=hint)
    if value.is_floating_point() or value.is_complex():
        unset = torch.isnan(value if value.is_complex() or value.dtype == torch.float64 else value.to(torch.float32))
    else:
        again = _run(module, name, seed, 1)
        unset = torch.ones((), device="cpu") if again is None or again.shape != value.shape else value != again
    if bool(unset.any()):
        how = "does not set this" if bool(unset.all()) else "does not set all of this"
        raise RuleError(f"the {kind}'s reset_parameters {how}", key=key, hint=hint)
    return value


def own_tensor(module: nn.Module | None, key: str) -> torch.Tensor | None:
    """The parameter or buffer of `module` itself whose name is the key's last segment."""
    name = key.rpartition(".")[2]
    tensor = getattr(module, "_parameters", {}).get(name)
    if tensor is None:
        tensor = getattr(module, "_buffers", {}).get(name)
    return tensor if isinstance(tensor, torch.Tensor) else None


def _run(module: nn.Module, name: str, seed: int, prefill: int) -> torch.Tensor | None:
    """The tensor after one run on a copy whose tensors were filled with NaN, or with `prefill` if their dtype has no NaN."""

    def run() -> torch.Tensor | None:
        layer = _on_cpu(module, name, prefill)
        reset: object = layer.reset_parameters
        assert callable(reset)
        reset()
        tensor = own_tensor(layer, name)
        return None if tensor is None else tensor.detach()

    with forked(seed), torch.device("cpu"):
        return user_code.call(type(module).__name__, run)


def _on_cpu(module: nn.Module, name: str, prefill: int) -> nn.Module:
    """A copy on the CPU whose own parameters and tensor `name` are overwritten; for a module on meta, all its tensors are."""
    layer = copy.deepcopy(module)
    tensors = [*layer.parameters(), *layer.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        layer.to_empty(device="cpu")
        overwritten = [*layer.parameters(), *layer.buffers()]
    else:
        layer.to("cpu")
        requested = own_tensor(layer, name)
        overwritten = [*layer.parameters(recurse=False), *([] if requested is None else [requested])]
    with torch.no_grad():
        for tensor in overwritten:
            tensor.fill_(math.nan if tensor.is_floating_point() or tensor.is_complex() else prefill)
    return layer
