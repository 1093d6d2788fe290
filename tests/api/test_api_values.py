"""Where values come from when the source has none, and that the same input gives the same bytes."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from pathlib import Path

import api_support as support
import numpy
import pytest
import torch

import ckptsurgeon as cs


def headless(path: Path, seed: int = 1) -> Path:
    """A checkpoint of `Net` without its head and its batch norm."""
    state = support.network(seed=seed).state_dict()
    torch.save({key: tensor for key, tensor in state.items() if not key.startswith(("head", "norm"))}, path)
    return path


FRESH = ("norm.weight", "norm.bias", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "head.weight", "head.bias")


@pytest.mark.parametrize("output", ["out.pt", "out.safetensors"])
@pytest.mark.parametrize("seed", [0, 7])
def test_missing_keys_get_what_the_constructor_gives_under_the_seed(seed: int, output: str, tmp_path: Path) -> None:
    source = headless(tmp_path / "in.pt")
    report = cs.merge(source, support.nets(tmp_path) + ":Net", tmp_path / output, seed=seed)
    space: dict[str, object] = {}
    exec(support.NETS, space)
    torch.manual_seed(seed)
    built = space["Net"]().state_dict()  # type: ignore[operator]
    expected = {**built, **torch.load(source, weights_only=True)}
    support.same(support.load(tmp_path / output), expected)
    assert report.fresh == FRESH
    assert report.kept == ()


def test_missing_keys_keep_a_target_checkpoints_values(tmp_path: Path) -> None:
    source = headless(tmp_path / "in.pt")
    target = support.network(seed=3).state_dict()
    for name, path in support.SOURCES.items():
        if name == "lightning":
            continue
        folder = tmp_path / name
        folder.mkdir()
        goal = path(target, folder)
        report = cs.merge(source, goal, tmp_path / f"{name}.pt")
        support.same(support.load(tmp_path / f"{name}.pt"), {**target, **torch.load(source, weights_only=True)})
        assert sorted(report.kept) == sorted(FRESH)
        assert report.fresh == ()


def test_kept_values_in_an_odd_layout_and_another_dtype(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2)}, tmp_path / "in.pt")
    weight = torch.randn(4, 3).t()
    torch.save({"a": torch.zeros(2), "b": weight}, tmp_path / "target.pt")
    cs.merge(tmp_path / "in.pt", tmp_path / "target.pt", tmp_path / "out.pt")
    support.same(support.load(tmp_path / "out.pt"), {"a": torch.ones(2), "b": weight})
    cs.merge(tmp_path / "in.pt", tmp_path / "target.pt", tmp_path / "half.pt", dtype="BF16")
    support.same(support.load(tmp_path / "half.pt"), {"a": torch.ones(2).bfloat16(), "b": weight.bfloat16()})


@pytest.mark.parametrize("output", ["out.pt", "out.safetensors"])
@pytest.mark.parametrize("scheme", ["normal", "xavier_normal", "model"])
def test_tied_fresh_keys_are_one_tensor_with_one_value(scheme: str, output: str, tmp_path: Path) -> None:
    state = support.network().state_dict()
    torch.save({key: tensor for key, tensor in state.items() if key not in ("embed.weight", "out.weight")}, tmp_path / "in.pt")
    rules = {} if scheme == "model" else {"embed.*": scheme}
    report = cs.merge(tmp_path / "in.pt", support.nets(tmp_path) + ":Net", tmp_path / output, init=rules)
    found = support.load(tmp_path / output)
    assert torch.equal(found["embed.weight"], found["out.weight"])
    assert found["embed.weight"].std() > 0
    assert report.fresh == ("embed.weight", "out.weight")
    fresh = support.network()
    fresh.load_state_dict({key: torch.zeros_like(tensor) for key, tensor in state.items()})
    cs.transfer(tmp_path / "in.pt", fresh, init=rules)
    if scheme != "model":
        assert torch.equal(fresh.state_dict()["out.weight"], found["out.weight"])  # in memory as in the file


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize("output", ["out.pt", "out.safetensors"])
def test_the_same_input_gives_the_same_bytes_anywhere(output: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    digests = set()
    for name in ("one", "another folder"):
        folder = tmp_path / name
        folder.mkdir()
        headless(tmp_path / "in.pt")
        shutil.copy(tmp_path / "in.pt", folder / "in.pt")
        os.utime(folder / "in.pt", (1, len(name)))
        support.nets(folder)
        monkeypatch.chdir(folder)
        torch.manual_seed(len(name))
        cs.merge("in.pt", "nets:Net", output)
        cs.merge(folder / "in.pt", f"{folder}/nets.py:Net", f"again-{output}")
        cs.merge(folder / "in.pt", "nets:Net", f"unproven-{output}", verify=False)
        digests |= {digest(folder / f"{start}{output}") for start in ("", "again-", "unproven-")}
    assert len(digests) == 1
    cs.merge("in.pt", "nets:Net", f"seeded-{output}", seed=1)
    assert digest(Path(f"seeded-{output}")) not in digests


def test_global_random_states_are_untouched(tmp_path: Path) -> None:
    source = headless(tmp_path / "in.pt")
    spec = support.nets(tmp_path) + ":Net"
    net = support.network()
    before = torch.get_rng_state(), random.getstate(), numpy.random.get_state()[1].copy()  # type: ignore[index]
    cs.merge(source, spec, tmp_path / "out.pt", init={"head.*": "normal"})
    cs.transfer(source, net, init={"head.*": "normal"})
    cs.initialize(net, ["head.weight"], "normal")
    cs.verify(tmp_path / "out.pt", spec)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert (numpy.random.get_state()[1] == before[2]).all()  # type: ignore[index]


TWO_SHAPES = """
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        probe = torch.ones(3)
        try:
            width = int(probe.sum().item())
        except Exception:
            width = 5
        self.body = nn.Linear(2, 2)
        self.head = nn.Linear(2, width)
