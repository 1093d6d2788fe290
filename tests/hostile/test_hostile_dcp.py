"""Folders of torch.distributed.checkpoint that lie, or ask to run something: each is refused by name, and nothing of it runs.

torch reads `.metadata` by `pickle.load`, which would run what these ask for.
"""

from __future__ import annotations

import io
import os
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorStorageMetadata

import ckptsurgeon as cs
from ckptsurgeon.errors import CheckpointError
from ckptsurgeon.tensors import Refused

MARKER = "ran"


class Marks:
    """What, unpickled, makes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (os.system, (f"touch {MARKER}",))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder `run` that was saved as it should be, within the current one."""
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save({"model": {"w": torch.arange(12.0).reshape(4, 3), "b": torch.ones(3)}, "step": 5}, checkpoint_id="run")
    return tmp_path / "run"


def changed(change: Callable[[Metadata], Any]) -> None:
    """Write `.metadata` anew as `change` makes it."""
    path = Path("run/.metadata")
    found = pickle.loads(path.read_bytes())
    made = change(found)
    path.write_bytes(pickle.dumps(made if made is not None else found))


def blob_of(found: Metadata, key: str) -> tuple[MetadataIndex, _StorageInfo]:
    return next((index, info) for index, info in found.storage_data.items() if index.fqn == key)


def moved(key: str, **fields: Any) -> Callable[[Metadata], None]:
    def change(found: Metadata) -> None:
        index, info = blob_of(found, key)
        found.storage_data[index] = replace(info, **fields)

    return change


def chunks(*blocks: tuple[tuple[int, ...], tuple[int, ...]], size: tuple[int, ...] = (4, 3)) -> Callable[[Metadata], None]:
    """Tell other chunks of `w`, all in its one blob."""

    def change(found: Metadata) -> None:
        row = found.state_dict_metadata["model.w"]
        index, info = blob_of(found, "model.w")
        del found.storage_data[index]
        rows = [ChunkStorageMetadata(torch.Size(start), torch.Size(sizes)) for start, sizes in blocks]
        found.state_dict_metadata["model.w"] = TensorStorageMetadata(row.properties, torch.Size(size), rows)
        found.storage_data |= {MetadataIndex("model.w", start): info for start, _ in blocks}

    return change


def extra(found: Metadata) -> None:
    found.storage_data[MetadataIndex("model.w", (1, 0))] = blob_of(found, "model.w")[1]


def nowhere(found: Metadata) -> None:
    found.storage_data[MetadataIndex("other", (0,))] = _StorageInfo("__0_0.distcp", 0, 9)


def unplaced(found: Metadata) -> None:
    del found.storage_data[blob_of(found, "model.w")[0]]


def renamed(found: Metadata) -> None:
    found.planner_data["model.w"] = ("ema", "w")


def wrong_dtype(found: Metadata) -> None:
    row = found.state_dict_metadata["model.w"]
    found.state_dict_metadata["model.w"] = replace(row, properties=replace(row.properties, dtype=torch.int32))


