"""Data that is not what its checksum says is refused wherever a CRC is at hand: deflated entries, and merges from zip to zip."""

from __future__ import annotations

import errno
import os
import threading
import zipfile
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hostile_zips import W, archive, changed, items

import ckptsurgeon as cs
from ckptsurgeon.errors import FormatError, OutputError, StaleError
from ckptsurgeon.storage import copying
from ckptsurgeon.streaming import checksums, in_threads, writing
from ckptsurgeon.streaming.reading import Reader

OLD = b"the old file"


def written(folder: Path, data: bytes) -> Path:
    path = folder / "it.pt"
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("output", ["out.pt", "out.safetensors"])
def test_a_deflated_storage_is_held_against_its_checksum_where_it_is_read(output: str, tmp_path: Path) -> None:
    path = written(tmp_path, changed("data/0", method=8, crc=1))
    checkpoint = cs.open(path)
    with Reader([checkpoint]) as reader, pytest.raises(FormatError, match="not what its checksum says"):
        reader.read(checkpoint["w"])
    (tmp_path / output).write_bytes(OLD)
    with pytest.raises(FormatError, match="checksum") as caught:
        cs.merge(path, None, output=tmp_path / output, overwrite=True)
    assert caught.value.path == str(path) and (tmp_path / output).read_bytes() == OLD
    assert sorted(found.name for found in tmp_path.iterdir()) == sorted(["it.pt", output])


def test_a_stored_storage_is_held_against_its_checksum_where_a_merge_counts_one(tmp_path: Path) -> None:
    path = written(tmp_path, changed("data/0", crc=1))
    (tmp_path / "out.pt").write_bytes(OLD)
    with pytest.raises(FormatError, match="its own checksum says") as caught:
        cs.merge(path, None, output=tmp_path / "out.pt", overwrite=True)
    assert caught.value.path == str(path) and "check --full" in (caught.value.hint or "")
    assert (tmp_path / "out.pt").read_bytes() == OLD


@pytest.mark.parametrize("method", [0, 8])
def test_honest_checksums_and_none_are_no_matter(method: int, tmp_path: Path) -> None:
    none = [type(item)(**{**vars(item), "crc": 0}) for item in items()]
    for number, data in enumerate((changed("data/0", method=method), archive(*none))):
        path = written(tmp_path, data)
        cs.merge(path, None, output=tmp_path / f"{number}.pt")
        assert torch.load(tmp_path / f"{number}.pt", weights_only=True)["w"].numpy().tobytes() == W


def test_a_part_of_a_storage_has_no_checksum_of_its_own(tmp_path: Path) -> None:
    whole = torch.arange(8.0)
    torch.save({"head": whole[:4], "tail": whole[4:], "all": whole}, tmp_path / "it.pt")
    found = cs.open(tmp_path / "it.pt")
    spans = {key: tensor.span for key, tensor in found.items()}
    assert [spans[key] is not None and spans[key].checksum() is None for key in ("head", "tail", "all")] == [True, True, False]
    cs.merge(tmp_path / "it.pt", None, output=tmp_path / "out.pt", adapt={"all": "slice(dim=0, start=2, stop=5)"})
    assert torch.load(tmp_path / "out.pt", weights_only=True)["all"].tolist() == [2, 3, 4]


PART = 1 << 12


@pytest.fixture
def in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor of some kilobytes is worked on in several parts, by threads."""
    monkeypatch.setattr(copying, "PART", PART)
    monkeypatch.setattr(in_threads, "SMALL", 1 << 10)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of all data whose CRC is computed; headers and names are shorter than a kilobyte."""
    lengths: list[int] = []

    def crc32(data: bytes | memoryview, start: int = 0) -> int:
        lengths.append(memoryview(data).nbytes)
        return zlib.crc32(data, start)

    for module in (copying, checksums, writing):
        name, by = ("crc32", crc32) if module is writing else ("zlib", SimpleNamespace(crc32=crc32))
        monkeypatch.setattr(module, name, by)
    return lengths


