"""A folder of torch.distributed.checkpoint (DCP): `.metadata`, written last, and the blobs of all ranks in `.distcp` files.

Reads headers only: the `.metadata`, and of each blob all but the tensor's bytes. A tensor of several chunks lies in pieces. Files that
contradict each other are refused by file and rows. Layout as in torch's `filesystem.py` (`FileSystemWriter`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ckptsurgeon.errors import CheckpointError, FormatError, UnreadableError
from ckptsurgeon.formats.archive_tree import ValueTree, plain_tree
from ckptsurgeon.formats.folders import nesting
from ckptsurgeon.formats.folders.blobs import Blobs
from ckptsurgeon.formats.folders.dcp_metadata import Blob, Contents, TensorRow, combined, parse
from ckptsurgeon.formats.folders.hf_folder import check_link, member
from ckptsurgeon.formats.json_text import whole
from ckptsurgeon.formats.layout import RECORD, parse_provenance
from ckptsurgeon.formats.pickle.unpickled import Unpacked, plain
from ckptsurgeon.formats.zip_directory import read_directory
from ckptsurgeon.limit_table import Budget, allowed, exceeded
from ckptsurgeon.storage.files import OpenFile, Window
from ckptsurgeon.storage.opening import OpenFiles, open_regular
from ckptsurgeon.storage.pieces import tiled
from ckptsurgeon.tensors import Archive, FileStamp, Piece, Refused, Span, TensorMeta, contiguous_stride

METADATA = ".metadata"
# What a chunk of a tensor costs: bytes of `.metadata`, seconds and bytes of memory (measured; see tests/bench/distributed.py).
_BYTES, _SECONDS, _MEMORY = 143, 85e-6, 3500
_DATA = re.compile(r"__(\d+)_\d+\.distcp")
_RANK = re.compile(r"__\d+\.metadata")  # of a save without collectives, one for each rank


@dataclass(frozen=True)
class _Read:
    """What was read from a folder: its nested value, the values that are no tensors by key, and the facts of an `Archive`."""

    tree: dict[Any, Any]
    values: Mapping[str, Unpacked]
    stamps: tuple[FileStamp, ...]
    globals: tuple[str, ...]
    fingerprint: str
    notes: tuple[str, ...]


def read(folder: str, names: Collection[str]) -> Archive:
    """Read the headers of a DCP folder that has files of these names."""
    saved = _read(folder, names)
    known: dict[int, tuple[Any, int]] = {}

    def extra_state(dotted: str, value: Any) -> Any:
        return plain(saved.values[dotted].value, known) if dotted in saved.values else value

    roots, beside = nesting.collect(saved.tree, extra_state)
    if not roots:
        raise FormatError("holds no tensors under names", path=folder, hint="give a folder that dcp.save wrote of a model's state_dict")
    return Archive(
        path=folder,
        format="dcp",
        fingerprint=saved.fingerprint,
        files=saved.stamps,
        state_dicts=roots,
        globals=saved.globals,
        beside=beside,
        notes=saved.notes,
        provenance=_provenance(folder) if RECORD in names else None,
    )


def _provenance(folder: str) -> Mapping[str, Any] | None:
    """What a merge recorded about itself beside `.metadata`, of which torch reads nothing; None where it can't be read."""
    try:
        with _opened(folder, RECORD) as file:
            return parse_provenance(whole(file))
    except CheckpointError:
        return None


def read_tree(folder: str, names: Collection[str]) -> ValueTree:
    """All that a DCP folder holds, nested as it was saved."""
    saved = _read(folder, names)
    return ValueTree(folder, saved.tree, saved.stamps)


def contents_of(folder: str, names: Collection[str]) -> Contents:
    """What the `.metadata` of a DCP folder says, or those of all ranks together."""
    by_rank = [parse(raw, stamp.path) for stamp, raw in _metadata(folder, names)]
    return by_rank[0] if len(by_rank) == 1 else combined(by_rank)[0]


def _metadata(folder: str, names: Collection[str]) -> list[tuple[FileStamp, bytes]]:
    """The bytes of `.metadata`, or of each rank's; UnreadableError where the save never finished."""
    metadata_names = (
        [METADATA] if METADATA in names else sorted(filter(_RANK.fullmatch, names), key=lambda name: int(name[2 : -len(METADATA)]))
    )
    if not metadata_names:
        early = f"{METADATA}.tmp is there" if f"{METADATA}.tmp" in names else f"it has no {METADATA}"
        words = f"is a save of torch.distributed.checkpoint that never finished: {early}, and {METADATA} is written last"
        raise UnreadableError(words, path=folder, hint="give the folder of an earlier step")
    files: list[tuple[FileStamp, bytes]] = []
    for name in metadata_names:
        with _opened(folder, name) as file:
            files.append((file.stamp, _whole(file, sum(len(raw) for _, raw in files))))
    return files


