"""Memory for a sharded model on the meta device, and the plan for it: what no source gives is drawn by its layer's own `reset_parameters`.

A meta model has no constructor's values. What its state_dict does not show (buffers that are not persistent) could never get any, and is
refused by name. Buffers that have values keep them; a parameter that has values, among others that have none, is refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ckptsurgeon.errors import ModelError
from ckptsurgeon.hints import shortened
from ckptsurgeon.models.init.schemes import KEEP
from ckptsurgeon.models.target.parameters import named_tensors
from ckptsurgeon.models.target.sharding import is_sharded
from ckptsurgeon.planning.plan_types import Plan

_DRAWN = "reset"


def on_meta(model: nn.Module) -> bool:
    """Whether tensors of the model are on the meta device."""
    return any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers()))


def with_initial_values(plan: Plan, state: Mapping[str, Any]) -> Plan:
    """The plan where every value that would be the constructor's is the layer's own `reset_parameters`', by the plan's seed.

    Steps for tensors of `state`, the model's state_dict, that have values stay as they are.
    """

    def op(row: Any) -> Any:
        return {**row, "scheme": _DRAWN} if row.get("scheme") == KEEP and (row["op"] == "init" or row.get("fill") == "init") else row

    return replace(
        plan, steps=tuple(replace(step, ops=tuple(map(op, step.ops))) if state[step.target].is_meta else step for step in plan.steps)
    )


def refuse_unreachable(model: nn.Module, plan: Plan, state: Mapping[str, Any]) -> None:
    """Raises ModelError for tensors on meta that no transfer reaches, or that keep a value which they do not have; and for parameters
    that have values, which memory for the others would take from them."""
    parameters, buffers = named_tensors(model)
    with_values = [name for name, parameter in parameters.items() if not parameter.tensor.is_meta]
    if with_values:
        raise ModelError(
            "has values, and other parameters are on the meta device: it would lose them",
            key=with_values[0],
            problems=shortened(with_values[1:]),
            hint="build the whole model on meta, or model.to_empty(device=…), give these their values, then transfer",
        )
    lost = [name for name, tensor in (*parameters.items(), *buffers.items()) if tensor.tensor.is_meta and not tensor.keys]
    lost += [step.target for step in plan.steps if step.action in ("keep", "load") and state[step.target].is_meta]
    if lost:
        raise ModelError(
            "is on the meta device, and would have no value: it is not in the state_dict",
            key=lost[0],
            problems=shortened(lost[1:]),
            hint="model.to_empty(device=…), give these their values, then transfer",
        )


@contextmanager
def memory_for(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Iterator[None]:
    """Give a meta model memory on its mesh's device; if the block fails, what was on meta is there again.

    Raises:
        ModelError: its plain parameters are other objects afterwards, so that a tie, or the optimizer that was made of them, would be lost.
    """
    before = named_tensors(model)[0]
    with_values = [
        (module, name, buffer)
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_meta
    ]

    def to(device: torch.device | str) -> None:
        model.to_empty(device=device)
        for module, name, buffer in with_values:
            module._buffers[name] = buffer

    try:
        to(_device(model))
        after = named_tensors(model)[0]
        own = {id(one.tensor) for one in after.values()}
        held = set() if optimizer is None else {id(one) for group in optimizer.param_groups for one in group["params"]}
        apart = [name for name, one in before.items() if name not in after or one.keys != after[name].keys]
        apart += [name for name, one in before.items() if id(one.tensor) in held - own]
        if apart:
            raise ModelError(
                "is another parameter since it has memory",
                key=apart[0],
                problems=shortened(apart[1:]),
                hint="model.to_empty(device=…), tie what was tied, make the optimizer, then transfer",
            )
        yield
    except BaseException:
        to("meta")
        raise


def _device(model: nn.Module) -> torch.device:
    """The device that sharded tensors' mesh is of; on GPUs the current one."""
    sharded: Any = next(tensor for tensor in (*model.parameters(), *model.buffers()) if is_sharded(tensor))
    kind = str(sharded.device_mesh.device_type)
    index = getattr(torch, kind).current_device() if kind not in ("cpu", "meta") else None
    return torch.device(kind) if index is None else torch.device(kind, index)
