"""Adds a group to a live optimizer whose rates a scheduler changes: it joins where the schedule stands, and the scheduler learns of it.

torch's schedulers keep lists with one value per group, in `_PER_GROUP`'s attributes; those grow by one, a scaled or a copied value.
The other groups' values, their state and the course of the schedule stay what they are.
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
    """The rate that a group's schedule is made from: its highest under OneCycleLR, else the one that it began with.

    >>> course({"lr": 0.01, "initial_lr": 0.1})
    0.1
    """
    return float(next(group[word] for word in _NOMINAL if word in group))


def check_schedulers(optimizer: Optimizer, given: object) -> tuple[Any, ...]:
    """The schedulers given, one or several.

    Raises:
        ModelError: one is no scheduler or another optimizer's, or none is given where the optimizer shows the marks of one.
    """
    several = tuple(given) if isinstance(given, Iterable) else () if given is None else (given,)
    for one in several:
        if not hasattr(one, "step") or not hasattr(one, "optimizer"):
            raise ModelError(f"a {type(one).__name__} is no scheduler of torch's", hint="give a torch.optim.lr_scheduler")
        if getattr(one.optimizer, "optimizer", one.optimizer) is not getattr(optimizer, "optimizer", optimizer):
            raise ModelError(f"the {type(one).__name__} belongs to another optimizer")
    if not several and any("initial_lr" in group for group in optimizer.param_groups):
        raise ModelError("a scheduler is at work on this optimizer, and is not given", hint="pass it, scheduler=…: its lists are per group")
    return several


def attach(
    optimizer: Optimizer, schedulers: Sequence[Any], group: dict[str, Any], lr: float, base: float, weight_decay: float | None
) -> None:
    """Add `group` (name, params, param_names) with what else the first group has, its rates scaled.

    Args:
        lr: the new group's rate where the schedule stands at its base.
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
    for one in schedulers:
        yield one
        yield from _all(getattr(one, "_schedulers", ()))


def _scaled(value: Any, ratio: float | None, lr: float) -> Any:
    """A rate times `ratio`, as a new value: a rate may be a tensor, which a scheduler fills in place."""
    return value * ratio if ratio is not None else value * 0 + lr
