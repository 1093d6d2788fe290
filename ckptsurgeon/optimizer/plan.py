"""Decides what an optimizer's state becomes when its model changes: each moment is changed as the plan changes its weight.

Moments follow their weight, with zeros where the weight was filled. For a weight that is fresh or computed, nothing is carried, and the
reason is reported. 8-bit moments are codes: they are carried unchanged, and only for a weight that is copied unchanged. Pure: no tensor is
read and torch is not loaded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from ckptsurgeon.adapters.chain import infer_chain
from ckptsurgeon.adapters.op import Op, Shape
from ckptsurgeon.adapters.table import adapter_of
from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.optimizer.format import Leaf, Slot, State
from ckptsurgeon.planning.keys import SourceKey
from ckptsurgeon.planning.plan_types import Step
from ckptsurgeon.report import FRESH
from ckptsurgeon.tensors import Refused, TensorMeta

NO_COUNT = "is no count of steps"  # why a step is not carried, in words that continue "the source's step"


@dataclass(frozen=True)
class Parameter:
    """A parameter of the new optimizer: its name, its keys in the state_dict, its dtype code and shape, and the slots that its group
    needs."""

    name: str
    keys: tuple[str, ...]
    dtype: str
    shape: Shape
    slots: tuple[Slot, ...]


@dataclass(frozen=True)
class SlotPlan:
    """How a slot gets its value: from the sources' leaves, in order, by `ops`; zeros if there are no leaves."""

    slot: Slot
    leaves: tuple[Leaf, ...]
    ops: tuple[Op, ...] = ()


@dataclass(frozen=True)
class ParameterPlan:
    """A parameter's new state: its `slots`, or none with the `reason`. `sources` are the source keys that it comes from."""

    parameter: Parameter
    slots: tuple[SlotPlan, ...] = ()
    sources: tuple[SourceKey, ...] = ()
    reason: str | None = None

    @property
    def adapted(self) -> bool:
        """Whether a moment is adapted."""
        return any(slot.ops for slot in self.slots)

    @property
    def started(self) -> tuple[str, ...]:
        """The slots of a carried state that start at zero, because the source has no value."""
        return tuple(slot.slot.name for slot in self.slots if not slot.leaves)


def moment_ops(ops: Sequence[Op]) -> tuple[Op, ...] | None:
    """The ops for the moments of a weight to which `ops` are applied; None if moments can't follow one of them.

    >>> moment_ops([{"op": "pad", "dim": 0, "size": 9, "fill": "mean", "at": "end"}])
    ({'op': 'pad', 'dim': 0, 'size': 9, 'at': 'end', 'fill': 'zeros'},)
    >>> moment_ops([{"op": "average", "weights": [0.5, 0.5]}]) is None
    True
    """
    followed = [adapter_of(op).moments(op) for op in ops]
    return tuple(op for op in followed if op is not None) if None not in followed else None


def plan_states(parameters: Sequence[Parameter], steps: Mapping[str, Step], held: Mapping[SourceKey, State]) -> tuple[ParameterPlan, ...]:
    """Plan the new state of each parameter.

    Args:
        parameters: the parameters of the new optimizer.
        steps: the plan's steps by target key.
        held: the source optimizer's state by source key; each of several tied keys has it.
    """
    return tuple(_planned(parameter, steps, held) for parameter in parameters)


def notes_on_steps(counts: Iterable[float | None]) -> list[str]:
    """A note for a parameter that is joined of parts with different step counts, of which the largest is kept; else none.

    >>> notes_on_steps([5.0, 3.0, 5.0]), notes_on_steps([5.0, None])
    (['its parts had taken 3 and 5 steps; the largest number is kept'], [])
    """
    different = sorted({count for count in counts if count is not None})
    words = " and ".join(f"{count:g}" for count in different)
    return [f"its parts had taken {words} steps; the largest number is kept"] if len(different) > 1 else []


def _planned(parameter: Parameter, steps: Mapping[str, Step], held: Mapping[SourceKey, State]) -> ParameterPlan:
    own = [steps[key] for key in parameter.keys if key in steps]
    step = next((step for step in own if step.sources), None)
    if step is None:
        return ParameterPlan(parameter, reason=FRESH if own else "is not in the state_dict")
    ops = moment_ops(step.adapters) if step.action != "load" else None
    if ops is None:
        names = " | ".join(dict.fromkeys(str(op["op"]) for op in step.changes))
        return ParameterPlan(parameter, sources=step.sources, reason=f"its weights are computed by {names}, which moments can't follow")
    missing = next((key for key in step.sources if key not in held), None)
    if missing is not None:
        return ParameterPlan(parameter, sources=step.sources, reason=f"the source's optimizer has no state of {missing[1]}")
    states = [held[key] for key in step.sources]
    empty = next((key for key, state in zip(step.sources, states, strict=True) if all(leaf is None for leaf in state.values())), None)
    if empty is not None and parameter.slots:
        return ParameterPlan(parameter, sources=step.sources, reason=f"the source's optimizer has an empty state of {empty[1]}")
    plans = []
    for slot in parameter.slots:
        leaves = tuple(state.get(slot.name) for state in states)
        if slot.kind == "code" and not slot.needed and all(leaf is None for leaf in leaves):
            continue
        lacking = _lacking(slot, leaves, ops, parameter)
        if lacking is not None and (slot.needed or any(leaf is not None for leaf in leaves)):
            return ParameterPlan(parameter, sources=step.sources, reason=f"the source's {slot.name} {lacking}")
        plans.append(SlotPlan(slot, () if lacking is not None else leaves, ops if slot.kind == "moment" and lacking is None else ()))
    return ParameterPlan(parameter, tuple(plans), step.sources)


def _lacking(slot: Slot, leaves: tuple[Leaf, ...], ops: tuple[Op, ...], parameter: Parameter) -> str | None:
    """Why a slot's leaves can't give its value, in words that continue "the source's exp_avg"; None if they can."""
    for leaf in leaves:
        if leaf is None:
            return "is missing"
        if isinstance(leaf, Refused):
            return f"is {leaf.reason}"
    if slot.kind == "code":
        if ops or len(leaves) > 1:
            changed = " | ".join(str(op["op"]) for op in ops)
            return f"has codes of bitsandbytes, which can only be carried unchanged, and {changed} changes them"
        return None if type(leaves[0]) in (int, float, TensorMeta) else "is no tensor"
    if slot.kind == "step":
        whole = all(type(leaf) in (int, float) or (type(leaf) is TensorMeta and leaf.numel == 1) for leaf in leaves)
        return None if whole else "is no number"
    if not all(type(leaf) is TensorMeta for leaf in leaves):
        return "is no tensor"
    if {BY_CODE[leaf.dtype].kind for leaf in leaves} != {BY_CODE[parameter.dtype].kind} or len({leaf.dtype for leaf in leaves}) > 1:
        return f"has the dtype {' and '.join(dict.fromkeys(leaf.dtype for leaf in leaves))}"
    shapes = infer_chain(ops, [leaf.shape for leaf in leaves])
    return None if shapes == (parameter.shape,) else f"becomes {', '.join(map(str, shapes[:4]))}, not {parameter.shape}"
