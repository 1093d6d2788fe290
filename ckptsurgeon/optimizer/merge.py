"""Plans the optimizer's state of a merged file: the steps that write its moments, and the value in which they stand.

The new positions are the target's parameters, each in the group that its source's parameter was in, in the target's order; the groups keep
the source's hyper-parameters and get the parameters' names. Pure: step counts come through `count`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ckptsurgeon.errors import FormatError, PlanError
from ckptsurgeon.formats.layout import Stored
from ckptsurgeon.optimizer.assign import Assigned
from ckptsurgeon.optimizer.format import BITSANDBYTES, MARKS, SLOTS, Leaf, Saved, Slot, State
from ckptsurgeon.optimizer.plan import Parameter, ParameterPlan, SlotPlan, plan_states
from ckptsurgeon.planning.plan_types import Step
from ckptsurgeon.tensors import Refused, TensorMeta

Count = Callable[[Leaf], float | None]


@dataclass(frozen=True)
class MergedState:
    """An optimizer's state to be written: its `value`, the `steps` of its tensors, which read `leaves` by name, what became of each
    parameter, and what there is to say."""

    value: Mapping[str, Any]
    steps: tuple[Step, ...]
    leaves: Mapping[str, TensorMeta]
    plans: tuple[ParameterPlan, ...]
    notes: tuple[tuple[str, str], ...]


def kind_of(saved: Saved) -> str:
    """The kind of optimizer that a state is of, told by what it keeps, or its groups' hyper-parameters. PlanError for one of none.

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
    """The slots that a state has anywhere, all of them needed, save codes: what is written must be whole."""
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
        held: what is kept by the source's keys.
        steps: the weights' plan, by target key.
        taken: names that steps have already.
        number: of the source that has the leaves.
        count: the number of steps that a leaf says; None for none.

    Raises:
        FormatError: a hyper-parameter that is no plain value.
    """
    plans = plan_states(parameters, steps, {(0, key): state for key, state in held.items()})
    made: list[Step] = []
    leaves: dict[str, TensorMeta] = {}
    notes: list[tuple[str, str]] = []
    groups_of = _groups_of(saved, assigned, plans)
    order = [place for number_ in range(len(saved.groups)) for place, group in enumerate(groups_of) if group == number_]
    state: dict[int, dict[str, Any]] = {}
    done = list(plans)
    for position, place in enumerate(order):
        plan = plans[place]
        counts = [count(leaf) for slot in plan.slots if slot.slot.kind == "step" for leaf in slot.leaves]
        if None in counts:
            plan = done[place] = replace(plan, slots=(), reason="the source's step is no count of steps")
        if len(set(counts) - {None}) > 1:
            words = " and ".join(f"{one:g}" for one in sorted({one for one in counts if one is not None}))
            notes.append((plan.parameter.name, f"its parts had taken {words} steps; the most is kept"))
        values = {slot.slot.name: _written(plan, slot, taken, number, counts, made, leaves) for slot in plan.slots}
        if values:
            state[position] = values
    value = {"state": state, "param_groups": _groups(saved, plans, order, groups_of)}
    return MergedState(value, tuple(made), leaves, tuple(done), tuple(notes))


def _written(
    plan: ParameterPlan,
    slot: SlotPlan,
    taken: frozenset[str],
    number: int,
    counts: Sequence[float | None],
    made: list[Step],
    leaves: dict[str, TensorMeta],
) -> Any:
    """What stands in the state for a slot: a plain number, or `Stored` for a tensor, whose step and leaves are added."""
    used, shape = slot.leaves, plan.parameter.shape
    if slot.slot.kind == "step":
        used = (slot.leaves[max(range(len(counts)), key=lambda place: counts[place] or 0.0)],)
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
    made.append(Step(target, used[0].dtype, shape, action, tuple(sources), slot.ops, False, "as its weight"))
    return Stored(target)


def _groups_of(saved: Saved, assigned: Assigned, plans: Sequence[ParameterPlan]) -> list[int]:
    """The group of each parameter: that of its source's, else that of the parameter before it."""
    group_of = {position: number for number, positions in enumerate(saved.positions) for position in positions}
    of_key = {key: group_of[position] for position, key in assigned.keys.items()}
    found: list[int] = []
    for plan in plans:
        own = next((of_key[key] for _, key in plan.sources if key in of_key), None)
        found.append(own if own is not None else found[-1] if found else 0)
    return found


def _groups(saved: Saved, plans: Sequence[ParameterPlan], order: Sequence[int], groups_of: Sequence[int]) -> list[dict[str, Any]]:
    rows = []
    for number, group in enumerate(saved.groups):
        members = [position for position, place in enumerate(order) if groups_of[place] == number]
        names = [plans[order[position]].parameter.name for position in members]
        rows.append({**{name: _plain(name, value) for name, value in group.items()}, "params": members, "param_names": names})
    return rows


def _plain(name: str, value: Any) -> Any:
    if is_plain(value):
        return value
    raise FormatError(f"has a group whose {str(name)[:60]!r} is no plain value", hint="save it with a rate that is a number")


def is_plain(value: Any) -> bool:
    """Whether a value has neither tensors nor what is refused in it."""
    if isinstance(value, Mapping):
        return all(map(is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    return (
        not isinstance(value, (Refused, TensorMeta))
        and (type(value) is not int or value.bit_length() < 1000)
        and type(value) is not complex
    )
