"""An averaged copy of a model (EMA, SWA): the model inside its wrapper, and the wrapper's own buffers, such as `n_averaged`.

Also finds the state_dicts nested in a live training checkpoint, by the same rule as in a file. Tensors are copied only for restoring them
after a failure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ckptsurgeon.errors import ModelError
from ckptsurgeon.limit_table import allowed
from ckptsurgeon.models.target.skeleton import checkpoint_of_state_dict
from ckptsurgeon.planning.training_places import AVERAGED
from ckptsurgeon.tensors import Archive, StateDict
from ckptsurgeon.wrappers import WRAPPERS

_INNER = (*sorted(WRAPPERS), *AVERAGED)  # the attributes that may hold it: `module` of AveragedModel and timm's, `ema` of ultralytics'


def inner(averaged: Any) -> nn.Module:
    """The model whose weights are averaged.

    Raises:
        ModelError: `averaged` is not a model and has none.

    >>> inner(torch.optim.swa_utils.AveragedModel(nn.Linear(3, 2)))
    Linear(in_features=3, out_features=2, bias=True)
    """
    wraps = not isinstance(averaged, nn.Module) or list(averaged._modules) in [[name] for name in _INNER]
    wrapped = next((getattr(averaged, name, None) for name in _INNER if isinstance(getattr(averaged, name, None), nn.Module)), None)
    model = wrapped if wraps else averaged
    if not isinstance(model, nn.Module):
        raise ModelError(f"a {type(averaged).__name__} is no averaged model", hint="give the module that holds the averaged weights")
    return model


def own_buffers(averaged: Any) -> dict[str, torch.Tensor]:
    """The wrapper's own buffers, such as `n_averaged`."""
    if not isinstance(averaged, nn.Module) or averaged is inner(averaged):
        return {}
    return {name: buffer for name, buffer in averaged._buffers.items() if buffer is not None}


@contextmanager
def restored(model: nn.Module | None, buffers: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Restore the values of the model and the buffers if the block fails."""
    tensors = [*buffers.values(), *(() if model is None else (*model.parameters(), *model.buffers()))]
    kept = [tensor.detach().clone() for tensor in tensors]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for tensor, value in zip(tensors, kept, strict=True):
                tensor.copy_(value)
        raise


def live_roots(source: Mapping[Any, Any]) -> Archive:
    """The state_dicts in a live training checkpoint, as a file's reader would list them, without data.

    >>> [state_dict.root for state_dict in live_roots({"epoch": 3, "net": {"w": torch.zeros(2)}}).state_dicts]
    ['net']
    """
    return Archive("the source", "model", "", (), tuple(_roots("", source, set(), 0)), kind="model")


def _roots(place: str, value: Any, seen: set[int], depth: int) -> Iterator[StateDict]:
    if id(value) in seen or depth > allowed("nesting") or not isinstance(value, (Mapping, list, tuple)):
        return
    seen.add(id(value))
    items = list(value.items() if isinstance(value, Mapping) else enumerate(value))
    if isinstance(value, Mapping):
        if "state" in value and "param_groups" in value:
            return
        tensors = {key: item for key, item in items if isinstance(key, str) and isinstance(item, torch.Tensor)}
        if tensors:
            checkpoint = checkpoint_of_state_dict(tensors)
            yield StateDict(place, checkpoint.tensors, ties=checkpoint.ties)
    for key, item in items:
        if isinstance(key, (str, int)):
            yield from _roots(f"{place}.{key}" if place else str(key), item, seen, depth + 1)
