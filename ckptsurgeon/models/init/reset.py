"""The scheme `reset`: what a module's own `reset_parameters` gives, without building the rest of the model.

It runs on a copy of that one module on the CPU, under a forked random state, so neither the model nor torch's random state
changes, and a module on meta will do. A tensor that `reset_parameters` leaves alone is told by what stood there before, and refused.
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
        seed: of the random state under which it runs; all tensors of a module come from one and the same run.
        leaf: the tensor's name in the layer; None where it is the key's last part.

    Raises:
        RuleError: the module has no `reset_parameters`, or that does not set this tensor, or sets it to NaN.
        TargetError: it fails, or the module can't be copied.

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


def held(module: nn.Module | None, key: str) -> torch.Tensor | None:
    """The parameter or buffer of `module` itself that has the key's last segment as its name."""
    name = key.rpartition(".")[2]
    found = getattr(module, "_parameters", {}).get(name)
    if found is None:
        found = getattr(module, "_buffers", {}).get(name)
    return found if isinstance(found, torch.Tensor) else None


def _run(module: nn.Module, name: str, seed: int, before: int) -> torch.Tensor | None:
    """One run, before which the tensor held `before`, or NaN where it can."""

    def run() -> torch.Tensor | None:
        copied = _on_cpu(module, name, before)
        reset: object = copied.reset_parameters
        assert callable(reset)
        reset()
        found = held(copied, name)
        return None if found is None else found.detach()

    with forked(seed), torch.device("cpu"):
        return user_code.call(type(module).__name__, run)


def _on_cpu(module: nn.Module, name: str, before: int) -> nn.Module:
    """A copy on the CPU whose own parameters, and the tensor `name`, are overwritten; of a module on meta, everything."""
    copied = copy.deepcopy(module)
    tensors = [*copied.parameters(), *copied.buffers()]
    if any(tensor.is_meta for tensor in tensors):
        copied.to_empty(device="cpu")
        marked = [*copied.parameters(), *copied.buffers()]
    else:
        copied.to("cpu")
        asked = held(copied, name)
        marked = [*copied.parameters(recurse=False), *([] if asked is None else [asked])]
    with torch.no_grad():
        for tensor in marked:
            tensor.fill_(math.nan if tensor.is_floating_point() or tensor.is_complex() else before)
    return copied
