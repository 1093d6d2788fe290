"""The directory of a zip archive, read once and believed only when every header agrees.

Rule: each byte of the file belongs to exactly one entry, the directory or the end records, so that no two readers can see two
archives in one file. It reads headers, never contents. Specification: PKWARE APPNOTE 6.3; torch writes such archives with miniz.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from ckptsurgeon.errors import FormatError
from ckptsurgeon.formats.files import OpenFile
from ckptsurgeon.limit_table import allowed, exceeded

STORED, DEFLATED = 0, 8
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR64 = struct.Struct("<4sLQL")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_LOCAL = struct.Struct("<4s5H3L2H")
_ENCRYPTED, _DESCRIPTOR = 0x1, 0x8
_FLAGS = 0x80E  # descriptor, UTF-8 names, how hard deflate tried; readers differ over all others (patch data, strong encryption)
_MAX16, _MAX32 = 0xFFFF, 0xFFFFFFFF
_DESCRIPTORS = {form.size: form for form in map(struct.Struct, ("<3L", "<4s3L", "<LQQ", "<4sLQQ"))}  # with and without a signature
_INFLATION = 1032  # deflate can't make more of a byte
_UNICODE_PATH = 0x7075
_NO_PATH = frozenset(("", ".", ".."))  # parts of a name that lead to another place than the one that is written


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry: `offset` and `packed` (bytes as stored) locate its data, `size` is its length when inflated."""

    name: str
    offset: int
    packed: int
    size: int
    crc: int
    method: int


@dataclass(frozen=True)
class Directory:
    """All entries in file order, and the directory's own bytes."""

    entries: dict[str, Entry]
    raw: bytes


def read_directory(file: OpenFile) -> Directory:
    """Read and validate the directory of `file`. Raises FormatError for any contradiction, LimitError for too many entries."""
    start, size, count, end = _end_records(file)
    for name, value, what in (("zip-entries", count, "entries"), ("zip-directory-bytes", size, "bytes of directory")):
        if value > allowed(name):
            raise exceeded(name, f"is a zip of {value} {what}, above the limit of {allowed(name)}", value, path=file.path)
    raw = file.read(start, size)
    if start + size != end:
        raise _bad(file, "has bytes between its directory and its end record")
    entries: dict[str, Entry] = {}
    spellings: dict[str, str] = {}  # torch finds an entry without regard to case
    position = 0
    found = []
    for _ in range(count):
        entry, header, flags, position = _central(file, raw, position)
        if entry.name in entries:
            raise _bad(file, f"has the entry {entry.name!r} twice")
        other = spellings.setdefault(entry.name.casefold(), entry.name)
        if other != entry.name:
            raise _bad(file, f"has the entries {other!r} and {entry.name!r}, which torch takes for one name")
        entries[entry.name] = entry
        found.append((header, entry, flags))
    if position != size:
        raise _bad(file, "has a directory that is longer than its entries")
    found.sort(key=lambda item: item[0])
    position = 0
    before: Entry | None = None  # the entry whose descriptor may stand at `position`
    for header, entry, flags in found:
        gap = header - position
        if not 0 <= gap <= max(_DESCRIPTORS):
            raise _bad(file, f"hides bytes, or overlaps, before the entry {entry.name!r}")
        head = file.read(position, gap + _LOCAL.size + len(entry.name.encode()))
        _descriptor(file, head[:gap], before)
        offset = _local(file, head[gap:], header, entry, flags)
        entries[entry.name] = Entry(entry.name, offset, entry.packed, entry.size, entry.crc, entry.method)
        position = offset + entry.packed
        before = entry if flags & _DESCRIPTOR else None
        if position > start:
            raise file.truncated(position)
    if start - position > max(_DESCRIPTORS):
        raise _bad(file, "hides bytes before its directory")
    _descriptor(file, file.read(position, start - position), before)
    return Directory(entries, raw)


def _descriptor(file: OpenFile, raw: bytes, entry: Entry | None) -> None:
    """Hold what stands after an entry's data against the directory: its descriptor, or nothing (miniz writes none for an empty one)."""
    if not raw and (entry is None or not entry.size):
        return
    form = _DESCRIPTORS.get(len(raw))
    if entry is None or form is None:
        raise _bad(file, "hides bytes between its entries")
    *signature, crc, packed, size = form.unpack(raw)
    if (crc, packed, size) != (entry.crc, entry.packed, entry.size) or signature not in ([], [b"PK\x07\x08"]):
        raise _bad(file, f"describes the entry {entry.name!r} differently before and after its data")


def _bad(file: OpenFile, what: str) -> FormatError:
    return FormatError(f"is a damaged zip archive: it {what}", path=file.path, hint="copy or download it again; do not trust it")


