"""Keys that loading code fills in where the source lacks them: torch's own load says what the model holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from loading_support import same
from torch import nn

import ckptsurgeon as cs

BASE = """
import torch
from torch import nn
def lacks(keys, name): return any(key.rpartition(".")[2] == name for key in keys.missing_keys)
"""
GAIN = """
        super().__init__()
        self.body, self.gain = nn.Linear(3, 3), nn.Parameter(torch.randn(3))
        self.register_load_state_dict_post_hook(after)
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.head = Block(), nn.Linear(3, 2)
"""
# By name: the model's code, and whether it fills `block.gain` in.
NETS = {
    "from another tensor": (
        "def after(block, keys):\n    if lacks(keys, 'gain'): block.gain.data.copy_(block.body.bias.data * 2)",
        True,
    ),
    "a constant": ("def after(block, keys):\n    if lacks(keys, 'gain'): nn.init.constant_(block.gain, 3.0)", True),
    "a tensor of its own": ("def after(block, keys):\n    if lacks(keys, 'gain'): block.gain = nn.Parameter(torch.full((3,), 4.0))", True),
    "as given": ("def after(block, keys):\n    keys.missing_keys[:] = [k for k in keys.missing_keys if not k.endswith('gain')]", False),
    "masked": ("def after(block, keys):\n    block.gain.data.mul_(torch.tensor([1.0, 0.0, 1.0]))", False),
    "drawn": ("def after(block, keys):\n    if lacks(keys, 'gain'): nn.init.normal_(block.gain)", False),
}
WRITES = """
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain, self.count = nn.Parameter(torch.randn(3)), nn.Buffer(torch.tensor(4))
    def _load_from_state_dict(self, state, prefix, *rest):
        super()._load_from_state_dict(state, prefix, *rest)
        with torch.no_grad():
            if prefix + "gain" not in state: self.gain.fill_(0.5); self.count.zero_()
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.head = Block(), nn.Linear(3, 2)
"""
SETS = """
class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.randn(3))
        self._register_load_state_dict_pre_hook(lambda state, prefix, *rest: state.setdefault(prefix + "gain", torch.ones(3)))
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.block, self.head = Block(), nn.Linear(3, 2)
"""


def _net(code: str, folder: Path) -> tuple[str, Any]:
    (folder / "net.py").write_text(BASE + code)
    scope: dict[str, Any] = {}
    exec(BASE + code, scope)
    return f"{folder / 'net.py'}:Net", scope["Net"]


def _as_torch_loads(code: str, state: dict[str, torch.Tensor], folder: Path) -> tuple[cs.Report, cs.Report]:
    """The reports of transfer and merge, after both were held against torch's load."""
    spec, net = _net(code, folder)
    torch.save(state, folder / "a.pt")
    truth, model, merged = (_seeded(net, 0), _seeded(net, 0), _seeded(net, 1))
    truth.load_state_dict(state, strict=False)
    transferred = cs.transfer(folder / "a.pt", model)
    report = cs.merge(folder / "a.pt", spec, folder / "out.pt")
    merged.load_state_dict(torch.load(folder / "out.pt", weights_only=True))
    same(model.state_dict(), truth.state_dict())

    same(merged.state_dict(), truth.state_dict())
    return transferred, report


def _seeded(net: Any, seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return net()


@pytest.mark.parametrize("name", NETS)
def test_what_a_hook_after_loading_fills_in_is_not_fresh(name: str, tmp_path: Path) -> None:
    hook, fills = NETS[name]
    state = {"block.body.weight": torch.randn(3, 3), "block.body.bias": torch.randn(3), "head.weight": torch.randn(2, 3)}
    code = f"{hook}\nclass Block(nn.Module):\n    def __init__(self):{GAIN}"
    reports = _as_torch_loads(code, state, tmp_path) if name != "drawn" else (cs.transfer(state, _net(code, tmp_path)[1]()),)
    for report in reports:
        assert ("block.gain" in report.fresh) is not fills
        assert "head.bias" in report.fresh


@pytest.mark.parametrize("code", [WRITES, SETS], ids=["writes into the model", "sets a key of the dict"])
def test_a_module_of_which_the_file_has_no_key_is_filled_in(code: str, tmp_path: Path) -> None:
    state = {"head.weight": torch.randn(2, 3), "head.bias": torch.randn(2)}
    for report in _as_torch_loads(code, state, tmp_path):
        assert not report.fresh
    spec = f"{tmp_path / 'net.py'}:Net"
    assert cs.verify(tmp_path / "out.pt", spec).ok
    assert not cs.diff(tmp_path / "a.pt", spec).missing
