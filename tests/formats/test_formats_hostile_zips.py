"""Zip archives that two readers would see differently, or that lie about themselves; and the odd ones that are legal."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from formats_support import assert_same, bits, carry_out, only, out_tensors, refusal, save_zip

from ckptsurgeon.errors import FormatError, UnreadableError
from ckptsurgeon.formats import read, torch_zip_writer

STATE = {"w": torch.arange(6.0), "b": torch.ones(300, dtype=torch.float16)}


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


def given(*values: int | None) -> int:
    """The first value that is given."""
    return next(value for value in values if value is not None)


def archive(*items: Item, between: bytes = b"", comment: bytes = b"", count: int | None = None, zip64: bytes = b"", **end: int) -> bytes:
    """The bytes of an archive."""
    body, directory = b"", b""
    for item in items:
        deflate = zlib.compressobj(9, zlib.DEFLATED, -15)
        stored = deflate.compress(item.data) + deflate.flush() if item.method == 8 else item.data
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
    """The entries of a real file."""
    buffer = io.BytesIO()
    torch.save(STATE, buffer)
    with zipfile.ZipFile(buffer) as real:
        return [Item(info.filename, real.read(info)) for info in real.infolist()]


def at(name: str) -> int:
    """Where an entry stands among the items."""
    return next(index for index, item in enumerate(items()) if item.name.endswith(name))


def changed(which: str, /, **changes: object) -> bytes:
    """The real file's archive with one entry changed."""
    entries = items()
    entries[at(which)] = replace(entries[at(which)], **changes)
    return archive(*entries)


def test_an_honest_archive_is_read(tmp_path: Path) -> None:
    (tmp_path / "it").write_bytes(archive(*items()))
    assert_same(only(read(str(tmp_path / "it"))).tensors, torch.load(tmp_path / "it", weights_only=True))


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


@pytest.mark.parametrize("case", LEGAL)
def test_legal(case: str, tmp_path: Path) -> None:
    changes = dict(LEGAL[case])
    data = changed(str(changes.pop("name")), **changes)
    (tmp_path / "it").write_bytes(data)
    with zipfile.ZipFile(tmp_path / "it") as official:
        assert official.testzip() is None
    assert_same(only(read(str(tmp_path / "it"))).tensors, STATE)


@pytest.mark.parametrize("comment", [b"", b"trained in spring", b"x" * 65535])
def test_a_comment_at_the_end_is_legal(comment: bytes, tmp_path: Path) -> None:
    (tmp_path / "it").write_bytes(archive(*items(), comment=comment))
    assert_same(only(read(str(tmp_path / "it"))).tensors, STATE)


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


@pytest.mark.parametrize("case", LIES)
def test_lies(case: str, tmp_path: Path) -> None:
    error = refusal(changed("data/0", **LIES[case]), tmp_path)
    assert isinstance(error, FormatError | UnreadableError)
    assert error.hint or "storage" in error.reason, error


def _twice(name: str, data: bytes) -> bytes:
    entries = items()
    first = entries[at(name)]
    return archive(*entries[: at(name)], first, replace(first, data=data), *entries[at(name) + 1 :])


@pytest.mark.parametrize("name", ["data.pkl", "data/0", "byteorder"])
def test_an_entry_twice(name: str, tmp_path: Path) -> None:
    assert "twice" in refusal(_twice(name, b"other"), tmp_path).reason


def test_two_entries_of_one_place(tmp_path: Path) -> None:
    entries = items()
    again = replace(entries[at("data/0")], name=entries[0].name.partition("/")[0] + "/data/8", header=0)
    refusal(archive(*entries, again), tmp_path)


@pytest.mark.parametrize(
    "changes",
    [
        {"between": b"hidden"},
        {"between": bytes(16)},
        {"count": 3},
        {"count": 100},
        {"disk": 1},
        {"size": 10},
        {"start": 3},
        {"start": 1 << 31},
        {"comment": archive(*items())[-22:]},  # a comment that is another end record
        {"zip64": b"hidden between directory and end"},
        {"zip64": struct.pack("<4sLQL", b"PK\x06\x07", 0, 5, 1)},
        {"zip64": struct.pack("<4sLQL", b"PK\x06\x07", 1, 5, 2)},
    ],
)
def test_end_records_that_lie(changes: dict[str, object], tmp_path: Path) -> None:
    refusal(archive(*items(), **changes), tmp_path)


