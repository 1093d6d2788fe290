"""The state of bitsandbytes' 8-bit optimizers is codes: it goes as it is with a weight that goes as it is, or is left out by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import api_support as support
import pytest
import torch
from model import Net
from test_api_resume import NetSplit
from torch import Tensor, nn

import ckptsurgeon as cs

VARIANTS = str(support.FIXTURES / "variants.py")
RENAME = {"fc2.{p}": "dense2.{p}"}
WRAPPED = "__bnb_optimizer_quant_state__"
SMALL = 4096  # elements, below which bitsandbytes keeps float32
GROUP = {"lr": 1e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01, "alpha": 0.0, "t_alpha": None, "t_beta3": None}


def tensors_of(parameter: Tensor, made: torch.Generator) -> dict[str, Tensor]:
    """What bitsandbytes' Adam8bit keeps of a parameter (`Optimizer2State.init_state` of its optim/optimizer.py)."""
    if parameter.numel() < SMALL:
        return {name: torch.rand(parameter.shape, generator=made) for name in ("state1", "state2")}
    blocks = -(-parameter.numel() // 256)
    codes = {name: torch.randint(0, 256, parameter.shape, generator=made, dtype=torch.uint8) for name in ("state1", "state2")}
    tables = {name: torch.linspace(-1, 1, 256) for name in ("qmap1", "qmap2")}
    return {**codes, **tables, **{name: torch.rand(blocks, generator=made) for name in ("absmax1", "absmax2")}}


def saved(net: nn.Module, path: Path, wrapped: bool = True) -> dict[str, dict[str, Any]]:
    """A training checkpoint, and by the parameters' names what is in its optimizer's state."""
    made = torch.Generator().manual_seed(1)
    state = {name: {"step": 7, **tensors_of(parameter, made)} for name, parameter in net.named_parameters()}
    rows = {
        position: {"step": 7, WRAPPED: {name: value for name, value in one.items() if name != "step"}} if wrapped else one
        for position, one in enumerate(state.values())
    }
    optimizer = {"state": rows, "param_groups": [{**GROUP, "params": list(rows)}]}
    torch.save({"model": net.state_dict(), "optimizer": optimizer}, path)
    return state


def written(path: Path) -> dict[str, dict[str, Any]]:
    """The state in a merged file, by the parameters' names."""
    value = torch.load(path, weights_only=True)["optimizer"]
    names = [name for group in value["param_groups"] for name in group["param_names"]]
    return {name: value["state"][position] for position, name in enumerate(names) if position in value["state"]}


def equal(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["step"] == expected["step"] and set(found) == set(expected)
    support.same({name: found[name] for name in found if name != "step"}, {name: expected[name] for name in found if name != "step"})


@pytest.mark.parametrize("wrapped", [True, False])
@pytest.mark.parametrize("dtype", [None, "F16"])
def test_codes_go_unchanged_under_their_new_names(wrapped: bool, dtype: str | None, tmp_path: Path) -> None:
    """Also where the weight is cast: codes have no dtype of their weight's."""
    before = saved(Net(), tmp_path / "a.pt", wrapped)
    report = cs.merge(tmp_path / "a.pt", f"{VARIANTS}:NetRenamed", tmp_path / "b.pt", rename=RENAME, with_optimizer=True, dtype=dtype)
    assert report.optimizer is not None and len(report.optimizer.carried) == 10 and report.optimizer.not_carried == ()
    found = written(tmp_path / "b.pt")
    assert list(found) == [name.replace("fc2", "dense2") for name in before]
    for name, state in before.items():
        equal(found[name.replace("fc2", "dense2")], state)
    assert found["fc1.weight"]["state1"].dtype == torch.uint8 and "absmax1" not in found["conv1.weight"]


def test_codes_that_an_adapter_would_change_are_left_out_by_name(tmp_path: Path) -> None:
    before = saved(Net(), tmp_path / "a.pt")
    adapt = {"fc1.{p} -> left.{p} + right.{p}": "chunk", "fc2.weight": "transpose"}

    class Turned(NetSplit):
        def __init__(self) -> None:
            super().__init__()
            self.fc2.weight = nn.Parameter(self.fc2.weight.T.contiguous())

    report = cs.merge(tmp_path / "a.pt", Turned(), tmp_path / "b.pt", adapt=adapt, with_optimizer=True)
    changed = ("left.weight", "left.bias", "right.weight", "right.bias", "fc2.weight")
    assert report.optimizer is not None and sorted(report.optimizer.zeroed) == sorted(changed)
    reasons = dict(report.optimizer.not_carried)
    assert all("codes of bitsandbytes, which can only be carried unchanged" in reasons[name] for name in changed)
    assert "transpose" in reasons["fc2.weight"] and "fc2.weight" in str(report)
    found = written(tmp_path / "b.pt")
    assert not set(found) & set(changed)
    for name in found:
        equal(found[name], before[name])


@pytest.mark.parametrize("live", [True, False])
def test_an_optimizer_of_torch_does_not_take_codes(live: bool, tmp_path: Path) -> None:
    saved(Net(), tmp_path / "a.pt")
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    report = cs.transfer(torch.load(tmp_path / "a.pt") if live else tmp_path / "a.pt", net, optimizer=optimizer)
    assert report.optimizer is not None and report.optimizer.carried == () and not optimizer.state
    ((name, reason),) = report.optimizer.not_carried
    assert name == "AdamW" and "8-bit codes of bitsandbytes" in reason


def test_two_averages_in_one_tensor(tmp_path: Path) -> None:
    """AdEMAMix keeps two averages in `state1`, whose shape is not the parameter's."""
    saved(Net(), tmp_path / "a.pt")
    value = torch.load(tmp_path / "a.pt")
    for state in value["optimizer"]["state"].values():
        state[WRAPPED]["state1"] = torch.stack([state[WRAPPED]["state1"]] * 2)
    torch.save(value, tmp_path / "a.pt")
    cs.merge(tmp_path / "a.pt", f"{VARIANTS}:NetRenamed", tmp_path / "b.pt", rename=RENAME, with_optimizer=True)
    assert written(tmp_path / "b.pt")["fc1.weight"]["state1"].shape == (2, 120, 400)


def test_bitsandbytes_own_optimizer_goes_on_where_it_was(tmp_path: Path) -> None:
    """Its own state_dict, through transfer into its own live optimizer, and through a merged file that its own loader reads."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")
    torch.manual_seed(0)
    net = Net()
    optimizer = bnb.optim.AdamW8bit(net.parameters(), lr=1e-3)
    made = torch.Generator().manual_seed(1)
    for index, parameter in enumerate(net.parameters()):
        optimizer.init_state(optimizer.param_groups[0], parameter, 0, index)
        kept = optimizer.state[parameter]
        kept["step"] = 7
        for name, value in kept.items():
            if isinstance(value, Tensor) and not name.startswith("qmap"):
                value.copy_(torch.randint(0, 200, value.shape, generator=made))
    before = {name: dict(optimizer.state[parameter]) for name, parameter in net.named_parameters()}
    assert {state["state1"].dtype for state in before.values()} == {torch.uint8, torch.float32}
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")

    renewed = Net()
    again = bnb.optim.AdamW8bit(renewed.parameters(), lr=1e-3)
    report = cs.transfer(tmp_path / "a.pt", renewed, optimizer=again)
    assert report.optimizer is not None and len(report.optimizer.carried) == 10
    for name, parameter in renewed.named_parameters():
        equal(dict(again.state[parameter]), before[name])

    cs.merge(tmp_path / "a.pt", Net(), tmp_path / "b.pt", with_optimizer=True)
    third = bnb.optim.AdamW8bit(renewed.parameters(), lr=1e-3)
    third.load_state_dict(torch.load(tmp_path / "b.pt", weights_only=True)["optimizer"])
    for name, parameter in renewed.named_parameters():
        equal(dict(third.state[parameter]), before[name])