def large(folder: Path, damaged: bool = False) -> Path:
    """A file of three tensors of many kilobytes; with `damaged` one byte in the middle of `b` is not what was saved."""
    torch.manual_seed(0)
    path = folder / "large.pt"
    torch.save({key: torch.randn(size) for key, size in SIZES.items()}, path)
    if damaged:
        span = cs.open(path)["b"].span
        assert span is not None
        data = bytearray(path.read_bytes())
        data[span.offset + span.nbytes // 2] ^= 1
        path.write_bytes(data)
    return path


SIZES = {"a": 5_000, "b": 7_001, "c": 1_025}
NBYTES = 4 * sum(SIZES.values())


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("rules", [{}, {"rename": {"b": "renamed"}}, {"adapt": {"b + a": "concat"}}], ids=["as it is", "renamed", "joined"])
@pytest.mark.parametrize("output", ["out.pt", "out.safetensors"])
def test_a_damaged_record_is_refused_by_its_key_whatever_becomes_of_it(output: str, rules: dict[str, Any], tmp_path: Path) -> None:
    path = large(tmp_path, damaged=True)
    with pytest.raises(FormatError, match="its own checksum says") as caught:
        cs.merge(path, None, output=tmp_path / output, **rules)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["b"]
    assert caught.value.path == str(path) and [item.name for item in tmp_path.iterdir()] == ["large.pt"]


@pytest.mark.usefixtures("in_parts")
def test_without_a_proof_a_wrong_checksum_is_carried_on_and_can_be_found(tmp_path: Path) -> None:
    output = tmp_path / "out.pt"
    cs.merge(large(tmp_path, damaged=True), None, output=output, rename={"b": "renamed"}, verify=False)
    with zipfile.ZipFile(output) as written:
        assert written.testzip() == "archive/data/1"
    assert {(finding.code, finding.key) for finding in cs.check([output], full=True).files[0].findings} == {("CK106", "renamed")}
    with pytest.raises(FormatError, match="its own checksum says"):
        cs.merge(output, None, output=tmp_path / "again.pt")


@pytest.mark.usefixtures("in_parts")
def test_a_record_that_is_copied_whole_keeps_its_checksum(tmp_path: Path, counted: list[int]) -> None:
    path = large(tmp_path)
    counted.clear()
    cs.merge(path, None, output=tmp_path / "out.pt", rename={"b": "renamed"}, verify=False)
    assert counted == []  # nothing is computed
    cs.merge(path, None, output=tmp_path / "proven.pt", rename={"b": "renamed"})
    assert sum(counted) == NBYTES  # one pass serves the source and the copy
    counted.clear()
    cs.merge(path, None, output=tmp_path / "out.safetensors")
    assert sum(counted) == NBYTES
    assert (tmp_path / "out.pt").read_bytes() == (tmp_path / "proven.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "out.pt") as written:
        assert written.testzip() is None


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("verify", [True, False])
def test_other_checksums_are_computed_once_beside_the_copy(verify: bool, tmp_path: Path, counted: list[int]) -> None:
    cs.merge(large(tmp_path), None, output=tmp_path / "in.safetensors")
    counted.clear()
    cs.merge(tmp_path / "in.safetensors", None, output=tmp_path / "out.pt", adapt={"a": "slice(dim=0, start=9, stop=4000)"}, verify=verify)
    assert sum(counted) == NBYTES - 4 * (5_000 - 3_991)
    with zipfile.ZipFile(tmp_path / "out.pt") as written:
        assert written.testzip() is None


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("source", ["large.pt", "in.safetensors"])
@pytest.mark.parametrize(
    "rules",
    [
        {"adapt": {"b + a + b": "concat"}},
        {"adapt": {"a": "slice(dim=0, start=1, stop=4999)"}},
        {"adapt": {"a -> x + y": "chunk"}},
        {"dtype": "F16"},
        {"dtype": "F64"},
    ],
    ids=str,
)
def test_every_kind_of_value_gets_the_right_checksum(rules: dict[str, Any], source: str, tmp_path: Path) -> None:
    cs.merge(large(tmp_path), None, output=tmp_path / "in.safetensors")
    for verify in (True, False):
        cs.merge(tmp_path / source, None, output=tmp_path / "out.pt", overwrite=True, verify=verify, **rules)
        with zipfile.ZipFile(tmp_path / "out.pt") as written:
            assert written.testzip() is None


@pytest.mark.usefixtures("in_parts")
@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("event", ["the disk is full", "became shorter"])
def test_what_fails_on_the_way_ends_the_threads_and_leaves_nothing(
    event: str, verify: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, calls = tmp_path / "in.safetensors", 0
    cs.merge(large(tmp_path), None, output=source)
    before, real = sorted(os.listdir(tmp_path)), copying.copy_range

    def fails(*arguments: Any) -> copying.Copied:
        nonlocal calls
        calls += 1
        if calls == 4 and event == "the disk is full":
            raise OSError(errno.ENOSPC, "No space left on device")
        if calls == 4:
            os.truncate(source, 10_000)
        return real(*arguments)

    monkeypatch.setattr(copying, "copy_range", fails)
    with pytest.raises(OutputError if event == "the disk is full" else StaleError, match=event):
        cs.merge(source, None, output=tmp_path / "out.pt", verify=verify)
    assert threading.active_count() == 1 and sorted(os.listdir(tmp_path)) == before
