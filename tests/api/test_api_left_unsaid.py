"""What a checkpoint holds beside the tensors that a merge carries is said: files that are not read, versions, other names of a tensor."""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import nn

import ckptsurgeon as cs

INDEX = "model.safetensors.index.json"


def _sharded(folder: Path) -> None:
    folder.mkdir()
    names = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    for number, name in enumerate(names):
        save_file({f"w{number}": torch.ones(2)}, folder / name)
    weight_map = {f"w{number}": name for number, name in enumerate(names)}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _notes(report: cs.Report) -> str:
    return " | ".join(f"{finding.key}: {finding.message}" for finding in report.findings)


@pytest.mark.parametrize(
    ("name", "read"),
    [("model-00003-of-00003.safetensors", INDEX), ("model-00001-of-00005.safetensors", INDEX), ("model.safetensors", "model.safetensors")],
)
def test_a_file_that_looks_like_a_part_and_is_not_read_is_named(name: str, read: str, tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    _sharded(folder)
    save_file({"stray": torch.ones(1)}, folder / name)
    notes: list[str] = []
    cs.diff(folder, folder, note=notes.append)
    report = cs.merge(folder, None, tmp_path / "out.pt")
    unread = name if read == INDEX else INDEX
    for words in (_notes(report), " ".join(notes), " ".join(cs.inspect(folder).notes)):
        assert words.count(unread) >= 1 and f"{read}: beside it" in f"{read}: {words}"


def test_what_is_no_part_of_it_is_not_named(tmp_path: Path) -> None:
    folder = tmp_path / "hf"
    _sharded(folder)
    save_file({"x": torch.ones(1)}, folder / "adapter_model.safetensors")
    torch.save({"x": torch.ones(1)}, folder / "pytorch_model.bin")
    torch.save({"x": torch.ones(1)}, folder / "pytorch_model-00001-of-00002.bin")
    assert not cs.inspect(folder).notes and not cs.inspect(folder / INDEX).notes


def test_versions_that_a_format_does_not_keep_are_said_where_they_may_matter(tmp_path: Path) -> None:
    state = OrderedDict(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)).state_dict())
    state._metadata = OrderedDict({"": {"version": 1}, "0": {"version": 3}, "1": {"version": 2}})  # type: ignore[attr-defined]
    torch.save(state, tmp_path / "a.pt")
    for target in (None, tmp_path / "a.pt"):
        said = _notes(cs.merge(tmp_path / "a.pt", target, tmp_path / "out.safetensors", overwrite=True))
        assert "None: 0: this format keeps no versions" in said  # torch's own norm loads values of every version alike
    assert "versions" not in _notes(cs.merge(tmp_path / "a.pt", None, tmp_path / "out.pt"))
    assert torch.load(tmp_path / "out.pt", weights_only=True)._metadata["0"] == {"version": 3}


@pytest.mark.parametrize("kind", [nn.utils.parametrizations.spectral_norm, nn.utils.parametrizations.orthogonal])
def test_a_tensor_that_is_parted_from_its_parametrization_is_a_warning(kind: Callable[..., nn.Module], tmp_path: Path) -> None:
    torch.save(nn.Sequential(kind(nn.Linear(3, 3))).state_dict(), tmp_path / "a.pt")
    other = nn.Linear(3, 3)
    nn.utils.parametrize.register_parametrization(other, "weight", nn.Identity(), unsafe=True)
    assert "which belong to one parametrization" in _notes(cs.merge(tmp_path / "a.pt", nn.Sequential(other), tmp_path / "out.pt"))
    whole = nn.Sequential(kind(nn.Linear(3, 3)))
    assert "parametrization" not in _notes(cs.merge(tmp_path / "a.pt", whole, tmp_path / "whole.pt"))
    dropped = cs.merge(tmp_path / "a.pt", nn.Sequential(other), tmp_path / "dropped.pt", drop=["/.*(_u|_v|base)/"])
    assert "parametrization" not in _notes(dropped)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(4, 3), nn.Linear(3, 4, bias=False)
        self.head.weight = self.embed.weight


def test_another_name_of_a_tensor_that_goes_nowhere_is_said(tmp_path: Path) -> None:
    save_model(Tied(), str(tmp_path / "a.safetensors"))
    assert len(load_file(tmp_path / "a.safetensors")) == 1
    assert "another name" in _notes(cs.merge(tmp_path / "a.safetensors", None, tmp_path / "out.pt"))
    assert "another name" not in _notes(cs.merge(tmp_path / "a.safetensors", Tied(), tmp_path / "tied.pt"))
