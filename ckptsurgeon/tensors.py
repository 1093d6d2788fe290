"""The central types: a tensor is a slice of a file, a checkpoint is a mapping of keys to such slices.

Frozen values without any torch object. No file is opened here: `formats` makes these values from files, `models` from models.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from types import MappingProxyType
from typing import Any, Literal

from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.loading import Loader, Naming
from ckptsurgeon.shown import Look, Result, Shown, short

Kind = Literal["file", "model", "skeleton"]  # where a checkpoint's names come from; a skeleton has no values
NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, slots=True)
class Packed:
    """A deflated zip entry: `nbytes` compressed bytes at `offset` that inflate to `size` bytes with the CRC-32 `crc` (0 where there is
    none)."""

    offset: int
    nbytes: int
    size: int
    crc: int = 0


@dataclass(frozen=True, slots=True)
class Record:
    """A stored zip entry and the CRC-32 that the file gives for it (0 where there is none)."""

    offset: int
    nbytes: int
    crc: int

    @property
    def size(self) -> int:
        """Its length when it is read, like the `size` of a deflated entry."""
        return self.nbytes


@dataclass(frozen=True, slots=True)
class Span:
    """Where a tensor's bytes lie.

    `offset` and `nbytes` (in bytes) run from the first to the last element that the tensor's stride reaches; they count within
    the file, or within the inflated entry where `packed` is set. Tensors of one `storage` share memory in torch. `record` is the stored
    zip entry around it. `lazy` names what torch does to these bytes only when they are used: `conj`, `neg`, or both.
    """

    file: str
    offset: int
    nbytes: int
    storage: str
    packed: Packed | None = None
    record: Record | None = field(default=None, compare=False)
    lazy: tuple[str, ...] = ()

    @property
    def entry(self) -> str:
        """The name of its zip entry in messages: torch's storages are records below `data/`, an array is an entry of its own."""
        return self.storage if self.storage.endswith(".npy") else f"data/{self.storage}"

    def checksum(self) -> int | None:
        """The CRC-32 that the file records for exactly these bytes, or None."""
        record = self.record
        return (record.crc or None) if record is not None and (record.offset, record.nbytes) == (self.offset, self.nbytes) else None


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a tensor that is stored separately: its elements lie in `span`, with a `stride` of their own.

    `offsets` and `sizes` say which part of the whole it is: a block, with an offset and a size for each dimension; or a run of the whole's
    elements in row-major order, with a single offset and size (all pieces of a tensor are of one kind).
    """

    span: Span
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def block(self) -> tuple[tuple[int, int], ...]:
        """Start and stop, for each dimension."""
        return tuple((start, start + size) for start, size in zip(self.offsets, self.sizes, strict=True))

    @property
    def as_stored(self) -> bool:
        """As `TensorMeta.as_stored`, for its own elements."""
        return is_contiguous(self.sizes, self.stride) and not self.span.lazy


@dataclass(frozen=True, slots=True, repr=False)
class TensorMeta(Shown):
    """A tensor without its data.

    Attributes:
        name: its key.
        dtype: safetensors' code, such as `F32`.
        shape: its shape.
        stride: its stride, in elements; row-major where it lies in `pieces`.
        span: where its bytes lie; None in a skeleton, and where they lie in `pieces`.
        pieces: the parts that it lies in (`storage.pieces`), where there are several.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    span: Span | None = None
    pieces: tuple[Piece, ...] = ()

    @property
    def place(self) -> Span | tuple[Piece, ...] | None:
        """Where its bytes lie, as one value; None in a skeleton."""
        return self.span or self.pieces or None

    @property
    def spans(self) -> tuple[Span, ...]:
        """The spans in which its bytes lie, in order."""
        return (self.span,) if self.span is not None else tuple(piece.span for piece in self.pieces)

    @property
    def numel(self) -> int:
        """The number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The size in bytes of all elements, stored densely."""
        return prod(self.shape) * BY_CODE[self.dtype].size

    @property
    def contiguous(self) -> bool:
        """Whether the elements lie densely in row-major order."""
        return is_contiguous(self.shape, self.stride)

    @property
    def as_stored(self) -> bool:
        """Whether the stored bytes are the tensor's own: its elements in row-major order, and none to be conjugated or negated."""
        if self.pieces:
            return all(piece.as_stored for piece in self.pieces)
        return self.contiguous and (self.span is None or not self.span.lazy)


