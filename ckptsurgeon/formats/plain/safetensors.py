"""safetensors: a JSON header, then every tensor's bytes, one after another without gaps.

Reads and validates the whole header before it hands out one tensor, never the data. Lays a file out exactly as the official library
does (dtype from the widest, then by name; compact JSON, padded with spaces to 8 bytes); a large file that is copied from others in their
order and with more spaces, so that a file system can share the bytes. Specification: safetensors README, `tensor.rs`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from hashlib import sha256
from math import prod
from typing import Any

from ckptsurgeon.dtypes import BY_CODE, SAFETENSORS_RANK
from ckptsurgeon.errors import FormatError, OutputError
from ckptsurgeon.formats.folders import parts
from ckptsurgeon.formats.json_text import bounded, integer, parse, short
from ckptsurgeon.formats.layout import RECORD_KEY, WEIGHTS, Contents, Layout, Origin, OutTensor, Slot, follows_origins, parse_provenance
from ckptsurgeon.limit_table import allowed, exceeded
from ckptsurgeon.storage.files import OpenFile
from ckptsurgeon.storage.platform import BLOCK
from ckptsurgeon.tensors import Archive, Span, StateDict, TensorMeta, contiguous_stride

METADATA = "__metadata__"
MOST_HEADER = 100_000_000  # what the official library reads


def read(file: OpenFile) -> Archive:
    """Read the header of a safetensors file."""
    length = int.from_bytes(file.read(0, 8), "little")
    raw = file.read(8, bounded(file, length, "a header"))
    if raw[:1] != b"{":
        raise FormatError("has a safetensors header that does not begin with '{'", path=file.path)
    fingerprint = sha256(b"%d\n" % file.size + raw).hexdigest()
    header = parse(raw, file.path, "safetensors header", _row)
    del raw  # a header of a million keys is large
    metadata = header.pop(METADATA, None)
    metadata = {} if metadata is None else metadata
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise FormatError("has a __metadata__ that is not a map from text to text", path=file.path)
    tensors = _tensors(file, header, 8 + length)
    provenance = metadata.get(RECORD_KEY)
    return Archive(
        path=file.path,
        format="safetensors",
        fingerprint=fingerprint,
        files=(file.stamp,),
        state_dicts=(StateDict("", tensors),),
        metadata=metadata,
        part=parts.of_safetensors(file.path, metadata),
        provenance=parse_provenance(provenance) if provenance else None,
    )


_FIELDS = ("dtype", "shape", "data_offsets")
_TEXT = {code: code for code in SAFETENSORS_RANK if BY_CODE[code].safetensors}  # one object for each


class _Row(tuple[str, tuple[int, ...], int, int]):
    """A well-formed entry of the header: dtype, shape, offset of the first byte and of the byte after the last."""

    __slots__ = ()


def _row(pairs: list[tuple[str, Any]]) -> _Row | None:
    """An object of the header as a row, which takes a tenth of the memory; None for a malformed one, which `_tensors` refuses."""
    if len(pairs) != 3:
        return None
    (first, code), (second, shape), (third, offsets) = pairs
    if (first, second, third) != _FIELDS:
        info = dict(pairs)
        if info.keys() != set(_FIELDS):
            return None
        code, shape, offsets = (info[field] for field in _FIELDS)
    if type(code) is not str or code not in _TEXT or type(shape) is not list or type(offsets) is not list or len(offsets) != 2:
        return None
    if len(shape) > 64 or not all(map(integer, shape)) or not all(map(integer, offsets)):
        return None
    return _Row((_TEXT[code], tuple(shape), offsets[0], offsets[1]))


def _tensors(file: OpenFile, header: dict[str, Any], data: int) -> dict[str, TensorMeta]:
    path, size = file.path, file.size - data
    if len(header) > (most := allowed("tensors")):
        raise exceeded("tensors", f"has {len(header):,} tensors, above the limit of {most:,}", len(header), path=path)
    shapes: dict[
        tuple[int, ...], tuple[tuple[int, ...], tuple[int, ...], int]
    ] = {}  # with strides and numbers of elements: many tensors have the same shape
    ordered, position = True, 0
    for name, info in header.items():
        if type(info) is not _Row:
            raise _malformed(path, name, info)
        code, shape, start, stop = info
        known = shapes.get(shape)
        if known is None:
            if 0 in shape and prod(size or 1 for size in shape) >= 1 << 63:
                raise FormatError("has a shape that overflows 64 bits", path=path, key=name)
            known = shapes[shape] = shape, contiguous_stride(shape), prod(shape)
        dims, stride, numel = known
        if stop - start != numel * BY_CODE[code].size:
            raise FormatError(f"has {stop - start} bytes for the shape {shape} of {code}", path=path, key=name)
        if stop > size:
            raise file.truncated(data + stop)
        ordered, position = ordered and start == position, stop
        header[name] = TensorMeta(name, code, dims, stride, Span(path, data + start, stop - start, name))
    if not ordered:
        position = _position(path, header, data)
    if position != size:
        raise FormatError(f"has {size - position:,} bytes after its last tensor", path=path)
    return header


def _position(path: str, tensors: Mapping[str, TensorMeta], data: int) -> int:
    """The end of the last tensor's data, where the header lists tensors in another order. FormatError for a gap or an overlap."""
    position = data
    for start, nbytes, name in sorted((meta.span.offset, meta.span.nbytes, name) for name, meta in tensors.items() if meta.span):
        if start != position:
            raise FormatError("leaves a gap before it, or overlaps the tensor before it", path=path, key=name)
        position = start + nbytes
    return position - data


