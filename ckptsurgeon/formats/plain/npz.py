"""NumPy's npz: a zip archive of arrays, each a `.npy` file that is stored (`numpy.savez`) or deflated (`numpy.savez_compressed`).

Reads every array's header, never its data, and needs no NumPy. Numbers that torch has a dtype for are tensors; any other array (objects,
which are pickles; text, records, times, big-endian numbers) is `Refused` by name. Format as in numpy `lib/_format_impl.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from math import prod

from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.errors import FormatError
from ckptsurgeon.formats.inflate import beginning
from ckptsurgeon.formats.zip_directory import Entry, read_directory
from ckptsurgeon.limit_table import allowed, exceeded
from ckptsurgeon.storage.files import OpenFile
from ckptsurgeon.tensors import Archive, Packed, Refused, Span, StateDict, TensorMeta, contiguous_stride

_END = ".npy"
_MAGIC = b"\x93NUMPY"
_USUAL = 256  # how much of an entry is read first; most headers have 128 bytes
_LONGEST = 10_000  # the longest header that NumPy reads
_LENGTH = {1: 2, 2: 4, 3: 4}  # by the format's version: the bytes that give the header's length
_MOST_DIMS = 64  # as NumPy has it

# By NumPy's dtype text without its byte order.
_DTYPES = {
    "b1": "BOOL",
    "i1": "I8",
    "u1": "U8",
    "i2": "I16",
    "u2": "U16",
    "i4": "I32",
    "u4": "U32",
    "i8": "I64",
    "u8": "U64",
    "f2": "F16",
    "f4": "F32",
    "f8": "F64",
    "c8": "C64",
    "c16": "C128",
}
_OTHERS = {
    "O": "an array of Python objects, which is a pickle",
    "U": "an array of text",
    "S": "an array of text",
    "V": "an array of raw bytes, as NumPy saves bfloat16 and others that it does not know (save it as another dtype)",
    "M": "an array of times",
    "m": "an array of times",
}
# The header is a dict as Python writes it. A list (the fields of records) is matched, but not parsed.
_HEADER = re.compile(r"\s*\{(?P<pairs>.*)\}\s*", re.DOTALL)
_NUMBER = r"\s*+(?:0|[1-9][0-9]{0,18})L?\s*+"  # with the L of Python 2
_PAIR = re.compile(
    r"\s*(?P<quote>['\"])(?P<name>\w+)(?P=quote)\s*:\s*(?:"
    r"(?P<mark>['\"])(?P<text>[^'\"\\]*)(?P=mark)|(?P<bool>True|False)|"
    rf"\((?P<shape>(?:(?:{_NUMBER},)+(?:{_NUMBER})?)?\s*+)\)|(?P<list>\[.*\]))\s*(?:,\s*|$)",
    re.ASCII | re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class _Header:
    """An array's header: its `length` in the entry, the dtype as NumPy writes it (`""` for records), whether the first index runs
    fastest, and the shape."""

    length: int
    dtype: str
    fortran: bool
    shape: tuple[int, ...]


def read(file: OpenFile) -> Archive:
    """Read the headers of an npz file."""
    directory = read_directory(file, cased=True)
    entries = directory.entries
    _check(file, entries)
    digest = sha256(b"%d\n" % file.size + directory.raw)
    tensors: dict[str, TensorMeta] = {}
    refused: dict[str, Refused] = {}
    for name, entry in entries.items():
        key = name.removesuffix(_END)
        raw = _raw_header(file, name, entry)
        digest.update(raw)
        header = _parsed(file, key, raw)
        array = _tensor(file, name, entry, header)
        if isinstance(array, Refused):
            refused[key] = array
        else:
            tensors[key] = array
    if not tensors:
        key, array = next(iter(refused.items()))
        raise FormatError(f"holds no tensors: {key} is {array.reason}", path=file.path, hint="give the file that has the weights")
    return Archive(
        path=file.path,
        format="npz",
        fingerprint=digest.hexdigest(),
        files=(file.stamp,),
        state_dicts=(StateDict("", tensors, refused),),
    )


def _check(file: OpenFile, entries: dict[str, Entry]) -> None:
    """Raises FormatError for a zip archive that holds anything but arrays, LimitError for one that is too large."""
    for name in entries:
        if not name.endswith(_END):
            raise FormatError(f"is a zip archive of arrays with the entry {name!r}, which is none", path=file.path, hint="do not trust it")
        if name + _END in entries:
            raise FormatError(f"has the entries {name!r} and {name + _END!r}, which NumPy takes for one", path=file.path)
    if len(entries) > (most := allowed("tensors")):
        raise exceeded("tensors", f"has {len(entries):,} tensors, above the limit of {most:,}", len(entries), path=file.path)
    inflated, most = sum(entry.size for entry in entries.values() if type(entry) is Packed), allowed("inflated-data-bytes", file.size)
    if inflated > most:
        raise exceeded("inflated-data-bytes", f"inflates to {inflated:,} bytes, above the limit of {most:,}", inflated, path=file.path)


def _raw_header(file: OpenFile, name: str, entry: Entry) -> bytes:
    """The bytes of an entry before its data."""
    key, raw = name.removesuffix(_END), _first(file, name, entry, _USUAL)
    if not raw.startswith(_MAGIC) or len(raw) < 12:
        raise FormatError("is no NumPy array, by its first bytes", path=file.path, key=key, hint="copy or download it again")
    size = _LENGTH.get(raw[6])
    if size is None or raw[7]:
        raise FormatError(f"is of version {raw[6]}.{raw[7]} of NumPy's format, which NumPy does not write", path=file.path, key=key)
    length = int.from_bytes(raw[8 : 8 + size], "little")
    if length > _LONGEST:
        raise FormatError(f"has a header of {length:,} bytes, and NumPy reads {_LONGEST:,}", path=file.path, key=key)
    length += 8 + size
    if length > len(raw):
        raw = _first(file, name, entry, length)
    if length > len(raw):
        raise FormatError("ends within its header", path=file.path, key=key, hint="copy or download it again")
    return raw[:length]


def _first(file: OpenFile, name: str, entry: Entry, count: int) -> bytes:
    """The first `count` bytes of an entry, or all where it is shorter."""
    count = min(count, entry.size)
    if type(entry) is not Packed:
        return file.read(entry.offset, count)

    def parts() -> Iterator[bytes]:
        for position in range(entry.offset, entry.offset + entry.nbytes, _LONGEST):
            yield file.read(position, min(_LONGEST, entry.offset + entry.nbytes - position))

    return beginning(parts(), entry.size, count, file.path, name)


def _parsed(file: OpenFile, key: str, raw: bytes) -> _Header:
    """The three values of a header, in any order. FormatError for a header that NumPy could read differently, or not at all."""
    text = raw[8 + _LENGTH[raw[6]] :].decode("utf-8" if raw[6] == 3 else "latin-1", errors="replace")
    whole = _HEADER.fullmatch(text)
    pairs = whole["pairs"] if whole is not None else ""
    values: dict[str, re.Match[str]] = {}
    position = 0
    while (pair := _PAIR.match(pairs, position)) is not None and pair["name"] not in values:
        values[pair["name"]] = pair
        position = pair.end()
    if position != len(pairs) or values.keys() != {"descr", "fortran_order", "shape"}:
        raise _malformed(file, key)
    dtype, order, shape = values["descr"], values["fortran_order"]["bool"], values["shape"]["shape"]
    if order is None or shape is None or (dtype["text"] is None and dtype["list"] is None):
        raise _malformed(file, key)
    dims = tuple(int(number.rstrip("L")) for number in shape.replace(",", " ").split())
    if len(dims) > _MOST_DIMS or prod(size or 1 for size in dims) >= 1 << 63:
        raise FormatError("has a shape that no array can have", path=file.path, key=key)
    return _Header(len(raw), dtype["text"] or "", order == "True", dims)


def _malformed(file: OpenFile, key: str) -> FormatError:
    return FormatError("has a header that NumPy does not write", path=file.path, key=key)


def _tensor(file: OpenFile, name: str, entry: Entry, header: _Header) -> TensorMeta | Refused:
    order, kind = header.dtype[:1], header.dtype[1:]
    code = _DTYPES.get(kind)
    if not header.dtype:
        return Refused("an array of records")
    if code is None:
        return Refused(_OTHERS.get(kind[:1], f"an array of the dtype {header.dtype[:40]!r}, which torch does not have"))
    dtype = BY_CODE[code]
    if order == ">" and dtype.size > 1:
        return Refused("an array of big-endian numbers (save it in the machine's own order: array.astype(array.dtype.newbyteorder('=')))")
    key = name.removesuffix(_END)
    if order not in (("<", "|", ">", "=") if dtype.size == 1 else "<"):
        raise _malformed(file, key)
    nbytes = prod(header.shape) * dtype.size
    if entry.size != header.length + nbytes:
        raise FormatError(f"has {entry.size - header.length:,} bytes for the shape {header.shape} of {code}", path=file.path, key=key)
    stride = contiguous_stride(header.shape[::-1])[::-1] if header.fortran else contiguous_stride(header.shape)
    if type(entry) is Packed:
        span = Span(file.path, header.length, nbytes, name, entry)
    else:
        span = Span(file.path, entry.offset + header.length, nbytes, name, None, entry)  # type: ignore[arg-type]
    return TensorMeta(key, code, header.shape, stride, span)
