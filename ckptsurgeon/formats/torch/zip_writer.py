"""Lays out a torch zip file as torch itself does: stored records, 64-byte alignment, CRCs in descriptors after the data.

A large record whose bytes are copied begins instead where its source does, modulo 4096, so that a file system can share them. Only offsets
are computed here; `streaming` copies the tensors' bytes. The archive's folder and dates are fixed, so that the same state_dict gives the
same bytes. `.format_version` is left out on purpose: it would let readers compute offsets instead of reading them.

The pickle is written opcode by opcode (protocol 2), as torch's weights-only reader takes it. It names only globals that
`torch.load(weights_only=True)` allows, and needs no torch.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.errors import OutputError
from ckptsurgeon.formats.layout import RECORD, WEIGHTS, Chunk, Contents, Layout, OutTensor, Slot, Stored, follows_origins
from ckptsurgeon.formats.pickle.unpickled import written_out
from ckptsurgeon.storage.platform import BLOCK
from ckptsurgeon.tensors import contiguous_stride

FOLDER = "archive"
ALIGNMENT = 64
_LARGE = 64 << 10
_MAX32 = 0xFFFFFFFF
_FLAGS = 0x0808  # sizes and CRC in a descriptor after the data; names in UTF-8
_ORDERED_DICT = b"ccollections\nOrderedDict\n)R"
_LONG1_BITS = 8 * 255  # the longest integer of protocol 2's LONG1


@dataclass(frozen=True)
class _Record:
    name: bytes
    header: int
    data: int
    size: int
    crc: int | None  # None for a slot's, which is known once its data is written

    @property
    def wide(self) -> bool:
        return self.size >= _MAX32 or self.header >= _MAX32


def layout_of(contents: Contents) -> Layout:
    """A new file of these contents; tied tensors stay tied, so it has no aliases."""
    record = None if contents.record is None else contents.record.encode()
    return lay_out(contents.tensors, contents.entries, contents.module_metadata, contents.order, record, contents.around)


def lay_out(
    tensors: Sequence[OutTensor],
    entries: Mapping[str, Any],
    module_metadata: Mapping[str, Any],
    order: Sequence[str],
    provenance: bytes | None,
    around: Any = WEIGHTS,
) -> Layout:
    """The layout of a new torch zip file; tied tensors (one `storage` number) share a record.

    `around` is the value that contains the state_dict, as for `state_dict_pickle`.
    """
    storage_keys: dict[int, str] = {}
    first: list[int] = []
    for index, tensor in enumerate(tensors):
        if tensor.storage not in storage_keys:
            storage_keys[tensor.storage] = str(len(first))
            first.append(index)
    pickle = state_dict_pickle(tensors, storage_keys, entries, module_metadata, order, around)
    contents: list[tuple[str, bytes | int]] = [("data.pkl", pickle), ("byteorder", b"little")]
    contents += [(f"data/{number}", index) for number, index in enumerate(first)]
    contents.append(("version", b"3\n"))
    if provenance is not None:
        contents.append((RECORD, provenance))

    following = follows_origins(tensors[index].nbytes for index in first)
    position = 0
    records: list[_Record] = []
    chunks: list[Chunk] = []
    slots: list[Slot] = []
    for name, content in contents:
        full = f"{FOLDER}/{name}".encode()
        size = len(content) if isinstance(content, bytes) else tensors[content].nbytes
        start = (0, ALIGNMENT) if isinstance(content, bytes) or not following else _start(tensors[content])
        header = _local_header(full, position, *start)
        data = position + len(header)
        known = isinstance(content, bytes)
        record = _Record(full, position, data, size, zlib.crc32(content) if isinstance(content, bytes) else None)
        chunks.append((position, header + content if isinstance(content, bytes) else header))
        if not known:
            slots.append(Slot(data, size, content))  # type: ignore[arg-type]
        records.append(record)
        position = data + size + len(_descriptor(record, 0))

    def tail(checksums: Sequence[int]) -> tuple[Chunk, ...]:
        computed = iter(checksums)
        crcs = [next(computed) if record.crc is None else record.crc for record in records]
        descriptors = [(record.data + record.size, _descriptor(record, crc)) for record, crc in zip(records, crcs, strict=True)]
        return (*descriptors, (position, _directory(records, crcs, position)))

    size = position + len(_directory(records, [0] * len(records), position))
    return Layout(tuple(slots), tuple(chunks), size, checksums=True, tail=tail)


def _start(tensor: OutTensor) -> tuple[int, int]:
    """The remainder that the offset of a tensor's record has, and the divisor. torch reads offsets that are no multiples of 64 too."""
    if tensor.origin is None or tensor.nbytes < _LARGE or tensor.origin.offset % BY_CODE[tensor.dtype].size:
        return 0, ALIGNMENT
    return tensor.origin.offset % BLOCK, BLOCK


def _local_header(name: bytes, position: int, remainder: int, divisor: int) -> bytes:
    # The extra field "FB" is torch's own padding: it brings the data to its offset.
    padding = (remainder - (position + 30 + len(name) + 4)) % divisor
    extra = b"FB" + struct.pack("<H", padding) + b"Z" * padding
    return struct.pack("<4s5H3L2H", b"PK\x03\x04", 0, _FLAGS, 0, 0, 0, 0, 0, 0, len(name), len(extra)) + name + extra


