"""Plans the optimizer's state of a merged file: the steps that write its moments, and the nested value that holds them.

The new positions are the target's parameters, in the target's order, each in the group of its source's parameter. The groups keep the
source's hyper-parameters and get the parameters' names. Pure: `count` reads step counts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ckptsurgeon.errors import FormatError, PlanError
from ckptsurgeon.formats.layout import Stored
from ckptsurgeon.optimizer.assign import Assigned
from ckptsurgeon.optimizer.format import BITSANDBYTES, MARKS, SLOTS, Leaf, Saved, Slot, State
from ckptsurgeon.optimizer.plan import NO_COUNT, Parameter, ParameterPlan, SlotPlan, notes_on_steps, plan_states
from ckptsurgeon.planning.plan_types import Step
from ckptsurgeon.tensors import Refused, TensorMeta

Count = Callable[[Leaf], float | None]


@dataclass(frozen=True)
class MergedState:
    """An optimizer's state to be written.

    Attributes:
        value: the nested value, with `Stored` for each tensor.
        steps: the steps that write these tensors.
        leaves: by name, the source tensors that the steps read.
        plans: the outcome for each parameter's state.
        notes: (name of a parameter, note) pairs.
    """

    value: Mapping[str, Any]
    steps: tuple[Step, ...]
    leaves: Mapping[str, TensorMeta]
    plans: tuple[ParameterPlan, ...]
    notes: tuple[tuple[str, str], ...]


def kind_of(saved: Saved) -> str:
    """The kind of optimizer that saved a state, recognised by its slots or by its groups' hyper-parameters. PlanError for an unknown kind.

    >>> kind_of(Saved(({"lr": 0.1, "alpha": 0.99},), ((),), None, {}))
    'RMSprop'
    """
    if saved.by_bitsandbytes:
        return BITSANDBYTES
    for kind, mark in MARKS.items():
        if saved.groups and all(mark in group for group in saved.groups):
            return kind
    raise PlanError(f"the optimizer's state is of none of {', '.join(SLOTS)}", hint="merge without --with-optimizer")


def slots_of(saved: Saved, kind: str) -> tuple[Slot, ...]:
    """The slots that any parameter of a state has. All of them are needed, except codes: the state that is written must be complete."""
    present = {name for state in saved.state.values() for name, value in state.items() if value is not None}
    return tuple(slot if slot.kind == "code" else replace(slot, needed=True) for slot in SLOTS[kind] if slot.name in present)


def merge_state(
    saved: Saved,
    assigned: Assigned,
    held: Mapping[str, State],
    parameters: Sequence[Parameter],
    steps: Mapping[str, Step],
    taken: frozenset[str],
    number: int,
    count: Count,
) -> MergedState:
    """Plan the state of `parameters`, in the target's order.

    Args:
        saved: the source's optimizer state.
        assigned: the source key of each of its positions.
        held: the optimizer's state by source key.
        parameters: the target's parameters.
        steps: the weights' plan, by target key.
        taken: names that steps already have.
        number: the number of the source that has the leaves.
        count: reads the step count of a leaf; None if it is not a count.

    Raises:
        FormatError: a hyper-parameter that is not a plain value.
    """
    plans = plan_states(parameters, steps, {(0, key): state for key, state in held.items()})
    written: list[Step] = []
    leaves: dict[str, TensorMeta] = {}
    notes: list[tuple[str, str]] = []
    groups_of = _groups_of(saved, assigned, plans)
    order = sorted(range(len(plans)), key=groups_of.__getitem__)  # the parameters, group after group
    state: dict[int, dict[str, Any]] = {}
    results = list(plans)
    for position, index in enumerate(order):
        plan = plans[index]
        counts = [count(leaf) for slot in plan.slots if slot.slot.kind == "step" for leaf in slot.leaves]
        if None in counts:
            plan = results[index] = replace(plan, slots=(), reason=f"the source's step {NO_COUNT}")
        notes += [(plan.parameter.name, note) for note in notes_on_steps(counts)]
        values = {slot.slot.name: _written(plan, slot, taken, number, counts, written, leaves) for slot in plan.slots}
        if values:
            state[position] = values
    value = {"state": state, "param_groups": _groups(saved, plans, order, groups_of)}
    return MergedState(value, tuple(written), leaves, tuple(results), tuple(notes))


def _written(
    plan: ParameterPlan,
    slot: SlotPlan,
    taken: frozenset[str],
    number: int,
    counts: Sequence[float | None],
    written: list[Step],
    leaves: dict[str, TensorMeta],
) -> Any:
    """The value of a slot in the state: a plain number, or `Stored` for a tensor, whose step and leaves are added to `written` and
    `leaves`."""
    used, shape = slot.leaves, plan.parameter.shape
    if slot.slot.kind == "step":
        used = (slot.leaves[max(range(len(counts)), key=lambda index: counts[index] or 0.0)],)
    if slot.slot.kind != "moment":
        if type(used[0]) is not TensorMeta:
            return used[0]
        shape = used[0].shape
    target = f"{plan.parameter.name} {slot.slot.name} of the optimizer"
    while target in taken:
        target += "'"
    sources = []
    for leaf in used:
        name = f"moment {len(leaves)}"
        leaves[name] = replace(leaf, name=name)
        sources.append((number, name))
    action: Any = "adapt" if slot.ops else "rename"
    written.append(Step(target, used[0].dtype, shape, action, tuple(sources), slot.ops, False, "as its weight"))
    return Stored(target)


def _groups_of(saved: Saved, assigned: Assigned, plans: Sequence[ParameterPlan]) -> list[int]:
    """The group of each parameter: that of its source parameter, else that of the parameter before it."""
    group_of = {position: number for number, positions in enumerate(saved.positions) for position in positions}
    of_key = {key: group_of[position] for position, key in assigned.keys.items()}
    groups: list[int] = []
    for plan in plans:
        group = next((of_key[key] for _, key in plan.sources if key in of_key), None)
        groups.append(group if group is not None else groups[-1] if groups else 0)
    return groups


def _groups(saved: Saved, plans: Sequence[ParameterPlan], order: Sequence[int], groups_of: Sequence[int]) -> list[dict[str, Any]]:
    rows = []
    for number, group in enumerate(saved.groups):
        members = [position for position, index in enumerate(order) if groups_of[index] == number]
        names = [plans[order[position]].parameter.name for position in members]
        rows.append({**{name: _plain(name, value) for name, value in group.items()}, "params": members, "param_names": names})
    return rows


def _plain(name: str, value: Any) -> Any:
    """The value of a hyper-parameter. FormatError if it is not plain."""
    if is_plain(value):
        return value
    raise FormatError(f"has a group whose {str(name)[:60]!r} is no plain value", hint="save it with a rate that is a number")


def is_plain(value: Any) -> bool:
    """Whether a value contains neither tensors nor refused values."""
    if isinstance(value, Mapping):
        return all(map(is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    return (
        not isinstance(value, (Refused, TensorMeta))
        and (type(value) is not int or value.bit_length() < 1000)
        and type(value) is not complex
    )
