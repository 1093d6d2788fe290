"""Gives a scheduler or a gradient scaler the state of another run, and turns live training state into the trees that files give.

A state is carried where its keys, kinds of values and number of groups are those of the new object, and else left out with the reason:
half a schedule is none. Everything is checked before anything is loaded; a failure puts back what was there.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from ckptsurgeon.errors import FormatError
from ckptsurgeon.limit_table import allowed
from ckptsurgeon.models.target import user_code
from ckptsurgeon.models.target.skeleton import checkpoint_of_state_dict
from ckptsurgeon.tensors import Refused, TensorMeta

Fetch = Callable[[TensorMeta], torch.Tensor]
# What versions of torch's schedulers have and have not; none of it is about the schedule.
VOLATILE = frozenset({"verbose", "_is_initial", "_get_lr_called_within_step"})
# One value for each of the optimizer's groups.
BY_GROUP = frozenset({"base_lrs", "_last_lr", "min_lrs", "max_lrs", "base_momentums", "max_momentums"})


class Unfit(Exception):
    """A state that does not go with the object that is to take it; never leaves this module."""


def fitted(own: Mapping[str, Any], given: Any, fetch: Fetch, groups: int | None = None) -> dict[str, Any] | str:
    """A given state as the object whose own state is `own` would have it; or, in words, why it does not go with it.

    Args:
        groups: how many groups the optimizer has, for a scheduler.

    >>> fitted({"gamma": 0.1, "base_lrs": [1.0]}, {"gamma": 0.5, "base_lrs": [2.0]}, fetch=None, groups=1)
    {'gamma': 0.5, 'base_lrs': [2.0]}
    >>> fitted({"gamma": 0.1}, {"step_size": 3}, fetch=None)
    "lacks 'gamma' and has 'step_size' more"
    """
    try:
        found: dict[str, Any] = _like("", own, given, fetch, groups)
    except Unfit as error:
        return str(error)
    return found


def _like(place: str, own: Any, given: Any, fetch: Fetch, groups: int | None) -> Any:
    if isinstance(given, Refused):
        raise Unfit(f"{_at(place)} is {given.reason}")
    if type(given) is TensorMeta:
        tensor = fetch(given).detach().clone()
        return tensor if isinstance(own, torch.Tensor) else _like(place, own, tensor.item() if tensor.numel() == 1 else None, fetch, groups)
    if isinstance(own, Counter):
        if not isinstance(given, Mapping) or not all(type(item) is int for pair in given.items() for item in pair):
            raise Unfit(f"{_at(place)} is no count of whole numbers")
        return Counter(given)
    if isinstance(own, Mapping):
        return _like_dict(place, own, given, fetch, groups)
    if isinstance(own, (list, tuple)):
        return _like_list(place, own, given, fetch, groups)
    if own is None or given is None:
        kept = own if own is not None else given
        if kept is not None and type(kept) not in (int, float, bool, str):
            raise Unfit(f"{_at(place)} is a {type(kept).__name__}, or none")
        return given
    numbers = (int, float)
    if isinstance(own, torch.Tensor) and type(given) in numbers:
        return torch.full_like(own, given)
    if type(own) is not type(given) and not (type(own) in numbers and type(given) in numbers):
        raise Unfit(f"{_at(place)} is a {type(given).__name__}, not a {type(own).__name__}")
    if type(given) is float and math.isnan(given):
        raise Unfit(f"{_at(place)} is not a number")
    if type(given) is int and given.bit_length() > 63:
        raise Unfit(f"{_at(place)} is beyond 64 bits")
    return given


def _like_dict(place: str, own: Mapping[Any, Any], given: Any, fetch: Fetch, groups: int | None) -> dict[Any, Any]:
    if not isinstance(given, Mapping):
        raise Unfit(f"{_at(place)} is no dict")
    lacks = [name for name in own if name not in given and name not in VOLATILE]
    more = [name for name in given if name not in own and name not in VOLATILE]
    if lacks or more:
        words = ([f"lacks {lacks[0]!r:.60}"] if lacks else []) + ([f"has {more[0]!r:.60} more"] if more else [])
        raise Unfit(f"{f'{_at(place)} ' if place else ''}{' and '.join(words)}")
    return {
        name: _like(f"{place}.{name}" if place else str(name), value, given[name], fetch, groups)
        for name, value in own.items()
        if name in given
    }


def _like_list(place: str, own: Sequence[Any], given: Any, fetch: Fetch, groups: int | None) -> Any:
    if not isinstance(given, (list, tuple)):
        raise Unfit(f"{_at(place)} is no list")
    if groups is not None and place.rpartition(".")[2] in BY_GROUP and len(given) != groups:
        raise Unfit(f"is for {len(given)} groups, and the optimizer has {groups}")
    if any(isinstance(one, Mapping) for one in own) and len(own) != len(given):
        raise Unfit(f"{_at(place)} has {len(given)} parts, not {len(own)}")
    pattern = list(own) if len(own) == len(given) else [own[0] if own else None] * len(given)
    rows = [_like(f"{place}.{index}", one, value, fetch, groups) for index, (one, value) in enumerate(zip(pattern, given, strict=True))]
    return rows if isinstance(own, list) else tuple(rows)


def _at(place: str) -> str:
    return f"its {place}" if place else "it"


def driven(state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What a carried scheduler drives in each of the optimizer's groups: the rate it stood at, and, where it cycles them, the momentum.

    Args:
        state: the scheduler's, fitted.
        groups: the optimizer's own groups; `saved` those of the source's optimizer, where it is known.
    """
    rates, base = state.get("_last_lr"), state.get("base_lrs")
    found: list[dict[str, Any]] = []
    for index, group in enumerate(groups):
        own: dict[str, Any] = {}
        if isinstance(rates, list) and len(rates) == len(groups):
            own["lr"] = rates[index]
        if isinstance(base, list) and len(base) == len(groups) and "initial_lr" in group:
            own["initial_lr"] = base[index]
        if state.get("cycle_momentum") and len(saved) == len(groups):
            for word in ("momentum", "betas"):
                value: Any = saved[index].get(word)
                if word in group and _is_momentum(value):
                    own[word] = value if word == "momentum" else tuple(value)
        found.append(own)
    return found


