"""Helpers of the tests of the library's verbs: sources in every format, model files, and comparison by torch's own reader."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

import ckptsurgeon

ROOT = Path(__file__).resolve().parents[2]
FIXTURES = ROOT / "fixtures"
PARAMS = FIXTURES / "net_params.pkl"
_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

NETS = '''
import torch
from torch import nn


class Net(nn.Module):
    """A convolution, a batch norm, a tied embedding, and a head."""

    def __init__(self, classes=3, width=4):
        super().__init__()
        self.conv = nn.Conv2d(1, width, 3)
        self.norm = nn.BatchNorm2d(width)
        self.embed = nn.Embedding(7, width)
        self.head = nn.Linear(width, classes)
        self.out = nn.Linear(width, 7, bias=False)
        self.out.weight = self.embed.weight
        self.register_buffer("scratch", torch.ones(2), persistent=False)

    def forward(self, x):
        return self.head(self.norm(self.conv(x)).mean((2, 3)))


def make(classes=3):
    return Net(classes)
'''


def bits(tensor: Tensor) -> bytes:
    """A tensor's elements in row-major order, as bytes: NaN payloads and the sign of zero count."""
    tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
    if tensor.itemsize == 16:
        tensor = torch.view_as_real(tensor)
    return tensor.contiguous().view(_INTEGERS[tensor.itemsize]).numpy().tobytes()


def same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """The two have the same keys, dtypes, shapes and bits."""
    assert sorted(found) == sorted(expected)
    for key, tensor in expected.items():
        assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
        assert bits(found[key]) == bits(tensor), key


def load(path: str | Path) -> dict[str, Tensor]:
    """The file as torch's or safetensors' own reader gives it."""
    path = str(path)
    if path.endswith(".safetensors"):
        return safetensors.torch.load_file(path)
    return torch.load(path, weights_only=True, mmap=True)


def nets(folder: Path, source: str = NETS, name: str = "nets.py") -> str:
    """Write a model file; returns its path."""
    path = folder / name
    path.write_text(source)
    return str(path)


def network(classes: int = 3, seed: int = 0) -> nn.Module:
    """The `Net` of `NETS`, with values of its own everywhere."""
    space: dict[str, object] = {}
    exec(NETS, space)
    torch.manual_seed(seed)
    net = space["Net"](classes)  # type: ignore[operator]
    net.norm.running_mean.normal_()
    net.norm.num_batches_tracked.fill_(17)
    return net


def folder_state(folder: Path) -> dict[str, bytes]:
    """Every file of a folder with its content, hidden ones included."""
    return {name: (folder / name).read_bytes() for name in sorted(os.listdir(folder)) if (folder / name).is_file()}


@contextlib.contextmanager
def without_checksums() -> Iterator[None]:
    """torch.save writes every CRC as 0."""
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(True)


def _legacy(state: Mapping[str, Tensor], folder: Path) -> Path:
    torch.save(state, folder / "source.pkl", _use_new_zipfile_serialization=False)
    return folder / "source.pkl"


def _zip(state: Mapping[str, Tensor], folder: Path) -> Path:
    torch.save(state, folder / "source.pt")
    return folder / "source.pt"


def _untied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.detach().clone().contiguous() for key, tensor in state.items()}


def _safetensors(state: Mapping[str, Tensor], folder: Path) -> Path:
    safetensors.torch.save_file(_untied(state), folder / "source.safetensors", metadata={"format": "pt"})
    return folder / "source.safetensors"


def _shards(state: Mapping[str, Tensor], folder: Path, suffix: str, write: Callable[[dict[str, Tensor], Path], None]) -> Path:
    home = folder / "hf"
    home.mkdir()
    keys, weight_map = list(state), {}
    for number, part in enumerate((keys[: len(keys) // 2], keys[len(keys) // 2 :]), start=1):
        name = f"model-0000{number}-of-00002{suffix}"
        write({key: _untied(state)[key] for key in part}, home / name)
        weight_map.update(dict.fromkeys(part, name))
    index = "model.safetensors.index.json" if suffix == ".safetensors" else "pytorch_model.bin.index.json"
    (home / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return home


def _sharded(state: Mapping[str, Tensor], folder: Path) -> Path:
    return _shards(state, folder, ".safetensors", lambda part, path: safetensors.torch.save_file(part, path, metadata={"format": "pt"}))


def _sharded_bin(state: Mapping[str, Tensor], folder: Path) -> Path:
    return _shards(state, folder, ".bin", lambda part, path: torch.save(part, path))


def _training(state: Mapping[str, Tensor], folder: Path) -> Path:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([parameter])
    parameter.grad = torch.ones(3)
    optimizer.step()
    torch.save({"epoch": 3, "model": state, "optimizer": optimizer.state_dict(), "losses": [0.5, 0.25]}, folder / "source.pth")
    return folder / "source.pth"


def _lightning(state: Mapping[str, Tensor], folder: Path) -> Path:
    renamed = OrderedDict((f"model.{key}", tensor) for key, tensor in state.items())
    value = {
        "epoch": 1,
        "pytorch-lightning_version": "2.4.0",
        "state_dict": renamed,
        "optimizer_states": [],
        "hyper_parameters": {"lr": 0.1},
    }
    torch.save(value, folder / "source.ckpt")
    return folder / "source.ckpt"


SOURCES: dict[str, Callable[[Mapping[str, Tensor], Path], Path]] = {
    "legacy": _legacy,
    "zip": _zip,
    "safetensors": _safetensors,
    "shards": _sharded,
    "bin-shards": _sharded_bin,
    "training": _training,
    "lightning": _lightning,
}


def python(code: str, *arguments: object, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter that finds the package."""
    env = {**os.environ, "PYTHONPATH": str(Path(ckptsurgeon.__file__).parents[1]), **environment}
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
