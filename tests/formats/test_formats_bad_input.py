"""What is found in a checkpoint's place: one typed error each, with the path and what to try; never a hang, never anything else."""

from __future__ import annotations

import gzip
import io
import json
import os
import pickle
import signal
import tarfile
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import torch
from formats_support import Save, bits, carry_out, out_tensors, outcome, refusal, save_legacy, save_zip

from ckptsurgeon.errors import CheckpointError, FormatError, UnreadableError, UnsafeError
from ckptsurgeon.formats import read
from ckptsurgeon.formats.torch import zip_writer as torch_zip_writer
from ckptsurgeon.tensors import Archive


def _state() -> dict[str, torch.Tensor]:
    weight = torch.arange(6.0).reshape(2, 3)
    return {"fc.weight": weight, "fc.tied": weight, "fc.bias": torch.ones(2, dtype=torch.float16), "n": torch.tensor(3)}


def _save_ours(value: object, path: Path) -> None:
    tensors = OrderedDict(value)
    layout = torch_zip_writer.lay_out(out_tensors(tensors), {}, {"": {"version": 1}}, list(tensors), b'{"fresh": []}')
    carry_out(layout, [bits(tensor) for tensor in tensors.values()], path)


def _save_skeleton(value: object, path: Path) -> None:
    rows = [{"name": key, "dtype": "F32", "shape": list(tensor.shape)} for key, tensor in value.items()]
    metadata = {"": {"version": 1}}
    skeleton = {"version": 1, "kind": "skeleton", "tensors": rows, "ties": [["fc.weight", "fc.tied"]], "entries": ["e"]}
    path.write_text(json.dumps({**skeleton, "module_metadata": metadata}))


def _save_training(value: object, path: Path) -> None:
    value = {"epoch": 3, "model": value, "scalar": numpy.float64(1), "optimizer": {"state": {}, "param_groups": []}}
    torch.save(value, path, pickle_protocol=4)


FILES: dict[str, Save] = {
    "zip": save_zip,
    "ours": _save_ours,
    "training": _save_training,
    "legacy": save_legacy,
    "safetensors": safetensors.torch.save_file,
    "skeleton": _save_skeleton,
}