def _is_momentum(value: Any) -> bool:
    values = value if isinstance(value, (list, tuple)) and len(value) == 2 else [value]
    return all(type(one) in (int, float) and 0 <= one < 1 for one in values)


def own_state(taker: Any) -> dict[str, Any]:
    """What a scheduler or scaler says its state is."""
    state: dict[str, Any] = user_code.call(type(taker).__name__, taker.state_dict)
    return state


@contextmanager
def loaded(taker: Any, state: dict[str, Any]) -> Iterator[None]:
    """Give a scheduler or scaler its state; when that, or what is done within, fails, it has what it had.

    Raises:
        TargetError: the object refuses the state.
    """
    name = type(taker).__name__
    before = own_state(taker)
    try:
        user_code.call(name, taker.load_state_dict, state)
        yield
    except BaseException:
        if before:
            user_code.call(name, taker.load_state_dict, before)
        raise


def live_tree(value: Any, place: str = "") -> tuple[Any, dict[str, torch.Tensor]]:
    """A live state as a tree like those of files, with a `TensorMeta` for each tensor, and the tensors by the names of these.

    >>> tree, tensors = live_tree({"step": 3, "exp_avg": torch.zeros(2)})
    >>> tree["step"], tree["exp_avg"].shape, list(tensors)
    (3, (2,), ['exp_avg'])
    """
    tensors: dict[str, torch.Tensor] = {}
    return _told(value, place, tensors, (), 0), tensors


def _told(value: Any, place: str, tensors: dict[str, torch.Tensor], above: tuple[int, ...], depth: int) -> Any:
    if isinstance(value, torch.Tensor):
        while place in tensors:
            place += "'"
        try:
            meta = checkpoint_of_state_dict({place: value})[place]
        except FormatError as error:
            return Refused(f"a tensor that {error.reason}")
        tensors[place] = value
        return meta
    if type(value) in (str, int, float, bool, type(None), bytes, complex):
        return value
    if not isinstance(value, (Mapping, list, tuple)):
        return Refused(f"a {type(value).__name__}")
    if id(value) in above or depth > allowed("nesting"):
        return Refused("a value that contains itself, or is nested too deep")
    within = (*above, id(value))
    if isinstance(value, Mapping):
        return {key: _told(one, f"{place}.{key}".lstrip("."), tensors, within, depth + 1) for key, one in value.items()}
    rows = [_told(one, f"{place}.{index}".lstrip("."), tensors, within, depth + 1) for index, one in enumerate(value)]
    return rows if isinstance(value, list) else tuple(rows)