"""


@pytest.mark.parametrize("missing", [True, False])
def test_a_constructor_that_builds_another_shape_on_meta(missing: bool, tmp_path: Path) -> None:
    spec = support.nets(tmp_path, TWO_SHAPES) + ":Net"
    state = {"body.weight": torch.randn(2, 2), "body.bias": torch.zeros(2), "head.weight": torch.randn(3, 2), "head.bias": torch.randn(3)}
    torch.save({key: value for key, value in state.items() if not (missing and "head" in key)}, tmp_path / "in.pt")
    assert cs.skeleton(spec)["head.weight"].shape == (5, 2)
    notes: list[str] = []
    report = cs.merge(tmp_path / "in.pt", spec, tmp_path / "out.pt", note=notes.append)
    found = support.load(tmp_path / "out.pt")
    assert found["head.weight"].shape == (3, 2)
    assert any("on the CPU" in note and "meta" in note for note in notes)
    assert report.fresh == (("head.weight", "head.bias") if missing else ())
    if not missing:
        support.same(found, state)


def test_what_was_fresh_stays_on_record_through_a_conversion(tmp_path: Path) -> None:
    source = headless(tmp_path / "in.pt")
    spec = support.nets(tmp_path) + ":Net"
    cs.merge(source, spec, tmp_path / "one.pt")
    cs.merge(tmp_path / "one.pt", None, tmp_path / "two.safetensors")
    report = cs.merge(tmp_path / "two.safetensors", spec, tmp_path / "three.pt")
    for name in ("one.pt", "two.safetensors", "three.pt"):
        record = cs.open(tmp_path / name).provenance
        assert record is not None and tuple(record["fresh"]) == FRESH
    assert report.fresh == report.still_fresh == FRESH and report.coverage.tensors == 1
    model = support.network()
    moved = cs.transfer(tmp_path / "one.pt", model)
    assert moved.fresh == moved.still_fresh == FRESH and not set(moved.transferred) & set(FRESH)
    (group,) = [group for group in cs.param_groups(model, tmp_path / "two.safetensors", lr=1e-3, fresh_lr=1e-2) if group["name"] == "fresh"]
    assert group["param_names"] == ["norm.weight", "norm.bias", "head.weight", "head.bias"]
