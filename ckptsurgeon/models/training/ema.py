"""An averaged copy of a model (EMA, SWA): the model inside its wrapper, and the wrapper's own buffers, such as `n_averaged`.

Also finds the state_dicts nested in a live training checkpoint, by the same rule as in a file. Tensors are copied only to restore them
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

_INNER = (*sorted(WRAPPERS), *AVERAGED)  # attributes that may hold the model: `module` of AveragedModel and timm, `ema` of ultralytics


def averaged_model(wrapper: Any) -> nn.Module:
    """The model with the averaged weights: inside its wrapper, or `wrapper` itself if it is a plain model.

    Raises:
        ModelError: `wrapper` neither is nor holds a model.

    >>> averaged_model(torch.optim.swa_utils.AveragedModel(nn.Linear(3, 2)))
    Linear(in_features=3, out_features=2, bias=True)
    """
    is_wrapper = not isinstance(wrapper, nn.Module) or list(wrapper._modules) in [[name] for name in _INNER]
    wrapped = next((getattr(wrapper, name, None) for name in _INNER if isinstance(getattr(wrapper, name, None), nn.Module)), None)
    model = wrapped if is_wrapper else wrapper
    if not isinstance(model, nn.Module):
        raise ModelError(f"a {type(wrapper).__name__} is no averaged model", hint="give the module that holds the averaged weights")
    return model


def wrapper_buffers(wrapper: Any) -> dict[str, torch.Tensor]:
    """The wrapper's own buffers, such as `n_averaged`."""
    if not isinstance(wrapper, nn.Module) or wrapper is averaged_model(wrapper):
        return {}
    return {name: buffer for name, buffer in wrapper._buffers.items() if buffer is not None}


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
    """The state_dicts in a live training checkpoint, as a reader of files lists them, without data.

    >>> [state_dict.root for state_dict in live_roots({"epoch": 3, "net": {"w": torch.zeros(2)}}).state_dicts]
    ['net']
    """
    return Archive("the source", "model", "", (), tuple(_roots("", source, set(), 0)), kind="model")


def _roots(path: str, value: Any, seen: set[int], depth: int) -> Iterator[StateDict]:
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
            yield StateDict(path, checkpoint.tensors, ties=checkpoint.ties)
    for key, item in items:
        if isinstance(key, (str, int)):
            yield from _roots(f"{path}.{key}" if path else str(key), item, seen, depth + 1)
