"""A snapshot of modules that undoes later changes to them: tensors' values, attributes, and the contents of lists and dicts; and the keys
that loading code fills in by writing into the model itself, as a hook after loading does, where the source lacks them.

Objects of other classes are kept by reference: changes inside them, or outside the modules, can't be undone.

A write is seen on any device. What it writes counts as filled in only if it is the same whatever the key held before: a hook that only
rescales or masks a fresh value leaves it fresh.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass

from ckptsurgeon.models.init.values import tensor_bytes
from ckptsurgeon.models.target.loaders import storage_of
from ckptsurgeon.models.target.sharding import local

Undo = Callable[[], None]
State = Mapping[str, Any]
_CONTAINERS = (list, dict, set, deque, OrderedDict)


def take_snapshot(modules: Iterable[nn.Module], tensors: Iterable[torch.Tensor] = ()) -> Undo:
    """Return a function that restores the modules' attributes and the tensors' values to what they are now.

    >>> layer = nn.BatchNorm1d(2)
    >>> restore = take_snapshot([layer])
    >>> layer.eps, layer.weight = 3, nn.Parameter(torch.zeros(5))
    >>> restore()
    >>> layer.eps, layer.weight.tolist()
    (1e-05, [1.0, 1.0])
    """
    undo: list[Undo] = []
    seen: dict[int, Any] = {}  # objects of the snapshot by id; they stay alive, so that no id is used again
    for module in modules:
        _keep(vars(module), undo, seen)
    for tensor in tensors:
        _keep(tensor, undo, seen)

    def restore() -> None:
        for undo_step in undo:
            undo_step()

    return restore


def values_of(state: Mapping[str, Any], keys: Iterable[str]) -> dict[str, bytes]:
    """A copy of the values of these keys' tensors, as far as they have memory; of a sharded one those of this rank's part.

    >>> values_of({"a": torch.tensor([1], dtype=torch.uint8)}, ["a", "b"])
    {'a': b'\\x01'}
    """
    tensors = {key: local(state[key]) for key in keys if isinstance(state.get(key), torch.Tensor)}
    return {key: bytes(tensor_bytes(tensor)) for key, tensor in tensors.items() if not tensor.is_meta}


def _keep(value: Any, undo: list[Undo], seen: dict[int, Any]) -> None:
    if id(value) in seen:
        return
    seen[id(value)] = value
    if isinstance(value, torch.Tensor):
        undo.append(_tensor(value))
    elif type(value) in _CONTAINERS:
        content = type(value)(value)
        undo += [value.clear, lambda: value.extend(content) if isinstance(value, (list, deque)) else value.update(content)]
        for item in list(content.values()) if isinstance(content, dict) else list(content):
            _keep(item, undo, seen)
    elif type(value) is tuple:
        for item in value:
            _keep(item, undo, seen)


def _tensor(tensor: torch.Tensor) -> Undo:
    """What restores a tensor's values, its memory and `requires_grad`."""
    plain = type(tensor) in (torch.Tensor, nn.Parameter) and not is_traceable_wrapper_subclass(tensor)
    with torch.no_grad():
        memory, value, requires_grad = tensor.data if plain else None, tensor.detach().clone(), tensor.requires_grad

    def restore() -> None:
        with torch.no_grad():
            if memory is not None and (tensor.data_ptr(), tensor.shape) != (memory.data_ptr(), memory.shape):
                tensor.data = memory
            tensor.copy_(value)
        if tensor.is_leaf and tensor.requires_grad != requires_grad:
            tensor.requires_grad_(requires_grad)

    return restore


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
