"""Changes of dtype in a merge: what is lost is reported, what must not be lost is refused, and nothing is left behind."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import api_support as support
import numpy
import pytest
import torch
from torch import Tensor

import ckptsurgeon as cs
from ckptsurgeon.errors import CastError, PlanError, RuleError
from ckptsurgeon.report import Cast


def files(folder: Path, source: dict[str, Tensor], target: dict[str, Tensor]) -> tuple[Path, Path]:
    torch.save(source, folder / "in.pt")
    torch.save(target, folder / "target.pt")
    return folder / "in.pt", folder / "target.pt"


@pytest.mark.parametrize("output", ["out.pt", "out.safetensors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2])
def test_the_targets_dtype_wins_and_losses_are_reported(dtype: torch.dtype, output: str, tmp_path: Path) -> None:
    weight = torch.randn(50, 30)
    given, goal = files(
        tmp_path,
        {"w": weight, "t": weight.t(), "n": torch.arange(4)},
        {"w": torch.zeros(50, 30, dtype=dtype), "t": torch.zeros(30, 50, dtype=dtype), "n": torch.zeros(4, dtype=torch.int64)},
    )
    report = cs.merge(given, goal, tmp_path / output)
    support.same(support.load(tmp_path / output), {"w": weight.to(dtype), "t": weight.t().to(dtype), "n": torch.arange(4)})
    if dtype == torch.float64:
        assert report.casts == ()
        return
    error = numpy.abs(weight.double().numpy() - weight.to(dtype).double().numpy())
    assert [cast.key for cast in report.casts] == ["w", "t"]
    for cast in report.casts:
        assert cast.largest_error == error.max()
        assert cast.changed == (error > 0).sum()
        assert (cast.overflowed, cast.truncated) == (0, 0)


@pytest.mark.parametrize("output", ["out.pt", "out.safetensors"])
def test_overflow_and_truncation_are_refused_for_all_keys_at_once(output: str, tmp_path: Path) -> None:
    given, goal = files(
        tmp_path,
        {"big": torch.tensor([1.0, 70000.0]), "part": torch.tensor([1.9, 2.0]), "fine": torch.ones(2), "moved": torch.ones(2)},
        {"big": torch.zeros(2).half(), "part": torch.zeros(2).long(), "fine": torch.zeros(2).half(), "moved": torch.zeros(2)},
    )
    before = support.folder_state(tmp_path)
    with pytest.raises(CastError) as caught:
        cs.merge(given, goal, tmp_path / output)
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["big", "part"]
    assert support.folder_state(tmp_path) == before
    with pytest.raises(CastError) as caught:
        cs.merge(given, goal, tmp_path / output, allow_cast=["big"])
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["part"]
    report = cs.merge(given, goal, tmp_path / output, allow_cast=["big", "p*"])
    found = support.load(tmp_path / output)
    assert found["big"].tolist() == [1.0, float("inf")]
    assert found["part"].tolist() == [1, 2]
    assert {cast.key: (cast.overflowed, cast.truncated) for cast in report.casts} == {"big": (1, 0), "part": (0, 1)}


def test_one_pattern_may_be_given_as_text_and_means_itself(tmp_path: Path) -> None:
    given, goal = files(tmp_path, {"a": torch.tensor([70000.0]), "*": torch.ones(1)}, {"a": torch.zeros(1).half(), "*": torch.ones(1)})
    cs.merge(given, goal, tmp_path / "out.pt", allow_cast="a")
    with pytest.raises(RuleError, match="matches nothing"):
        cs.merge(given, goal, tmp_path / "other.pt", allow_cast="b*")  # not the letters `b` and `*`
    with pytest.raises(RuleError):
        cs.merge(given, goal, tmp_path / "other.pt", allow_cast="/(/")
    assert not (tmp_path / "other.pt").exists()


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (torch.tensor(1234.0), torch.tensor(0)),
        (torch.tensor(1234), torch.tensor(0.0)),
        (torch.tensor([True, False]), torch.zeros(2)),
        (torch.tensor([1, 0]), torch.tensor([False, False])),
        (torch.tensor([1.0, 0.0]), torch.tensor([False, False])),
        (torch.tensor([1.5 + 0j]), torch.zeros(1)),
        (torch.tensor([1.5]), torch.zeros(1, dtype=torch.complex64)),
        (torch.tensor([1.5]).bfloat16(), torch.zeros(1).half()),
        (torch.tensor([1.5]).to(torch.float8_e5m2), torch.zeros(1)),
        (torch.tensor([3], dtype=torch.uint16), torch.tensor([0])),
    ],
    ids=str,
)
def test_casts_that_keep_every_value_are_silent(given: Tensor, wanted: Tensor, tmp_path: Path) -> None:
    source, goal = files(tmp_path, {"k": given, "other": torch.ones(1)}, {"k": wanted, "other": torch.ones(1)})
    report = cs.merge(source, goal, tmp_path / "out.pt")
    support.same(support.load(tmp_path / "out.pt"), {"k": given.to(wanted.dtype), "other": torch.ones(1)})
    assert report.casts == ()


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (torch.tensor([1 + 1j]), torch.zeros(1)),
        (torch.tensor([0.5]), torch.tensor([True])),
        (torch.tensor([300]), torch.zeros(1, dtype=torch.uint8)),
        (torch.tensor([-1]), torch.zeros(1, dtype=torch.uint8)),
        (torch.tensor([float("nan")]), torch.tensor([1])),
        (torch.tensor([1e39], dtype=torch.float64), torch.zeros(1)),
        (torch.tensor([500.0]), torch.zeros(1).to(torch.float8_e4m3fn)),
    ],
    ids=str,
)
def test_casts_that_can_not_be(given: Tensor, wanted: Tensor, tmp_path: Path) -> None:
    source, goal = files(tmp_path, {"k": given, "other": torch.ones(1)}, {"k": wanted, "other": torch.ones(1)})
    with pytest.raises(CastError):
        cs.merge(source, goal, tmp_path / "out.pt")
    assert sorted(os.listdir(tmp_path)) == ["in.pt", "target.pt"]


def test_the_choice_of_dtype(tmp_path: Path) -> None:
    state = {"w": torch.randn(3), "h": torch.randn(3).half(), "n": torch.arange(3), "b": torch.tensor([True])}
    goal = {"w": torch.zeros(3).bfloat16(), "h": torch.zeros(3), "n": torch.arange(3), "b": torch.tensor([True]), "kept": torch.randn(2)}
    source, target = files(tmp_path, state, goal)
    expected = {
        None: {"w": torch.bfloat16, "h": torch.float32, "kept": torch.float32},
        "target": {"w": torch.bfloat16, "h": torch.float32, "kept": torch.float32},
        "source": {"w": torch.float32, "h": torch.float16, "kept": torch.float32},
        "F16": dict.fromkeys(("w", "h", "kept"), torch.float16),
        "BF16": dict.fromkeys(("w", "h", "kept"), torch.bfloat16),
        "F32": dict.fromkeys(("w", "h", "kept"), torch.float32),
    }
    for number, (choice, dtypes) in enumerate(expected.items()):
        cs.merge(source, target, tmp_path / f"{number}.pt", dtype=choice)
        found = support.load(tmp_path / f"{number}.pt")
        whole = {**state, "kept": goal["kept"]}
        support.same(found, {key: tensor.to(dtypes.get(key, tensor.dtype)) for key, tensor in whole.items()})
    cs.merge(source, None, tmp_path / "converted.safetensors", dtype="BF16")
    found = support.load(tmp_path / "converted.safetensors")
    assert {key: tensor.dtype for key, tensor in found.items()} == {
        "w": torch.bfloat16,
        "h": torch.bfloat16,
        "n": torch.int64,
        "b": torch.bool,
    }
    with pytest.raises(PlanError):
        cs.merge(source, target, tmp_path / "no.pt", dtype="I8")


def test_a_model_target_in_another_dtype_keeps_its_fresh_values_cast_too(tmp_path: Path) -> None:
    torch.save({"conv.weight": torch.randn(4, 1, 3, 3)}, tmp_path / "in.pt")
    spec = support.nets(tmp_path) + ":Net"
    report = cs.merge(tmp_path / "in.pt", spec, tmp_path / "out.pt", dtype="F16")
    cs.merge(tmp_path / "in.pt", spec, tmp_path / "full.pt")
    full = support.load(tmp_path / "full.pt")
    expected = {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in full.items()}
    support.same(support.load(tmp_path / "out.pt"), expected)
    assert {"conv.weight", "head.weight"} <= {cast.key for cast in report.casts}


def test_views_of_one_storage_as_two_dtypes_do_not_become_tied(tmp_path: Path) -> None:
    base = torch.tensor([1.0, 2.0, 3.0, 4.0]).half()
    path, goal = files(tmp_path, {"half": base}, {"half": torch.zeros(4), "brain": torch.zeros(4)})
    opened = cs.open(path)
    source = replace(opened, tensors={**opened, "brain": replace(opened["half"], name="brain", dtype="BF16")})
    for name in ("out.pt", "out.safetensors"):
        cs.merge(source, goal, tmp_path / name)
        support.same(support.load(tmp_path / name), {"half": base.float(), "brain": base.view(torch.bfloat16).float()})


def test_tied_keys_that_are_cast_stay_tied(tmp_path: Path) -> None:
    weight = torch.randn(5)
    torch.save({"a": weight, "b": weight}, tmp_path / "in.pt")
    cs.merge(tmp_path / "in.pt", None, tmp_path / "out.pt", dtype="F16")
    found = support.load(tmp_path / "out.pt")
    assert found["a"].data_ptr() == found["b"].data_ptr()
    support.same(found, {"a": weight.half(), "b": weight.half()})
    report = cs.merge(tmp_path / "in.pt", None, tmp_path / "out.safetensors", dtype="F16")
    support.same(support.load(tmp_path / "out.safetensors"), {"a": weight.half(), "b": weight.half()})
    assert {cast.key for cast in report.casts} == {"a", "b"}
    assert all(isinstance(cast, Cast) for cast in report.casts)


@pytest.mark.parametrize("many", [1, 20])
def test_what_overflowed_and_was_truncated_stands_in_the_text_as_in_the_json(many: int, tmp_path: Path) -> None:
    state = {f"big{i}": torch.tensor([1.0, 70000.0]) for i in range(many)} | {
        f"part{i}": torch.tensor([1.9, 2.0, 3.5]) for i in range(many)
    }
    wanted = {key: torch.zeros(value.shape, dtype=torch.float16 if key.startswith("big") else torch.int64) for key, value in state.items()}
    given, goal = files(tmp_path, state, wanted)
    report = cs.merge(given, goal, tmp_path / "out.pt", allow_cast=["*"])
    lines = [line for line in str(report).splitlines() if "→" in line and "F32" in line]
    assert any(f"{many} overflowed" in line and "truncated" not in line for line in lines)
    assert any(f"{2 * many} truncated" in line and "overflowed" not in line for line in lines)
    assert sum(cast.overflowed for cast in report.casts) == many and sum(cast.truncated for cast in report.casts) == 2 * many

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for key, value in wanted.items():
                self.register_buffer(key, value.clone())

    assert [line for line in str(cs.transfer(given, Net(), allow_cast=["*"])).splitlines() if "→" in line and "F32" in line] == lines


def test_unsigned_integers_that_fit_are_no_loss(tmp_path: Path) -> None:
    most = torch.tensor([2**63 - 1, 0], dtype=torch.uint64)
    given, goal = files(tmp_path, {"n": most, "w": torch.ones(1)}, {"n": torch.zeros(2, dtype=torch.int64), "w": torch.ones(1)})
    assert cs.merge(given, goal, tmp_path / "out.pt").casts == ()
    assert support.load(tmp_path / "out.pt")["n"].tolist() == [2**63 - 1, 0]
    torch.save({"n": torch.tensor([2**63, 0], dtype=torch.uint64), "w": torch.ones(1)}, given)
    with pytest.raises(CastError):
        cs.merge(given, goal, tmp_path / "other.pt")