def contiguous_stride(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The row-major stride of a dense tensor of this shape.

    >>> contiguous_stride((2, 3, 4))
    (12, 4, 1)
    """
    stride = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        stride[dim] = stride[dim + 1] * max(shape[dim + 1], 1)
    return tuple(stride)


def is_contiguous(shape: tuple[int, ...], stride: tuple[int, ...]) -> bool:
    """Whether `stride` is row-major and dense for `shape`; dimensions of size one, and empty tensors, never matter."""
    if 0 in shape:
        return True
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1:
            if step != expected:
                return False
            expected *= size
    return True


@dataclass(frozen=True, slots=True)
class FileStamp:
    """A file as it was when its header was read, so that a change during a run is noticed. `data` is set for a file in memory."""

    path: str
    size: int
    mtime_ns: int
    inode: int
    device: int
    data: bytes | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Refused:
    """Stands for a value inside a state_dict that can't be read without running code that the file names, or can't be carried."""

    reason: str


@dataclass(frozen=True, repr=False)
class StateDict(Shown):
    """One root of a file: its tensors, its other values, torch's `_metadata` (module path to version and the like), and the ties
    that its tensors' spans can't show (a skeleton's)."""

    root: str
    tensors: Mapping[str, TensorMeta]
    entries: Mapping[str, Any] = field(default_factory=dict)
    module_metadata: Mapping[str, Any] = field(default_factory=dict)
    ties: tuple[tuple[str, ...], ...] = ()

    @property
    def nbytes(self) -> int:
        """The sum of its tensors' bytes."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


@dataclass(frozen=True, slots=True)
class Part:
    """Why a file is only a part of a checkpoint: its `kind`, one sentence, and a hint how to read the whole checkpoint."""

    kind: str
    reason: str
    hint: str


@dataclass(frozen=True, slots=True)
class Shard:
    """A file that is one shard of several: the index or folder of the `whole` checkpoint, and the keys in the other shards, None without an
    index."""

    whole: str
    other_keys: frozenset[str] | None = None


@dataclass(frozen=True, repr=False)
class Archive(Result):
    """A file, or a folder of shards, as read, with every root it holds.

    Attributes:
        path: the path, as the user wrote it.
        format: as `Checkpoint.format`.
        fingerprint: SHA-256 (hex) of the header's bytes and the file's size.
        files: the files that hold the data, as they were when read.
        state_dicts: the roots, each with its tensors and other values.
        globals: the globals that a pickle names beyond the allow-list.
        metadata: the text metadata of safetensors.
        provenance: what a merge recorded about itself, or None.
        beside: the dotted paths of all other values in the file.
        notes: what a user should know about the file, in sentences.
        part: set where it is one rank's part of a checkpoint, whose tensors are pieces.
        kind: `file`, or `skeleton`.
        chosen: the root to show; None for all.
        look: which of its tensors are shown, and how.
    """

    path: str
    format: str
    fingerprint: str
    files: tuple[FileStamp, ...]
    state_dicts: tuple[StateDict, ...]
    globals: tuple[str, ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    provenance: Mapping[str, Any] | None = None
    beside: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    part: Part | None = None
    kind: Kind = "file"
    chosen: Checkpoint | None = field(default=None, repr=False, compare=False)
    look: Look = field(default=Look(), repr=False, compare=False)

    __str__ = Shown.__repr__


@dataclass(frozen=True, eq=False)
class Checkpoint(Result, Mapping[str, TensorMeta]):
    """One state_dict without its data: keys to `TensorMeta`, in the file's or model's own order.

    Attributes:
        path: the path, as the user wrote it; for a model its spec.
        format: `torch-zip`, `torch-legacy`, `safetensors`, `safetensors-shards`, `torch-shards`, `dcp`, `dcp-safetensors`,
            `npz`, `skeleton` or `model`.
        fingerprint: SHA-256 (hex) of the header's bytes and the file's size; of names, dtypes and shapes for a model or skeleton.
        root: the nested dict that holds it, `""` for the top.
        tensors: the tensors by key; the checkpoint itself is this mapping too.
        entries: the values that are not tensors, by key (`_extra_state` among them).
        module_metadata: torch's `_metadata`.
        ties: groups of keys that are one tensor (same storage, offset, shape and stride).
        metadata: the text metadata of safetensors.
        left_behind: what else the file holds, by dotted path.
        notes: what a user should know about the file, in sentences.
        globals: the globals that a pickle names beyond the allow-list.
        provenance: what a merge recorded about itself, or None.
        files: the files that hold the data, as they were when read; empty for a model or skeleton.
        loaders: a model's modules with loading code of their own, by path.
        naming: how the model's library converts the names and layouts of its files to the model's; None without such a library.
        overlaps: groups of a model's keys whose memory partly overlaps, so that loading one changes the others.
        shard: set where it is one shard of several.
        kind: `file`, `model`, or `skeleton` (names, dtypes and shapes without values).
    """

    path: str
    format: str
    fingerprint: str
    tensors: Mapping[str, TensorMeta]
    root: str = ""
    entries: Mapping[str, Any] = field(default_factory=dict)
    module_metadata: Mapping[str, Any] = field(default_factory=dict)
    ties: tuple[tuple[str, ...], ...] = ()
    metadata: Mapping[str, str] = field(default_factory=dict)
    left_behind: tuple[str, ...] = ()
    globals: tuple[str, ...] = ()
    provenance: Mapping[str, Any] | None = None
    files: tuple[FileStamp, ...] = ()
    notes: tuple[str, ...] = ()
    loaders: Mapping[str, Loader] = field(default_factory=dict)
    naming: Naming | None = None
    overlaps: tuple[tuple[str, ...], ...] = ()
    shard: Shard | None = None
    kind: Kind = "file"

    @property
    def in_memory(self) -> str:
        """`file`, `model` or `state_dict` for one that is in memory and that no path or spec names; `""` for all others."""
        if any(file.data is not None for file in self.files):
            return "file"
        if self.kind != "model" or ":" in self.path:
            return ""
        return "state_dict" if self.path == "state_dict" else "model"

    @property
    def loaded_keys(self) -> frozenset[str]:
        """The keys whose values a module's own loading code may change."""
        return frozenset().union(*(loader.keys for loader in self.loaders.values() if loader.changes))

    def __getitem__(self, key: str) -> TensorMeta:
        return self.tensors[key]

    def __contains__(self, key: object) -> bool:
        return key in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        return f"<Checkpoint {short(self.path)}: {self.format}, {len(self):,} tensors, {self.numel:,} elements>"

    @property
    def numel(self) -> int:
        """The number of elements in all tensors."""
        return sum(tensor.numel for tensor in self.tensors.values())

    @property
    def nbytes(self) -> int:
        """The bytes of all tensors, tied ones counted each time."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def find_ties(tensors: Mapping[str, TensorMeta]) -> tuple[tuple[str, ...], ...]:
    """Groups of keys with the same storage, offset, shape and stride (tied tensors), in the order of their first key.

    A tensor and its lazy conjugate have different values, so they are not tied.
    """
    if len({tensor.span and tensor.span.storage for tensor in tensors.values()}) == len(tensors):
        return ()  # as in every safetensors
    if len({tensor.span and (tensor.span.file, tensor.span.storage, tensor.span.offset) for tensor in tensors.values()}) == len(tensors):
        return ()  # views of one storage that begin at different offsets
    groups: dict[tuple[Any, ...], list[str]] = {}
    for key, tensor in tensors.items():
        span = tensor.span
        if span is not None and span.nbytes:
            where = (span.file, span.storage, span.offset, span.lazy)
            groups.setdefault((*where, tensor.dtype, tensor.shape, tensor.stride), []).append(key)
        elif tensor.pieces:
            groups.setdefault((tensor.pieces, tensor.dtype, tensor.shape), []).append(key)
    return tuple(tuple(keys) for keys in groups.values() if len(keys) > 1)


def find_overlaps(tensors: Mapping[str, TensorMeta]) -> tuple[tuple[str, str], ...]:
    """Pairs of keys whose bytes overlap in one storage without being tied; they are written separately, so they no longer overlap."""
    by_storage: dict[tuple[str, str], list[tuple[int, int, str]]] = {}
    for key, tensor in tensors.items():
        for span in tensor.spans:
            if span.nbytes:
                by_storage.setdefault((span.file, span.storage), []).append((span.offset, span.offset + span.nbytes, key))
    pairs = []
    for spans in by_storage.values():
        if len(spans) < 2:
            continue
        spans.sort()
        end, owner = -1, ""
        for start, stop, key in spans:
            if start < end and owner != key and not _tied(tensors[owner], tensors[key]):
                pairs.append((owner, key))
            if stop > end:
                end, owner = stop, key
    return tuple(pairs)


def _tied(first: TensorMeta, second: TensorMeta) -> bool:
    return (first.place, first.dtype, first.shape, first.stride) == (second.place, second.dtype, second.shape, second.stride)
