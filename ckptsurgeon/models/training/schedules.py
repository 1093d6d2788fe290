"""Adds a group to a live optimizer whose rates a scheduler changes. The new group starts at the schedule's current point.

torch's schedulers keep lists with one value per group, in the attributes `_PER_GROUP`. Each list gets one more value, scaled or copied.
The other groups' values, their state and the schedule itself stay unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from ckptsurgeon.errors import ModelError

_BASE = ("max_lr", "initial_lr", "lr")  # the first of these in a group is the base rate of its schedule; max_lr is OneCycleLR's
_SCALED = ("lr", "initial_lr", "max_lr", "min_lr")  # rates in a group
_OWN = ("params", "param_names", "name")
# Attributes of schedulers with one value per group, and whether the first group's value is scaled for a new group, or copied.
_PER_GROUP: dict[str, bool] = {
    "base_lrs": True,
    "max_lrs": True,
    "_last_lr": True,
    "lr_lambdas": False,
    "min_lrs": False,
    "base_momentums": False,
    "max_momentums": False,
}


def base_rate(group: Mapping[str, Any]) -> float:
    """The base rate of a group's schedule: its highest rate under OneCycleLR, else its initial rate.

    >>> base_rate({"lr": 0.01, "initial_lr": 0.1})
    0.1
    """
    return float(next(group[option] for option in _BASE if option in group))


def check_schedulers(optimizer: Optimizer, scheduler: object) -> tuple[Any, ...]:
    """The schedulers as a tuple; `scheduler` is one scheduler, several, or None.

    Raises:
        ModelError: a value is no scheduler, or belongs to another optimizer; or there is none although the groups have an `initial_lr`.
    """
    schedulers = tuple(scheduler) if isinstance(scheduler, Iterable) else () if scheduler is None else (scheduler,)
    for member in schedulers:
        if not hasattr(member, "step") or not hasattr(member, "optimizer"):
            raise ModelError(f"a {type(member).__name__} is no torch scheduler", hint="give a torch.optim.lr_scheduler")
        if getattr(member.optimizer, "optimizer", member.optimizer) is not getattr(optimizer, "optimizer", optimizer):
            raise ModelError(f"the {type(member).__name__} belongs to another optimizer")
    if not schedulers and any("initial_lr" in group for group in optimizer.param_groups):
        raise ModelError(
            "this optimizer has a scheduler, which was not passed", hint="pass scheduler=…, since its lists have one value per group"
        )
    return schedulers


def attach(
    optimizer: Optimizer, schedulers: Sequence[Any], group: dict[str, Any], lr: float, base: float, weight_decay: float | None
) -> None:
    """Add `group` (name, params, param_names) with all other options of the first group, its rates scaled.

    Args:
        lr: the new group's rate when the schedule is at its base.
        base: the `base_rate` of the first group; if it is 0, the new group's rates are `lr` itself.
        weight_decay: None takes that of the first group.
    """
    first = optimizer.param_groups[0]
    ratio = lr / base if base else None
    scaled = {option: _scaled(first[option], ratio, lr) for option in _SCALED if option in first}
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    names = _OWN if "param_names" in first else ("params", "name")
    before = len(optimizer.param_groups)
    options = {option: value for option, value in first.items() if option not in _OWN}
    optimizer.add_param_group({**options, **scaled, **decay, **{option: group[option] for option in names}})
    for scheduler in _all(schedulers):
        for attribute, scales in _PER_GROUP.items():
            values = getattr(scheduler, attribute, None)
            if isinstance(values, list) and len(values) == before:
                # a new list: a SequentialLR shares the list of its current scheduler, which must not grow twice
                setattr(scheduler, attribute, [*values, _scaled(values[0], ratio, lr) if scales else values[0]])


def _all(schedulers: Iterable[Any]) -> Iterator[Any]:
    """Each scheduler, and the schedulers that it contains."""
    for scheduler in schedulers:
        yield scheduler
        yield from _all(getattr(scheduler, "_schedulers", ()))


def _scaled(value: Any, ratio: float | None, lr: float) -> Any:
    """A rate times `ratio`, as a new value: a rate may be a tensor, which a scheduler fills in place."""
    return value * ratio if ratio is not None else value * 0 + lr
