"""Keys that only a module's loading code takes: planned as the renames that torch makes, or named with the module's class; never fresh in
silence. The classes are after torchvision's, detectron2's and torch's own."""

from __future__ import annotations

import copy
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import program
from loading_support import Frozen, everything, same
from safetensors.torch import save_file
from torch import nn

import ckptsurgeon as cs
from ckptsurgeon.errors import CheckpointError, PlanError, TargetError


class Block(nn.Sequential):
    """torchvision's MLPBlock of its vision transformer."""

    _version = 2

    def __init__(self) -> None:
        super().__init__(nn.Linear(3, 4), nn.GELU(), nn.Dropout(0.0), nn.Linear(4, 3))

    def _load_from_state_dict(self, state: Any, prefix: str, local: Any, *rest: Any) -> None:
        version = local.get("version", None)
        if version is None or version < 2:
            for i in range(2):
                for kind in ("weight", "bias"):
                    old = f"{prefix}linear_{i + 1}.{kind}"
                    if old in state:
                        state[f"{prefix}{3 * i}.{kind}"] = state.pop(old)
        super()._load_from_state_dict(state, prefix, local, *rest)


class Pyramid(nn.Module):
    """torchvision's FeaturePyramidNetwork: each convolution stands in a Sequential now."""

    _version = 2

    def __init__(self) -> None:
        super().__init__()
        self.inner_blocks = nn.ModuleList(nn.Sequential(nn.Conv2d(2, 2, 1)) for _ in range(2))

    def _load_from_state_dict(self, state: Any, prefix: str, local: Any, *rest: Any) -> None:
        if (local.get("version") or 1) < 2:
            for i in range(2):
                for kind in ("weight", "bias"):
                    if f"{prefix}inner_blocks.{i}.{kind}" in state:
                        state[f"{prefix}inner_blocks.{i}.0.{kind}"] = state.pop(f"{prefix}inner_blocks.{i}.{kind}")
        super()._load_from_state_dict(state, prefix, local, *rest)


def net() -> nn.Module:
    return nn.Sequential(OrderedDict(stem=nn.Linear(3, 3), block=Block(), fpn=Pyramid(), norm=Frozen()))


def old(model: nn.Module) -> Any:
    """The model's state_dict as its former code saved it, from a BatchNorm where it has a frozen one."""
    state: Any = OrderedDict()
    for key, value in model.state_dict().items():
        for one, other in (("block.0", "block.linear_1"), ("block.3", "block.linear_2"), (".0.weight", ".weight"), (".0.bias", ".bias")):
            key = key.replace(one, other) if key.startswith(("block", "fpn")) and "linear" not in key else key
        state[key] = value.clone()
    state["norm.num_batches_tracked"] = torch.tensor(7)
    state._metadata = OrderedDict({path: {"version": 1} for path in ("", "stem", "block", "fpn")})
    return state


def write(state: Any, path: Path) -> Path:
    save_file(dict(state), path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", ["a.pt", "a.safetensors"])
def test_names_that_a_loader_takes_are_the_renames_of_torch(name: str, prefix: str, tmp_path: Path) -> None:
    saved = old(net())
    truth, model = net(), net()
    told = truth.load_state_dict(copy.deepcopy(saved), strict=False)
    assert not told.missing_keys and not told.unexpected_keys
    moved: Any = OrderedDict((prefix + key, value) for key, value in saved.items())
    moved._metadata = OrderedDict((f"{prefix}{path}".rstrip("."), local) for path, local in saved._metadata.items())
    source = write(moved, tmp_path / name)
    diff = cs.diff(source, model)
    assert diff.same and {row.key: row.words for row in diff.loaded}["block.linear_1.bias"] == "→ block.0.bias, as Block loads it"
    assert "Block" in str(diff) and "Frozen" in str(diff)
    plan = cs.plan(source, model)
    assert not plan.fresh and {step.action for step in plan.steps if step.target.startswith(("block", "fpn"))} == {"rename"}
    assert {step.reason for step in plan.steps if step.target.startswith("fpn")} == {"rename (as Pyramid loads it)"}
    assert [(row.source, row.reason) for row in plan.dropped] == [(f"{prefix}norm.num_batches_tracked", "drop (as Frozen loads it)")]
    cs.merge(source, model, tmp_path / "o.pt")
    fresh = net()
    fresh.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=True))
    same(everything(fresh), everything(truth))
    cs.transfer(source, model)
    same(everything(model), everything(truth))