LIES: dict[str, tuple[Callable[[Metadata], Any], str]] = {
    "a file above the folder": (moved("model.w", relative_path="../x"), "not a plain file name"),
    "a file by its full path": (moved("model.w", relative_path="/etc/passwd"), "not a plain file name"),
    "a file in a folder": (moved("model.w", relative_path="a/b"), "not a plain file name"),
    "no file": (moved("model.w", relative_path=""), "not a plain file name"),
    "a name with NUL": (moved("model.w", relative_path="a\0b"), "not a plain file name"),
    "a blob beyond the file": (moved("model.w", offset=1 << 40), "reach out of"),
    "a blob before the file": (moved("model.w", offset=-1), "without a file, offset and length"),
    "a blob longer than the file": (moved("model.w", length=1 << 62), "overlap"),
    "a blob of no bytes": (moved("model.w", length=0), "can't be read"),
    "two blobs that overlap": (moved("model.w", offset=1), "overlap"),
    "a chunk twice": (chunks(((0, 0), (4, 3)), ((0, 0), (4, 3))), "rows 0 to 3 lie in 2 pieces"),
    "a chunk that is not there": (chunks(((0, 0), (4, 3)), size=(5, 3)), "rows 4 to 4 lie in no piece"),
    "a chunk out of the tensor": (chunks(((2, 0), (4, 3))), "reaches out of the tensor"),
    "a chunk of other dimensions": (chunks(((0,), (12,))), "one of each for every dimension"),
    "a chunk that is larger than its blob": (chunks(((0, 0), (4, 300)), size=(4, 300)), r"says F32 \(4, 300\)"),
    "a shape beyond 64 bits": (chunks(((0, 0), (4, 3)), size=(1 << 62, 1 << 62)), "lie in no piece"),
    "a chunk of which nothing says where it is": (unplaced, "rows 0 to 3 lie in no piece"),
    "a chunk that is not described": (extra, "which its description does not have"),
    "a chunk of nothing": (nowhere, "no description of what it is a chunk of"),
    "another name in the nested dict": (renamed, "stands at another place"),
    "another dtype than the blob's": (wrong_dtype, "says I32"),
    "no metadata": (lambda _found: {"w": 1}, "is no .metadata"),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_folder_that_lies_is_refused(lie: str) -> None:
    change, words = LIES[lie]
    changed(change)
    with pytest.raises(CheckpointError, match=words) as refused:
        cs.inspect("run")
    assert refused.value.path is not None and refused.value.path.startswith("run")
    assert not cs.check("run").ok


def test_what_metadata_asks_for_is_never_run() -> None:
    whole = Path("run/.metadata").read_bytes()
    for place in ("planner_data", "storage_meta", "version"):
        Path("run/.metadata").write_bytes(whole)
        changed(lambda found, place=place: setattr(found, place, {**found.planner_data, "x": Marks()}))
        found = cs.inspect("run")
        assert any("system" in name for name in found.globals)
        report = cs.check("run")
        assert [one.code for one in report.files[0].findings] == ["CK201"] and not report.ok
    Path("run/.metadata").write_bytes(pickle.dumps(Marks()))
    with pytest.raises(CheckpointError, match=r"is no \.metadata"):
        cs.inspect("run")
    assert not os.path.exists(MARKER)


def test_what_a_value_asks_for_is_never_run() -> None:
    made = io.BytesIO()
    torch.save(Marks(), made)
    Path("run/__9_0.distcp").write_bytes(made.getvalue())
    changed(moved("step", relative_path="__9_0.distcp", offset=0, length=len(made.getvalue())))
    found = cs.inspect("run")
    assert any("system" in name for name in found.globals) and found.beside == ("step",)
    assert not cs.check("run").ok
    cs.merge("run", None, "o.safetensors")
    assert not os.path.exists(MARKER)


def test_a_tensor_behind_a_call_blocks_by_name() -> None:
    made = io.BytesIO()
    torch.save(Marks(), made)
    Path("run/__9_0.distcp").write_bytes(made.getvalue())
    changed(moved("model.w", relative_path="__9_0.distcp", offset=0, length=len(made.getvalue())))
    entry = cs.inspect("run").state_dicts[0].entries["w"]
    assert isinstance(entry, Refused) and "system" in entry.reason
    with pytest.raises(CheckpointError, match="w: "):
        cs.merge("run", None, "o.safetensors")
    assert not os.path.exists(MARKER)


def test_a_stored_transform_is_refused_by_name() -> None:
    changed(moved("model.w", transform_descriptors=["zstd"]))
    entry = cs.inspect("run").state_dicts[0].entries["w"]
    assert isinstance(entry, Refused) and "stored through zstd" in entry.reason
    with pytest.raises(CheckpointError, match="zstd"):
        cs.merge("run", None, "o.safetensors")


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata"])
def test_a_link_out_of_the_folder_is_refused(folder: Path, name: str) -> None:
    os.rename(folder / name, "elsewhere")
    os.symlink("../elsewhere", folder / name)
    with pytest.raises(CheckpointError, match="a link that leads out of its folder"):
        cs.inspect("run")
    os.remove(folder / name)
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match="not a regular file"):
        cs.inspect("run")
