"""Makes a new optimizer's state from planned moments, and loads it. The whole state is made before any of it is loaded.

The groups keep the new optimizer's hyper-parameters. A moment that a dtype can't hold is left out with its reason, never made infinite.
Nothing here opens a file: tensors come through `fetch`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from ckptsurgeon.dtypes import BY_TORCH
from ckptsurgeon.errors import ModelError
from ckptsurgeon.models.target import user_code
from ckptsurgeon.models.target.parameters import named, named_tensors
from ckptsurgeon.models.target.sharding import is_sharded
from ckptsurgeon.optimizer.format import BITSANDBYTES, SLOTS, Leaf, wanted_slots
from ckptsurgeon.optimizer.order import LiveOrder, live_order
from ckptsurgeon.optimizer.plan import NO_COUNT, Parameter, ParameterPlan, SlotPlan, notes_on_steps
from ckptsurgeon.planning.plan_types import Step
from ckptsurgeon.report import Cast
from ckptsurgeon.streaming.adapting import adapted, dense_parts
from ckptsurgeon.streaming.values import cast, tensor_from
from ckptsurgeon.tensors import Checkpoint, TensorMeta

Fetch = Callable[[TensorMeta], torch.Tensor]
Spread = Callable[[torch.Tensor, TensorMeta | torch.Tensor], None]  # fills a sharded tensor from one in a file, or from a whole tensor
LARGEST_STEP = 1 << 53  # above it, floats can't hold every whole number


@dataclass(frozen=True)
class NewState:
    """A new optimizer's state: the argument of `load_state_dict`, the outcome for each parameter, the casts' losses, and notes by
    parameter."""

    state_dict: dict[str, Any]
    plans: tuple[ParameterPlan, ...]
    casts: tuple[Cast, ...]
    notes: tuple[tuple[str, str], ...]


def kind_of(optimizer: torch.optim.Optimizer) -> str | None:
    """An optimizer's name in `SLOTS`; None for any other optimizer, such as a user-defined subclass.

    >>> kind_of(torch.optim.SGD([torch.zeros(1)], lr=0.1)), kind_of(torch.optim.Adagrad([torch.zeros(1)]))
    ('SGD', None)
    """
    kind = type(optimizer)
    if kind.__module__.startswith("bitsandbytes.optim."):
        return BITSANDBYTES
    return kind.__name__ if kind.__module__.startswith("torch.optim.") and kind.__name__ in SLOTS else None


def parameters_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[Parameter, ...]:
    """The optimizer's parameters in its own order, each with its keys in the model's state_dict.

    Raises:
        ModelError: `optimizer` is no optimizer, or has no parameter of the model.

    >>> net = nn.Linear(3, 2)
    >>> [(parameter.name, parameter.keys, parameter.shape) for parameter in parameters_of(net, torch.optim.SGD(net.parameters(), lr=0.1))]
    [('weight', ('weight',), (2, 3)), ('bias', ('bias',), (2,))]
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ModelError(f"a {type(optimizer).__name__} is no torch optimizer", hint="give the new torch.optim optimizer itself")
    known = {id(names.tensor): (first, names.keys) for first, names in named(model).items()}
    kind = kind_of(optimizer)
    parameters = []
    for number, group in enumerate(optimizer.param_groups):
        slots = wanted_slots(kind, group) if kind is not None else ()
        for index, parameter in enumerate(group["params"]):
            name, keys = known.get(id(parameter), (f"parameter {index} of group {number}", ()))
            dtype = BY_TORCH.get(str(parameter.dtype).removeprefix("torch."))
            parameters.append(Parameter(name, keys, "F32" if dtype is None else dtype.code, tuple(parameter.shape), slots))
    if parameters and not any(parameter.keys for parameter in parameters):
        raise ModelError(
            "the optimizer has no parameter of the model", path=type(model).__name__, hint="build it from this model's parameters"
        )
    return tuple(parameters)


def order_of(model: nn.Module, optimizer: torch.optim.Optimizer | None, steps: Mapping[str, Step], source: Checkpoint) -> LiveOrder:
    """The order of a model's parameters and of its optimizer's groups, from which the source's moments are assigned to parameters. Without
    an optimizer, the model's order never decides alone."""
    parameters, buffers = named_tensors(model)
    keys = {id(names.tensor): names.keys for names in parameters.values()}
    groups = [] if optimizer is None else optimizer.param_groups
    return live_order(
        {name: names.keys for names in parameters.values() for name in names.all_names},
        list(keys.values()),
        [key for names in buffers.values() for key in names.keys],
        [[keys.get(id(parameter), ()) for parameter in group["params"]] for group in groups],
        groups,
        steps,
        source,
        leads=optimizer is not None,
    )


def make(optimizer: torch.optim.Optimizer, plans: Sequence[ParameterPlan], fetch: Fetch, spread: Spread | None = None) -> NewState:
    """Make the planned state, on the parameters' devices, in their dtypes and strides. Nothing is loaded yet.

    Args:
        fetch: returns a leaf's tensor, of its dtype and shape, on any device; the tensor is copied.
        spread: fills a sharded parameter's moment with this rank's part of a leaf, or of a whole tensor.

    Raises:
        PlanError: a tensor is not what it was planned to be.
    """
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    casts: list[Cast] = []
    notes: list[tuple[str, str]] = []
    results: list[ParameterPlan] = []
    for position, (parameter, plan) in enumerate(zip(parameters, plans, strict=True)):
        plan_casts: list[Cast] = []
        values: dict[str, Any] = {}
        for slot in plan.slots:
            value = _value(parameter, plan, slot, fetch, plan_casts, spread)
            if isinstance(value, str):
                plan = replace(plan, slots=(), reason=f"the source's {slot.slot.name} {value}")
                break
            values[slot.slot.name] = value
        results.append(plan)
        if plan.reason is None:
            casts += plan_casts
            notes += _notes(plan, fetch)
        if plan.slots:
            state[position] = values
    current = user_code.call(type(optimizer).__name__, optimizer.state_dict)
    return NewState({"state": state, "param_groups": current["param_groups"]}, tuple(results), tuple(casts), tuple(notes))


