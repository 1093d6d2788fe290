"""Tensors' bytes as the reader gives them, in both of its ways, are those of torch's own reader; a file that changes is noticed."""

from __future__ import annotations

import os
import tempfile
import zipfile
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ckptsurgeon as cs
from ckptsurgeon.errors import FormatError, StaleError
from ckptsurgeon.storage import copying
from ckptsurgeon.streaming import reading
from ckptsurgeon.streaming.reading import Reader
from ckptsurgeon.streaming.values import memory_of
from ckptsurgeon.tensors import Checkpoint


def state() -> dict[str, torch.Tensor]:
    big = torch.randn(40, 50)
    return {
        "whole": big,
        "turned": big.t(),
        "row": big[3],
        "column": big[:, 3],
        "wide": torch.randn(1, 4).expand(3, 4),
        "none": torch.ones(0, 2),
    }


def packed(path: Path, output: Path) -> None:
    with zipfile.ZipFile(path) as stored, zipfile.ZipFile(output, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in stored.namelist():
            archive.writestr(name, stored.read(name))


@pytest.mark.parametrize("kind", ["zip", "legacy", "deflated"])
@pytest.mark.parametrize(("buffer", "part"), [(16, 7), (1 << 22, 1 << 22)])
def test_read_and_parts_agree_with_torch(kind: str, buffer: int, part: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "BUFFER", buffer)
    monkeypatch.setattr(reading, "BUFFER", buffer)
    monkeypatch.setattr(copying, "PART", part)
    given, path = state(), tmp_path / "in.pt"
    torch.save(given, path, _use_new_zipfile_serialization=kind != "legacy")
    if kind == "deflated":
        packed(path, tmp_path / "packed.pt")
        path = tmp_path / "packed.pt"
    found = cs.open(path)
    with Reader([found]) as reader:
        for key, tensor in given.items():
            expected = memory_of(tensor)
            assert bytes(reader.read(found[key])) == expected, key
            assert b"".join(bytes(part) for part in reader.parts(found[key])) == expected, key
            memory = bytearray(len(expected))
            for read in reversed([*reader.reads(found[key], memoryview(memory))]):
                read.do()
            assert memory == expected, key
        reader.check_unchanged()


def appended(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def rewritten(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    os.utime(path, ns=(1, 1))


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def replaced(path: Path) -> None:
    (path.parent / "new").write_bytes(path.read_bytes())
    os.replace(path.parent / "new", path)


@pytest.mark.parametrize("change", [appended, rewritten, truncated, replaced])
def test_a_source_that_changed_after_its_header_was_read_is_stale(change: object, tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "in.pt")
    found = cs.open(tmp_path / "in.pt")
    change(tmp_path / "in.pt")  # type: ignore[operator]
    with Reader([found]) as reader, pytest.raises(StaleError) as caught:
        reader.read(found["whole"])
    assert caught.value.path == str(tmp_path / "in.pt")


@pytest.mark.parametrize("change", [appended, rewritten, truncated])
def test_a_source_that_changes_while_it_is_open_is_stale(change: object, tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "in.pt")
    found = cs.open(tmp_path / "in.pt")
    with Reader([found]) as reader:
        reader.read(found["whole"])
        change(tmp_path / "in.pt")  # type: ignore[operator]
        with pytest.raises(StaleError):
            reader.check_unchanged()


@pytest.mark.parametrize("change", [replaced, Path.unlink])
def test_a_source_that_is_replaced_or_taken_away_while_it_is_open_is_still_whole(change: object, tmp_path: Path) -> None:
    given = state()
    torch.save(given, tmp_path / "in.pt")
    found = cs.open(tmp_path / "in.pt")
    with Reader([found]) as reader:
        reader.read(found["row"])
        change(tmp_path / "in.pt")  # type: ignore[operator]
        assert bytes(reader.read(found["whole"])) == memory_of(given["whole"])
        reader.check_unchanged()


def test_one_file_seen_in_two_states_is_stale(tmp_path: Path) -> None:
    torch.save(state(), tmp_path / "in.pt")
    before = cs.open(tmp_path / "in.pt")
    rewritten(tmp_path / "in.pt")
    torch.save(state(), tmp_path / "in.pt")
    after = cs.open(tmp_path / "in.pt")
    for order in ([before, after], [after, before]):
        with pytest.raises(StaleError):
            Reader(order)
    Reader([after, after])


def deflated(tmp_path: Path, stream: bytes, size: int) -> Checkpoint:
    """A checkpoint whose one storage is the raw deflate `stream`, said to inflate to `size` bytes, without a checksum."""
    torch.save({"w": torch.zeros(size // 4)}, tmp_path / "in.pt")
    packed(tmp_path / "in.pt", tmp_path / "packed.pt")
    found = cs.open(tmp_path / "packed.pt")
    (tmp_path / "stream").write_bytes(stream)
    status = (tmp_path / "stream").stat()
    span = found["w"].span
    assert span is not None and span.packed is not None
    moved = replace(span, file=str(tmp_path / "stream"), packed=replace(span.packed, offset=0, nbytes=len(stream), size=size, crc=0))
    stamp = replace(found.files[0], path=str(tmp_path / "stream"), size=status.st_size, mtime_ns=status.st_mtime_ns, inode=status.st_ino)
    return replace(found, tensors={"w": replace(found["w"], span=moved)}, files=(stamp,))


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-15)
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize("damage", ["longer", "shorter", "cut", "more after it", "noise"])
def test_a_damaged_deflated_entry_is_refused(damage: str, tmp_path: Path) -> None:
    data = bytes(4000)
    stream = {
        "longer": raw_deflate(data + b"abcd"),
        "shorter": raw_deflate(data[4:]),
        "cut": raw_deflate(os.urandom(4000))[:-2],
        "more after it": raw_deflate(data) + b"more",
        "noise": b"\xff" * 100,
    }[damage]
    found = deflated(tmp_path, stream, 4000)
    with Reader([found]) as reader, pytest.raises(FormatError):
        reader.read(found["w"])


def test_a_bomb_stops_at_the_size_that_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, real = [], tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda: made.append(real()) or made[-1])
    found = deflated(tmp_path, raw_deflate(bytes(64 << 20)), 4000)
    with Reader([found]) as reader:
        with pytest.raises(FormatError):
            reader.read(found["w"])
        (file,) = made
        assert os.fstat(file.fileno()).st_size <= 4000


def test_a_well_formed_deflated_entry_is_read(tmp_path: Path) -> None:
    data = os.urandom(2000) + bytes(2000)
    found = deflated(tmp_path, raw_deflate(data), 4000)
    with Reader([found]) as reader:
        assert bytes(reader.read(found["w"])) == data
