"""Loads a saved state into a scheduler or a gradient scaler, and turns live training state into trees as readers of files return them.

A state is loaded only if its keys, types of values and number of groups are those of the new object; otherwise it is left out with the
reason, since half a schedule would set wrong rates. Everything is checked before anything is loaded; a failure restores the previous state.
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
# Only some versions of torch's schedulers save these; the schedule does not depend on them.
VOLATILE = frozenset({"verbose", "_is_initial", "_get_lr_called_within_step"})
# One value for each of the optimizer's groups.
BY_GROUP = frozenset({"base_lrs", "_last_lr", "min_lrs", "max_lrs", "base_momentums", "max_momentums"})


class Unfit(Exception):
    """A state does not fit its new object. Never leaves this module."""


def fitted(own: Mapping[str, Any], saved: Any, fetch: Fetch, groups: int | None = None) -> dict[str, Any] | str:
    """A saved state in the form of the object whose current state is `own`; or a str that says why it does not fit that object.

    Args:
        groups: how many groups the optimizer has, for a scheduler.

    >>> fitted({"gamma": 0.1, "base_lrs": [1.0]}, {"gamma": 0.5, "base_lrs": [2.0]}, fetch=None, groups=1)
    {'gamma': 0.5, 'base_lrs': [2.0]}
    >>> fitted({"gamma": 0.1}, {"step_size": 3}, fetch=None)
    "lacks 'gamma' and has an extra 'step_size'"
    """
    try:
        state: dict[str, Any] = _fit("", own, saved, fetch, groups)
    except Unfit as error:
        return str(error)
    return state


def _fit(path: str, own: Any, saved: Any, fetch: Fetch, groups: int | None) -> Any:
    if isinstance(saved, Refused):
        raise Unfit(f"{_at(path)} is {saved.reason}")
    if type(saved) is TensorMeta:
        tensor = fetch(saved).detach().clone()
        return tensor if isinstance(own, torch.Tensor) else _fit(path, own, tensor.item() if tensor.numel() == 1 else None, fetch, groups)
    if isinstance(own, Counter):
        if not isinstance(saved, Mapping) or not all(type(item) is int for pair in saved.items() for item in pair):
            raise Unfit(f"{_at(path)} is no count of whole numbers")
        return Counter(saved)
    if isinstance(own, Mapping):
        return _fit_dict(path, own, saved, fetch, groups)
    if isinstance(own, (list, tuple)):
        return _fit_list(path, own, saved, fetch, groups)
    if own is None or saved is None:
        present = own if own is not None else saved
        if present is not None and type(present) not in (int, float, bool, str):
            raise Unfit(f"{_at(path)} is a {type(present).__name__}, or none")
        return saved
    numbers = (int, float)
    if isinstance(own, torch.Tensor) and type(saved) in numbers:
        return torch.full_like(own, saved)
    if type(own) is not type(saved) and not (type(own) in numbers and type(saved) in numbers):
        raise Unfit(f"{_at(path)} is a {type(saved).__name__}, not a {type(own).__name__}")
    if type(saved) is float and math.isnan(saved):
        raise Unfit(f"{_at(path)} is not a number")
    if type(saved) is int and saved.bit_length() > 63:
        raise Unfit(f"{_at(path)} is beyond 64 bits")
    return saved


def _fit_dict(path: str, own: Mapping[Any, Any], saved: Any, fetch: Fetch, groups: int | None) -> dict[Any, Any]:
    if not isinstance(saved, Mapping):
        raise Unfit(f"{_at(path)} is no dict")
    lacks = [name for name in own if name not in saved and name not in VOLATILE]
    extra = [name for name in saved if name not in own and name not in VOLATILE]
    if lacks or extra:
        words = ([f"lacks {lacks[0]!r:.60}"] if lacks else []) + ([f"has an extra {extra[0]!r:.60}"] if extra else [])
        raise Unfit(f"{f'{_at(path)} ' if path else ''}{' and '.join(words)}")
    return {
        name: _fit(f"{path}.{name}" if path else str(name), value, saved[name], fetch, groups)
        for name, value in own.items()
        if name in saved
    }


def _fit_list(path: str, own: Sequence[Any], saved: Any, fetch: Fetch, groups: int | None) -> Any:
    if not isinstance(saved, (list, tuple)):
        raise Unfit(f"{_at(path)} is no list")
    if groups is not None and path.rpartition(".")[2] in BY_GROUP and len(saved) != groups:
        raise Unfit(f"is for {len(saved)} groups, but the optimizer has {groups}")
    if any(isinstance(own_item, Mapping) for own_item in own) and len(own) != len(saved):
        raise Unfit(f"{_at(path)} has {len(saved)} parts, not {len(own)}")
    own_items = list(own) if len(own) == len(saved) else [own[0] if own else None] * len(saved)
    rows = [
        _fit(f"{path}.{index}", own_item, value, fetch, groups)
        for index, (own_item, value) in enumerate(zip(own_items, saved, strict=True))
    ]
    return rows if isinstance(own, list) else tuple(rows)


def _at(path: str) -> str:
    return f"its {path}" if path else "it"


def scheduled_options(
    state: Mapping[str, Any], groups: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The options that a loaded scheduler sets in each of the optimizer's groups: its last learning rate, and the momentum that it cycles.
    `saved` are the groups of the source's optimizer; empty if they are unknown."""
    rates, base_rates = state.get("_last_lr"), state.get("base_lrs")
    by_group: list[dict[str, Any]] = []
    for index, group in enumerate(groups):
        values: dict[str, Any] = {}
        if isinstance(rates, list) and len(rates) == len(groups):
            values["lr"] = rates[index]
        if isinstance(base_rates, list) and len(base_rates) == len(groups) and "initial_lr" in group:
            values["initial_lr"] = base_rates[index]
        if state.get("cycle_momentum") and len(saved) == len(groups):
            for option in ("momentum", "betas"):
                value: Any = saved[index].get(option)
                if option in group and _is_momentum(value):
                    values[option] = value if option == "momentum" else tuple(value)
        by_group.append(values)
    return by_group


