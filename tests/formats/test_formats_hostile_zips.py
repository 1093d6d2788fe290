"""Zip archives that two readers would see differently, or that lie about themselves; and the odd ones that are legal."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from formats_support import assert_same, bits, carry_out, only, out_tensors, refusal, save_zip
from hostile_zips import ENDS, LEGAL, LIES, Item, archive, at, changed, items, twice

from ckptsurgeon.errors import CheckpointError, FormatError, UnreadableError
from ckptsurgeon.formats import read, zip_directory
from ckptsurgeon.formats.torch import zip_writer as torch_zip_writer
from ckptsurgeon.formats.zip_directory import read_directory
from ckptsurgeon.storage.opening import open_regular

STATE = {"w": torch.arange(6.0), "b": torch.ones(300, dtype=torch.float16)}


def test_an_honest_archive_is_read(tmp_path: Path) -> None:
    (tmp_path / "it").write_bytes(archive(*items()))
    assert_same(only(read(str(tmp_path / "it"))).tensors, torch.load(tmp_path / "it", weights_only=True))


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


@pytest.mark.parametrize("case", LIES)
def test_lies(case: str, tmp_path: Path) -> None:
    error = refusal(changed("data/0", **LIES[case]), tmp_path)
    assert isinstance(error, FormatError | UnreadableError)
    assert error.hint or "storage" in error.reason, error


def test_a_directory_in_another_order(tmp_path: Path) -> None:
    """The entries come in the order of the file."""
    raw = archive(*items())
    start, end = raw.index(b"PK\x01\x02"), raw.rindex(b"PK\x05\x06")
    first, *rows = raw[start:end].split(b"PK\x01\x02")
    assert not first and len(rows) == len(items())
    (tmp_path / "it").write_bytes(raw[:start] + b"".join(b"PK\x01\x02" + row for row in reversed(rows)) + raw[end:])
    with zipfile.ZipFile(tmp_path / "it") as official:
        assert official.namelist() == [item.name for item in reversed(items())]
    assert_same(only(read(str(tmp_path / "it"))).tensors, STATE)
    with open_regular(str(tmp_path / "it")) as file:
        assert list(read_directory(file).entries) == [item.name for item in items()]


@pytest.mark.parametrize("name", ["data.pkl", "data/0", "byteorder"])
def test_an_entrytwice(name: str, tmp_path: Path) -> None:
    assert "twice" in refusal(twice(name, b"other"), tmp_path).reason


def test_two_entries_of_one_place(tmp_path: Path) -> None:
    entries = items()
    again = replace(entries[at("data/0")], name=entries[0].name.partition("/")[0] + "/data/8", header=0)
    refusal(archive(*entries, again), tmp_path)


@pytest.mark.parametrize("case", ENDS)
def test_end_records_that_lie(case: str, tmp_path: Path) -> None:
    refusal(archive(*items(), **ENDS[case]), tmp_path)


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


def test_headers_as_torch_writes_them_are_read_as_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever byte is changed, the quick look at a usual header and the full one come to the same end."""
    save_zip({"w": torch.zeros(2), "empty": torch.zeros(0)}, tmp_path / "it")
    raw = (tmp_path / "it").read_bytes()

    def read_with(change: Callable[[int], int], place: int) -> object:
        broken = bytearray(raw)
        broken[place] = change(broken[place])
        (tmp_path / "it").write_bytes(broken)
        try:
            with open_regular(str(tmp_path / "it")) as file:
                return read_directory(file)
        except CheckpointError as error:
            return type(error), error.reason

    pickle = raw.index(b"\x80\x02")
    changes: list[Callable[[int], int]] = [lambda old: old ^ 1, lambda old: old ^ 8, lambda _: 0xFF]
    for place in (*range(pickle), *range(raw.index(b".PK\x07\x08"), len(raw))):
        if raw[place] == ord("Z"):
            continue  # padding
        quick = read_with(changes[place % 3], place)
        with monkeypatch.context() as patch:
            patch.setattr(zip_directory, "_NO_SIZES", b"never")  # then no header is a usual one
            patch.setattr(zip_directory, "_USUAL", zip_directory._DESCRIPTORS[24])  # and no descriptor
            assert read_with(changes[place % 3], place) == quick, place


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
