"""Finds the keys that loading code fills in by writing into the model itself, as a hook after loading does, where the source lacks them.

A write is seen on any device. What it writes counts as filled in only if it is the same whatever the key held before: a hook that only
rescales or masks a fresh value leaves it fresh.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from ckptsurgeon.models.own_loading.snapshot import Undo, values_of
from ckptsurgeon.models.target.loaders import storage_of
from ckptsurgeon.models.target.sharding import local

State = Mapping[str, Any]


class Writes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While it is entered, sees whether anything writes into the tensors of these keys; `seen` says so."""

    def __init__(self, state: State, keys: Collection[str]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.keys = [key for key in keys if isinstance(state.get(key), torch.Tensor) and state[key].numel()]
        self.storages = {storage_of(state[key]) for key in self.keys}
        self.seen = False

    def replaced(self, after: State) -> bool:
        """Whether any of these keys has another tensor in the state_dict after loading."""
        values = (after.get(key) for key in self.keys)
        return any(isinstance(value, torch.Tensor) and storage_of(value) not in self.storages for value in values)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = kwargs or {}
        for number, argument in enumerate(func._schema.arguments):
            value = args[number] if number < len(args) else named.get(argument.name)
            if argument.is_out or (argument.alias_info is not None and argument.alias_info.is_write):
                self.seen |= isinstance(value, torch.Tensor) and storage_of(value) in self.storages
        return func(*args, **named)


def find_filled(
    state: State, before: Mapping[str, bytes], after: Mapping[str, bytes], restore: Undo, load: Callable[[], State]
) -> set[str]:
    """The keys whose values loading changed to what they do not depend on.

    Args:
        state: the model's state_dict.
        before, after: the values of the keys that the source lacks, before and after loading.
        restore: puts the model back as it was before.
        load: loads once more, and returns the state_dict that this leaves.
    """
    changed = {key for key, value in after.items() if value != before[key]}
    if not changed:
        return set()
    restore()
    with torch.no_grad():
        for key in changed:
            tensor = local(state[key])
            tensor.fill_(0 if bool((tensor == 1).all()) else 1)
    again = values_of(load(), changed)
    return {key for key in changed if again.get(key) == after[key]}