def test_a_loader_of_todays_version_takes_no_old_names(tmp_path: Path) -> None:
    saved = old(net())
    for local in saved._metadata.values():
        local["version"] = 2
    model = net()
    unexpected = net().load_state_dict(copy.deepcopy(saved), strict=False).unexpected_keys
    diff = cs.diff(write(saved, tmp_path / "a.pt"), model)
    assert set(diff.extra) == set(unexpected) != set()


def test_the_plan_says_it_on_the_command_line_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(old(net()), tmp_path / "a.pt")
    lines = (
        f"import sys; sys.path[:0] = {[str(folder) for folder in Path(__file__).parents[:2]]!r}\nfrom test_models_taken import net as Net\n"
    )
    (tmp_path / "nets.py").write_text(lines)
    for arguments in (["diff", "a.pt", "nets.py:Net"], ["merge", "a.pt", "nets.py:Net", "-o", "o.pt", "--strict"]):
        ended = program(*arguments, folder=tmp_path)
        assert ended.code == 0 and "Frozen" in ended.out, ended
    assert torch.load(tmp_path / "o.pt", weights_only=True)["block.0.weight"].shape == (4, 3)


def test_trying_it_out_leaves_a_live_model_as_it_was(tmp_path: Path) -> None:
    class Counts(Block):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
            self.seen.append(prefix)
            with torch.no_grad():
                self[0].weight.zero_()
            super()._load_from_state_dict(state, prefix, *rest)

    model = nn.ModuleDict({"block": Counts(), "fpn": Pyramid()})
    before = everything(model)
    cs.diff(write(old(net()), tmp_path / "a.pt"), model)
    same(everything(model), before)
    assert model["block"].seen == []


def test_a_renamed_key_of_another_shape_is_a_mismatch_and_no_drop(tmp_path: Path) -> None:
    saved = old(net())
    saved["block.linear_2.weight"] = torch.ones(5, 4)
    with pytest.raises(RuntimeError, match=r"size mismatch for block\.3\.weight"):
        net().load_state_dict(copy.deepcopy(saved), strict=False)
    source = write(saved, tmp_path / "a.pt")
    diff = cs.diff(source, net())
    assert [(row.key, row.source) for row in diff.mismatched] == [("block.3.weight", "block.linear_2.weight")]
    report = cs.transfer(source, net())
    assert report.fresh == ("block.3.weight",)
    assert ("block.linear_2.weight", "shape (5, 4) does not fit (3, 4)") in report.dropped


def test_a_tensor_that_its_loader_resizes_is_named(tmp_path: Path) -> None:
    """torch.ao's FakeQuantize takes the shape of what it loads."""

    class Observes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.ones(2))
            self.register_buffer("scale", torch.ones(1))

        def _load_from_state_dict(self, state: Any, prefix: str, *rest: Any) -> None:
            self.scale.resize_(state[prefix + "scale"].shape)
            super()._load_from_state_dict(state, prefix, *rest)

    model = Observes()
    source = write({"w": torch.ones(2), "scale": torch.ones(3)}, tmp_path / "a.pt")
    assert copy.deepcopy(model).load_state_dict(torch.load(source, weights_only=True)).missing_keys == []
    assert [row.key for row in cs.diff(source, model).loaded] == ["scale"]
    assert model.scale.shape == (1,)
    with pytest.raises(PlanError, match="a Observes makes it from scale"):
        cs.transfer(source, model)
    assert model.scale.shape == (1,)


