"""A zip made field by field: honest, or with headers that lie where they are told to."""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import BytesIO


@dataclass(frozen=True)
class Member:
    """An entry, with what its headers say where that is not the truth."""

    name: bytes
    data: bytes
    method: int = 0
    flags: int = 0
    extra: bytes = b""
    local: Mapping[str, int] = field(default_factory=dict)
    central: Mapping[str, int] = field(default_factory=dict)


FIELDS = ("flags", "method", "crc", "packed", "size", "name_len", "extra_len")


def members(data: bytes) -> list[Member] | None:
    """The entries of a zip as Python's zipfile reads them; None where it does not."""
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            return [Member(info.filename.encode(), archive.read(info), info.compress_type) for info in archive.infolist()[:40]]
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, OSError, ValueError, KeyError, EOFError, struct.error):
        return None


def build(entries: Sequence[Member], comment: bytes = b"", end: Mapping[str, int] | None = None) -> bytes:
    """A zip of these entries; `end` overrides fields of the end record."""
    out, directory = bytearray(), bytearray()
    for entry in entries:
        packed = zlib.compress(entry.data, 6)[2:-4] if entry.method == 8 else entry.data
        true = {
            "flags": entry.flags, "method": entry.method, "crc": zlib.crc32(entry.data), "packed": len(packed), "size": len(entry.data),
            "name_len": len(entry.name), "extra_len": len(entry.extra), "header": len(out), "disk": 0,
        }  # fmt: skip
        local = {**true, **entry.local}
        central = {**true, **entry.central}
        form = (local["flags"], local["method"], 0, 33, local["crc"], local["packed"], local["size"], local["name_len"], local["extra_len"])
        out += struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, *form) + entry.name + entry.extra + packed
        if entry.flags & 8:
            out += struct.pack("<4s3L", b"PK\x07\x08", true["crc"], true["packed"], true["size"])
        form = (central["flags"], central["method"], 0, 33, central["crc"], central["packed"], central["size"], central["name_len"])
        directory += struct.pack(
            "<4s6H3L5H2L", b"PK\x01\x02", 20, 20, *form, central["extra_len"], 0, central["disk"], 0, 0, central["header"]
        )
        directory += entry.name + entry.extra
    count = {"count": len(entries), "here": len(entries), "size": len(directory), "start": len(out), "comment": len(comment), **(end or {})}
    out += directory
    out += struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count["here"], count["count"], count["size"], count["start"], count["comment"])
    return bytes(out + comment)
