"""Data that is not what its checksum says is refused wherever a CRC is at hand: deflated entries, and merges from zip to zip."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hostile_zips import W, archive, changed, items

import ckptsurgeon as cs
from ckptsurgeon.errors import FormatError
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