def _malformed(path: str, name: str, info: Any) -> FormatError:
    """The error for a malformed entry of the header."""
    reason = "has data_offsets that are not two non-negative integers"
    if type(info) is not dict or info.keys() != set(_FIELDS):
        reason = "has an entry with other fields than dtype, shape and data_offsets"
    elif type(info["dtype"]) is not str or info["dtype"] not in _TEXT:
        reason = f"has the unknown dtype {short(info['dtype'])}"
    elif type(info["shape"]) is not list or not all(map(integer, info["shape"])) or len(info["shape"]) > 64:
        reason = "has a shape that is not a list of non-negative integers"
    return FormatError(reason, path=path, key=name)


def layout_of(contents: Contents) -> Layout:
    """A new file of these contents. OutputError for what safetensors can't hold."""
    if contents.around != WEIGHTS:
        raise OutputError("can't hold a training state: safetensors holds nothing but tensors", hint="write a .pt file instead")
    if contents.entries:
        key = next(iter(contents.entries))
        raise OutputError("is no tensor, and safetensors holds nothing else", key=key, hint="write a .pt file instead")
    record = {} if contents.record is None else {RECORD_KEY: contents.record}
    return lay_out(contents.tensors, {"format": "pt", **contents.aliases, **record})


def lay_out(tensors: Sequence[OutTensor], metadata: Mapping[str, str]) -> Layout:
    """The layout of a new file; every tensor, tied or not, has bytes of its own.

    Raises OutputError, by key, for a dtype that the format does not have.
    """
    for tensor in tensors:
        if not BY_CODE[tensor.dtype].safetensors:
            raise OutputError(
                f"has the dtype {tensor.dtype}, which safetensors does not have", key=tensor.name, hint="write a .pt file instead"
            )
        if tensor.name == METADATA:
            raise OutputError("is a name that safetensors keeps for itself", key=tensor.name, hint="rename it, or write a .pt file")
        if not tensor.name.isprintable() and any("\ud800" <= character <= "\udfff" for character in tensor.name):
            raise OutputError("is a name that is not valid Unicode", key=tensor.name, hint="rename it")
    order = _order(tensors)
    header: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    position = 0
    places = []
    for index in order:
        tensor = tensors[index]
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [position, position + tensor.nbytes]}
        places.append((position, index))
        position += tensor.nbytes
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    if follows_origins(tensor.nbytes for tensor in tensors) and len(raw) + BLOCK <= MOST_HEADER:
        raw += b" " * _padding(8 + len(raw), [tensors[index] for index in order])
    if len(raw) > MOST_HEADER:
        raise OutputError(f"would have a header of {len(raw)} bytes, more than safetensors allows", hint="write a .pt file instead")
    base = 8 + len(raw)
    slots = tuple(Slot(base + start, tensors[index].nbytes, index) for start, index in places)
    return Layout(slots, ((0, len(raw).to_bytes(8, "little") + raw),), base + position)


def _order(tensors: Sequence[OutTensor]) -> list[int]:
    """The indexes of tensors in the order of their data."""
    # Rust orders text by its UTF-8 bytes.
    official = sorted(range(len(tensors)), key=lambda index: (-SAFETENSORS_RANK[tensors[index].dtype], tensors[index].name.encode()))
    copied = _copied(tensors) if follows_origins(tensor.nbytes for tensor in tensors) else []
    if not copied:
        return official
    order = _around(copied, official, tensors)
    if _aligned(tensors[index] for index in order):
        return order
    return _around([index for index in copied if not tensors[index].nbytes % 8], official, tensors)


def _copied(tensors: Sequence[OutTensor]) -> list[int]:
    """The indexes of tensors that are copied, in the order of their bytes in the sources; of those that begin at one byte, the largest."""
    starts: dict[Origin, int] = {}
    for origin, _, index in sorted((each.origin, -each.nbytes, index) for index, each in enumerate(tensors) if each.origin is not None):
        starts.setdefault(origin, index)
    return list(starts.values())


def _around(copied: Sequence[int], official: Sequence[int], tensors: Sequence[OutTensor]) -> list[int]:
    """`copied`, and all others: before it those that keep its alignment, after it those of odd sizes."""
    taken = set(copied)
    others = [index for index in official if index not in taken]
    whole = [index for index in others if not tensors[index].nbytes % 8]
    return [*whole, *copied, *(index for index in others if tensors[index].nbytes % 8)]


def _aligned(tensors: Iterable[OutTensor]) -> bool:
    """Whether each of these tensors, one after another, begins at a multiple of its dtype's size."""
    position = 0
    for tensor in tensors:
        if position % BY_CODE[tensor.dtype].size:
            return False
        position += tensor.nbytes
    return True


def _padding(start: int, tensors: Iterable[OutTensor]) -> int:
    """How many bytes to put before the data, which would begin at `start`, so that most of it has the offset of its origin, modulo 4096."""
    votes: Counter[int] = Counter()
    position = start
    for tensor in tensors:
        if tensor.origin is not None:
            votes[(tensor.origin.offset - position) % BLOCK] += tensor.nbytes
        position += tensor.nbytes
    return max((padding for padding in votes if not padding % 8), key=lambda padding: (votes[padding], -padding), default=0)
