"""safetensors headers, skeletons and index files that lie, contradict themselves or cost too much."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from formats_support import assert_same, bits, only, refusal, save_legacy, save_zip
from hostile_json import EIGHT, FOUR, HEADERS, INDEXES, ROW, SKELETONS, entry, safetensor, skeleton

from ckptsurgeon.errors import CheckpointError, FormatError, LimitError, UnreadableError
from ckptsurgeon.formats import read, sniff
from ckptsurgeon.formats.plain import skeleton as skeletons
from ckptsurgeon.limit_table import allowed
from ckptsurgeon.tensors import Archive, Checkpoint


@pytest.mark.parametrize("case", HEADERS)
def test_safetensors_headers_that_lie(case: str, tmp_path: Path) -> None:
    header, data = HEADERS[case]
    (tmp_path / "it").write_bytes(safetensor(header, data))
    try:
        official = set(safetensors.torch.load_file(tmp_path / "it"))
    except Exception:  # noqa: BLE001
        official = None
    error = refusal(tmp_path / "it", tmp_path)
    assert isinstance(error, FormatError | UnreadableError)
    # What the library takes and we don't is said here, so that a change of either is seen.
    accepted = {
        "white space first",
        "one name twice",
        "one name twice, once escaped",
        "one metadata name twice",
        "another field",
        "a thousand dimensions",
    }
    assert (official is None) or case in accepted, official


@pytest.mark.parametrize(
    ("header", "data"),
    [
        ({}, b""),
        ({"__metadata__": None}, b""),
        ({"__metadata__": {}}, b""),
        ({"b": entry(4, 8), "a": entry(0, 4)}, EIGHT),
        ({"a": entry(0, 0, (0, 5)), "b": entry(0, 4), "c": entry(4, 4, (3, 0))}, FOUR),
        ({"a": entry(0, 4, ())}, FOUR),
        ({"metadata": entry(0, 4)}, FOUR),
    ],
)
def test_safetensors_headers_that_are_unusual(header: Any, data: bytes, tmp_path: Path) -> None:
    (tmp_path / "it").write_bytes(safetensor(header, data, pad=b"   "))
    assert_same(only(read(str(tmp_path / "it"))).tensors, safetensors.torch.load_file(tmp_path / "it"))


@pytest.mark.parametrize("length", [0, 1, 3, 100, allowed("json-bytes") + 1, 1 << 39, 1 << 63, (1 << 64) - 1])
def test_a_header_length_that_lies(length: int, tmp_path: Path) -> None:
    refusal(length.to_bytes(8, "little") + b"{}" + FOUR, tmp_path)


def test_a_header_above_the_limit(tmp_path: Path) -> None:
    error = refusal((allowed("json-bytes") + 1).to_bytes(8, "little") + b"{}", tmp_path)
    assert isinstance(error, LimitError) and f"{allowed('json-bytes'):,} " in f"{error.reason} "


def test_many_names_and_one_twice_is_found_at_once(tmp_path: Path) -> None:
    body = b",".join(b'"%d":0' % number for number in range(100_000))
    assert "'99999' twice" in refusal(safetensor(b"{" + body + b',"99999":0}'), tmp_path).reason


def test_provenance_in_safetensors(tmp_path: Path) -> None:
    for text, expected in (('{"fresh": ["a"]}', {"fresh": ["a"]}), ("{", None), ("3", None), ("[" * 9999, None)):
        safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "it", metadata={"ckptsurgeon": text})
        assert read(str(tmp_path / "it")).provenance == expected


# Skeletons.


def test_a_skeleton_keeps_everything(tmp_path: Path) -> None:
    rows = [
        ROW,
        {"name": "v", "dtype": "F32", "shape": [2, 3]},
        {"name": "n", "dtype": "I64", "shape": []},
        {"name": "e", "dtype": "C32", "shape": [0]},
    ]
    value = skeleton(tensors=rows, ties=[["w", "v"]], entries=["x._extra_state"], module_metadata={"": {"version": 2}})
    (tmp_path / "it").write_text(json.dumps(value))
    archive = read(str(tmp_path / "it"))
    state = only(archive)
    assert archive.format == archive.kind == "skeleton" and archive.files == ()
    assert [(meta.name, meta.dtype, meta.shape, meta.span) for meta in state.tensors.values()] == [
        ("w", "F32", (2, 3), None), ("v", "F32", (2, 3), None), ("n", "I64", (), None), ("e", "C32", (0,), None)]  # fmt: skip
    assert (state.ties, list(state.entries), state.module_metadata) == ((("w", "v"),), ["x._extra_state"], {"": {"version": 2}})
    assert state.tensors["w"].stride == (3, 1)
    checkpoint = Checkpoint(
        "net:Net",
        "model",
        archive.fingerprint,
        state.tensors,
        entries=state.entries,
        module_metadata=state.module_metadata,
        ties=state.ties,
    )
    (tmp_path / "again").write_text(json.dumps(skeletons.to_json(checkpoint)))
    again = read(str(tmp_path / "again"))
    assert (again.state_dicts, again.fingerprint) == (archive.state_dicts, archive.fingerprint)


@pytest.mark.parametrize("case", SKELETONS)
def test_skeletons_that_lie(case: str, tmp_path: Path) -> None:
    assert isinstance(refusal(json.dumps(SKELETONS[case]).encode(), tmp_path), FormatError)


# Several files.

PARTS = {"one": {"a": torch.ones(2), "b": torch.zeros(3)}, "two": {"c": torch.full((2, 2), 7.0)}}


def shards(folder: Path, suffix: str = ".safetensors", save: Any = safetensors.torch.save_file, name: str = "model", **index: Any) -> Path:
    """A folder of two shards and their index."""
    folder.mkdir(exist_ok=True)
    for part, tensors in PARTS.items():
        save(tensors, folder / f"{part}{suffix}")
    weight_map = {key: f"{part}{suffix}" for part, tensors in PARTS.items() for key in tensors}
    path = folder / f"{name}{suffix}.index.json"
    path.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map, **index}))
    return path


@pytest.mark.parametrize(
    ("suffix", "save", "name", "told"),
    [
        (".safetensors", safetensors.torch.save_file, "model", "safetensors-shards"),
        (".bin", save_zip, "pytorch_model", "torch-shards"),
        (".bin", save_legacy, "pytorch_model", "torch-shards"),
        (".safetensors", safetensors.torch.save_file, "mine", "safetensors-shards"),
    ],
)
def test_shards_are_one_checkpoint(suffix: str, save: Any, name: str, told: str, tmp_path: Path) -> None:
    index = shards(tmp_path / "folder", suffix, save, name)
    for path in (index, tmp_path / "folder"):
        archive = read(str(path))
        assert archive.format == told and len(archive.files) == 3
        assert_same(only(archive).tensors, PARTS["one"] | PARTS["two"])
    before = read(str(index)).fingerprint
    save({"c": torch.full((2, 2), 8.0), "d": torch.ones(1)}, tmp_path / "folder" / f"two{suffix}")
    weight_map = {"a": f"one{suffix}", "b": f"one{suffix}", "c": f"two{suffix}", "d": f"two{suffix}"}
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert read(str(index)).fingerprint != before


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin", "adapter_model.safetensors"])
def test_a_folder_with_one_file(name: str, tmp_path: Path) -> None:
    (safetensors.torch.save_file if name.endswith("safetensors") else save_zip)(PARTS["one"], tmp_path / name)
    assert_same(only(read(str(tmp_path))).tensors, PARTS["one"])


@pytest.mark.parametrize("case", INDEXES)
def test_indexes_that_lie(case: str, tmp_path: Path) -> None:
    import os

    folder = tmp_path / "folder"
    index = shards(folder, weight_map=INDEXES[case])
    (folder / "net.json").write_text(json.dumps(skeleton(tensors=[{**ROW, "name": "c"}])))
    shards(folder / "below")
    safetensors.torch.save_file(PARTS["two"], tmp_path / "outside")
    (folder / "outside").symlink_to(tmp_path / "outside")
    (folder / "garbage").write_bytes(b"garbage of some length")
    os.mkfifo(folder / "pipe")
    (folder / "zero").symlink_to("/dev/zero")
    (folder / "dangling").symlink_to("nowhere")
    (folder / "chain").symlink_to("outside")
    refusal(index, tmp_path)
    refusal(folder, tmp_path)


def test_a_shard_with_another_root_is_refused(tmp_path: Path) -> None:
    index = shards(tmp_path / "folder", ".bin", save_zip, "pytorch_model")
    save_zip({"model": PARTS["two"], "epoch": 1}, tmp_path / "folder" / "two.bin")
    refusal(index, tmp_path)


def test_links_of_a_hugging_face_cache(tmp_path: Path) -> None:
    model = tmp_path / "models--someone--net"
    snapshot, blobs = model / "snapshots" / "abc", model / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    shards(snapshot)
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / f"blob{number}")
        path.symlink_to(f"../../blobs/blob{number}")
    assert_same(only(read(str(snapshot))).tensors, PARTS["one"] | PARTS["two"])
    other = tmp_path / "models--someone--netother" / "blobs"
    other.mkdir(parents=True)
    (other / "blob").write_bytes((snapshot / "two.safetensors").read_bytes())
    (snapshot / "two.safetensors").unlink()
    (snapshot / "two.safetensors").symlink_to(other / "blob")
    assert "leads out" in refusal(snapshot, tmp_path).reason


@pytest.mark.parametrize("swapped", ["before it is opened", "after it was opened"])
def test_a_link_that_is_changed_while_it_is_read(swapped: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It leads inside when it is looked at, and outside when it is opened."""
    index = shards(tmp_path / "folder")
    link, real, outside = tmp_path / "folder" / "two.safetensors", tmp_path / "folder" / "real", tmp_path / "outside"
    link.rename(real)
    outside.write_bytes(real.read_bytes())
    link.symlink_to("real")
    honest = sniff._read_shard

    def lead(to: Path) -> None:
        link.unlink()
        link.symlink_to(to)

    def swapping(path: str) -> Archive:
        if path != str(link):
            return honest(path)
        lead(outside)
        found = honest(path)
        if swapped == "before it is opened":
            lead(real)  # and back, so that only what was opened tells
        return found

    monkeypatch.setattr(sniff, "_read_shard", swapping)
    assert "a link that" in refusal(index, tmp_path).reason