def test_torchs_weight_norm_takes_the_names_of_the_old_one(tmp_path: Path) -> None:
    source = nn.ModuleDict({"x": nn.utils.weight_norm(nn.Linear(3, 3))})
    model = nn.ModuleDict({"x": nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))})
    truth = copy.deepcopy(model)
    truth.load_state_dict(source.state_dict())
    report = cs.transfer(write(source.state_dict(), tmp_path / "a.pt"), model)
    assert not report.fresh
    same(everything(model), everything(truth))


def test_a_loader_that_fails_when_it_is_tried_is_named(tmp_path: Path) -> None:
    class Demands(nn.Module):
        """torchvision's MNASNet: it wants a version."""

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(2))

        def _load_from_state_dict(self, state: Any, prefix: str, local: Any, *rest: Any) -> None:
            if local.get("version") not in (1, 2):
                raise ValueError("version should be set")
            super()._load_from_state_dict(state, prefix, local, *rest)

    model, before = Demands(), torch.zeros(2)
    source = write({"w": torch.ones(2), "more": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="version should be set"):
        Demands().load_state_dict({"w": torch.ones(2)}, strict=False)
    assert "version should be set" in str(cs.diff(source, model))
    before = model.w.detach().clone()
    with pytest.raises(TargetError, match="version should be set"):
        cs.transfer(source, model)
    assert torch.equal(model.w, before)


def test_the_models_own_load_state_dict_that_remaps_names(tmp_path: Path) -> None:
    class Remaps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def load_state_dict(self, state: Any, strict: bool = True, assign: bool = False) -> Any:
            return super().load_state_dict({key.replace("core.", "inner."): value for key, value in state.items()}, strict, assign)

    model, truth = Remaps(), Remaps()
    state = {"core.weight": torch.ones(3, 3), "core.bias": torch.ones(3)}
    truth.load_state_dict(state)
    report = cs.transfer(state, model)
    assert not report.fresh
    same(everything(model), everything(truth))
    report = cs.merge(write(state, tmp_path / "a.pt"), Remaps(), tmp_path / "o.pt")
    assert not report.fresh and set(torch.load(tmp_path / "o.pt", weights_only=True)) == {"inner.weight", "inner.bias"}


def test_two_sources_each_with_its_own_old_names(tmp_path: Path) -> None:
    saved = old(net())
    halves = [OrderedDict((key, value) for key, value in saved.items() if key.startswith("block") is first) for first in (True, False)]
    for half, name in zip(halves, ("a.pt", "b.pt"), strict=True):
        half._metadata = saved._metadata  # type: ignore[attr-defined]
        torch.save(half, tmp_path / name)
    model, truth = net(), net()
    truth.load_state_dict(saved)
    assert not cs.merge([tmp_path / "a.pt", tmp_path / "b.pt"], model, tmp_path / "o.pt").fresh
    model.load_state_dict(torch.load(tmp_path / "o.pt", weights_only=True))
    same(everything(model), everything(truth))


def test_a_rule_of_the_person_comes_first(tmp_path: Path) -> None:
    source = write(old(net()), tmp_path / "a.pt")
    plan = cs.plan(source, net(), rename={"block.linear_1.{p}": "block.0.{p}"}, drop=["block.linear_2.*"])
    reasons = {step.target: step.reason for step in plan.steps}
    assert reasons["block.0.weight"].startswith("--rename") and "block.3.weight" in plan.fresh


def test_no_code_is_run_where_the_names_are_the_models(tmp_path: Path) -> None:
    class Never(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(2))

        def _load_from_state_dict(self, *_: Any) -> None:
            raise AssertionError

    source = write(Never().state_dict(), tmp_path / "a.pt")
    assert cs.diff(source, Never()).same and cs.plan(source, Never()).transferred == ("w",)
    with pytest.raises(CheckpointError, match="AssertionError"):
        cs.transfer(source, Never())
