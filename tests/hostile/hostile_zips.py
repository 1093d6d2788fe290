"""Zip archives made by hand, so that every field can lie; the honest one is what torch.save writes of `w` and `b`, less its alignment."""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass, replace

from hostile_pickles import dims, tensor_of, text

W, B = struct.pack("<6f", *range(6)), struct.pack("<e", 1.0) * 300  # torch.arange(6.0), torch.ones(300, dtype=torch.float16)


@dataclass(frozen=True)
class Item:
    """An entry of an archive made by hand; every header field can lie."""

    name: str
    data: bytes
    method: int = 0
    flags: int = 0
    crc: int | None = None
    local_crc: int | None = None
    local_name: str | None = None
    size: int | None = None
    packed: int | None = None
    local_size: int | None = None
    local_packed: int | None = None
    descriptor: bytes = b""
    extra: bytes = b""
    local_extra: bytes = b""
    disk: int = 0
    before: bytes = b""
    comment: bytes = b""
    header: int | None = None
    local_method: int | None = None
    cut: int = 0  # bytes that are taken from the end of what is stored
    stray: bytes = b""  # bytes that are put behind it


def given(*values: int | None) -> int:
    """The first value that is given."""
    return next(value for value in values if value is not None)


def archive(*items: Item, between: bytes = b"", comment: bytes = b"", count: int | None = None, zip64: bytes = b"", **end: int) -> bytes:
    """The bytes of an archive."""
    body, directory = b"", b""
    for item in items:
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
        stored = deflate.compress(item.data) + deflate.flush() if item.method == 8 else item.data
        stored = stored[: len(stored) - item.cut] + item.stray
        crc, size, packed = zlib.crc32(item.data), given(item.size, len(item.data)), given(item.packed, len(stored))
        body += item.before
        header = given(item.header, len(body))
        name, local_name = item.name.encode(), given_name(item).encode()
        local = (item.flags, given(item.local_method, item.method), 0, 0, given(item.local_crc, item.crc, crc))
        sizes = (given(item.local_packed, packed), given(item.local_size, size))
        body += struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, *local, *sizes, len(local_name), len(item.local_extra))
        body += local_name + item.local_extra + stored + item.descriptor
        fields = (20, 20, item.flags, item.method, 0, 0, given(item.crc, crc), packed, size, len(name), len(item.extra), len(item.comment))
        directory += struct.pack("<4s6H3L5H2L", b"PK\x01\x02", *fields, item.disk, 0, 0, header) + name + item.extra + item.comment
    start = len(body) + len(between)
    count = given(count, len(items))
    fields = (
        end.get("disk", 0),
        0,
        count,
        count,
        end.get("size", len(directory)),
        end.get("start", start),
        end.get("comment", len(comment)),
    )
    return body + between + directory + zip64 + struct.pack("<4s4H2LH", b"PK\x05\x06", *fields) + comment


def given_name(item: Item) -> str:
    """The name that the local header gives."""
    return item.name if item.local_name is None else item.local_name


def items() -> list[Item]:
    """The entries of an honest file."""
    w = tensor_of("0", b"K\x06", b"K\x00", dims(6), dims(1))
    b = tensor_of("1", b"M\x2c\x01", b"K\x00", dims(300), dims(1), "torch\nHalfStorage")
    pickled = b"\x80\x02}(" + text("w") + w + text("b") + b + b"u."
    contents = {"data.pkl": pickled, "byteorder": b"little", "data/0": W, "data/1": B, "version": b"3\n"}
    return [Item(f"archive/{name}", data) for name, data in contents.items()]


def at(name: str) -> int:
    """Where an entry stands among the items."""
    return next(index for index, item in enumerate(items()) if item.name.endswith(name))


def changed(which: str, /, **changes: object) -> bytes:
    """The real file's archive with one entry changed."""
    entries = items()
    entries[at(which)] = replace(entries[at(which)], **changes)
    return archive(*entries)


def descriptor(data: bytes, form: str = "<4s3L", *, crc: int | None = None, size: int | None = None) -> bytes:
    """A data descriptor."""
    values = (given(crc, zlib.crc32(data)), given(size, len(data)), given(size, len(data)))
    return struct.pack(form, *([b"PK\x07\x08"] if "s" in form else []), *values)


STORAGE = items()[at("data/0")].data
WIDE = struct.pack("<2H2Q", 1, 16, len(STORAGE), len(STORAGE))
LEGAL: dict[str, dict[str, object]] = {
    "deflated pickle": {"name": "data.pkl", "method": 8},
    "descriptor": {"name": "data/0", "flags": 8, "descriptor": descriptor(STORAGE), "local_crc": 0, "local_size": 0, "local_packed": 0},
    "descriptor and sizes": {"name": "data/0", "flags": 8, "descriptor": descriptor(STORAGE)},
    "descriptor without signature": {"name": "data/0", "flags": 8, "descriptor": descriptor(STORAGE, "<3L")},
    "wide descriptor": {"name": "data/0", "flags": 8, "descriptor": descriptor(STORAGE, "<4sLQQ")},
    "wide descriptor without signature": {"name": "data/0", "flags": 8, "descriptor": descriptor(STORAGE, "<LQQ")},
    "zip64 field": {"name": "data/0", "size": 0xFFFFFFFF, "packed": 0xFFFFFFFF, "extra": WIDE, "local_extra": WIDE},
    "zip64 field in the directory": {
        "name": "data/0", "size": 0xFFFFFFFF, "packed": 0xFFFFFFFF, "extra": WIDE, "local_size": 24, "local_packed": 24},
    "other extra fields": {"name": "data/0", "extra": b"UT\x01\x00\x05", "local_extra": b"FB\x02\x00ZZ"},
    "comment": {"name": "data/0", "comment": b"a comment"},
    "name in UTF-8": {"name": "data.pkl", "flags": 0x800},
}  # fmt: skip


