"""The blobs of a `.distcp`, one after another: each is a whole file of `torch.save`, of one tensor or one other value.

Headers only, through the reader of torch's zip format. Nearly all blobs of one length differ only in checksums and an identifier: these
are compared with a blob that the reader has read, and the result is the same.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from hashlib import sha256

from ckptsurgeon.errors import CheckpointError
from ckptsurgeon.formats.folders.dcp_metadata import Blob
from ckptsurgeon.formats.pickle.unpickled import Claims, Unpacked, refusal, tensor_meta
from ckptsurgeon.formats.pickle.values import StorageRef, TensorRef
from ckptsurgeon.formats.torch.zip import unpack
from ckptsurgeon.formats.zip_directory import read_directory
from ckptsurgeon.storage.files import OpenFile, Window
from ckptsurgeon.tensors import Record, Refused, Span, TensorMeta

_TEMPLATES = 8  # at most, for one length
_CRC = slice(4, 8)  # of a data descriptor, after its signature
_CENTRAL_CRC = 16  # bytes from an entry's beginning in the directory
_CENTRAL = 46  # bytes of an entry in the directory before its name
_SIGNATURE = b"PK\x07\x08"


@dataclass(frozen=True, slots=True)
class _Template:
    """A blob that was read: its bytes before the tensor, those after it without checksums, the ranges of the checksums, and its tensor."""

    head: bytes
    kept: bytes
    cuts: tuple[tuple[int, int], ...]
    pairs: tuple[tuple[int, int], ...]  # the two positions of each checksum
    tensor: TensorMeta


@dataclass
class Blobs:
    """Reads blobs, and takes a digest of their headers and checksums."""

    claims: Claims = field(default_factory=Claims)
    globals: dict[str, None] = field(default_factory=dict)
    _templates: dict[int, list[_Template]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._sha = sha256()

    def fingerprint(self, first: bytes) -> str:
        """SHA-256 (hex) of `first` and of all that was read."""
        return sha256(first + self._sha.digest()).hexdigest()

    def tensor(self, file: OpenFile, key: str, blob: Blob, *, fast: bool = True) -> TensorMeta | Refused:
        """The tensor in a blob, with its offset in the file; a `Refused` where the blob holds no plain tensor.

        Raises:
            FormatError: the blob is no file of torch, or a damaged one.
        """
        for template in self._templates.get(blob.length, ()) if fast else ():
            tensor = self._like(file, blob, template)
            if tensor is not None:
                return tensor
        unpacked = self.value(file, key, blob)
        if type(unpacked.value) is not TensorRef:
            return Refused(refusal(unpacked.value))
        tensor = tensor_meta(file.path, key, unpacked.value, unpacked.locate, self.claims)
        self._keep(file, blob, tensor)
        return tensor

    def value(self, file: OpenFile, key: str, blob: Blob) -> Unpacked:
        """What the opcode machine makes of a blob."""
        try:
            unpacked = unpack(Window(file, blob.offset, blob.length))
        except CheckpointError as error:
            error.key = error.key or key
            error.reason = f"has a blob at byte {blob.offset} that can't be read: it {error.reason}"
            raise
        self.globals.update(dict.fromkeys(unpacked.globals))
        return replace(unpacked, locate=_moved(unpacked.locate, blob.offset))

    def hash(self, *parts: bytes) -> None:
        """Add bytes of a header to the fingerprint."""
        for part in parts:
            self._sha.update(part)

    def _like(self, file: OpenFile, blob: Blob, template: _Template) -> TensorMeta | None:
        """The tensor of a blob that differs from a template only in checksums; None for any other blob."""
        span = template.tensor.span
        assert span is not None and span.record is not None
        start = len(template.head)
        head = file.read(blob.offset, start)
        if head != template.head:
            return None
        end = blob.offset + start + span.record.nbytes
        tail = file.read(end, blob.offset + blob.length - end)
        if _without(tail, template.cuts) != template.kept or any(tail[a : a + 4] != tail[b : b + 4] for a, b in template.pairs):
            return None
        self.hash(head, tail)
        by = blob.offset + start - span.record.offset
        record = Record(blob.offset + start, span.record.nbytes, int.from_bytes(tail[_CRC], "little"))
        storage = _storage(blob.offset, span.storage.rpartition("/")[2])
        self.claims.stored[storage] = record.nbytes
        self.claims.nbytes += template.tensor.nbytes
        return replace(template.tensor, span=Span(file.path, span.offset + by, span.nbytes, storage, None, record, span.lazy))

    def _keep(self, file: OpenFile, blob: Blob, tensor: TensorMeta) -> None:
        """Add a blob's header to the fingerprint, and keep the blob as a template where torch wrote it."""
        span = tensor.span
        assert span is not None
        record = span.record
        if record is None or not record.nbytes:
            self.hash(file.read(blob.offset, blob.length) if record is None else b"", struct.pack("<2Q", blob.offset, blob.length))
            return
        head = file.read(blob.offset, record.offset - blob.offset)
        end = record.offset + record.nbytes
        tail = file.read(end, blob.offset + blob.length - end)
        self.hash(head, tail)
        known = self._templates.setdefault(blob.length, [])
        if len(known) < _TEMPLATES and (varying := _varying(file, blob, record, tail)) is not None:
            cuts, pairs = varying
            known.append(_Template(head, _without(tail, cuts), cuts, pairs, tensor))