def _end_records(file: OpenFile) -> tuple[int, int, int, int]:
    """Start, size and count of the directory, and where the end records begin."""
    if file.size < _END.size:
        raise file.truncated(_END.size)
    # A comment can follow the end record; what it says of itself must reach exactly to the file's end.
    tail = file.read(max(file.size - _END.size - _MAX16, 0), min(_END.size + _MAX16, file.size))
    where = tail.rfind(b"PK\x05\x06")
    if where < 0:
        raise FormatError("is truncated: a zip archive without its directory at the end", path=file.path, hint="copy or download it again")
    if len(tail) - where < _END.size:
        raise _bad(file, "ends within its end record")
    _, disk, start_disk, here, count, size, start, comment = _END.unpack_from(tail, where)
    if len(tail) - where - _END.size != comment:
        raise _bad(file, "has bytes after its end")
    if disk or start_disk or here != count:
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
    """Whether a file that is no zip by its beginning is one by its end, where Python's zipfile looks. Chance makes 1 in 4 billion so."""
    tail = file.read(max(file.size - _END.size - _MAX16, 0), min(_END.size + _MAX16, file.size))
    where = tail.find(b"PK\x05\x06")
    while 0 <= where <= len(tail) - _END.size:
        if _END.unpack_from(tail, where)[-1] == len(tail) - where - _END.size:
            return True
        where = tail.find(b"PK\x05\x06", where + 1)
    return False


def _central(file: OpenFile, raw: bytes, position: int) -> tuple[Entry, int, int, int]:
    if position + _CENTRAL.size > len(raw):
        raise _bad(file, "has a directory that is shorter than its entries")
    fields = _CENTRAL.unpack_from(raw, position)
    signature, flags, method, crc, packed, size = fields[0], fields[3], fields[4], *fields[7:10]
    name_len, extra_len, comment_len, disk, header = *fields[10:14], fields[16]
    position += _CENTRAL.size
    if signature != b"PK\x01\x02" or position + name_len + extra_len + comment_len > len(raw):
        raise _bad(file, "has a damaged directory")
    try:
        name = raw[position : position + name_len].decode("utf-8")
    except UnicodeDecodeError as error:
        raise _bad(file, "has an entry whose name is not UTF-8") from error
    extra = raw[position + name_len : position + name_len + extra_len]
    if extra:
        size, packed, header, disk = _zip64(file, extra, size, packed, header, disk)
    if flags & _ENCRYPTED:
        raise _bad(file, f"has the encrypted entry {name!r}")
    if flags & ~_FLAGS:
        raise _bad(file, f"has the entry {name!r} with flags 0x{flags:x}, which torch does not write")
    if method not in (STORED, DEFLATED) or (method == STORED and packed != size):
        raise _bad(file, f"has the entry {name!r} in a compression that torch does not write")
    if size > packed * _INFLATION:
        raise _bad(file, f"has the entry {name!r} that can't inflate to what it says")
    if disk:
        raise _bad(file, "spans several disks")
    if "\0" in name or "\\" in name or not _NO_PATH.isdisjoint(name.removesuffix("/").split("/")):
        raise _bad(file, f"has an entry with the unusable name {name!r}")
    return Entry(name, 0, packed, size, crc, method), header, flags, position + name_len + extra_len + comment_len


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


def _local(file: OpenFile, raw: bytes, header: int, entry: Entry, central_flags: int) -> int:
    """Hold the local header (`raw`, at `header`) against the directory; return where the data begins."""
    name_bytes = entry.name.encode()
    signature, _needs, flags, method, _time, _date, crc, packed, size, name_len, extra_len = _LOCAL.unpack_from(raw)
    if signature != b"PK\x03\x04" or raw[_LOCAL.size :] != name_bytes or name_len != len(name_bytes):
        raise _bad(file, f"names the entry {entry.name!r} differently in its two headers")
    if method != entry.method or (flags ^ central_flags) & (_ENCRYPTED | _DESCRIPTOR) or flags & ~_FLAGS:
        raise _bad(file, f"describes the entry {entry.name!r} differently in its two headers")
    begin = header + _LOCAL.size + int(name_len)
    if _MAX32 in (packed, size):
        size, packed, _, _ = _zip64(file, file.read(begin, extra_len), size, packed, 0, 0)
    later = flags & _DESCRIPTOR
    for local, central in ((packed, entry.packed), (size, entry.size), (crc, entry.crc)):
        if local != central and not (later and local == 0):
            raise _bad(file, f"gives the entry {entry.name!r} two sizes or checksums")
    return begin + int(extra_len)
