"""Finds the state_dicts in a pickle's value: every dict that holds tensors is a root, and all other values are listed as `beside`.

Rule: only containers (dicts, lists, tuples of the allow-list) are walked, each once. Every value ends in exactly one of: a root's tensors,
a root's entries, `beside`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

from ckptsurgeon.dtypes import DType
from ckptsurgeon.errors import CheckpointError, FormatError, UnsafeError
from ckptsurgeon.formats.folders import parts
from ckptsurgeon.formats.pickle.globals import SCALARS, key_text
from ckptsurgeon.formats.pickle.state import name_globals
from ckptsurgeon.formats.pickle.values import Encoded, Global, Inert, NumpyArray, NumpyDType, Opaque, PickledDict, StorageRef, TensorRef
from ckptsurgeon.limit_table import Budget, allowed, exceeded
from ckptsurgeon.tensors import NOTHING, Part, Refused, Span, StateDict, TensorMeta

Locate = Callable[[StorageRef], Span]  # returns the span of a whole storage
NAMES = "names its values with more than {} characters"
Known = dict[int, tuple[Any, int]]  # by id: a value as plain values, and its size


@dataclass(frozen=True)
class Unpacked:
    """The value of a file's pickle of `nbytes` bytes, as the opcode machine made it; every storage was checked against the file."""

    value: Any
    globals: tuple[str, ...]
    locate: Locate
    nbytes: int


@dataclass
class Claims:
    """The sum of the bytes of a file's tensors, `nbytes`, and the bytes of each storage that they use. `extents` caches by shape and
    stride how many elements a tensor has and how many it spans."""

    nbytes: int = 0
    stored: dict[str, int] = field(default_factory=dict)
    extents: dict[tuple[tuple[int, ...], tuple[int, ...]], tuple[int, int]] = field(default_factory=dict)

    def check(self, path: str) -> None:
        """LimitError where the tensors together have far more bytes than are stored, even if each alone is within its limit."""
        stored = sum(self.stored.values())
        beyond, most = self.nbytes - stored, allowed("claimed-bytes", stored)
        if beyond > most:
            words = f"has tensors of {self.nbytes:,} bytes together in storages of {stored:,}, above the limit of {most:,} beyond these"
            raise exceeded("claimed-bytes", words, beyond, path=path)


@dataclass(frozen=True)
class Tree:
    """The state_dicts of a pickle, the dotted paths of its other values, and, where the file is one rank's part, which."""

    state_dicts: tuple[StateDict, ...]
    beside: tuple[str, ...]
    part: Part | None = None


def collect(path: str, unpacked: Unpacked) -> Tree:
    """Find every state_dict in a pickle. FormatError or UnsafeError, with the globals that the pickle names, when there is none."""
    top, locate = unpacked.value, unpacked.locate
    deepest, budget = allowed("nesting"), Budget(path, unpacked.nbytes)
    roots: list[StateDict] = []
    beside: list[str] = []
    arrays = 0
    seen: set[int] = set()
    known: Known = {}
    claims = Claims()
    part: Part | None = None
    waiting: list[tuple[str, Any, int]] = [("", top, 0)]
    while waiting:
        dotted, node, depth = waiting.pop()
        if depth > deepest:
            raise exceeded("nesting", f"nests its containers more than {deepest} deep", path=path)
        if id(node) in seen or _is_optimizer(node):
            beside.append(dotted)
            continue
        seen.add(id(node))
        children = list(node.values()) if type(node) is PickledDict else node if _is_container(node) else ()
        types = list(map(type, children))
        kinds = set(types)
        has_containers = not kinds.isdisjoint(_CONTAINERS)
        if has_containers:
            budget.spend("containers", sum(map(types.count, _CONTAINERS)), "has more than {} dicts, lists and tuples")
        if not kinds or (type(node) is not PickledDict and kinds <= _PLAIN):
            beside.append(dotted)  # empty, or a list of plain values: listed as one value
            continue
        budget.spend("name-characters", (len(children) + 1) * (len(dotted) + 1), NAMES)
        names = _names(path, dotted, node)
        budget.spend("name-characters", sum(map(len, names)), NAMES)
        if Inert in kinds:
            part = part or parts.sharded(children)
        if NumpyArray in kinds:
            arrays += types.count(NumpyArray)
        is_root = TensorRef in kinds and type(node) is PickledDict
        if is_root:
            if depth and not dotted:
                raise FormatError("has tensors in a nested dict under an empty name, which would read as its top dict", path=path)
            budget.spend("tensors", types.count(TensorRef), "has more than {} tensors")
            budget.spend("dense-keys", len(names), "has more than {} keys, for which its pickle is too short")
            roots.append(_state_dict(path, dotted, node, zip(names, children, strict=True), locate, known, claims))
        taken = roots[-1].entries if is_root else NOTHING
        items = [
            (name, child)
            for name, child in zip(names, children, strict=True)
            if not (is_root and type(child) is TensorRef) and name not in taken
        ]
        beside += [_join(dotted, name) for name, child in items if not (has_containers and _is_container(child))]
        if has_containers:
            waiting += [(_join(dotted, name), child, depth + 1) for name, child in reversed(items) if _is_container(child)]
    if len({root.root for root in roots}) != len(roots):
        raise FormatError("has two nested dicts of one name", path=path)
    part = part or parts.of_pickle(path, top)
    if not roots:
        error = parts.refused(part, path) if part is not None else _nothing(path, top, arrays)
        name_globals(error, unpacked.globals)
        raise error
    claims.check(path)
    return Tree(tuple(roots), tuple(beside), part)