OTHER = bytes(reversed(STORAGE))
LIES: dict[str, dict[str, object]] = {
    "another name in the local header": {"local_name": "archive/data/9"},
    "a longer local name": {"local_name": "archive/data/00"},
    "another method in the local header": {"local_method": 8},
    "another local size": {"local_size": 23, "local_packed": 23},
    "another local CRC": {"local_crc": 1},
    "zero sizes without a descriptor": {"local_size": 0, "local_packed": 0},
    "hidden bytes before": {"before": b"hidden"},
    "a hidden entry before": {"before": archive(Item("archive/data/7", OTHER))[:60]},
    "hidden bytes after": {"descriptor": b"hidden-bytes"},
    "hidden bytes of a descriptor's size": {"descriptor": bytes(16)},
    "a descriptor with another CRC": {"flags": 8, "descriptor": descriptor(STORAGE, crc=1)},
    "a descriptor with another size": {"flags": 8, "descriptor": descriptor(STORAGE, size=23)},
    "a descriptor with another signature": {"flags": 8, "descriptor": b"PK\x07\x07" + descriptor(STORAGE)[4:]},
    "no descriptor": {"flags": 8},
    "half a descriptor": {"flags": 8, "descriptor": descriptor(STORAGE)[:9]},
    "encrypted": {"flags": 1},
    "another disk": {"disk": 3},
    "bzip2": {"method": 12},
    "stored with two sizes": {"packed": 24, "size": 23},
    "a size beyond the file": {"size": 1 << 30, "packed": 1 << 30, "local_size": 1 << 30, "local_packed": 1 << 30},
    "a header within another entry": {"header": 5},
    "a header beyond the file": {"header": 1 << 30},
    "deflate that can't inflate so far": {"method": 8, "size": 1 << 30, "local_size": 1 << 30},
    "a zip64 field that is too short": {"size": 0xFFFFFFFF, "packed": 0xFFFFFFFF, "extra": b"\x01\x00\x08\x00" + bytes(8)},
    "a zip64 field that is cut": {"size": 0xFFFFFFFF, "packed": 0xFFFFFFFF, "extra": WIDE[:-3]},
    "two zip64 fields": {"size": 0xFFFFFFFF, "packed": 0xFFFFFFFF, "extra": WIDE + WIDE, "local_extra": WIDE},
    "zip64 fields that disagree": {
        "size": 0xFFFFFFFF, "packed": 0xFFFFFFFF, "extra": WIDE, "local_extra": struct.pack("<2H2Q", 1, 16, 12, 12)},
    "a zip64 size without its field": {"local_size": 0xFFFFFFFF, "local_packed": 0xFFFFFFFF},
    "a second name in an extra field": {"extra": b"\x75\x70\x09\x00\x01" + bytes(4) + b"evil"},
    "no name": {"name": ""},
    "an absolute name": {"name": "/archive/data/0"},
    "a name with a zero byte": {"name": "archive/data/0\0x"},
    "a name with a backslash": {"name": "archive\\data\\0"},
    "a name in another folder": {"name": "other/data/0"},
    "a name at the root": {"name": "data"},
    "a record that is too short": {"data": STORAGE[:-1]},
    "a record that is too long": {"data": STORAGE + b"\0"},
    "no record": {"name": "archive/data/5"},
}  # fmt: skip
ENDS: dict[str, dict[str, object]] = {
    "bytes between": {"between": b"hidden"},
    "zeros between": {"between": bytes(16)},
    "fewer entries": {"count": 3},
    "more entries": {"count": 100},
    "another disk": {"disk": 1},
    "a smaller directory": {"size": 10},
    "a directory that begins elsewhere": {"start": 3},
    "a directory beyond the file": {"start": 1 << 31},
    "a comment that is another end record": {"comment": archive(*items())[-22:]},
    "hidden bytes before the end record": {"zip64": b"hidden between directory and end"},
    "a zip64 locator that leads nowhere": {"zip64": struct.pack("<4sLQL", b"PK\x06\x07", 0, 5, 1)},
    "a zip64 record on another disk": {"zip64": struct.pack("<4sLQL", b"PK\x06\x07", 1, 5, 2)},
}


def twice(name: str, data: bytes) -> bytes:
    entries = items()
    first = entries[at(name)]
    return archive(*entries[: at(name)], first, replace(first, data=data), *entries[at(name) + 1 :])
