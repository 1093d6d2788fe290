"""A plan as a file: what `apply` makes of it is what `merge` makes, and one that no longer holds is refused before anything is written."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import api_support as support
import pytest
import torch

import ckptsurgeon as cs
from ckptsurgeon.errors import CheckpointError, PlanError, StaleError, UnreadableError
from ckptsurgeon.planning import planfile
from ckptsurgeon.planning.plan import Plan


def written(plan: Plan, path: Path) -> Path:
    path.write_text(json.dumps(planfile.to_json(plan)))
    return path


def setting(folder: Path) -> tuple[str, dict[str, str | None]]:
    """A source, and a target of each kind."""
    state = support.network(seed=1).state_dict()
    torch.save({"model": {key: tensor for key, tensor in state.items() if "head" not in key}, "epoch": 3}, folder / "in.pt")
    torch.save(support.network(seed=2).state_dict(), folder / "target.pt")
    return str(folder / "in.pt"), {"model": support.nets(folder) + ":Net", "checkpoint": str(folder / "target.pt"), "none": None}


@pytest.mark.parametrize("output", ["out.pt", "out.safetensors"])
@pytest.mark.parametrize("target", ["model", "checkpoint", "none"])
def test_apply_gives_the_bytes_that_merge_gives(target: str, output: str, tmp_path: Path) -> None:
    source, targets = setting(tmp_path)
    chosen: dict[str, Any] = {"rename": {"conv.{p}": "conv.{p}"}}
    if target != "none":
        chosen["dtype"] = "BF16"
    if target == "model":
        chosen["seed"] = 3
    merged = cs.merge(source, targets[target], tmp_path / f"merged-{output}", **chosen)
    plan = cs.plan(source, targets[target], **chosen)
    path = written(plan, tmp_path / "plan.json")
    assert sorted(name for name in os.listdir(tmp_path) if name.endswith(output)) == [f"merged-{output}"]
    applied = cs.apply(path, tmp_path / f"applied-{output}")
    direct = cs.apply(plan, tmp_path / f"direct-{output}")
    bytes_of = {(tmp_path / f"{name}-{output}").read_bytes() for name in ("merged", "applied", "direct")}
    assert len(bytes_of) == 1
    for report in (applied, direct):
        assert (report.transferred, report.fresh, report.kept, report.dropped) == (
            merged.transferred,
            merged.fresh,
            merged.kept,
            merged.dropped,
        )
        assert [cast.key for cast in report.casts] == [cast.key for cast in merged.casts]
    assert str(cs.load_plan(path)) == str(plan)


def test_a_plan_can_be_followed_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, targets = setting(tmp_path)
    path = written(cs.plan(source, targets["model"]), tmp_path / "plan.json")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    cs.apply(path, "out.pt")
    monkeypatch.chdir(tmp_path)
    relative = written(cs.plan("in.pt", "nets.py:Net"), tmp_path / "relative.json")
    cs.apply("relative.json", "here.pt")
    assert Path("here.pt").read_bytes() == Path("elsewhere/out.pt").read_bytes()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(UnreadableError, match="does not exist"):
        cs.apply(relative, "no.pt")
    assert os.listdir() == ["out.pt"]


def resaved(folder: Path) -> None:
    torch.save({"model": support.network(seed=9).state_dict()}, folder / "in.pt")


def target_resaved(folder: Path) -> None:
    torch.save({"other": torch.ones(1), **support.network(seed=9).state_dict()}, folder / "target.pt")


def model_rewritten(folder: Path) -> None:
    support.nets(folder, support.NETS.replace("nn.Linear(width, classes)", "nn.Linear(width, classes + 1)"))


@pytest.mark.parametrize(
    ("target", "change"),
    [("model", resaved), ("checkpoint", resaved), ("none", resaved), ("checkpoint", target_resaved), ("model", model_rewritten)],
)
def test_a_stale_plan_is_refused(target: str, change: Callable[[Path], None], tmp_path: Path) -> None:
    source, targets = setting(tmp_path)
    path = written(cs.plan(source, targets[target]), tmp_path / "plan.json")
    change(tmp_path)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(StaleError) as caught:
        cs.apply(path, tmp_path / "out.pt")
    assert "plan again" in (caught.value.hint or "")
    assert [name for name in sorted(os.listdir(tmp_path)) if name != "__pycache__"] == [name for name in before if name != "__pycache__"]


def test_a_source_that_was_only_touched_or_moved_with_its_plan_is_not_stale(tmp_path: Path) -> None:
    source, targets = setting(tmp_path)
    path = written(cs.plan(source, targets["checkpoint"]), tmp_path / "plan.json")
    os.utime(source)
    cs.apply(path, tmp_path / "out.pt")


def step(value: dict[str, Any], key: str) -> dict[str, Any]:
    found: dict[str, Any] = next(row for row in value["steps"] if row["target"] == key)
    return found


EDITS: dict[str, Callable[[dict[str, Any]], object]] = {
    "another version": lambda v: v.update(version=2),
    "no steps": lambda v: v.pop("steps"),
    "a step less": lambda v: v["steps"].remove(step(v, "conv.bias")),
    "a step twice": lambda v: v["steps"].append(step(v, "conv.bias")),
    "a step more": lambda v: v["steps"].append({**step(v, "conv.bias"), "target": "another"}),
    "another source key": lambda v: step(v, "conv.bias")["sources"][0].update(key="nothing"),
    "another source file": lambda v: step(v, "conv.bias")["sources"][0].update(file=7),
    "a source of another shape": lambda v: step(v, "conv.bias")["sources"][0].update(key="conv.weight"),
    "another dtype": lambda v: step(v, "conv.bias").update(dtype="F16"),
    "an unknown dtype": lambda v: step(v, "conv.bias").update(dtype="F17"),
    "another shape": lambda v: step(v, "conv.bias").update(shape=[5]),
    "an unknown op": lambda v: step(v, "conv.bias")["ops"].append({"op": "exec"}),
    "an unknown action": lambda v: step(v, "conv.bias").update(action="run"),
    "fresh as text": lambda v: step(v, "conv.bias").update(fresh="no"),
    "a fate less": lambda v: v["dropped"].clear(),
    "kept without a target": lambda v: (v.update(target=None), step(v, "head.bias").update(action="keep", fresh=False, ops=[])),
    "initialised without a target": lambda v: v.update(target=None),
    "a scheme that is none": lambda v: step(v, "head.bias")["ops"][0].update(scheme="os.system('x')"),
    "an extra state from nowhere": lambda v: v["entries"].append(
        {"target": "conv._extra_state", "source": {"file": 0, "key": "x._extra_state"}}
    ),
    "an extra state of the target's": lambda v: v["entries"].append({"target": "conv._extra_state", "source": None}),
    "a list": lambda v: v.update(steps=3),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edited_plan_is_refused(edit: str, tmp_path: Path) -> None:
    state = support.network(seed=1).state_dict()
    torch.save({"surplus": torch.ones(4), **{key: tensor for key, tensor in state.items() if "head" not in key}}, tmp_path / "in.pt")
    spec = support.nets(tmp_path) + ":Net"
    value = planfile.to_json(cs.plan(tmp_path / "in.pt", spec))
    (tmp_path / "good.json").write_text(json.dumps(value))
    cs.apply(tmp_path / "good.json", tmp_path / "good.pt")
    EDITS[edit](value)
    (tmp_path / "plan.json").write_text(json.dumps(value))
    with pytest.raises(CheckpointError):
        cs.apply(tmp_path / "plan.json", tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


@pytest.mark.parametrize("raw", [b"", b"[]", b"{}", b'{"version": 1}', b"\xff\xfe", b'{"version": 1, "steps": []}'])
def test_what_is_no_plan(raw: bytes, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_bytes(raw)
    with pytest.raises(CheckpointError):
        cs.apply(tmp_path / "plan.json", tmp_path / "out.pt")


def test_a_plan_for_a_model_in_memory_says_so(tmp_path: Path) -> None:
    source, _ = setting(tmp_path)
    plan = cs.plan(source, support.network())
    with pytest.raises(PlanError, match="in memory"):
        cs.apply(plan, tmp_path / "out.pt")


def test_planning_writes_nothing_and_says_what_merge_will_do(tmp_path: Path) -> None:
    source, targets = setting(tmp_path)
    before = sorted(os.listdir(tmp_path))
    plan = cs.plan(source, targets["checkpoint"])
    assert sorted(os.listdir(tmp_path)) == before
    assert plan.kept == ("head.weight", "head.bias")
    assert "Plan:" in str(plan)
