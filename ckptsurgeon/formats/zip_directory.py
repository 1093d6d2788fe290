"""The directory of a zip archive, read once, and accepted only if every header agrees with it.

Rule: each byte of the file belongs to exactly one entry, the directory or the end records, so that no two readers can see two
archives in one file. It reads headers, never contents. Specification: PKWARE APPNOTE 6.3; torch writes such archives with miniz.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from ckptsurgeon.errors import FormatError
from ckptsurgeon.limit_table import allowed, exceeded
from ckptsurgeon.storage.files import OpenFile
from ckptsurgeon.tensors import Packed, Record

_STORED, _DEFLATED = 0, 8
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_CENTRAL = struct.Struct("<4s4x2H4x3L4H6xL")
_LOCAL = struct.Struct("<4s5H3L2H")
_ENCRYPTED, _DESCRIPTOR = 0x1, 0x8
_FLAGS = 0x80E  # descriptor, UTF-8 names, how hard deflate tried; readers differ over all others (patch data, strong encryption)
_MAX16, _MAX32 = 0xFFFF, 0xFFFFFFFF
_DESCRIPTORS = {form.size: form for form in map(struct.Struct, ("<3L", "<4s3L", "<LQQ", "<4sLQQ"))}  # with and without a signature
_USUAL, _LONGEST = _DESCRIPTORS[16], max(_DESCRIPTORS)
_NO_SIZES = bytes(12)  # CRC and sizes of a local header that leaves them to the descriptor
_INFLATION = 1032  # deflate can't make a byte longer than this
_UNICODE_PATH = 0x7075
_NO_PATH = frozenset(("", ".", ".."))  # parts of a name with which it leads to another path
_SUSPECT = ("\\", "//", "/./", "/../")  # all names, each between slashes, contain one of these where a name is unusable
_NEAR, _TOGETHER = 4096, 1 << 20  # headers that are no further apart are read together, up to so many bytes

Entry = Record | Packed  # stored or deflated
# An entry in the directory: the offset of its header, the offset of its name in the directory and its length, flags, method, CRC, stored
# and inflated size. There may be a million.
_Row = tuple[int, int, int, int, int, int, int, int]


@dataclass(frozen=True)
class Directory:
    """All entries by name, in file order, and the directory's own bytes."""

    entries: dict[str, Entry]
    raw: bytes


def read_directory(file: OpenFile, *, cased: bool = False) -> Directory:
    """Read and validate the directory of `file`. Raises FormatError for any contradiction, LimitError for too many entries.

    `cased`: names may differ only in case; torch treats such names as equal, other readers don't.
    """
    start, size, count, end = _end_records(file)
    for name, value, what in (("zip-entries", count, "entries"), ("zip-directory-bytes", size, "bytes of directory")):
        if value > allowed(name):
            raise exceeded(name, f"is a zip of {value:,} {what}, above the limit of {allowed(name):,}", value, path=file.path)
    raw = file.read(start, size)
    if start + size != end:
        raise _bad(file, "has bytes between its directory and its end record")
    rows = _rows(file, raw, count)
    rows.sort()  # by the offsets of their headers
    return Directory(_entries(file, raw, start, rows, _names(file, raw, rows, cased)), raw)


def _rows(file: OpenFile, raw: bytes, count: int) -> list[_Row]:
    rows: list[_Row] = []
    unpack, position = _CENTRAL.unpack_from, 0
    for _ in range(count):
        begin = position + _CENTRAL.size
        if begin > len(raw):
            raise _bad(file, "has a directory that is shorter than its entries")
        signature, flags, method, crc, packed, size, length, extra_len, comment_len, disk, header = unpack(raw, position)
        extra = begin + length
        position = extra + extra_len + comment_len
        if signature != b"PK\x01\x02" or position > len(raw):
            raise _bad(file, "has a damaged directory")
        if extra_len:
            size, packed, header, disk = _zip64(file, raw[extra : extra + extra_len], size, packed, header, disk)
        if method or packed != size or disk or flags & ~_FLAGS:
            _check(file, raw[begin:extra], flags, method, packed, size, disk)
        rows.append((header, begin, length, flags, method, crc, packed, size))
    if position != len(raw):
        raise _bad(file, "has a directory that is longer than its entries")
    return rows


def _check(file: OpenFile, raw_name: bytes, flags: int, method: int, packed: int, size: int, disk: int) -> None:
    """Raises FormatError for an entry that torch would not write, unless it is deflated."""
    name = raw_name.decode(errors="replace")
    if flags & _ENCRYPTED:
        raise _bad(file, f"has the encrypted entry {name!r}")
    if flags & ~_FLAGS:
        raise _bad(file, f"has the entry {name!r} with flags 0x{flags:x}, which torch does not write")
    if method not in (_STORED, _DEFLATED) or (method == _STORED and packed != size):
        raise _bad(file, f"has the entry {name!r} in a compression that torch does not write")
    if size > packed * _INFLATION:
        raise _bad(file, f"has the entry {name!r} that can't inflate to what it says")
    if disk:
        raise _bad(file, "spans several disks")