def _is_momentum(value: Any) -> bool:
    values = value if isinstance(value, (list, tuple)) and len(value) == 2 else [value]
    return all(type(number) in (int, float) and 0 <= number < 1 for number in values)


def own_state(owner: Any) -> dict[str, Any]:
    """The `state_dict()` of a scheduler or scaler."""
    state: dict[str, Any] = user_code.call(type(owner).__name__, owner.state_dict)
    return state


@contextmanager
def loaded(owner: Any, state: dict[str, Any]) -> Iterator[None]:
    """Load a state into a scheduler or scaler; if loading or the `with` block fails, restore its previous state.

    Raises:
        TargetError: the object refuses the state.
    """
    name = type(owner).__name__
    before = own_state(owner)
    try:
        user_code.call(name, owner.load_state_dict, state)
        yield
    except BaseException:
        if before:
            user_code.call(name, owner.load_state_dict, before)
        raise


def live_tree(value: Any, path: str = "") -> tuple[Any, dict[str, torch.Tensor]]:
    """A live state as a tree like those of files, with a `TensorMeta` for each tensor; and the tensors by name.

    >>> tree, tensors = live_tree({"step": 3, "exp_avg": torch.zeros(2)})
    >>> tree["step"], tree["exp_avg"].shape, list(tensors)
    (3, (2,), ['exp_avg'])
    """
    tensors: dict[str, torch.Tensor] = {}
    return _as_tree(value, path, tensors, (), 0), tensors


def _as_tree(value: Any, path: str, tensors: dict[str, torch.Tensor], above: tuple[int, ...], depth: int) -> Any:
    if isinstance(value, torch.Tensor):
        while path in tensors:
            path += "'"
        try:
            meta = checkpoint_of_state_dict({path: value})[path]
        except FormatError as error:
            return Refused(f"a tensor that {error.reason}")
        tensors[path] = value
        return meta
    if type(value) in (str, int, float, bool, type(None), bytes, complex):
        return value
    if not isinstance(value, (Mapping, list, tuple)):
        return Refused(f"a {type(value).__name__}")
    if id(value) in above or depth > allowed("nesting"):
        return Refused("a value that contains itself, or is nested too deep")
    within = (*above, id(value))
    if isinstance(value, Mapping):
        return {key: _as_tree(item, f"{path}.{key}".lstrip("."), tensors, within, depth + 1) for key, item in value.items()}
    rows = [_as_tree(item, f"{path}.{index}".lstrip("."), tensors, within, depth + 1) for index, item in enumerate(value)]
    return rows if isinstance(value, list) else tuple(rows)
