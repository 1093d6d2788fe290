"""From a pickle's value to the state_dicts in it: every dict that holds tensors is a root, everything else stands beside.

Rule: walk containers only (dicts, lists, tuples of the allow-list), each once, never a stand-in; every value ends in exactly one
of: a root's tensors, a root's entries, beside.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from ckptsurgeon.dtypes import DType
from ckptsurgeon.errors import FormatError, LimitError
from ckptsurgeon.formats import limits
from ckptsurgeon.formats.pickle_values import Encoded, Global, Inert, NumpyArray, NumpyDType, PickledDict, StorageRef, TensorRef
from ckptsurgeon.tensors import NOTHING, Refused, Span, StateDict, TensorMeta

Locate = Callable[[StorageRef], Span]  # where a storage lies: the span of the whole storage


@dataclass(frozen=True)
class Tree:
    """The state_dicts found in a pickle, and by dotted place what stands beside them."""

    state_dicts: tuple[StateDict, ...]
    beside: tuple[str, ...]


def collect(path: str, value: Any, locate: Locate) -> Tree:
    """Find every state_dict in `value`. FormatError, in words that help, when there is none."""
    roots: list[StateDict] = []
    beside: list[str] = []
    arrays = 0
    seen: set[int] = set()
    waiting: list[tuple[str, Any, int]] = [("", value, 0)]
    while waiting:
        place, node, depth = waiting.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if depth > limits.DEPTH:
            raise LimitError(f"nests its containers more than {limits.DEPTH} deep", path=path)
        if _is_optimizer(node):
            beside.append(place)
            continue
        items = _children(path, place, node)
        nested = []
        if type(node) is PickledDict and any(type(child) is TensorRef for _, child in items):
            root, others = _state_dict(path, place, node, items, locate)
            roots.append(root)
            beside += others
        else:
            for name, child in items:
                if type(child) is NumpyArray:
                    arrays += 1
                if not _is_container(child):
                    beside.append(_join(place, name))
        nested = [(_join(place, name), child, depth + 1) for name, child in items if _is_container(child)]
        waiting += reversed(nested)
    if len({root.root for root in roots}) != len(roots):
        raise FormatError("has two nested dicts of one name", path=path)
    if not roots:
        raise _nothing(path, value, arrays)
    return Tree(tuple(roots), tuple(beside))


def _state_dict(path: str, place: str, node: PickledDict, items: list[tuple[str, Any]], locate: Locate) -> tuple[StateDict, list[str]]:
    tensors: dict[str, TensorMeta] = {}
    entries: dict[str, Any] = {}
    beside = []
    for name, child in items:
        if type(child) is TensorRef:
            tensors[name] = tensor_meta(path, name, child, locate)
        elif name.rpartition(".")[2] == "_extra_state":
            entries[name] = plain(child)
        elif type(child) in (Inert, NumpyArray):
            entries[name] = Refused(_refusal(child))
        elif not _is_container(child):
            beside.append(_join(place, name))
    metadata = getattr(node, "state", None)
    found = metadata.get("_metadata") if isinstance(metadata, dict) else None
    return StateDict(place, tensors, entries, _module_metadata(found)), beside


def _module_metadata(found: Any) -> Mapping[str, Any]:
    """torch's `_metadata`, as plain values; what is not plain in it is left out, as it can't matter to a load."""
    if not isinstance(found, dict):
        return NOTHING
    return {
        path: {name: value for name, value in local.items() if type(name) is str and type(value) in (int, str, bool, float, type(None))}
        for path, local in found.items()
        if type(path) is str and isinstance(local, dict)
    }


def tensor_meta(path: str, name: str, ref: TensorRef, locate: Locate) -> TensorMeta:
    """The `TensorMeta` of a tensor in a pickle, its bytes found by `locate`."""
    whole = locate(ref.storage)
    size = ref.dtype.size
    if 0 in ref.shape:
        length = 0
    else:
        length = 1
        for count, step in zip(ref.shape, ref.stride, strict=True):
            length += (count - 1) * step
    start = ref.storage.start + ref.offset * size
    span = Span(whole.file, whole.offset + start, length * size, whole.storage, whole.packed)
    meta = TensorMeta(name, ref.dtype.code, ref.shape, ref.stride, span)
    if length and meta.nbytes > max(length * size, limits.INFLATED_BYTES):
        raise LimitError(f"repeats {length * size} stored bytes into {meta.nbytes}", path=path, key=name)
    return meta


def plain(value: Any, depth: int = 0) -> Any:
    """An `_extra_state` as plain Python values, or `Refused` with the reason why it can't be carried."""
    if depth > 32:
        return Refused("an _extra_state nested more than 32 deep")
    kind = type(value)
    if kind in (str, int, float, bool, bytes, type(None)):
        return value
    if kind is TensorRef:
        return Refused("an _extra_state with tensors inside other values")
    if kind is Encoded:
        return value.text.encode("latin1", "replace")
    if kind is PickledDict:
        if any(type(key) not in (str, int) for key in value):
            return Refused("an _extra_state with keys that are neither text nor integers")
        result: Any = {key: plain(child, depth + 1) for key, child in value.items()}
        refused = [child for child in result.values() if type(child) is Refused]
    elif kind in (list, tuple):
        result = kind(plain(child, depth + 1) for child in value)
        refused = [child for child in result if type(child) is Refused]
    else:
        return Refused(_refusal(value))
    return refused[0] if refused else result