@pytest.mark.parametrize("name", FILES)
def test_cut_at_every_byte(name: str, tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    FILES[name](_state() if name != "safetensors" else {"a": torch.ones(3)}, whole)
    data = whole.read_bytes()
    assert isinstance(outcome(whole), Archive)
    for length in range(len(data)):
        error = refusal(data[:length], tmp_path)
        assert error.hint or "limit" in error.reason or name == "skeleton", (length, str(error))


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_every_bit_of_the_header_flipped(name: str, tmp_path: Path) -> None:
    """An Archive or a CheckpointError. What is read nevertheless has spans within the file."""
    path = tmp_path / "it"
    FILES[name](_state() if name != "safetensors" else {"a": torch.ones(3), "b": torch.ones(1)}, path)
    data = path.read_bytes()
    refused = 0
    for place in range(len(data)):
        for bit in range(8):
            broken = bytearray(data)
            broken[place] ^= 1 << bit
            path.write_bytes(broken)
            found = outcome(path)
            if isinstance(found, CheckpointError):
                refused += 1
                continue
            for state_dict in found.state_dicts:
                for meta in state_dict.tensors.values():
                    assert meta.span is None or 0 <= meta.span.offset <= meta.span.offset + meta.span.nbytes <= len(data)
    assert refused > len(data)  # most of a small file is header


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("more", [b"\0", b"PK\x05\x06", b"." * 100])
def test_bytes_after_the_end(name: str, more: bytes, tmp_path: Path) -> None:
    FILES[name](_state() if name != "safetensors" else {"a": torch.ones(3)}, tmp_path / "it")
    refusal((tmp_path / "it").read_bytes() + more, tmp_path)


@pytest.mark.parametrize("name", FILES)
def test_bytes_before_the_beginning(name: str, tmp_path: Path) -> None:
    FILES[name](_state() if name != "safetensors" else {"a": torch.ones(3)}, tmp_path / "it")
    refusal(b"\x01" + (tmp_path / "it").read_bytes(), tmp_path)


def test_missing(tmp_path: Path) -> None:
    error = refusal(tmp_path / "nothing.pt", tmp_path)
    assert (
        isinstance(error, UnreadableError)
        and "does not exist" in error.reason
        and error.hint
        and error.path == str(tmp_path / "nothing.pt")
    )


@pytest.mark.parametrize("path", ["\0", "a\0b", "", "x" * 5000, "\ud800"])
def test_paths_that_are_none(path: str) -> None:
    with pytest.raises(UnreadableError):
        read(path)


def test_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    assert "part of its path is a file" in refusal(tmp_path / "file" / "below", tmp_path).reason


def test_a_folder(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").write_bytes(b"")
    error = refusal(tmp_path, tmp_path)
    assert isinstance(error, UnreadableError) and "last.ckpt" in (error.hint or "")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_no_permission(tmp_path: Path) -> None:
    (tmp_path / "it").write_bytes(b"x")
    (tmp_path / "it").chmod(0)
    assert "may not be read" in refusal(tmp_path / "it", tmp_path).reason


def test_a_fifo_does_not_hang(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    signal.alarm(20)  # ends the run where reading waits for a writer
    try:
        assert "regular file" in refusal(tmp_path / "pipe", tmp_path).reason
    finally:
        signal.alarm(0)


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "/dev/full"])
def test_a_link_to_a_device(device: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(device)
    assert "regular file" in refusal(tmp_path / "link", tmp_path).reason


def test_a_link_to_itself(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "link")
    assert isinstance(refusal(tmp_path / "link", tmp_path), UnreadableError)


def test_a_link_to_a_file_is_the_file(tmp_path: Path) -> None:
    save_zip(_state(), tmp_path / "it")
    (tmp_path / "link").symlink_to(tmp_path / "it")
    assert read(str(tmp_path / "link")).path == str(tmp_path / "link")


def _pickled(value: object, protocol: int = 4) -> bytes:
    return pickle.dumps(value, protocol=protocol)


def _saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _saved_legacy(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()


def _script() -> bytes:
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


def _tar() -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        tar.addfile(tarfile.TarInfo("storages"))
    return buffer.getvalue()


def _zip(*names: str) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name in names:
            archive.writestr(name, b"x")
    return buffer.getvalue()


def _optimizer() -> dict[str, object]:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


ARRAYS = {"w": numpy.ones(3), "b": numpy.ones((2, 2), dtype="f4")}

STRANGERS: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "empty": (lambda: b"", "is empty", "download"),
    "LFS pointer": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123\n", "Git LFS pointer", "git lfs pull"),
    "HTML": (lambda: b"<!DOCTYPE html><html><body>sign in</body></html>", "HTML page", "log in"),
    "HTML after blanks": (lambda: b"\n\n  <HTML lang=en>" + b" " * 3000, "HTML page", "log in"),
    "XML": (lambda: b'<?xml version="1.0"?><Error><Code>NoSuchKey</Code></Error>', "HTML page", "raw link"),
    "text": (lambda: b"just a text file, with some words in it\n", "not a checkpoint", "the formats are"),
    "short": (lambda: b"abc", "too short", "download"),
    "zeros": (lambda: bytes(10_000), "not a checkpoint", "the formats are"),
    "gzip": (lambda: gzip.compress(b"x" * 100), "gzip", "gunzip"),
    "tar": (_tar, "tar archive", "unpack"),
    "HDF5": (lambda: b"\x89HDF\r\n\x1a\n" + bytes(100), "HDF5", "convert"),
    "npy": (lambda: b"\x93NUMPY\x01\x00" + bytes(100), "NumPy array file", "torch.from_numpy"),
    "npz": (lambda: _zip("w.npy", "b.npy"), "is no NumPy array", "download"),
    "zip": (lambda: _zip("folder/readme.txt", "folder/model.pt"), "none that torch.save wrote", "unpack"),
    "empty zip": (lambda: _zip(), "empty zip", "download"),
    "GGUF": (lambda: b"GGUF" + bytes(100), "GGUF", "original"),
    "TorchScript": (_script, "TorchScript", "torch.jit.load"),
    "pickled values": (lambda: _pickled({"a": 1, "b": [1, 2]}), "plain pickle", "torch.save"),
    "pickled list": (lambda: _pickled([1, 2], 2), "plain pickle", "torch.save"),
    "pickled state_dict": (lambda: _pickled(_state()), "pickle.dump", "write it by torch.save"),
    "pickled state_dict 2": (lambda: _pickled(_state(), 2), "pickle.dump", "write it by torch.save"),
    "pickled nested state_dict": (lambda: _pickled({"model": {"net": _state()}, "epoch": 1}), "pickle.dump", "write it by torch.save"),
    "pickled float8": (lambda: _pickled({"w": torch.ones(2).to(torch.float8_e5m2)}), "pickle.dump", "write it by torch.save"),
    "pickled arrays": (lambda: _pickled(ARRAYS), "2 NumPy arrays", "torch.from_numpy"),
    "pickled arrays 2": (lambda: _pickled(ARRAYS, 2), "2 NumPy arrays", "torch.from_numpy"),
    "pickled arrays 5": (lambda: _pickled(ARRAYS, 5), "2 NumPy arrays", "torch.from_numpy"),
    "saved arrays": (lambda: _saved(ARRAYS), "2 NumPy arrays", "torch.from_numpy"),
    "saved arrays, legacy": (lambda: _saved_legacy(ARRAYS), "2 NumPy arrays", "torch.from_numpy"),
    "saved nested arrays": (lambda: _saved({"params": ARRAYS}), "2 NumPy arrays", "torch.from_numpy"),
    "module": (lambda: _saved(torch.nn.Linear(2, 2)), "torch.nn.modules.linear.Linear", "state_dict()"),
    "module, legacy": (lambda: _saved_legacy(torch.nn.Linear(2, 2)), "torch.nn.modules.linear.Linear", "state_dict()"),
    "module in a dict": (lambda: _saved({"epoch": 1, "model": torch.nn.Linear(2, 2)}), "torch.nn.modules.linear.Linear", "state_dict()"),
    "optimizer": (lambda: _saved(_optimizer()), "optimizer's state", "model's"),
    "optimizer, nested": (lambda: _saved({"epoch": 1, "optimizer": _optimizer()}), "optimizer's state", "model's"),
    "bare tensor": (lambda: _saved(torch.ones(2)), "bare tensor", "torch.save"),
    "bare parameter": (lambda: _saved_legacy(torch.nn.Parameter(torch.ones(2))), "bare tensor", "torch.save"),
    "nothing": (lambda: _saved({}), "no tensors", "state_dict()"),
    "a number": (lambda: _saved(3), "no tensors", "state_dict()"),
    "list of tensors": (lambda: _saved([torch.ones(1)]), "no tensors under names", "state_dict()"),
    "JSON": (lambda: b'{"hidden_size": 768}', "is JSON, not a skeleton", "ckptsurgeon skeleton"),
}


@pytest.mark.parametrize("name", STRANGERS)
def test_strangers(name: str, tmp_path: Path) -> None:
    make, words, hint = STRANGERS[name]
    error = refusal(make(), tmp_path)
    assert isinstance(error, UnsafeError if name.startswith("module") else FormatError)
    assert words in error.reason, error
    assert hint in (error.hint or ""), error
    assert error.path == str(tmp_path / "patient.pt") and error.path in str(error)


def _rezipped(data: bytes, change: Callable[[str, bytes], bytes | None], **options: int) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w", **options) as new:
        for info in old.infolist():
            content = change(info.filename, old.read(info))
            if content is not None:
                new.writestr(info.filename, content)
    return buffer.getvalue()


def test_big_endian_zip(tmp_path: Path) -> None:
    data = _rezipped(_saved(_state()), lambda name, raw: b"big" if name.endswith("byteorder") else raw)
    error = refusal(data, tmp_path)
    assert "big-endian" in error.reason and error.hint


def test_big_endian_legacy(tmp_path: Path) -> None:
    data = _saved_legacy(_state())
    place = data.index(b"little_endian") + len(b"little_endian")
    flag = data.index(b"\x88", place)
    error = refusal(data[:flag] + b"\x89" + data[flag + 1 :], tmp_path)
    assert "big-endian" in error.reason and error.hint


def test_legacy_protocol_of_another_time(tmp_path: Path) -> None:
    data = _saved_legacy(_state())
    assert data.count(b"M\xe9\x03.") == 1
    assert "protocol" in refusal(data.replace(b"M\xe9\x03.", b"M\xea\x03."), tmp_path).reason


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_zip(_state(), tmp_path / "it")
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, nbytes, offset: real(fd, nbytes, offset)[:-1] if offset else b"PK\x03\x04"[:nbytes])
    with pytest.raises(UnreadableError):
        read(str(tmp_path / "it"))


def test_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_zip(_state(), tmp_path / "it")

    def fail(*_: object) -> bytes:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(UnreadableError, match="Input/output error"):
        read(str(tmp_path / "it"))
