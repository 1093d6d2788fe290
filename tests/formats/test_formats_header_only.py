"""Reading touches headers only, without torch, whatever the file's size."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from formats_support import only, save_legacy, save_zip

from ckptsurgeon import formats
from ckptsurgeon.errors import CheckpointError
from ckptsurgeon.formats.layout import OutTensor
from ckptsurgeon.formats.torch import zip_writer as torch_zip_writer

TERABYTE = 1 << 40
PROBE = """
import sys
from ckptsurgeon.formats import read
archive = read(sys.argv[1])
assert archive.state_dicts[0].tensors
heavy = sorted({name.partition(".")[0] for name in sys.modules} & {"torch", "numpy", "safetensors", "pickle", "asyncio", "pathlib"})
peak = next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(heavy, int(peak) >> 10)
"""


def _sparse_safetensors(path: Path, size: int) -> Path:
    half = size // 2
    header = json.dumps(
        {name: {"dtype": "U8", "shape": [half], "data_offsets": [index * half, (index + 1) * half]} for index, name in enumerate("ab")}
    ).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    os.truncate(path, 8 + len(header) + 2 * half)
    return path


def _sparse_zip(path: Path, size: int) -> Path:
    half = size // 2
    layout = torch_zip_writer.lay_out([OutTensor(name, "U8", (half,), index) for index, name in enumerate("ab")], {}, {}, "ab", None)
    with open(path, "wb") as file:
        for offset, chunk in (*layout.chunks, *layout.tail([0, 0])):
            file.seek(offset)
            file.write(chunk)
    assert path.stat().st_size == layout.size
    return path


def _sparse_legacy(path: Path, size: int) -> Path:
    save_legacy({"a": torch.zeros(3, dtype=torch.uint8)}, path)
    data = path.read_bytes()
    small, large = b"K\x03Nt", b"\x8a\x08" + size.to_bytes(8, "little") + b"Nt"
    assert data.count(small) == 1
    path.write_bytes(data[:-11].replace(small, large) + size.to_bytes(8, "little"))
    os.truncate(path, path.stat().st_size + size)
    return path


SPARSE = [_sparse_safetensors, _sparse_zip, _sparse_legacy]


def _probe(path: Path) -> tuple[str, int]:
    clean = {"PYTHONPATH": str(Path(formats.__file__).parents[2]), "PATH": os.environ["PATH"]}
    command = [sys.executable, "-S", "-c", PROBE, str(path)]  # without site: what an editable install imports is not ours
    run = subprocess.run(command, capture_output=True, text=True, env=clean, timeout=60, check=False)
    assert run.returncode == 0, run.stderr
    heavy, _, megabytes = run.stdout.rpartition(" ")
    return heavy, int(megabytes)


@pytest.mark.parametrize("make", SPARSE)
def test_a_terabyte_costs_its_header(make: object, tmp_path: Path) -> None:
    heavy, megabytes = _probe(make(tmp_path / "it", TERABYTE))
    assert heavy == "[]"
    assert megabytes <= 40


@pytest.mark.parametrize("save", [save_zip, save_legacy, safetensors.torch.save_file])
def test_torch_is_never_imported(save: object, tmp_path: Path) -> None:
    save({"a": torch.ones(3), "b": torch.ones(2, 2, dtype=torch.bfloat16)}, tmp_path / "it")
    heavy, megabytes = _probe(tmp_path / "it")
    assert heavy == "[]"
    assert megabytes <= 40


@pytest.mark.parametrize("make", SPARSE)
def test_the_bytes_read_do_not_grow_with_the_file(make: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def count(size: int) -> tuple[int, int]:
        path = make(tmp_path / f"{size}", size)
        real, asked = os.pread, []
        monkeypatch.setattr(os, "pread", lambda fd, nbytes, offset: (asked.append(nbytes), real(fd, nbytes, offset))[1])
        formats.read(str(path))
        monkeypatch.undo()
        return sum(asked), len(asked)

    nbytes, calls = count(1 << 28)
    more, more_calls = count(TERABYTE)
    assert nbytes < (1 << 20) + (1 << 17) and more <= nbytes + 128 and more_calls == calls


def test_headers_that_stand_near_one_another_are_read_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {f"{i}": torch.zeros(4 if i != 700 else 1 << 20) for i in range(2000)}
    save_zip(state, tmp_path / "it")
    real, asked = os.pread, []
    monkeypatch.setattr(os, "pread", lambda fd, nbytes, offset: (asked.append(nbytes), real(fd, nbytes, offset))[1])
    assert len(only(formats.read(str(tmp_path / "it"))).tensors) == 2000
    assert len(asked) < 20
    assert sum(asked) < (tmp_path / "it").stat().st_size - (4 << 20) + (1 << 17)  # what is large is passed over; the end is read twice


@pytest.mark.parametrize("save", [save_zip, save_legacy, safetensors.torch.save_file])
def test_a_file_is_opened_once(save: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save({"a": torch.ones(3)}, tmp_path / "it")
    real, opened = os.open, []
    monkeypatch.setattr(os, "open", lambda path, *rest: (opened.append(path), real(path, *rest))[1])
    formats.read(str(tmp_path / "it"))
    assert opened == [str(tmp_path / "it")]


def test_no_descriptor_stays_open(tmp_path: Path) -> None:
    save_zip({"a": torch.ones(3)}, tmp_path / "good")
    (tmp_path / "bad").write_bytes(b"PK\x03\x04 and no more")
    before = len(os.listdir("/proc/self/fd"))
    formats.read(str(tmp_path / "good"))
    with pytest.raises(CheckpointError):
        formats.read(str(tmp_path / "bad"))
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("running", [True, False])
def test_the_garbage_collector_is_left_as_it_was(running: bool, tmp_path: Path) -> None:
    save_zip({"a": torch.ones(3)}, tmp_path / "good")
    (gc.enable if running else gc.disable)()
    try:
        formats.read(str(tmp_path / "good"))
        assert gc.isenabled() is running
        with pytest.raises(CheckpointError):
            formats.read(str(tmp_path / "missing"))
        assert gc.isenabled() is running
    finally:
        gc.enable()


def test_the_sparse_zip_is_a_zip_that_torch_maps(tmp_path: Path) -> None:
    path = _sparse_zip(tmp_path / "it", 1 << 34)
    loaded = torch.load(path, weights_only=True, mmap=True)
    assert loaded["a"].shape == (1 << 33,) and int(loaded["b"][-1]) == 0
    assert only(formats.read(str(path))).tensors.keys() == loaded.keys()
