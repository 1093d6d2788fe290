"""Puts a plan's values into a sharded model: each rank fills its own parts. If anything is wrong before the first copy, no rank copies.

The counterpart of `training.transfer` for models with sharded tensors. All decisions are in the plan.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ckptsurgeon.errors import ModelError
from ckptsurgeon.models.sharded.load import load
from ckptsurgeon.models.sharded.ranks import Ranks
from ckptsurgeon.models.sharded.values import Value
from ckptsurgeon.models.target.loaders import find_loaders, storage_of, tensors_of
from ckptsurgeon.models.target.sharding import local
from ckptsurgeon.models.training.transfer import check_writable, reset_extra, set_extra
from ckptsurgeon.planning.plan_types import Plan
from ckptsurgeon.progress import Held
from ckptsurgeon.streaming.signals import undisturbed

_BEFORE = "transfer into the model before it is sharded"


def refuse(plan: Plan, model: nn.Module, state: Mapping[str, Any]) -> None:
    """ModelError for a model whose own loading code would have to run, or whose state_dict does not share its memory."""
    loaders = {path: loader for path, loader in find_loaders(model, state).items() if loader.changes}
    if loaders or plan.handed or any(step.action == "load" for step in plan.steps):
        path, loader = next(iter(loaders.items()), ("", None))
        kind = type(model).__name__ if loader is None else loader.name
        raise ModelError(f"has loading code of its own ({kind}), which can't run on sharded tensors", key=path or None, hint=_BEFORE)
    own = {storage_of(tensor) for tensor in tensors_of(model)}
    copies = [key for key, tensor in state.items() if isinstance(tensor, torch.Tensor) and storage_of(tensor) not in own]
    if copies:
        raise ModelError("is a copy that a hook of the state_dict made, not the model's own memory", key=copies[0], hint=_BEFORE)


def put(
    model: nn.Module, state: Mapping[str, Any], values: Mapping[str, Value], extra: Mapping[str, Any], ranks: Ranks, held: Held = None
) -> None:
    """Load the values into the model, in place. All ranks must call this together. An interrupt waits until this rank's parts are complete.

    Args:
        state: the model's state_dict.
        values: by key; of tied keys only the first.
        extra: values that are not tensors, by key.
        held: collects what a progress callback raises.

    Raises: UnreadableError, StaleError: a file fails or shrinks while it is read, on this rank or another. Only then the model may hold old
        and new values.
    """
    name = type(model).__name__
    with undisturbed(), torch.no_grad():
        with ranks.step():
            set_extra(model, state, extra, name)
        try:
            load(state, values, held)
        except BaseException:
            reset_extra(model, state, extra, name)
            raise


def refuse_unwritable(state: Mapping[str, Any], keys: Iterable[str]) -> None:
    """ModelError for a tensor that can't be written to in place."""
    for key in keys:
        check_writable(key, local(state[key]))