_WORDS = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_sparse_csr_tensor": "a sparse tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_qtensor": "a quantized tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without data (saved from the meta device)",
    "torch._utils._rebuild_wrapper_subclass": "a tensor subclass",
}


def _refusal(value: Any) -> str:
    if type(value) is NumpyArray:
        return "a NumPy array, not a tensor"
    if type(value) in (Inert, Global):
        return _WORDS.get(value.name, f"an object of {value.name}, which is never imported or called")
    if type(value) in (DType, NumpyDType):
        return "a dtype"
    return f"a {type(value).__name__}"


def _is_container(value: Any) -> bool:
    return type(value) in (PickledDict, list, tuple)


def _is_optimizer(node: Any) -> bool:
    return type(node) is PickledDict and "state" in node and "param_groups" in node


def _join(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


def _children(path: str, place: str, node: Any) -> list[tuple[str, Any]]:
    if type(node) in (list, tuple):
        return [(str(index), child) for index, child in enumerate(node)]
    if type(node) is not PickledDict:
        return []
    items = [(key if type(key) is str else _key(key), child) for key, child in node.items()]
    if len({name for name, _ in items}) != len(items):
        raise FormatError(f"has two keys in {place or 'its top dict'!r} that read the same, such as 1 and '1'", path=path)
    for name, _ in items:
        if not name.isascii():
            try:
                name.encode()
            except UnicodeEncodeError as error:
                raise FormatError("has a key that is not valid Unicode", path=path, key=name) from error
    return items


def _key(key: Any) -> str:
    return str(key) if type(key) in (int, float, bool, type(None)) else _refusal(key)


def _nothing(path: str, value: Any, arrays: int) -> FormatError:
    """Why there is no state_dict in this file, and what to do."""
    if type(value) is Inert:
        return FormatError(
            f"holds a whole pickled object of {value.name}, not a state_dict",
            path=path,
            hint="where that class can be imported and the file is trusted, load it there and save `model.state_dict()` instead",
        )
    if arrays:
        return FormatError(
            f"holds {arrays} NumPy arrays and no tensor",
            path=path,
            hint="convert it once: torch.save({k: torch.from_numpy(v) for k, v in arrays.items()}, 'out.pt')",
        )
    if type(value) is TensorRef:
        return FormatError(
            "holds one bare tensor, not a state_dict", path=path, hint="save it under a key: torch.save({'weight': tensor}, 'out.pt')"
        )
    if _is_optimizer(value) or (isinstance(value, dict) and any(_is_optimizer(child) for child in value.values())):
        return FormatError("holds an optimizer's state and no model's", path=path, hint="give the file that has the model's state_dict")
    return FormatError("holds no tensors under names", path=path, hint="give a file saved by torch.save(model.state_dict(), …)")