def _read(folder: str, names: Collection[str]) -> _Read:
    rows = _metadata(folder, names)
    by_rank = [parse(raw, stamp.path) for stamp, raw in rows]
    contents, copies = (by_rank[0], ()) if len(by_rank) == 1 else combined(by_rank)
    raw = b"".join(raw for _, raw in rows)
    with OpenFiles() as opened:
        files: dict[str, OpenFile] = {}
        blobs = [row for of_rank in by_rank for row in _blobs(of_rank)]
        for name in _files(blob for _, blob in blobs):
            with suppress(_Absent):
                files[name] = opened.add(_opened(folder, name))
        notes = (*_about(contents, names), *_check_extents(blobs, files, names))
        return _Folder(folder, contents, files, len(raw), copies).read(raw, [stamp for stamp, _ in rows], notes)


def _about(contents: Contents, names: Collection[str]) -> Iterator[str]:
    """Notes on who saved a folder, and on files beside it with values that are no tensors."""
    files = [name for name in names if name.endswith(".distcp")]
    ranks = len({match[1] for name in files if (match := _DATA.fullmatch(name)) is not None})
    if ranks:
        yield f"saved by {ranks} rank{'s' if ranks > 1 else ''}, in {len(files)} file{'s' if len(files) > 1 else ''}"
    if "megatron" in contents.kind or {"common.pt", "metadata.json"} <= {*names}:
        yield "Megatron's torch_dist: layers may be stacked along a first dimension, and common.pt beside it has what is no tensor"
    elif "meta.pt" in names:
        yield "Lightning's: meta.pt beside it has what is no tensor, such as hyper-parameters and the step"


def _whole(file: OpenFile, before: int) -> bytes:
    """The bytes of a `.metadata`; those of other ranks had `before` bytes together."""
    nbytes = before + file.size
    if nbytes > (most := allowed("dcp-metadata-bytes")):
        chunks = nbytes // _BYTES
        cost = f"some {chunks:,} chunks, which take about {chunks * _SECONDS:.0f} s of a core and {chunks * _MEMORY / 1e9:.1f} GB to read"
        words = f"is a .metadata of {nbytes} bytes, above the limit of {most}: {cost}"
        raise exceeded("dcp-metadata-bytes", words, nbytes, path=file.path)
    return file.read(0, file.size)


def _files(blobs: Iterable[Blob]) -> list[str]:
    return sorted({blob.file for blob in blobs})


class _Absent(UnreadableError):
    """There is no file of this name."""


@contextmanager
def _opened(folder: str, name: str) -> Iterator[OpenFile]:
    """The open file of a name, in the folder."""
    try:
        path = member(folder, folder, name, "file")
    except UnreadableError as error:
        raise _Absent(error.reason, path=folder, hint=error.hint) from error
    with open_regular(path) as file:
        if os.path.islink(path):
            check_link(folder, folder, name, "file", file.stamp)
        yield file


def _check_extents(blobs: Sequence[tuple[str, Blob]], files: Mapping[str, OpenFile], names: Collection[str]) -> Iterator[str]:
    """FormatError where two blobs overlap. Yields notes on bytes and files that `.metadata` does not name."""
    extents: dict[str, list[tuple[int, int, str]]] = {name: [] for name in files}
    for key, blob in blobs:
        if blob.file in extents:
            extents[blob.file].append((blob.offset, blob.offset + blob.length, key))
    for name, rows in extents.items():
        rows.sort()
        for (_, end, key), (start, _, next_key) in pairwise(rows):
            if start < end:
                words = f"has blobs that overlap, of {key} and {next_key}: one ends at byte {end}, the next begins at {start}"
                raise FormatError(words, path=files[name].path, key=next_key, hint="copy or download the folder again; do not trust it")
        unnamed = files[name].size - sum(end - start for start, end, _ in rows)
        if unnamed > 0 and all(end <= files[name].size for _, end, _ in rows):
            yield f"{name} has {unnamed} bytes that {METADATA} does not name"
    known = set(_files(blob for _, blob in blobs))
    unknown = sorted(name for name in names if name.endswith(".distcp") and name not in known)
    if unknown:
        yield f"{METADATA} does not name {', '.join(unknown[:5])}{' and others' if len(unknown) > 5 else ''}: an earlier save left it there"


def _blobs(contents: Contents) -> Iterator[tuple[str, Blob]]:
    for key, row in contents.tensors.items():
        seen: set[Blob] = set()
        for chunk in row.chunks:
            if chunk.blob is not None and chunk.blob not in seen:
                seen.add(chunk.blob)  # several chunks may name one blob: only one of them has elements then
                yield key, chunk.blob
    for key, value in contents.values.items():
        if value is not None:
            yield key, value