def _names(file: OpenFile, raw: bytes, rows: Sequence[_Row], cased: bool) -> list[str]:
    """The names of the rows, all usable and different. They are checked together, and singly only to find a wrong name."""
    spelled = [raw[row[1] : row[1] + row[2]] for row in rows]
    try:
        names = b"\0".join(spelled).decode().split("\0") if rows else []
    except UnicodeDecodeError as error:
        raise _bad(file, "has an entry whose name is not UTF-8") from error
    together = f"/{'/'.join(names)}/"
    if len(names) != len(rows) or any(part in together for part in _SUSPECT):
        for name in map(bytes.decode, spelled):
            if "\0" in name or "\\" in name or not _NO_PATH.isdisjoint(name.removesuffix("/").split("/")):
                raise _bad(file, f"has an entry with the unusable name {name!r}")
    if len(set(names)) != len(names):
        twice = next(name for name, following in pairwise(sorted(names)) if name == following)
        raise _bad(file, f"has the entry {twice!r} twice")
    if not cased and together.casefold() != together and len(set(map(str.casefold, names))) != len(names):
        pairs = pairwise(sorted(names, key=str.casefold))
        first, second = next(pair for pair in pairs if pair[0].casefold() == pair[1].casefold())
        raise _bad(file, f"has the entries {first!r} and {second!r}, which torch takes for one name")  # it ignores case
    return names


def _windows(file: OpenFile, rows: Sequence[_Row]) -> Iterator[tuple[bytes, int, int]]:
    """Ranges of the file with all headers and the descriptors before them: the bytes, their offset, and the offset of the last header in
    them."""
    first = 0
    for index in range(1, len(rows) + 1):
        last, length = rows[index - 1][0], rows[index - 1][2]
        if index < len(rows) and rows[index][0] - last <= _NEAR and rows[index][0] - rows[first][0] <= _TOGETHER:
            continue
        base = max(rows[first][0] - _LONGEST, 0)
        yield file.read(base, max(min(last + _LOCAL.size + length, file.size) - base, 0)), base, last
        first = index


def _entries(file: OpenFile, raw: bytes, start: int, rows: Sequence[_Row], names: Sequence[str]) -> dict[str, Entry]:
    """Compare the header before and the descriptor after each entry's data with the directory, which begins at `start`."""
    entries: dict[str, Entry] = {}
    windows = _windows(file, rows)
    window, base, last = b"", 0, -1
    position = 0
    before: tuple[str, _Row] | None = None  # the entry whose descriptor may be at `position`
    usual: bytes | None = b""  # the descriptor as torch writes it
    for name, row in zip(names, rows, strict=True):
        header, begin, length, flags, method, crc, packed, size = row
        gap = header - position
        if not 0 <= gap <= _LONGEST:
            raise _bad(file, f"hides bytes, or overlaps, before the entry {name!r}")
        if header > last:
            window, base, last = next(windows)
        local = header - base
        if window[local - gap : local] != usual:
            _descriptor(file, window[local - gap : local], before)
        # torch's local header repeats the directory's row, and leaves CRC and sizes to the descriptor: then no more needs to be compared.
        same = b"PK\x03\x04" + raw[begin - 40 : begin - 30] + _NO_SIZES + raw[begin - 18 : begin - 16]
        if flags & _DESCRIPTOR and window.startswith(same, local) and window.startswith(raw[begin : begin + length], local + 30):
            offset = header + 30 + length + (window[local + 28] | window[local + 29] << 8)
        else:
            offset = _local(file, window[local : local + _LOCAL.size + length], name, row)
        entries[name] = Record(offset, packed, crc) if method == _STORED else Packed(offset, packed, size, crc)
        position = offset + packed
        if position > start:
            raise file.truncated(position)
        before, usual = None, b""
        if flags & _DESCRIPTOR:
            before = name, row
            if size:
                usual = _USUAL.pack(b"PK\x07\x08", crc, packed, size) if packed < _MAX32 > size else None
    if start - position > _LONGEST:
        raise _bad(file, "hides bytes before its directory")
    _descriptor(file, file.read(position, start - position), before)
    return entries


def _descriptor(file: OpenFile, raw: bytes, entry: tuple[str, _Row] | None) -> None:
    """Compare the bytes after an entry's data with the directory: its descriptor, or no bytes (miniz writes none for an empty entry)."""
    if not raw and (entry is None or not entry[1][-1]):
        return
    form = _DESCRIPTORS.get(len(raw))
    if entry is None or form is None:
        raise _bad(file, "hides bytes between its entries")
    name, (*_, crc, packed, size) = entry
    *signature, local_crc, local_packed, local_size = form.unpack(raw)
    if (local_crc, local_packed, local_size) != (crc, packed, size) or signature not in ([], [b"PK\x07\x08"]):
        raise _bad(file, f"describes the entry {name!r} differently before and after its data")


def _bad(file: OpenFile, what: str) -> FormatError:
    return FormatError(f"is a damaged zip archive: it {what}", path=file.path, hint="copy or download it again; do not trust it")