def _value(parameter: torch.Tensor, plan: ParameterPlan, slot: SlotPlan, fetch: Fetch, casts: list[Cast], spread: Spread | None) -> Any:
    """A slot's value; or a str that says why it has none."""
    if slot.slot.kind == "step":
        return _step(slot, fetch)
    if slot.slot.kind == "code":
        (leaf,) = slot.leaves
        return fetch(leaf).detach().to(parameter.device, copy=True) if type(leaf) is TensorMeta else leaf
    return _moment(parameter, plan, slot, fetch, casts, spread)


def _notes(plan: ParameterPlan, fetch: Fetch) -> Iterator[tuple[str, str]]:
    for name in plan.started:
        yield plan.parameter.name, f"{name} starts at zero: the source has none"
    for slot in plan.slots:
        counts = {count_of(leaf, fetch) for leaf in slot.leaves} if slot.slot.kind == "step" else set()
        yield from ((plan.parameter.name, note) for note in notes_on_steps(counts))


def count_of(leaf: Leaf, fetch: Fetch) -> float | None:
    """A step count; None for a value that is no step count."""
    value = fetch(leaf).reshape(()).item() if type(leaf) is TensorMeta else leaf
    is_count = type(value) in (int, float) and 0 <= value <= LARGEST_STEP  # False for NaN
    return float(value) if is_count else None


def _step(slot: SlotPlan, fetch: Fetch) -> torch.Tensor | str:
    counts = [count_of(leaf, fetch) for leaf in slot.leaves]
    if None in counts:
        return NO_COUNT
    # As torch keeps it: a float on the CPU, which `load_state_dict` moves to the device for a fused or capturable optimizer.
    dtype = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    return torch.tensor(max(count for count in counts if count is not None), dtype=dtype)


def _moment(
    parameter: torch.Tensor, plan: ParameterPlan, slot: SlotPlan, fetch: Fetch, casts: list[Cast], spread: Spread | None
) -> torch.Tensor | str:
    """A moment with the parameter's device, dtype and strides; or a str that says why there is none."""
    moment = torch.zeros_like(parameter, requires_grad=False)
    if not slot.leaves:
        return moment
    name, target = f"{plan.parameter.name} {slot.slot.name}", plan.parameter
    if spread is not None and is_sharded(moment) and not slot.ops and slot.leaves[0].dtype == target.dtype:
        spread(moment, slot.leaves[0])
        return moment
    tensors = [fetch(leaf).detach() for leaf in slot.leaves]
    dtype = slot.leaves[0].dtype
    value = tensors[0]
    if slot.ops:
        step = Step(name, dtype, target.shape, "adapt", plan.sources, slot.ops, False, "")
        value = adapted(step, [tensor.cpu() for tensor in tensors], lambda: torch.zeros(target.shape, dtype=moment.dtype), {})
    if dtype != target.dtype:
        value = tensor_from(bytearray().join(cast(name, dense_parts(value), dtype, target.dtype, casts)), target.dtype).view(target.shape)
        if casts[-1].overflowed:
            return f"has values that {target.dtype} can't hold"
    if spread is not None and is_sharded(moment):
        spread(moment, value)
        return moment
    with torch.no_grad():
        return moment.copy_(value)


@contextmanager
def loaded(optimizer: torch.optim.Optimizer, state_dict: Mapping[str, Any]) -> Iterator[None]:
    """Load a state into an optimizer; restore its previous state if loading or the block fails.

    Raises:
        TargetError: the optimizer, or a hook on it, refuses the state.
    """
    name = type(optimizer).__name__
    before = user_code.call(name, optimizer.state_dict)
    try:
        user_code.call(name, optimizer.load_state_dict, dict(state_dict))
        yield
    except BaseException:
        user_code.call(name, optimizer.load_state_dict, before)
        raise


@contextmanager
def options_set(groups: Sequence[dict[str, Any]], values: Sequence[Mapping[str, Any]]) -> Iterator[None]:
    """Set the values that a scheduler changes in its optimizer's groups; restore the previous values if that or the block fails."""
    before = [{option: _copied(group[option]) for option in new if option in group} for group, new in zip(groups, values, strict=True)]
    try:
        _set(groups, values)
        yield
    except BaseException:
        _set(groups, before)
        raise


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, torch.Tensor) else value


def _set(groups: Sequence[dict[str, Any]], values: Sequence[Mapping[str, Any]]) -> None:
    for group, new_values in zip(groups, values, strict=True):
        for option, value in new_values.items():
            if isinstance(group.get(option), torch.Tensor):
                group[option].copy_(value) if isinstance(value, torch.Tensor) else group[option].fill_(value)
            else:
                group[option] = float(value) if isinstance(value, torch.Tensor) else value