@dataclass
class _Folder:
    """Reads the blobs of one folder."""

    path: str
    contents: Contents
    files: Mapping[str, OpenFile]
    nbytes: int
    copies: Sequence[tuple[str, Blob, Blob]] = ()

    def read(self, raw: bytes, stamps: Sequence[FileStamp], notes: tuple[str, ...]) -> _Read:
        """Read every blob's header."""
        self.blobs = Blobs()
        self.sizes = {file.path: file.size for file in self.files.values()}
        budget = Budget(self.path, self.nbytes)
        budget.spend("tensors", len(self.contents.tensors), "has more than {} tensors")
        tensors = {key: self._tensor(key, row) for key, row in self.contents.tensors.items()}
        unpacked = {key: self._value(key, blob) for key, blob in self.contents.values.items()}
        self.blobs.claims.check(self.path)
        values = {
            key: value if isinstance(value, Refused) else plain_tree(self.files[blob.file].path, value, key)
            for key, value in unpacked.items()
            if (blob := self.contents.values[key]) is not None
        }
        by_key = {**tensors, **values, **self._differing()}
        leaves = {key: by_key[key] for key in self.contents.order}
        tree = nesting.nested(leaves, self.contents.paths)
        return _Read(
            tree,
            {key: value for key, value in unpacked.items() if isinstance(value, Unpacked)},
            (*stamps, *(file.stamp for file in self.files.values())),
            (*self.contents.globals, *(name for name in self.blobs.globals if name not in self.contents.globals)),
            self.blobs.fingerprint(raw),
            notes,
        )

    def _value(self, key: str, blob: Blob | None) -> Unpacked | Refused:
        if blob is None:
            raise FormatError(f"is a value, and {METADATA} does not say where it lies", path=self.path, key=key)
        file = self.files.get(blob.file)
        if file is None or blob.offset + blob.length > file.size:
            problem = "is not there" if file is None else f"has {file.size} bytes, and ends before it"
            words = f"lies in {blob.file}, which {problem}"
            raise FormatError(words, path=self.path, key=key, hint="copy or download all of its files again")
        if blob.transforms:
            return Refused(_transformed(blob))
        unpacked = self.blobs.value(file, key, blob)
        self.blobs.hash(file.read(blob.offset, blob.length))
        return unpacked

    def _differing(self) -> dict[str, Refused]:
        """By key, the values that several ranks saved with different contents."""
        return {
            key: Refused(f"a value that several ranks saved, with different contents: in {first.file} and {second.file}")
            for key, first, second in self.copies
            if self._checksums(first) != self._checksums(second)
        }

    def _checksums(self, blob: Blob) -> object:
        """The checksums by which two blobs are compared; None for a blob that is missing."""
        file = self.files.get(blob.file)
        if file is None or blob.offset + blob.length > file.size:
            return None
        entries = read_directory(Window(file, blob.offset, blob.length)).entries
        return {name: (entry.crc, entry.size) for name, entry in entries.items() if not name.endswith("/.data/serialization_id")}

    def _tensor(self, key: str, row: TensorRow) -> TensorMeta | Refused:
        """A tensor, of one chunk or of pieces."""
        pieces: list[Piece] = []
        for chunk in row.chunks:
            blob = chunk.blob
            if blob is None:
                continue  # it has no elements, or `tiled` says which elements are missing
            if blob.transforms:
                return Refused(_transformed(blob))
            file = self.files.get(blob.file)
            if file is None or blob.offset + blob.length > file.size:
                where = os.path.join(self.path, blob.file) if file is None else file.path
                span = Span(where, blob.offset, max(blob.length, 1), "")
                pieces.append(Piece(span, chunk.offsets, chunk.sizes, contiguous_stride(chunk.sizes)))
                continue
            tensor = self.blobs.tensor(file, key, blob)
            if isinstance(tensor, Refused):
                return tensor
            if tensor.dtype != row.dtype.code or tensor.shape != chunk.sizes:
                if 0 in chunk.sizes:
                    continue
                words = f"has {tensor.dtype} {tensor.shape} at byte {blob.offset}, where {METADATA} says {row.dtype.code} {chunk.sizes}"
                raise FormatError(words, path=file.path, key=key, hint="copy or download the folder again; do not trust it")
            assert tensor.span is not None
            pieces.append(Piece(tensor.span, chunk.offsets, chunk.sizes, tensor.stride))
        return tiled(key, row.dtype.code, row.shape, pieces, self.sizes)


def _transformed(blob: Blob) -> str:
    return f"a value stored through {', '.join(blob.transforms)}, which only the program that wrote it can undo"