def test_a_link_within_the_folder(tmp_path: Path) -> None:
    index = shards(tmp_path / "folder")
    (tmp_path / "folder" / "two.safetensors").rename(tmp_path / "folder" / "real")
    (tmp_path / "folder" / "two.safetensors").symlink_to("real")
    assert_same(only(read(str(index))).tensors, PARTS["one"] | PARTS["two"])


def test_shards_read_from_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards(tmp_path / "folder")
    monkeypatch.chdir(tmp_path / "folder")
    for path in ("model.safetensors.index.json", "."):
        assert len(only(read(path)).tensors) == 3


def test_an_index_within_a_folder_of_a_long_chain_ends(tmp_path: Path) -> None:
    names = [f"{number}.json" for number in range(3)]
    for number, name in enumerate(names):
        (tmp_path / name).write_text(json.dumps({"weight_map": {"a": names[(number + 1) % 3]}}))
    with pytest.raises(CheckpointError):
        read(str(tmp_path / names[0]))


def test_bits_of_a_shard_are_its_own_file(tmp_path: Path) -> None:
    index = shards(tmp_path / "folder")
    span = only(read(str(index))).tensors["c"].span
    assert span is not None and span.file == str(tmp_path / "folder" / "two.safetensors")
    assert Path(span.file).read_bytes()[span.offset : span.offset + span.nbytes] == bits(PARTS["two"]["c"])