def _varying(
    file: OpenFile, blob: Blob, record: Record, tail: bytes
) -> tuple[tuple[tuple[int, int], ...], tuple[tuple[int, int], ...]] | None:
    """The ranges after a blob's tensor that differ from blob to blob: its checksum, and torch's identifier of the blob with its checksum.
    None where the blob is not laid out as torch writes it."""
    directory = read_directory(Window(file, blob.offset, blob.length))
    begin = record.offset + record.nbytes - blob.offset  # of the tail, within the blob
    first = tail.find(directory.raw)
    if not directory.raw or first < 0:
        return None
    cuts: list[tuple[int, int]] = []
    pairs: list[tuple[int, int]] = []
    for name, entry in directory.entries.items():
        is_tensor = type(entry) is Record and entry.offset == record.offset - blob.offset
        if not is_tensor and not name.endswith("/.data/serialization_id"):
            continue
        after = entry.offset + entry.nbytes - begin
        name_at = directory.raw.find(name.encode())
        central = first + name_at - _CENTRAL + _CENTRAL_CRC
        if type(entry) is not Record or after < 0 or tail[after : after + 4] != _SIGNATURE or name_at < _CENTRAL:
            return None
        if not is_tensor:
            cuts.append((after - entry.nbytes, after))
        cuts += [(after + 4, after + 8), (central, central + 4)]
        pairs.append((after + 4, central))
    if not any(pair[0] == _CRC.start for pair in pairs):
        return None
    return tuple(sorted(cuts)), tuple(pairs)


def _without(tail: bytes, cuts: Sequence[tuple[int, int]]) -> bytes:
    parts, position = [], 0
    for start, stop in cuts:
        parts.append(tail[position:start])
        position = stop
    return b"\0".join([*parts, tail[position:]])


def _storage(offset: int, key: str) -> str:
    return f"{offset}/{key}"


def _moved(locate: Callable[[StorageRef], Span], by: int) -> Callable[[StorageRef], Span]:
    """`locate`, of a blob that begins at byte `by` of its file."""

    def moved(storage: StorageRef) -> Span:
        span = locate(storage)
        name = _storage(by, span.storage)
        if span.packed is not None:
            return replace(span, storage=name, packed=replace(span.packed, offset=span.packed.offset + by))
        record = span.record and replace(span.record, offset=span.record.offset + by)
        return replace(span, offset=span.offset + by, storage=name, record=record)

    return moved
