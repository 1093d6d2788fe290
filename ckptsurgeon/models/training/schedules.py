"""Adds a group to a live optimizer whose rates a scheduler changes. The new group starts at the schedule's current point.

torch's schedulers keep lists with one value per group, in the attributes `_PER_GROUP`. Each list gets one more value, scaled or copied.
The other groups' values, their state and the schedule itself stay unchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from ckptsurgeon.errors import ModelError

_NOMINAL = ("max_lr", "initial_lr", "lr")  # the first that a group has is the rate that its schedule is made from; max_lr is OneCycleLR's
_SCALED = ("lr", "initial_lr", "max_lr", "min_lr")  # rates in a group
_OWN = ("params", "param_names", "name")
# Attributes of schedulers with a value per group, and whether a new group's is the first one's scaled, or the same.
_PER_GROUP: dict[str, bool] = {
    "base_lrs": True,
    "max_lrs": True,
    "_last_lr": True,
    "lr_lambdas": False,
    "min_lrs": False,
    "base_momentums": False,
    "max_momentums": False,
}


def course(group: Mapping[str, Any]) -> float:
    """The base rate of a group's schedule: its highest rate under OneCycleLR, else its initial rate.

    >>> course({"lr": 0.01, "initial_lr": 0.1})
    0.1
    """
    return float(next(group[word] for word in _NOMINAL if word in group))


def check_schedulers(optimizer: Optimizer, given: object) -> tuple[Any, ...]:
    """The schedulers given, one or several.

    Raises:
        ModelError: one is no scheduler, or belongs to another optimizer; or none is given although the groups have an `initial_lr`.
    """
    schedulers = tuple(given) if isinstance(given, Iterable) else () if given is None else (given,)
    for scheduler in schedulers:
        if not hasattr(scheduler, "step") or not hasattr(scheduler, "optimizer"):
            raise ModelError(f"a {type(scheduler).__name__} is no scheduler of torch's", hint="give a torch.optim.lr_scheduler")
        if getattr(scheduler.optimizer, "optimizer", scheduler.optimizer) is not getattr(optimizer, "optimizer", optimizer):
            raise ModelError(f"the {type(scheduler).__name__} belongs to another optimizer")
    if not schedulers and any("initial_lr" in group for group in optimizer.param_groups):
        raise ModelError("a scheduler is at work on this optimizer, and is not given", hint="pass it, scheduler=…: its lists are per group")
    return schedulers


def attach(
    optimizer: Optimizer, schedulers: Sequence[Any], group: dict[str, Any], lr: float, base: float, weight_decay: float | None
) -> None:
    """Add `group` (name, params, param_names) with all other options of the first group, its rates scaled.

    Args:
        lr: the new group's rate when the schedule is at its base.
        base: `course` of the first group; where it is 0 there is no ratio, and the rates are `lr` themselves.
        weight_decay: None for the first group's.
    """
    first = optimizer.param_groups[0]
    ratio = lr / base if base else None
    scaled = {word: _scaled(first[word], ratio, lr) for word in _SCALED if word in first}
    decay = {} if weight_decay is None else {"weight_decay": weight_decay}
    names = _OWN if "param_names" in first else ("params", "name")
    before = len(optimizer.param_groups)
    rest = {word: value for word, value in first.items() if word not in _OWN}
    optimizer.add_param_group({**rest, **scaled, **decay, **{word: group[word] for word in names}})
    for scheduler in _all(schedulers):
        for attribute, scales in _PER_GROUP.items():
            values = getattr(scheduler, attribute, None)
            if isinstance(values, list) and len(values) == before:
                # a new list: a SequentialLR shows the list of the scheduler that is at work, and it must not grow twice
                setattr(scheduler, attribute, [*values, _scaled(values[0], ratio, lr) if scales else values[0]])


def _all(schedulers: Iterable[Any]) -> Iterator[Any]:
    """Each scheduler and those within it."""
    for scheduler in schedulers:
        yield scheduler
        yield from _all(getattr(scheduler, "_schedulers", ()))


def _scaled(value: Any, ratio: float | None, lr: float) -> Any:
    """A rate times `ratio`, as a new value: a rate may be a tensor, which a scheduler fills in place."""
    return value * ratio if ratio is not None else value * 0 + lr
