"""Puts a plan's values into a live model: every value is at hand and checked before the first copy.

It decides nothing; the plan does. Values come through `fetch`, so that nothing here opens a file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from ckptsurgeon.errors import ModelError, VerificationError
from ckptsurgeon.models import initialize, persons_code
from ckptsurgeon.models.skeleton import state_dict_of
from ckptsurgeon.surgery.plan import Plan


def put(plan: Plan, model: nn.Module, fetch: Callable[[str], torch.Tensor], extra: Mapping[str, Any]) -> None:
    """Copy every transferred tensor, and every one that a rule initialises, into `model`, in place, on whatever device it is.

    Args:
        plan: made for this model.
        fetch: a target key's value, a CPU tensor of the target's shape and dtype; raises for one that can't be had or must not be cast.
        extra: values for `_extra_state` keys.

    Raises:
        ModelError: the model is on meta, or takes copies through hooks that do not keep them.
        VerificationError: what the model holds afterwards is not what was put in; the model is as it was before.
    """
    name = type(model).__name__
    state = state_dict_of(model, name)
    values: dict[str, torch.Tensor] = {}
    for step in plan.steps:
        if step.sources:
            values[step.target] = fetch(step.target)
        elif step.fresh:
            scheme = next(str(op["scheme"]) for op in step.ops if op["op"] == "init")
            if scheme != "model":
                leader = next((group[0] for group in plan.ties if step.target in group), step.target)
                owner = initialize.owner_of(model, step.target)
                values[step.target] = initialize.value(scheme, leader, step.shape, step.dtype, plan.seed, owner)
    empty = [key for key in values if state[key].device.type == "meta"]
    if empty:
        raise ModelError("the model is on the meta device and has no memory", key=empty[0], hint="model.to_empty(device='cpu') first")
    in_place = _in_place(model)
    if all(state[key].data_ptr() in in_place or not state[key].numel() for key in values):
        with torch.no_grad():
            for key, value in values.items():
                state[key].copy_(value)
        for key, value in extra.items():
            persons_code.call(name, model.get_submodule(key.rpartition(".")[0]).set_extra_state, value)
    else:
        _through_hooks(model, state, values, extra, name)


def _in_place(model: nn.Module) -> set[int]:
    """Where the model's own memory is: a copy to a state_dict tensor that lies there changes the model."""
    own = [*model.parameters(), *model.buffers()]
    return {tensor.data_ptr() for tensor in own}


def _through_hooks(
    model: nn.Module, state: Mapping[str, Any], values: Mapping[str, torch.Tensor], extra: Mapping[str, Any], name: str
) -> None:
    """A model whose state_dict is not its own memory takes values by load_state_dict only; what it holds before is kept to go back to."""
    before = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in state.items()}
    try:
        persons_code.call(name, model.load_state_dict, {**before, **values, **extra}, strict=True)
        after = state_dict_of(model, name)
        wrong = [key for key, value in values.items() if not torch.equal(after[key].to("cpu", value.dtype), value)]
        if wrong:
            raise VerificationError("the model does not hold what was put into it; it is as it was before", key=wrong[0])
    except BaseException:
        persons_code.call(name, model.load_state_dict, before, strict=True)
        raise
