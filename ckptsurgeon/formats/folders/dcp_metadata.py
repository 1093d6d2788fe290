"""What a `.metadata` of torch.distributed.checkpoint says: each tensor's dtype, shape and chunks, other values, and where their blobs lie.

The opcode machine reads it, inertly; torch reads it with `pickle.load`. Nothing here is believed to be whole: what the rows say together
is held against the files by `dcp`. The classes are those of `torch.distributed.checkpoint.metadata` and `filesystem`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from ckptsurgeon.dtypes import DType
from ckptsurgeon.errors import CheckpointError, FormatError
from ckptsurgeon.formats.pickle.globals import MAX_INT
from ckptsurgeon.formats.pickle.machine import run
from ckptsurgeon.formats.pickle.values import Inert
from ckptsurgeon.limit_table import allowed, exceeded

Sizes = tuple[int, ...]
Path = tuple[str | int, ...]  # the path of a value in the nested state_dict

_MODULE = "torch.distributed.checkpoint."
_TENSOR, _CHUNK = f"{_MODULE}metadata.TensorStorageMetadata", f"{_MODULE}metadata.ChunkStorageMetadata"
_BYTES, _INDEX = f"{_MODULE}metadata.BytesStorageMetadata", f"{_MODULE}metadata.MetadataIndex"
_INFO = f"{_MODULE}filesystem._StorageInfo"
# The globals that torch's own writer names; none is imported. All others are reported.
_KNOWN = frozenset((_TENSOR, _CHUNK, _BYTES, _INDEX, _INFO))
_KNOWN |= {f"{_MODULE}metadata.{name}" for name in ("Metadata", "TensorProperties", "_MEM_FORMAT_ENCODING", "StorageMeta")}
_KNOWN |= {f"pathlib.{module}{name}" for module in ("", "_local.") for name in ("PosixPath", "WindowsPath")}


@dataclass(frozen=True, slots=True)
class Blob:
    """Where a saved value lies: `length` bytes from `offset` of the file of this name; `transforms` names how its bytes were
    transformed."""

    file: str
    offset: int
    length: int
    transforms: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Chunk:
    """A block of a tensor, and its blob; None where `.metadata` does not say where that is."""

    offsets: Sizes
    sizes: Sizes
    blob: Blob | None


@dataclass(frozen=True, slots=True)
class TensorRow:
    """A tensor: its dtype, whole shape, and chunks."""

    dtype: DType
    shape: Sizes
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Contents:
    """All that a `.metadata` says. `values` are those that are no tensors; `order` has the keys of both, `paths` where each stands in the
    nested state_dict, `kind` the class that it is of, and `extra` what else stands in it."""

    tensors: Mapping[str, TensorRow]
    values: Mapping[str, Blob | None]
    paths: Mapping[str, Path]
    order: tuple[str, ...]
    globals: tuple[str, ...] = ()
    kind: str = ""
    extra: Mapping[str, Any] = field(default_factory=dict)


def parse(raw: bytes, path: str) -> Contents:
    """Read the bytes of the `.metadata` at `path`.

    Raises:
        FormatError: it is no such pickle, or does not go together; by key where it is one.
        LimitError: it asks for more than a header may cost.
    """
    try:
        return _contents(raw)
    except CheckpointError as error:
        error.path = error.path or path
        raise


def combined(by_rank: Sequence[Contents]) -> tuple[Contents, tuple[tuple[str, Blob, Blob], ...]]:
    """The `__{rank}.metadata` of ranks that each saved alone, as one; and the values that several ranks saved: key, first rank's blob,
    which is used, and another rank's blob.

    Raises:
        FormatError: two ranks describe one key differently.
    """
    tensors: dict[str, TensorRow] = {}
    values: dict[str, Blob | None] = {}
    paths: dict[str, Path] = {}
    copies: list[tuple[str, Blob, Blob]] = []
    for contents in by_rank:
        for key in contents.order:
            if paths.setdefault(key, contents.paths.get(key, ())) != contents.paths.get(key, ()) or (
                (key in tensors) != (key in contents.tensors) and (key in tensors or key in values)
            ):
                raise FormatError("is described by two ranks in two ways", key=key)
            if key in contents.values:
                blob, first = contents.values[key], values.setdefault(key, contents.values[key])
                if blob is not None and first is not None and blob is not first:
                    copies.append((key, first, blob))
                continue
            row, known = contents.tensors[key], tensors.get(key)
            if known is None:
                tensors[key] = row
                continue
            if (row.dtype, row.shape) != (known.dtype, known.shape):
                raise FormatError("is described by two ranks in two ways", key=key)
            known_blobs = {(chunk.offsets, chunk.sizes): chunk.blob for chunk in known.chunks}
            fresh = [chunk for chunk in row.chunks if (chunk.offsets, chunk.sizes) not in known_blobs]
            copies += [
                (key, first, chunk.blob)
                for chunk in row.chunks
                if chunk.blob is not None and (first := known_blobs.get((chunk.offsets, chunk.sizes))) is not None
            ]
            tensors[key] = TensorRow(row.dtype, row.shape, (*known.chunks, *fresh))
    return (
        Contents(
            tensors,
            values,
            {key: path for key, path in paths.items() if path},
            tuple(dict.fromkeys(key for contents in by_rank for key in contents.order)),
            tuple(dict.fromkeys(name for contents in by_rank for name in contents.globals)),
            by_rank[0].kind,
            by_rank[0].extra,
        ),
        tuple(copies),
    )


def _contents(raw: bytes) -> Contents:
    pickled = run(raw)
    if pickled.end != len(raw):
        raise FormatError("has bytes after its pickle")
    top = pickled.value
    state = top.state if type(top) is Inert else None
    rows = state.get("state_dict_metadata") if isinstance(state, dict) else None
    stored = state.get("storage_data") if isinstance(state, dict) else None
    if not isinstance(rows, dict) or not isinstance(stored, dict):
        raise FormatError("is no .metadata of torch.distributed.checkpoint: it lacks state_dict_metadata or storage_data")
    assert isinstance(state, dict)
    blobs = _blobs(stored)
    tensors: dict[str, TensorRow] = {}
    values: dict[str, Blob | None] = {}
    for name, row in rows.items():
        if type(name) is not str or not name:
            raise FormatError("names a value by something other than text")
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise FormatError("has a key that is not valid Unicode", key=name) from error
        own = blobs.pop(name, {})
        kind = row.name if type(row) is Inert else ""
        described: set[Sizes | None] = {None}
        if kind == _BYTES:
            values[name] = own.get(None)
        elif kind == _TENSOR:
            tensors[name] = _tensor(name, row.state, own)
            described = {chunk.offsets for chunk in tensors[name].chunks}
        else:
            raise FormatError("is described as neither a tensor nor bytes", key=name)
        if not described.issuperset(own):
            offsets, blob = next(row for row in own.items() if row[0] not in described)
            raise FormatError(f"has a chunk at {list(offsets or ())} in {blob.file}, which its description does not have", key=name)
    if blobs:
        raise FormatError("has a chunk, and no description of what it is a chunk of", key=next(iter(blobs)))
    globals_ = tuple(name for name in pickled.globals if name not in _KNOWN)
    extra = {name: value for name, value in state.items() if name not in ("state_dict_metadata", "storage_data", "planner_data")}
    return Contents(tensors, values, dict(_paths(state.get("planner_data"), rows)), tuple(rows), globals_, top.name, extra)


def _blobs(stored: Mapping[Any, Any]) -> dict[str, dict[Sizes | None, Blob]]:
    """By key and offsets (None for a value that is no tensor), where the blob lies."""
    by_key: dict[str, dict[Sizes | None, Blob]] = {}
    for index, info in stored.items():
        state = index.state if type(index) is Inert and index.name == _INDEX else None
        key = state.get("fqn") if isinstance(state, dict) else None
        if type(key) is not str or not isinstance(state, dict):
            raise FormatError("has a row of storage_data that names no key")
        offsets = state.get("offset")
        if offsets is not None and not _are_sizes(offsets):
            raise FormatError("has a chunk at offsets that are not non-negative integers", key=key)
        own = by_key.setdefault(key, {})
        if offsets in own:
            raise FormatError(f"has two chunks at {list(offsets or ())}", key=key)
        own[offsets] = _blob(key, info)
    return by_key


def _blob(key: str, info: Any) -> Blob:
    state = info.state if type(info) is Inert else None
    if type(info) is Inert and info.name != _INFO:
        raise FormatError(f"is stored as {info.name} says, which only its own reader can tell", key=key)
    if not isinstance(state, dict):
        raise FormatError("has a row of storage_data that says nothing", key=key)
    file, offset, length = (state.get(name) for name in ("relative_path", "offset", "length"))
    if type(file) is not str or not _is_size(offset) or not _is_size(length):
        raise FormatError("has a row of storage_data without a file, offset and length", key=key)
    transforms = state.get("transform_descriptors") or ()
    if transforms and (type(transforms) not in (list, tuple) or not all(type(transform) is str for transform in transforms)):
        raise FormatError("has transform_descriptors that are no names", key=key)
    return Blob(file, offset, length, tuple(transforms))


def _tensor(name: str, state: Any, own: Mapping[Sizes | None, Blob]) -> TensorRow:
    shape, chunks = (state.get("size"), state.get("chunks")) if isinstance(state, dict) else (None, None)
    if not _are_sizes(shape) or not isinstance(chunks, (list, tuple)):
        raise FormatError("is a tensor without a shape or without chunks", key=name)
    properties = state.get("properties")
    kept = properties.state if type(properties) is Inert else None
    dtype = kept[0] if type(kept) is tuple and kept else kept.get("dtype") if isinstance(kept, dict) else None
    if type(dtype) is not DType:
        raise FormatError("is a tensor of no dtype that is known", key=name)
    return TensorRow(dtype, shape, tuple(_chunks(name, shape, chunks, own)))


def _chunks(name: str, shape: Sizes, chunks: Sequence[Any], own: Mapping[Sizes | None, Blob]) -> Iterator[Chunk]:
    for chunk in chunks:
        state = chunk.state if type(chunk) is Inert and chunk.name == _CHUNK else None
        offsets, sizes = (state.get("offsets"), state.get("sizes")) if isinstance(state, dict) else (None, None)
        if not _are_sizes(offsets) or not _are_sizes(sizes) or not len(offsets) == len(sizes) == len(shape):
            raise FormatError("has a chunk without offsets and sizes, one of each for every dimension", key=name)
        yield Chunk(offsets, sizes, own.get(offsets))  # several chunks without elements may have the same offsets


def _is_size(value: Any) -> TypeGuard[int]:
    return type(value) is int and 0 <= value <= MAX_INT


def _are_sizes(value: Any) -> TypeGuard[Sizes]:
    return type(value) is tuple and len(value) <= 64 and all(map(_is_size, value))


def _paths(data: Any, rows: Mapping[str, Any]) -> Iterator[tuple[str, Path]]:
    """The path of each key in the nested state_dict. torch joins a path's parts by dots for the key; any other path is refused."""
    most = allowed("nesting")
    for name in rows:
        path = data.get(name) if isinstance(data, dict) else None
        if path is None:
            continue
        if type(path) is not tuple or not path or not all(type(part) is str or _is_size(part) for part in path):
            raise FormatError("has a place in the nested state_dict that is no path", key=name)
        if len(path) > most:
            raise exceeded("nesting", f"nests its containers more than {most} deep", len(path), key=name)
        if sum(map(len, (part for part in path if type(part) is str))) > len(name) or ".".join(map(str, path)) != name:
            raise FormatError("stands at another place in the nested state_dict than its name says", key=name)
        yield name, path
