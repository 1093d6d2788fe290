"""verify in place: the values that a live model has now against a file; one machine. Models over ranks are in `tests/distributed`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import ckptsurgeon as cs


def net(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_what_the_model_holds_is_compared_and_nothing_is_loaded(tmp_path: Path) -> None:
    source, model = net(1), net(2)
    torch.save({"model": source.state_dict()}, tmp_path / "a.pt")
    assert cs.verify(tmp_path / "a.pt", model).ok  # a copy is loaded
    assert not cs.verify(tmp_path / "a.pt", model, in_place=True).ok
    cs.transfer(tmp_path / "a.pt", model)
    found = cs.verify(tmp_path / "a.pt", model, in_place=True)
    assert found.ok and found.bitwise and found.in_place and found.tensors == 9 and found.to_dict()["in_place"]
    assert "9 tensors, as the model holds them on cpu, compared bit for bit" in str(found)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        model[2].weight[1, 3] = -model[2].weight[1, 3]
    wrong = [row for row in cs.verify(tmp_path / "a.pt", model, in_place=True).findings if row.level == "error"]
    assert [(row.code, row.key, row.message) for row in wrong] == [
        ("differs", "2.weight", "1 of 8 elements differ from the file, the first at (1, 3)")
    ]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if key != "2.weight")


def test_a_large_tensor_is_compared_in_bands(tmp_path: Path) -> None:
    value = torch.arange(9_000_000, dtype=torch.int32).view(3000, 3000)
    save_file({"w": value}, tmp_path / "w.safetensors")
    model = nn.Module()
    model.w = nn.Parameter(value.clone(), requires_grad=False)
    assert cs.verify(tmp_path / "w.safetensors", model, in_place=True).ok
    model.w[2999, 7] = model.w[1500, 9] = 0
    (wrong,) = [row for row in cs.verify(tmp_path / "w.safetensors", model, in_place=True).findings if row.level == "error"]
    assert wrong.message == "2 of 9,000,000 elements differ from the file, the first at (1500, 9)"


def test_wrappers_dtypes_and_missing_keys(tmp_path: Path) -> None:
    source = net(1)
    save_file({key: value for key, value in source.state_dict().items() if key != "1.running_mean"}, tmp_path / "a.safetensors")
    found = cs.verify(tmp_path / "a.safetensors", nn.DataParallel(source).to(torch.bfloat16), in_place=True)
    assert [(row.code, row.key) for row in found.findings if row.level == "error"] == [("missing", "1.running_mean")]
    assert ("dtype", "0.weight") in [(row.code, row.key) for row in found.findings]


def test_non_finite_values(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    with torch.no_grad():
        model.bias[1] = float("nan")
    save_file(model.state_dict(), tmp_path / "a.safetensors")
    found = cs.verify(tmp_path / "a.safetensors", model, in_place=True)
    assert found.ok and [(row.code, row.message) for row in found.findings] == [("non-finite", "has 1 NaN of 2 values")]
    assert not cs.verify(tmp_path / "a.safetensors", model, in_place=True, finite=True).ok


def test_a_model_on_meta_has_nothing_to_compare(tmp_path: Path) -> None:
    save_file(nn.Linear(2, 2).state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(cs.ModelError, match="weight: has no values") as caught:
        cs.verify(tmp_path / "a.safetensors", nn.Linear(2, 2, device="meta"), in_place=True)
    assert caught.value.problems == ("bias",)


@pytest.mark.parametrize("asked", [{"device": "cpu"}, {"inputs": ["1x2"]}, {"seed": 1}])
def test_what_is_for_a_copy_is_refused(tmp_path: Path, asked: dict[str, object]) -> None:
    save_file(nn.Linear(2, 2).state_dict(), tmp_path / "a.safetensors")
    with pytest.raises(cs.SettingsError, match="compared in place"):
        cs.verify(tmp_path / "a.safetensors", nn.Linear(2, 2), in_place=True, **asked)  # type: ignore[arg-type]


def test_only_a_live_model_can_be_compared_in_place(tmp_path: Path) -> None:
    save_file(nn.Linear(2, 2).state_dict(), tmp_path / "a.safetensors")
    for target in (tmp_path / "a.safetensors", nn.Linear(2, 2).state_dict()):
        with pytest.raises(cs.SettingsError, match="the target is none"):
            cs.verify(tmp_path / "a.safetensors", target, in_place=True)