def _state_dict(
    path: str, dotted: str, node: PickledDict, items: Iterable[tuple[str, Any]], locate: Locate, known: Known, claims: Claims
) -> StateDict:
    tensors: dict[str, TensorMeta] = {}
    entries: dict[str, Any] = {}
    refused: dict[int, Refused] = {}
    for name, child in items:
        if type(child) is TensorRef:
            tensors[name] = tensor_meta(path, name, child, locate, claims)
        elif name.rpartition(".")[2] == "_extra_state":
            entries[name] = plain(child, known)
        elif type(child) in (Inert, NumpyArray):
            entries[name] = refused.setdefault(id(child), Refused(refusal(child)))
    state = getattr(node, "state", None)
    versions = state.get("_metadata") if isinstance(state, dict) else None
    return StateDict(dotted, tensors, entries, _module_metadata(versions))


def _module_metadata(metadata: Any) -> Mapping[str, Any]:
    """torch's `_metadata` as plain values; other values in it are left out, since loading does not use them."""
    if not isinstance(metadata, dict):
        return NOTHING
    locals_ = {id(local): local for local in metadata.values() if isinstance(local, dict)}  # a shared dict is copied once
    plain_locals = {
        key: {name: value for name, value in local.items() if type(name) is str and type(value) in (int, str, bool, float, type(None))}
        for key, local in locals_.items()
    }
    return {path: plain_locals[id(local)] for path, local in metadata.items() if type(path) is str and isinstance(local, dict)}


def written_out(metadata: Mapping[str, Any]) -> Mapping[str, Any]:
    """torch's `_metadata`; LimitError where it is too large to write: a dict that paths share in a pickle is written once for each path."""
    entries, most = sum(len(local) for local in metadata.values()), allowed("metadata-entries")
    if entries > most:
        raise exceeded("metadata-entries", f"has a _metadata of {entries:,} entries, above the limit of {most:,}", entries)
    return metadata


def tensor_meta(path: str, name: str, ref: TensorRef, locate: Locate, claims: Claims) -> TensorMeta:
    """The `TensorMeta` of a tensor in a pickle, its bytes found by `locate`, its size added to `claims`."""
    whole = locate(ref.storage)
    size = ref.dtype.size
    sizes = ref.shape, ref.stride
    extent = claims.extents.get(sizes)
    if extent is None:
        extent = claims.extents[sizes] = prod(ref.shape), _reach(*sizes)
    start, nbytes, reach = ref.storage.start + ref.offset * size, extent[0] * size, extent[1] * size
    if ref.lazy:
        _refuse_unresolvable(path, name, ref)
    if nbytes > reach > 0 and nbytes > allowed("view-bytes"):
        raise exceeded("view-bytes", f"repeats {reach:,} stored bytes into {nbytes:,}", nbytes, path=path, key=name)
    span = whole
    if start or reach != whole.nbytes or ref.lazy:
        span = Span(whole.file, whole.offset + start, reach, whole.storage, whole.packed, whole.record, ref.lazy)
    claims.nbytes += nbytes
    claims.stored[whole.storage] = whole.nbytes
    return TensorMeta(name, ref.dtype.code, ref.shape, ref.stride, span)


