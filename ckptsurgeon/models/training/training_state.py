"""Loads a saved state into a scheduler or a gradient scaler, and turns live training state into trees as readers of files return them.

A state is loaded only if its keys, types of values and number of groups are those of the new object; otherwise it is left out with the
reason, since half a schedule would set wrong rates. Everything is checked before anything is loaded; a failure restores the former state.
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
# Only some versions of torch's schedulers keep these; the schedule does not depend on them.
VOLATILE = frozenset({"verbose", "_is_initial", "_get_lr_called_within_step"})
# One value for each of the optimizer's groups.
BY_GROUP = frozenset({"base_lrs", "_last_lr", "min_lrs", "max_lrs", "base_momentums", "max_momentums"})


class Unfit(Exception):
    """A state does not fit its new object. Never leaves this module."""


def fitted(own: Mapping[str, Any], saved: Any, fetch: Fetch, groups: int | None = None) -> dict[str, Any] | str:
    """A saved state in the form of the object whose own state is `own`; or, as a str, why it does not fit that object.

    Args:
        groups: how many groups the optimizer has, for a scheduler.

    >>> fitted({"gamma": 0.1, "base_lrs": [1.0]}, {"gamma": 0.5, "base_lrs": [2.0]}, fetch=None, groups=1)
    {'gamma': 0.5, 'base_lrs': [2.0]}
    >>> fitted({"gamma": 0.1}, {"step_size": 3}, fetch=None)
    "lacks 'gamma' and has 'step_size' more"
    """
    try:
        state: dict[str, Any] = _like("", own, saved, fetch, groups)
    except Unfit as error:
        return str(error)
    return state


def _like(place: str, own: Any, saved: Any, fetch: Fetch, groups: int | None) -> Any:
    if isinstance(saved, Refused):
        raise Unfit(f"{_at(place)} is {saved.reason}")
    if type(saved) is TensorMeta:
        tensor = fetch(saved).detach().clone()
        return tensor if isinstance(own, torch.Tensor) else _like(place, own, tensor.item() if tensor.numel() == 1 else None, fetch, groups)
    if isinstance(own, Counter):
        if not isinstance(saved, Mapping) or not all(type(item) is int for pair in saved.items() for item in pair):
            raise Unfit(f"{_at(place)} is no count of whole numbers")
        return Counter(saved)
    if isinstance(own, Mapping):
        return _like_dict(place, own, saved, fetch, groups)
    if isinstance(own, (list, tuple)):
        return _like_list(place, own, saved, fetch, groups)
    if own is None or saved is None:
        kept = own if own is not None else saved
        if kept is not None and type(kept) not in (int, float, bool, str):
            raise Unfit(f"{_at(place)} is a {type(kept).__name__}, or none")
        return saved
    numbers = (int, float)
    if isinstance(own, torch.Tensor) and type(saved) in numbers:
        return torch.full_like(own, saved)
    if type(own) is not type(saved) and not (type(own) in numbers and type(saved) in numbers):
        raise Unfit(f"{_at(place)} is a {type(saved).__name__}, not a {type(own).__name__}")
    if type(saved) is float and math.isnan(saved):
        raise Unfit(f"{_at(place)} is not a number")
    if type(saved) is int and saved.bit_length() > 63:
        raise Unfit(f"{_at(place)} is beyond 64 bits")
    return saved


def _like_dict(place: str, own: Mapping[Any, Any], saved: Any, fetch: Fetch, groups: int | None) -> dict[Any, Any]:
    if not isinstance(saved, Mapping):
        raise Unfit(f"{_at(place)} is no dict")
    lacks = [name for name in own if name not in saved and name not in VOLATILE]
    more = [name for name in saved if name not in own and name not in VOLATILE]
    if lacks or more:
        words = ([f"lacks {lacks[0]!r:.60}"] if lacks else []) + ([f"has {more[0]!r:.60} more"] if more else [])
        raise Unfit(f"{f'{_at(place)} ' if place else ''}{' and '.join(words)}")
    return {
        name: _like(f"{place}.{name}" if place else str(name), value, saved[name], fetch, groups)
        for name, value in own.items()
        if name in saved
    }


def _like_list(place: str, own: Sequence[Any], saved: Any, fetch: Fetch, groups: int | None) -> Any:
    if not isinstance(saved, (list, tuple)):
        raise Unfit(f"{_at(place)} is no list")
    if groups is not None and place.rpartition(".")[2] in BY_GROUP and len(saved) != groups:
        raise Unfit(f"is for {len(saved)} groups, and the optimizer has {groups}")
    if any(isinstance(like, Mapping) for like in own) and len(own) != len(saved):
        raise Unfit(f"{_at(place)} has {len(saved)} parts, not {len(own)}")
    pattern = list(own) if len(own) == len(saved) else [own[0] if own else None] * len(saved)
    rows = [_like(f"{place}.{index}", like, value, fetch, groups) for index, (like, value) in enumerate(zip(pattern, saved, strict=True))]
    return rows if isinstance(own, list) else tuple(rows)


def _at(place: str) -> str:
    return f"its {place}" if place else "it"


def driven(state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The values that a loaded scheduler sets in each of the optimizer's groups: its last learning rate and a cycled momentum.

    Args:
        state: the scheduler's state, as `fitted` returned it.
        groups: the optimizer's own groups.
        saved: the groups of the source's optimizer; empty where they are unknown.
    """
    rates, base = state.get("_last_lr"), state.get("base_lrs")
    by_group: list[dict[str, Any]] = []
    for index, group in enumerate(groups):
        values: dict[str, Any] = {}
        if isinstance(rates, list) and len(rates) == len(groups):
            values["lr"] = rates[index]
        if isinstance(base, list) and len(base) == len(groups) and "initial_lr" in group:
            values["initial_lr"] = base[index]
        if state.get("cycle_momentum") and len(saved) == len(groups):
            for word in ("momentum", "betas"):
                value: Any = saved[index].get(word)
                if word in group and _is_momentum(value):
                    values[word] = value if word == "momentum" else tuple(value)
        by_group.append(values)
    return by_group


def _is_momentum(value: Any) -> bool:
    values = value if isinstance(value, (list, tuple)) and len(value) == 2 else [value]
    return all(type(number) in (int, float) and 0 <= number < 1 for number in values)


def own_state(taker: Any) -> dict[str, Any]:
    """The `state_dict()` of a scheduler or scaler."""
    state: dict[str, Any] = user_code.call(type(taker).__name__, taker.state_dict)
    return state


@contextmanager
def loaded(taker: Any, state: dict[str, Any]) -> Iterator[None]:
    """Load a state into a scheduler or scaler; when that, or the `with` block, fails, it gets its former state back.

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
    """A live state as a tree like those of files, with a `TensorMeta` for each tensor; and the tensors by the names of their `TensorMeta`s.

    >>> tree, tensors = live_tree({"step": 3, "exp_avg": torch.zeros(2)})
    >>> tree["step"], tree["exp_avg"].shape, list(tensors)
    (3, (2,), ['exp_avg'])
    """
    tensors: dict[str, torch.Tensor] = {}
    return _as_tree(value, place, tensors, (), 0), tensors


def _as_tree(value: Any, place: str, tensors: dict[str, torch.Tensor], above: tuple[int, ...], depth: int) -> Any:
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
        return {key: _as_tree(item, f"{place}.{key}".lstrip("."), tensors, within, depth + 1) for key, item in value.items()}
    rows = [_as_tree(item, f"{place}.{index}".lstrip("."), tensors, within, depth + 1) for index, item in enumerate(value)]
    return rows if isinstance(value, list) else tuple(rows)
