"""What modules hold, kept so that code which changes them can be undone: tensors' values, attributes, and what lists and dicts contain.

Objects of other classes are kept by reference: what happens inside them, or outside the modules, can't be undone.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

Undo = Callable[[], None]
_CONTAINERS = (list, dict, set, deque, OrderedDict)


def remembered(modules: Iterable[nn.Module], tensors: Iterable[torch.Tensor] = ()) -> Undo:
    """A function that puts the modules' attributes and the tensors' values back as they are now.

    >>> layer = nn.BatchNorm1d(2)
    >>> back = remembered([layer])
    >>> layer.eps, layer.weight = 3, nn.Parameter(torch.zeros(5))
    >>> back()
    >>> layer.eps, layer.weight.tolist()
    (1e-05, [1.0, 1.0])
    """
    undo: list[Undo] = []
    seen: dict[int, Any] = {}  # what is kept, by id; it stays alive, so that no id is used again
    for module in modules:
        _keep(vars(module), undo, seen)
    for tensor in tensors:
        _keep(tensor, undo, seen)

    def back() -> None:
        for step in undo:
            step()

    return back


def _keep(value: Any, undo: list[Undo], seen: dict[int, Any]) -> None:
    if id(value) in seen:
        return
    seen[id(value)] = value
    if isinstance(value, torch.Tensor):
        undo.append(_tensor(value))
    elif type(value) in _CONTAINERS:
        content = type(value)(value)
        undo.append(lambda: _refill(value, content))
        for one in list(content.values()) if isinstance(content, dict) else list(content):
            _keep(one, undo, seen)
    elif type(value) is tuple:
        for one in value:
            _keep(one, undo, seen)


def _refill(container: Any, content: Any) -> None:
    container.clear()
    container.extend(content) if isinstance(container, (list, deque)) else container.update(content)


def _tensor(tensor: torch.Tensor) -> Undo:
    """Its values, in the memory that it has now."""
    plain = type(tensor) in (torch.Tensor, nn.Parameter) and not is_traceable_wrapper_subclass(tensor)
    with torch.no_grad():
        memory, value, learns = tensor.data if plain else None, tensor.detach().clone(), tensor.requires_grad

    def back() -> None:
        with torch.no_grad():
            if memory is not None and (tensor.data_ptr(), tensor.shape) != (memory.data_ptr(), memory.shape):
                tensor.data = memory
            tensor.copy_(value)
        if tensor.is_leaf and tensor.requires_grad != learns:
            tensor.requires_grad_(learns)

    return back
