"""A nested state_dict from its flat keys: as one tree of plain values, and as the state_dicts in it.

A dict that holds tensors is a root, as in a torch file; an optimizer's state is one root with all tensors below it, under joined names. All
other values are listed as `beside`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ckptsurgeon.errors import FormatError
from ckptsurgeon.formats.folders.dcp_metadata import Path
from ckptsurgeon.tensors import Refused, StateDict, TensorMeta

_FLAT = ("state.", "param_groups.")  # how the keys of an optimizer's flattened state begin


def nested(leaves: Mapping[str, Any], paths: Mapping[str, Path]) -> dict[Any, Any]:
    """The values of `leaves` in nested dicts and lists, each at its path; a value without a path is at the top.

    >>> nested({"a.0": 1, "a.1": 2, "b.c": 3}, {"a.0": ("a", 0), "a.1": ("a", 1)})
    {'a': [1, 2], 'b.c': 3}
    """
    top: dict[Any, Any] = {}
    containers: list[tuple[dict[Any, Any], Any]] = []  # the dict and key of each container, the outer ones first
    for name, value in leaves.items():
        node = top
        *outer, last = paths.get(name) or _unnested(name)
        for part in outer:
            child = node.setdefault(part, _Container())
            if type(child) is not _Container:
                raise FormatError("stands below a value that is no dict", key=name)
            if not child:
                containers.append((node, part))
            node = child
        if last in node:
            raise FormatError("stands where other values stand", key=name)
        node[last] = value
    for node, part in reversed(containers):
        node[part] = _as_list(node[part])
    return top


def _unnested(name: str) -> Path:
    """The path of a key for which none is recorded: the top, or an optimizer's part, as Megatron names it."""
    head, _, rest = name.partition(".")
    return (head, rest) if head == "optimizer" and rest else (name,)


class _Container(dict[Any, Any]):
    """A dict that paths make, as opposed to a value that is a dict."""


def _as_list(node: Mapping[Any, Any]) -> Any:
    """A container as a list where its keys are a list's indices, else as a dict."""
    if all(type(key) is int for key in node) and sorted(node) == list(range(len(node))):
        return [node[index] for index in range(len(node))]
    return dict(node)


def collect(tree: Mapping[Any, Any], extra_state: Callable[[str, Any], Any]) -> tuple[tuple[StateDict, ...], tuple[str, ...]]:
    """The state_dicts in a tree, and the dotted paths of all other values.

    Args:
        extra_state: gives an `_extra_state` as plain values, from its dotted path and its value in the tree.
    """
    roots: list[StateDict] = []
    beside: list[str] = []
    waiting: list[tuple[str, Any]] = [("", tree)]
    while waiting:
        dotted, node = waiting.pop()
        items = list(node.items() if isinstance(node, Mapping) else enumerate(node))
        if isinstance(node, Mapping) and _is_optimizer(node):
            roots.append(StateDict(dotted, dict(_tensors("", node))))
            beside += [_join(dotted, str(name)) for name in node if name == "param_groups"]
            continue
        is_root = isinstance(node, Mapping) and any(isinstance(child, TensorMeta) for child in node.values())
        tensors: dict[str, TensorMeta] = {}
        entries: dict[str, Any] = {}
        below: list[tuple[str, Any]] = []
        for key, child in items:
            name, child_dotted = str(key), _join(dotted, str(key))
            if is_root and isinstance(child, TensorMeta):
                tensors[name] = child if child.name == name else _renamed(child, name)
            elif is_root and name.rpartition(".")[2] == "_extra_state":
                entries[name] = extra_state(child_dotted, child)
            elif is_root and isinstance(child, Refused):
                entries[name] = child
            elif isinstance(child, (Mapping, list)) and child and _holds(child):
                below.append((child_dotted, child))
            else:
                beside.append(child_dotted)
        waiting += reversed(below)
        if is_root:
            roots.append(StateDict(dotted, tensors, entries))
    return tuple(roots), tuple(beside)


def _renamed(tensor: TensorMeta, name: str) -> TensorMeta:
    return TensorMeta(name, tensor.dtype, tensor.shape, tensor.stride, tensor.span, tensor.pieces)


def _holds(node: Any) -> bool:
    """Whether a container is searched: always for a dict, for a list where not all its values are plain."""
    return isinstance(node, Mapping) or any(isinstance(child, (Mapping, list, TensorMeta, Refused)) for child in node)


def _is_optimizer(node: Mapping[Any, Any]) -> bool:
    if "state" in node and "param_groups" in node:
        return True
    names = [key for key in node if isinstance(key, str) and key.startswith(_FLAT)]
    return len(names) == len(node) and any(name.startswith(_FLAT[1]) for name in names)


def _tensors(head: str, node: Any) -> Iterator[tuple[str, TensorMeta]]:
    items = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for key, child in items:
        name = _join(head, str(key))
        if isinstance(child, TensorMeta):
            yield name, _renamed(child, name)
        else:
            yield from _tensors(name, child)


def _join(head: str, name: str) -> str:
    return f"{head}.{name}" if head else name