def _reach(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    return 0 if 0 in shape else 1 + sum((count - 1) * step for count, step in zip(shape, stride, strict=True))


def _refuse_unresolvable(path: str, name: str, ref: TensorRef) -> None:
    """Raises FormatError for lazy bits that torch can't compute, or never sets, for a dtype."""
    kinds = ("complex",) if "conj" in ref.lazy else ("complex", "float")
    if ref.dtype.kind not in kinds or ref.dtype.size == 1 or (ref.dtype.code == "C32" and len(ref.lazy) == 2):
        words = " and ".join({"conj": "conjugated", "neg": "negated"}[bit] for bit in ref.lazy)
        raise FormatError(f"is a lazily {words} {ref.dtype.torch}, which torch can't compute", path=path, key=name, hint="do not trust it")


def plain(value: Any, known: Known | None = None) -> Any:
    """An `_extra_state` as plain Python values, or `Refused` with the reason why it can't be carried.

    `known` is shared by all values of one pickle: a value that they share is converted once, though its size counts each time.
    """
    return _plain(value, {} if known is None else known, 0)[0]


def _plain(value: Any, known: Known, depth: int) -> tuple[Any, int]:
    if type(value) in SCALARS:
        return value, len(value) if type(value) in (str, bytes) else 8
    if id(value) not in known:
        known[id(value)] = Refused("an _extra_state that contains itself"), 0
        known[id(value)] = _converted(value, known, depth)
    return known[id(value)]


def _converted(value: Any, known: Known, depth: int) -> tuple[Any, int]:
    """`value` as plain values, and how many bytes it takes when written."""
    if depth > 32:
        return Refused("an _extra_state nested more than 32 deep"), 0
    kind = type(value)
    if kind is TensorRef:
        return Refused("an _extra_state with tensors inside other values"), 0
    if kind is Encoded:
        return value.raw, len(value.raw)
    if kind not in (PickledDict, list, tuple):
        return Refused(refusal(value)), 0
    keys = value.keys() if kind is PickledDict else ()
    if any(type(key) not in (str, int) for key in keys):
        return Refused("an _extra_state with keys that are neither text nor integers"), 0
    children = [_plain(child, known, depth + 1) for child in (value.values() if kind is PickledDict else value)]
    refused = next((child for child, _ in children if type(child) is Refused), None)
    if refused is not None:
        return refused, 0
    size = 8 + sum(size for _, size in children) + sum(len(key) for key in keys if type(key) is str)
    if size > (most := allowed("extra-state-bytes")):
        return Refused(f"an _extra_state of more than {most:,} bytes (--limit extra-state-bytes={size} takes it)"), 0
    values = [child for child, _ in children]
    return dict(zip(keys, values, strict=True)) if kind is PickledDict else kind(values), size


_WORDS = {
    "torch._utils._rebuild_sparse_tensor": "a sparse tensor",
    "torch._utils._rebuild_sparse_csr_tensor": "a sparse tensor",
    "torch._utils._rebuild_nested_tensor": "a nested tensor",
    "torch._utils._rebuild_qtensor": "a quantized tensor",
    "torch._utils._rebuild_meta_tensor_no_storage": "a tensor without data (saved from the meta device)",
    "torch._utils._rebuild_wrapper_subclass": "a tensor subclass",
}


def refusal(value: Any) -> str:
    """What a value is that can't be carried, in a few words."""
    if type(value) is NumpyArray:
        return "a NumPy array, not a tensor"
    if type(value) in (Inert, Global):
        return _WORDS.get(value.name, f"an object of {value.name}, which is never imported or called")
    if type(value) in (DType, NumpyDType):
        return "a dtype"
    if type(value) is Opaque:
        return str(value.what)
    return f"a {type(value).__name__}"


_CONTAINERS = frozenset((PickledDict, list, tuple))
_PLAIN = frozenset(SCALARS)


def _is_container(value: Any) -> bool:
    return type(value) in _CONTAINERS


def _is_optimizer(node: Any) -> bool:
    return type(node) is PickledDict and "state" in node and "param_groups" in node


def _join(dotted: str, name: str) -> str:
    return f"{dotted}.{name}" if dotted else name


def _names(path: str, dotted: str, node: Any) -> list[str]:
    """The names of a container's values: no two the same, and valid Unicode."""
    if type(node) is not PickledDict:
        return list(map(str, range(len(node))))
    names = [key if type(key) is str else key_text(key) for key in node]
    if set(map(type, node)) != {str}:  # text keys of a dict all differ
        if len(set(names)) != len(names):
            # The names of keys that are neither text nor numbers only tell their type: the index makes them different.
            names = [name if type(key) in SCALARS else f"{name}#{index}" for index, (key, name) in enumerate(zip(node, names, strict=True))]
        if len(set(names)) != len(names):
            raise FormatError(f"has two keys in {dotted or 'its top dict'!r} that read the same, such as 1 and '1'", path=path)
    for name in names:
        if not name.isascii():
            try:
                name.encode()
            except UnicodeEncodeError as error:
                raise FormatError("has a key that is not valid Unicode", path=path, key=name) from error
    return names


def _nothing(path: str, value: Any, arrays: int) -> CheckpointError:
    """The error that says why a file has no state_dict, with a hint."""
    children = list(value.values()) if isinstance(value, dict) else []
    objects = (child for child in children if type(child) is Inert)
    modules = (child for child in objects if isinstance(child.state, dict) and "_modules" in child.state)
    whole = value if type(value) is Inert else next(modules, None)
    if whole is not None:
        return UnsafeError(
            f"holds a whole pickled object of {whole.name}, not a state_dict",
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
    if any(map(_is_optimizer, [value, *children])):
        return FormatError("holds an optimizer's state and no model's", path=path, hint="give the file that has the model's state_dict")
    return FormatError("holds no tensors under names", path=path, hint="give a file saved by torch.save(model.state_dict(), …)")
