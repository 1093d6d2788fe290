"""Gives a sharded model on the meta device memory, and adapts the plan: a fresh tensor gets its value from its layer's `reset_parameters`.

A meta model has no values from its constructor. Tensors on meta that are not in its state_dict (non-persistent buffers) could never get
any, and are refused by name. Buffers with values keep them. A parameter with values, while others have none, is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ckptsurgeon.errors import ModelError
from ckptsurgeon.hints import shortened
from ckptsurgeon.models.init.schemes import KEEP
from ckptsurgeon.models.target.loaders import tensors_of
from ckptsurgeon.models.target.parameters import named_tensors
from ckptsurgeon.models.target.sharding import is_sharded
from ckptsurgeon.planning.plan_types import Plan

_DRAWN = "reset"


def on_meta(model: nn.Module) -> bool:
    """Whether tensors of the model are on the meta device."""
    return any(tensor.is_meta for tensor in tensors_of(model))


def with_initial_values(plan: Plan, state: Mapping[str, Any]) -> Plan:
    """The plan with values from `reset_parameters`, by the plan's seed, instead of the constructor's.

    Steps for tensors of `state`, the model's state_dict, that have values are unchanged.
    """

    def op(row: Any) -> Any:
        return {**row, "scheme": _DRAWN} if row.get("scheme") == KEEP and (row["op"] == "init" or row.get("fill") == "init") else row

    return replace(
        plan, steps=tuple(replace(step, ops=tuple(map(op, step.ops))) if state[step.target].is_meta else step for step in plan.steps)
    )


def refuse_unreachable(model: nn.Module, plan: Plan, state: Mapping[str, Any]) -> None:
    """ModelError for tensors on meta that would have no value after the transfer, and for parameters with values, which would lose them
    when the others get memory."""
    parameters, buffers = named_tensors(model)
    with_values = [name for name, parameter in parameters.items() if not parameter.tensor.is_meta]
    if with_values:
        hint = "build the whole model on meta, or model.to_empty(device=…), give these their values, then transfer"
        raise _error("has values, which it would lose: other parameters are on the meta device", with_values, hint)
    valueless = [name for name, tensor in (*parameters.items(), *buffers.items()) if tensor.tensor.is_meta and not tensor.keys]
    valueless += [step.target for step in plan.steps if step.action in ("keep", "load") and state[step.target].is_meta]
    if valueless:
        hint = "model.to_empty(device=…), give these their values, then transfer"
        raise _error("is on the meta device, and would get no value: it is not in the state_dict", valueless, hint)


@contextmanager
def memory_for(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Iterator[None]:
    """Give a meta model memory on its mesh's device; if the block fails, put it back on meta.

    Raises:
        ModelError: a parameter is another object afterwards, so that a tie, or its place in the optimizer, would be lost.
    """
    before = named_tensors(model)[0]
    with_values = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_meta
    ]

    def move(device: torch.device | str) -> None:
        model.to_empty(device=device)
        for module, name, buffer in with_values:
            module._buffers[name] = buffer

    try:
        move(_device(model))
        after = named_tensors(model)[0]
        ids = {id(parameter.tensor) for parameter in after.values()}
        optimized = set() if optimizer is None else {id(tensor) for group in optimizer.param_groups for tensor in group["params"]}
        replaced = [name for name, parameter in before.items() if name not in after or parameter.keys != after[name].keys]
        replaced += [name for name, parameter in before.items() if id(parameter.tensor) in optimized - ids]
        if replaced:
            hint = "model.to_empty(device=…), tie the tied parameters, build the optimizer, then transfer"
            raise _error("became another parameter when it got memory", replaced, hint)
        yield
    except BaseException:
        move("meta")
        raise


def _error(reason: str, names: Sequence[str], hint: str) -> ModelError:
    return ModelError(reason, key=names[0], problems=shortened(names[1:]), hint=hint)


def _device(model: nn.Module) -> torch.device:
    """The device of the sharded tensors' mesh; for GPUs, the current one."""
    sharded: Any = next(tensor for tensor in (*model.parameters(), *model.buffers()) if is_sharded(tensor))
    kind = str(sharded.device_mesh.device_type)
    index = getattr(torch, kind).current_device() if kind not in ("cpu", "meta") else None
    return torch.device(kind) if index is None else torch.device(kind, index)