def _end_records(file: OpenFile) -> tuple[int, int, int, int]:
    """Offset, size and number of entries of the directory, and the offset of the end records."""
    if file.size < _END.size:
        raise file.truncated(_END.size)
    # A comment can follow the end record; by its own length it must end where the file ends.
    tail = file.read(max(file.size - _END.size - _MAX16, 0), min(_END.size + _MAX16, file.size))
    where = tail.rfind(b"PK\x05\x06")
    if where < 0:
        raise FormatError("is truncated: a zip archive without its directory at the end", path=file.path, hint="copy or download it again")
    if len(tail) - where < _END.size:
        raise _bad(file, "ends within its end record")
    _, disk, start_disk, on_disk, count, size, start, comment = _END.unpack_from(tail, where)
    if len(tail) - where - _END.size != comment:
        raise _bad(file, "has bytes after its end")
    if disk or start_disk or on_disk != count:
        raise _bad(file, "spans several disks")
    end = file.size - (len(tail) - where)
    if end >= _LOCATOR64.size:
        signature, at_disk, record, disks = _LOCATOR64.unpack(file.read(end - _LOCATOR64.size, _LOCATOR64.size))
        if signature == b"PK\x06\x07":
            if at_disk or disks > 1:
                raise _bad(file, "spans several disks")
            if record + _END64.size != end - _LOCATOR64.size:
                raise _bad(file, "has its zip64 end record in another place than it says")
            fields = _END64.unpack(file.read(record, _END64.size))
            if fields[0] != b"PK\x06\x06" or fields[1] != _END64.size - 12 or fields[4] or fields[5] or fields[6] != fields[7]:
                raise _bad(file, "has a damaged zip64 end record")
            for small, large, top in ((count, fields[7], _MAX16), (size, fields[8], _MAX32), (start, fields[9], _MAX32)):
                if small not in (top, large):
                    raise _bad(file, "has two end records that disagree")
            return fields[9], fields[8], fields[7], record
    return start, size, count, end


def ends_as_zip(file: OpenFile) -> bool:
    """Whether a file that does not begin as a zip archive ends as one, where Python's zipfile looks. By chance 1 file in 4 billion does."""
    tail = file.read(max(file.size - _END.size - _MAX16, 0), min(_END.size + _MAX16, file.size))
    where = tail.find(b"PK\x05\x06")
    while 0 <= where <= len(tail) - _END.size:
        if _END.unpack_from(tail, where)[-1] == len(tail) - where - _END.size:
            return True
        where = tail.find(b"PK\x05\x06", where + 1)
    return False


def _zip64(file: OpenFile, extra: bytes, size: int, packed: int, header: int, disk: int) -> tuple[int, int, int, int]:
    position, seen = 0, False
    while position + 4 <= len(extra):
        kind, length = struct.unpack_from("<2H", extra, position)
        body = extra[position + 4 : position + 4 + length]
        if len(body) != length or (kind == 1 and seen):
            raise _bad(file, "has a damaged extra field, or one twice")
        seen = seen or kind == 1
        if kind == _UNICODE_PATH:
            raise _bad(file, "has an entry with two names")
        if kind == 1:
            wide = iter(struct.unpack(f"<{len(body) // 8}Q", body[: len(body) // 8 * 8]))  # in this order, each only where it did not fit
            if size == _MAX32:
                size = next(wide, -1)
            if packed == _MAX32:
                packed = next(wide, -1)
            if header == _MAX32:
                header = next(wide, -1)
            if disk == _MAX16:
                disk = 0
            if -1 in (size, packed, header):
                raise _bad(file, "has an incomplete zip64 field")
        position += 4 + length
    return size, packed, header, disk


def _local(file: OpenFile, raw: bytes, name: str, row: _Row) -> int:
    """Compare the local header (`raw`) with the directory; return the offset where the data begins."""
    header, _, length, central_flags, central_method, *central = row
    if len(raw) < _LOCAL.size + length:
        raise file.truncated(header + _LOCAL.size + length)
    signature, _needs, flags, method, _time, _date, crc, packed, size, name_len, extra_len = _LOCAL.unpack_from(raw)
    if signature != b"PK\x03\x04" or raw[_LOCAL.size :] != name.encode() or name_len != length:
        raise _bad(file, f"names the entry {name!r} differently in its two headers")
    if method != central_method or (flags ^ central_flags) & (_ENCRYPTED | _DESCRIPTOR) or flags & ~_FLAGS:
        raise _bad(file, f"describes the entry {name!r} differently in its two headers")
    begin = header + _LOCAL.size + length
    if _MAX32 in (packed, size):
        size, packed, _, _ = _zip64(file, file.read(begin, extra_len), size, packed, 0, 0)
    later = flags & _DESCRIPTOR
    for local, listed in zip((crc, packed, size), central, strict=True):
        if local != listed and not (later and local == 0):
            raise _bad(file, f"gives the entry {name!r} two sizes or checksums")
    return begin + int(extra_len)
