"""An option that would do nothing in a call is refused: every row of the table, where it does not apply and where it does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import api_support as support
import pytest
import torch

import ckptsurgeon as cs
from ckptsurgeon.api._options import OPTIONS, option
from ckptsurgeon.errors import CheckpointError, SettingsError

Call = Callable[["Place"], Any]


class Place:
    """A checkpoint, one beside it, and a model that they fit; `out` is another path each time."""

    def __init__(self, folder: Path) -> None:
        state = support.network(seed=1).state_dict()
        torch.save(state, folder / "a.pt")
        torch.save(support.network(seed=2).state_dict(), folder / "b.pt")
        self.a, self.b, self.spec = folder / "a.pt", folder / "b.pt", support.nets(folder) + ":Net"
        model, self.copy = support.network(seed=3), support.network(seed=4)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        sum(parameter.sum() for parameter in model.parameters()).backward()  # type: ignore[union-attr]
        optimizer.step()
        names = [name for name, _ in model.named_parameters()]
        self.run, self.names = folder / "run.pt", names
        torch.save({"model": model.state_dict(), "run": {"optimizer": optimizer.state_dict()}, "ema2": model.state_dict()}, self.run)
        self.schedule = scheduler().state_dict()
        self.record = cs.merge(self.a, self.spec, folder / "merged.pt", drop=["head.*"])
        self.fp8 = folder / "fp8.pt"
        torch.save({"w": torch.ones(2, 2).to(torch.float8_e4m3fn), "w_scale_inv": torch.ones(1, 1)}, self.fp8)
        self.folder, self.number = folder, 0

    def out(self, suffix: str = ".pt") -> Path:
        self.number += 1
        return self.folder / f"out{self.number}{suffix}"

    def model(self) -> torch.nn.Module:
        return support.network(seed=5)


def optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def scheduler() -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer(torch.nn.Linear(1, 1)), 1)


def resumed(place: Place, **more: Any) -> Any:
    model = place.model()
    return cs.transfer(place.run, model, root="model", optimizer=optimizer(model), **more)


ROWS: list[tuple[str, Call, Call]] = [
    ("seed", lambda p: cs.merge(p.a, p.b, p.out(), seed=0), lambda p: cs.merge(p.a, p.spec, p.out(), seed=0)),
    (
        "seed",
        lambda p: cs.merge(p.a, None, p.out(), seed=1),
        lambda p: cs.merge(p.a, p.b, p.out(), drop=["head.*"], init={"head.weight": "normal"}, seed=1),
    ),
    ("seed", lambda p: cs.merge(p.a, p.spec, p.out(), seed=1, verify=False), lambda p: cs.plan(p.a, p.spec, seed=1)),
    (
        "seed",
        lambda p: cs.plan(p.a, p.b, seed=1),
        lambda p: cs.plan(p.a, cs.skeleton(p.spec), drop=["head.*"], init={"head.*": "zeros"}, seed=1),
    ),
    ("seed", lambda p: cs.verify(p.a, p.b, seed=1), lambda p: cs.verify(p.a, p.spec, seed=1)),
    (
        "seed",
        lambda p: cs.transfer(p.a, p.model(), seed=1),
        lambda p: cs.transfer(p.a, p.model(), drop=["head.*"], init={"head.weight": "normal"}, seed=1),
    ),
    ("device", lambda p: cs.merge(p.a, p.b, p.out(), device="cpu"), lambda p: cs.merge(p.a, p.spec, p.out(), device="cpu")),
    (
        "device",
        lambda p: cs.merge(p.a, p.spec, p.out(), device="cpu", verify=False),
        lambda p: cs.merge(p.a, p.spec, p.out(), device="meta"),
    ),
    ("device", lambda p: cs.verify(p.a, p.b, device="meta"), lambda p: cs.verify(p.a, p.spec, device="meta")),
    (
        "device",
        lambda p: cs.apply(cs.plan(p.a, p.b), p.out(), device="cpu"),
        lambda p: cs.apply(cs.plan(p.a, p.spec), p.out(), device="cpu"),
    ),
    ("dequantize", lambda p: cs.merge(p.a, p.b, p.out(), dequantize=True), lambda p: cs.merge(p.fp8, None, p.out(), dequantize=True)),
    ("dequantize", lambda p: cs.transfer(p.a, p.model(), dequantize=True), lambda p: cs.plan(p.fp8, dequantize=True)),
    ("inputs", lambda p: cs.verify(p.a, p.b, inputs=["1x1x4x4"]), lambda p: cs.verify(p.a, p.spec, inputs=["1x1x4x4"])),
    ("inputs", lambda p: cs.verify(p.a, p.spec, inputs=["1x1x4x4"], device="meta"), lambda p: cs.verify(p.a, p.spec, device="meta")),
    ("tied", lambda p: cs.merge(p.a, None, p.out(), tied="copy"), lambda p: cs.merge(p.a, None, p.out(".safetensors"), tied="copy")),
    (
        "tied",
        lambda p: cs.apply(cs.plan(p.a, p.b), p.out(), tied="alias"),
        lambda p: cs.apply(cs.plan(p.a, p.b), p.out(".safetensors"), tied="alias"),
    ),
    ("depth", lambda p: cs.inspect(p.a, depth=1), lambda p: cs.inspect(p.a, tree=True, depth=1)),
    (
        "resume",
        lambda p: cs.merge(p.a, None, p.out(), resume=True),
        lambda p: cs.merge(p.a, None, p.out(""), max_shard_size="1MB", resume=True),
    ),
    (
        "resume",
        lambda p: cs.merge(p.a, None, p.out(""), max_shard_size="1MB", resume=True, verify=False),
        lambda p: cs.merge(p.a, None, p.out(""), max_shard_size="1MB", verify=False),
    ),
    (
        "max_shard_size",
        lambda p: cs.merge(p.a, None, p.out(""), max_shard_size="1MB", format="dcp"),
        lambda p: cs.merge(p.a, None, p.out(""), format="dcp"),
    ),
    (
        "proof copied",
        lambda p: cs.merge(p.a, None, p.out(""), format="dcp", proof="copied"),
        lambda p: cs.merge(p.a, None, p.out(""), format="dcp", proof="full"),
    ),
    (
        "with_optimizer",
        lambda p: cs.merge(p.run, p.spec, p.out(""), root="model", with_optimizer=True, max_shard_size="1MB"),
        lambda p: cs.merge(
            p.run, p.spec, p.out(), root="model", with_optimizer=True, optimizer_names=p.names, optimizer_root="run.optimizer"
        ),
    ),
    ("auto", lambda p: cs.merge(p.a, None, p.out(), auto="safe"), lambda p: cs.merge(p.a, p.b, p.out(), auto="safe")),
    ("min_coverage", lambda p: cs.plan(p.a, min_coverage=0.5), lambda p: cs.plan(p.a, p.b, min_coverage=0.5)),
    (
        "min_coverage",
        lambda p: cs.merge([p.a, p.b], None, p.out(), average=True, min_coverage=0.0),
        lambda p: cs.merge(p.a, p.b, p.out(), min_coverage=0.0),
    ),
    ("strict", lambda p: cs.merge(p.a, None, p.out(), strict=True), lambda p: cs.merge(p.a, p.b, p.out(), strict=True)),
    ("dtype target", lambda p: cs.merge(p.a, None, p.out(), dtype="target"), lambda p: cs.merge(p.a, p.b, p.out(), dtype="target")),
    ("dtype target", lambda p: cs.plan([p.a, p.b], average=True, dtype="target"), lambda p: cs.plan(p.a, None, dtype="source")),
    ("tolerance", lambda p: cs.match(p.a, p.spec, tolerance=1e-3), lambda p: cs.match(p.a, p.spec)),
    (
        "optimizer_root",
        lambda p: cs.transfer(p.run, p.model(), root="model", optimizer_root="run.optimizer"),
        lambda p: resumed(p, optimizer_root="run.optimizer"),
    ),
    (
        "optimizer_root",
        lambda p: cs.merge(p.run, p.spec, p.out(), root="model", optimizer_root="x"),
        lambda p: cs.merge(p.run, p.spec, p.out(), root="model", optimizer_root="run.optimizer", with_optimizer=True),
    ),
    (
        "optimizer_names",
        lambda p: cs.transfer(p.run, p.model(), root="model", optimizer_names=p.names),
        lambda p: resumed(p, optimizer_root="run.optimizer", optimizer_names=p.names),
    ),
    (
        "optimizer_names",
        lambda p: cs.merge(p.run, p.spec, p.out(), root="model", optimizer_names=p.names),
        lambda p: cs.merge(
            p.run, p.spec, p.out(), root="model", optimizer_root="run.optimizer", optimizer_names=p.names, with_optimizer=True
        ),
    ),
    (
        "optimizer_from",
        lambda p: cs.transfer(p.a, p.model(), optimizer_from=p.run),
        lambda p: resumed(p, optimizer_from=p.run, optimizer_root="run.optimizer"),
    ),
    (
        "scheduler_from",
        lambda p: cs.transfer(p.a, p.model(), scheduler_from=p.schedule),
        lambda p: cs.transfer(p.a, p.model(), scheduler=scheduler(), scheduler_from=p.schedule),
    ),
    (
        "ema_root",
        lambda p: cs.transfer(p.run, p.model(), root="model", ema_root="ema2"),
        lambda p: cs.transfer(p.run, p.model(), root="model", ema=p.copy, ema_root="ema2"),
    ),
    ("partial", lambda p: cs.freeze(p.model(), "conv.*", partial="fresh"), lambda p: cs.freeze(p.model(), p.record, partial="fresh")),
    (
        "partial",
        lambda p: cs.param_groups(p.model(), {"head.*": 1.0}, lr=0.1, partial="fresh"),
        lambda p: cs.param_groups(p.model(), p.record, lr=0.1, fresh_lr=1.0, partial="fresh"),
    ),
    (
        "fresh_lr",
        lambda p: cs.param_groups(p.model(), {"head.*": 1.0}, lr=0.1, fresh_lr=1.0),
        lambda p: cs.param_groups(p.model(), p.record, lr=0.1, fresh_lr=1.0),
    ),
    (
        "fresh_scale",
        lambda p: cs.param_groups(p.model(), {"head.*": 1.0}, lr=0.1, fresh_scale=2),
        lambda p: cs.param_groups(p.model(), p.record, lr=0.1, fresh_scale=2),
    ),
]
ON_THE_COMMAND_LINE = {"finite", "weights"}  # rows that Python's verbs can't meet; tests/cli has them


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    return Place(tmp_path_factory.mktemp("applying"))


def test_every_row_is_tried() -> None:
    assert {name for name, _, _ in ROWS} | ON_THE_COMMAND_LINE == OPTIONS


@pytest.mark.parametrize(("name", "idle", "useful"), ROWS, ids=[f"{number}-{row[0]}" for number, row in enumerate(ROWS)])
def test_an_option_that_would_do_nothing_is_refused(name: str, idle: Call, useful: Call, place: Place) -> None:
    before = support.folder_state(place.folder)
    with pytest.raises(SettingsError) as caught:
        idle(place)
    assert caught.value.key == option(name) and caught.value.exit_code == 2 and caught.value.hint
    assert support.folder_state(place.folder) == before
    useful(place)


def test_all_idle_options_are_told_at_once(place: Place) -> None:
    with pytest.raises(SettingsError) as caught:
        cs.merge(place.a, None, place.out(), strict=True, min_coverage=0.5, seed=3)
    assert [problem.partition(" ")[0] for problem in caught.value.problems] == ["--seed", "--min-coverage", "--strict"]


@pytest.mark.parametrize(
    ("asked", "left_out"),
    [
        ({"finite": True}, {"ignore": "CK401"}),
        ({"finite": True}, {"select": "CK2"}),
        ({"full": True}, {"ignore": "CK1"}),
        ({"max_size": 10}, {"ignore": "too-large"}),
        ({"dtypes": "F32"}, {"ignore": "CK5"}),
        ({"allow": "torch"}, {"select": "CK503"}),
        ({"against": {"w": torch.ones(1)}}, {"ignore": "CK3"}),
    ],
    ids=str,
)
def test_a_check_that_is_asked_for_and_not_to_be_told_is_refused(asked: dict[str, Any], left_out: dict[str, str], place: Place) -> None:
    with pytest.raises(SettingsError, match="leaves out"):
        cs.check(place.a, **asked, **left_out)
    cs.check(place.a, **asked)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2, torch.float8_e4m3fn, torch.complex64]
)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_finite_is_held_whatever_the_target(dtype: torch.dtype, suffix: str, bad: float, tmp_path: Path) -> None:
    if dtype == torch.float8_e4m3fn and bad == float("inf"):
        bad = float("nan")  # it has no infinity
    state = {"w": torch.tensor([1.0, bad, 2.0]).to(dtype), "fine": torch.ones(2), "n": torch.arange(3)}
    torch.save(state, tmp_path / "in.pt")
    torch.save({key: torch.zeros_like(value) for key, value in state.items()}, tmp_path / "t.pt")
    targets = {"none": None, "file": tmp_path / "t.pt", "skeleton": cs.skeleton(tmp_path / "t.pt")}
    for verify in (True, False):
        for name, target in targets.items():
            with pytest.raises(CheckpointError) as caught:
                cs.merge(tmp_path / "in.pt", target, tmp_path / f"{name}{suffix}", finite=True, verify=verify)
            assert caught.value.exit_code == 1 and [problem.split(":")[0] for problem in caught.value.problems] == ["w"]
            with pytest.raises(CheckpointError) as caught:
                cs.apply(cs.plan(tmp_path / "in.pt", target), tmp_path / f"{name}{suffix}", finite=True, verify=verify)
            assert caught.value.exit_code == 1
            assert not (tmp_path / f"{name}{suffix}").exists()
            more: dict[str, Any] = {"skeleton": {"init": {"w": "zeros"}}}.get(name, {})
            cs.merge(tmp_path / "in.pt", target, tmp_path / f"{name}{suffix}", finite=True, verify=verify, drop=["w"], **more)
            (tmp_path / f"{name}{suffix}").unlink()


def test_finite_of_what_has_no_values_is_told(tmp_path: Path) -> None:
    from ckptsurgeon.formats.plain import skeleton

    torch.save({"w": torch.ones(2)}, tmp_path / "a.pt")
    (tmp_path / "net.json").write_text(json.dumps(skeleton.to_json(cs.skeleton(tmp_path / "a.pt"))))
    (found,) = cs.check(tmp_path / "net.json", finite=True).files[0].findings
    assert (found.code, found.level) == ("CK401", "note")
    assert cs.verify(tmp_path / "net.json", tmp_path / "a.pt").ok
    with pytest.raises(CheckpointError, match="no values"):
        cs.verify(tmp_path / "net.json", tmp_path / "a.pt", finite=True)


def test_finite_looks_at_the_file_on_meta_and_at_an_optimizers_state(tmp_path: Path) -> None:
    spec = support.nets(tmp_path) + ":Net"
    state = support.network(seed=1).state_dict()
    torch.save({**state, "head.bias": torch.tensor([1.0, float("nan"), 2.0])}, tmp_path / "in.pt")
    assert not cs.verify(tmp_path / "in.pt", spec, device="meta", finite=True).ok
    assert cs.verify(tmp_path / "in.pt", spec, device="meta").ok
    with pytest.raises(CheckpointError):
        cs.merge(tmp_path / "in.pt", spec, tmp_path / "out.pt", device="meta", finite=True)
    model = support.network(seed=3)
    adam = torch.optim.AdamW(model.parameters())
    sum(parameter.sum() for parameter in model.parameters()).backward()  # type: ignore[union-attr]
    adam.step()
    adam.state[model.head.bias]["exp_avg"][1] = float("inf")
    torch.save({"model": model.state_dict(), "optimizer": adam.state_dict()}, tmp_path / "run.pt")
    cs.merge(tmp_path / "run.pt", spec, tmp_path / "fine.pt", finite=True)
    cs.merge(tmp_path / "run.pt", spec, tmp_path / "full.pt", with_optimizer=True)
    with pytest.raises(CheckpointError) as caught:
        cs.merge(tmp_path / "run.pt", spec, tmp_path / "out.pt", with_optimizer=True, finite=True)
    assert caught.value.exit_code == 1 and any("exp_avg" in problem for problem in caught.value.problems)
    assert not (tmp_path / "out.pt").exists()