def _descriptor(record: _Record, crc: int) -> bytes:
    if not record.size:
        return b""  # as miniz does
    return struct.pack("<4sLQQ" if record.wide else "<4sLLL", b"PK\x07\x08", crc, record.size, record.size)


def _directory(records: Sequence[_Record], crcs: Sequence[int], start: int) -> bytes:
    parts = []
    for record, crc in zip(records, crcs, strict=True):
        wide = [value for value in (record.size, record.size, record.header) if value >= _MAX32]
        extra = struct.pack("<2H", 1, 8 * len(wide)) + struct.pack(f"<{len(wide)}Q", *wide) if wide else b""
        size = min(record.size, _MAX32)
        lengths = (len(record.name), len(extra), 0)
        header = min(record.header, _MAX32)
        parts.append(struct.pack("<4s6H3L5H2L", b"PK\x01\x02", 0, 0, _FLAGS, 0, 0, 0, crc, size, size, *lengths, 0, 0, 0, header))
        parts += [record.name, extra]
    body = b"".join(parts)
    count, end = len(records), start + len(body)
    small = (min(count, 0xFFFF), min(count, 0xFFFF), min(len(body), _MAX32), min(start, _MAX32))
    return body + (
        struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 0x031E, 45, 0, 0, count, count, len(body), start)
        + struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1)
        + struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, *small, 0)
    )


def state_dict_pickle(
    tensors: Sequence[OutTensor],
    storage_keys: Mapping[int, str],
    entries: Mapping[str, Any],
    module_metadata: Mapping[str, Any],
    order: Sequence[str],
    around: Any = WEIGHTS,
) -> bytes:
    """The pickle of an OrderedDict of tensors (and other plain `entries`), its keys in `order`, with torch's `_metadata`.

    `around` is the value that is written: the OrderedDict alone, or a training checkpoint in which `Stored` mark it and tensors.
    Raises OutputError, by key, for an entry that is not a plain value.
    """
    by_name = {tensor.name: tensor for tensor in tensors}
    parts = [_ORDERED_DICT, b"("]
    for key in order:
        parts.append(_text(key))
        parts.append(_tensor(by_name[key], storage_keys) if key in by_name else _value(key, entries[key]))
    parts.append(b"u")
    if module_metadata:
        parts += [b"}", _text("_metadata"), _ORDERED_DICT, b"("]
        for path, local in written_out(module_metadata).items():
            parts += [_text(path), _value(path, local)]
        parts.append(b"usb")
    weights = b"".join(parts)

    def stored(marker: Stored) -> bytes:
        return weights if marker.name is None else _tensor(by_name[marker.name], storage_keys)

    return b"\x80\x02" + _value("the training state", around, stored) + b"."


def _tensor(tensor: OutTensor, storage_keys: Mapping[int, str]) -> bytes:
    dtype = BY_CODE[tensor.dtype]
    typed = dtype.storage_class is not None
    kind = b"ctorch\n%s\n" % str(dtype.storage_class).encode() if typed else b"ctorch.storage\nUntypedStorage\n"
    length = prod(tensor.shape) if typed else tensor.nbytes
    storage = b"(" + _text("storage") + kind + _text(storage_keys[tensor.storage]) + _text("cpu") + _integer(length) + b"tQ"
    shape, stride = _integers(tensor.shape), _integers(contiguous_stride(tensor.shape))
    body = storage + _integer(0) + shape + stride + b"\x89" + _ORDERED_DICT
    if typed:
        return b"ctorch._utils\n_rebuild_tensor_v2\n(" + body + b"tR"
    return b"ctorch._utils\n_rebuild_tensor_v3\n(" + body + b"ctorch\n%s\n" % dtype.torch.encode() + b"tR"


def _text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return b"X" + struct.pack("<I", len(raw)) + raw


def _integers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(map(_integer, values)) + b"t" if values else b")"


def _integer(value: int) -> bytes:
    if 0 <= value < 256:
        return b"K%c" % value
    if 0 <= value < 65536:
        return b"M" + struct.pack("<H", value)
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a%c" % len(raw) + raw


def _value(key: str, value: Any, stored: Callable[[Stored], bytes] | None = None) -> bytes:
    kind = type(value)
    if stored is not None and kind is Stored:
        return stored(value)
    if value is None:
        return b"N"
    if kind is bool:
        return b"\x88" if value else b"\x89"
    if kind is int and value.bit_length() < _LONG1_BITS:
        return _integer(value)
    if kind is float:
        return b"G" + struct.pack(">d", value)
    if kind is str:
        return _text(value)
    if kind is bytes:
        return b"c_codecs\nencode\n(" + _text(value.decode("latin1")) + _text("latin1") + b"tR"
    if kind in (list, tuple):
        body = b"".join(_value(key, item, stored) for item in value)
        return b"](" + body + b"e" if kind is list else b"(" + body + b"t"
    if isinstance(value, Mapping):
        return b"}(" + b"".join(_value(key, name) + _value(key, item, stored) for name, item in value.items()) + b"u"
    raise OutputError(f"has a value of type {kind.__name__} that can't be written", key=key, hint="leave it out with --drop")