def test_a_wide_end_record_that_disagrees(tmp_path: Path) -> None:
    save_zip(STATE, tmp_path / "real")
    data = (tmp_path / "real").read_bytes()
    place = data.rindex(b"PK\x06\x06")
    for offset in (4, 16, 20, 24, 32, 40, 48):
        broken = bytearray(data)
        broken[place + offset] ^= 1
        refusal(bytes(broken), tmp_path)


def test_two_end_records_that_disagree(tmp_path: Path) -> None:
    save_zip(STATE, tmp_path / "real")
    data = (tmp_path / "real").read_bytes()
    place = data.rindex(b"PK\x05\x06")
    for offset in ((8, 10), (12,), (16,)):  # the count (twice), the directory's size and its start
        broken = bytearray(data)
        for each in offset:
            broken[place + each] ^= 1
        assert "disagree" in refusal(bytes(broken), tmp_path).reason


def test_bytes_after_the_end_record(tmp_path: Path) -> None:
    assert "after its end" in refusal(archive(*items()) + b"more", tmp_path).reason
    assert "after its end" in refusal(archive(*items(), comment=b"a comment")[:-1], tmp_path).reason


def test_a_size_that_deflate_cant_reach(tmp_path: Path) -> None:
    data = changed("data/0", method=8, size=1 << 20, local_size=1 << 20)
    assert "can't inflate" in refusal(data, tmp_path).reason


def test_two_archives_in_one_file(tmp_path: Path) -> None:
    one, other = archive(*items()), archive(*(replace(item, data=bytes(len(item.data))) for item in items()))
    refusal(one + other, tmp_path)
    refusal(other + archive(*items(), start=len(other)), tmp_path)


def test_a_deflated_storage_is_never_taken_raw(tmp_path: Path) -> None:
    storage = items()[at("data/1")].data
    (tmp_path / "it").write_bytes(changed("data/1", method=8))
    meta = only(read(str(tmp_path / "it"))).tensors["b"]
    assert meta.span is not None and meta.span.packed is not None
    packed, raw = meta.span.packed, (tmp_path / "it").read_bytes()
    inflated = zlib.decompress(raw[packed.offset : packed.offset + packed.nbytes], -15)
    assert inflated == storage and packed.size == len(storage)
    assert inflated[meta.span.offset : meta.span.offset + meta.span.nbytes] == bits(STATE["b"])
    plain = only(read(str(tmp_path / "it"))).tensors["w"]
    assert plain.span is not None and plain.span.packed is None


def test_a_pickle_with_a_wrong_checksum(tmp_path: Path) -> None:
    assert "checksum" in refusal(changed("data.pkl", crc=1), tmp_path).reason
    assert "checksum" in refusal(changed("data.pkl", crc=1, method=8), tmp_path).reason


def test_a_pickle_that_inflates_to_another_length(tmp_path: Path) -> None:
    length = len(items()[at("data.pkl")].data)
    for size in (length - 1, length + 1):
        refusal(changed("data.pkl", method=8, size=size), tmp_path)


def test_all_checksums_zero_is_said(tmp_path: Path) -> None:
    from torch.serialization import set_crc32_options

    set_crc32_options(False)
    try:
        save_zip(STATE, tmp_path / "without")
    finally:
        set_crc32_options(True)
    save_zip(STATE, tmp_path / "with")
    archive = read(str(tmp_path / "without"))
    assert_same(only(archive).tensors, STATE)
    assert any("checksum" in note for note in archive.notes)
    assert read(str(tmp_path / "with")).notes == ()


def test_storages_that_nothing_refers_to_are_noted(tmp_path: Path) -> None:
    folder = items()[0].name.partition("/")[0]
    (tmp_path / "it").write_bytes(archive(*items(), Item(f"{folder}/data/99", b"payload")))
    assert any("nothing refers to" in note for note in read(str(tmp_path / "it")).notes)


def test_a_provenance_record_is_read_and_never_a_reason_to_refuse(tmp_path: Path) -> None:
    layout = torch_zip_writer.lay_out(out_tensors(STATE), {}, {}, list(STATE), b'{"fresh": ["w"], "tool": "x"}')
    carry_out(layout, [bits(tensor) for tensor in STATE.values()], tmp_path / "it")
    assert read(str(tmp_path / "it")).provenance == {"fresh": ["w"], "tool": "x"}
    for record in (b"no json", b"[" * 100_000, b'{"fresh": 3}', b"\xff", b"[]", b"{}"):
        layout = torch_zip_writer.lay_out(out_tensors(STATE), {}, {}, list(STATE), record)
        carry_out(layout, [bits(tensor) for tensor in STATE.values()], tmp_path / "it")
        assert read(str(tmp_path / "it")).provenance is None
