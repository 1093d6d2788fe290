"""Transfers into models on a GPU and their proof, beside torch's own loading. They are skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import ckptsurgeon as cs
from ckptsurgeon.models.training import transfer as staging

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


class Net(nn.Module):
    """Parameters of several dtypes, some longer than a buffer, one that is not contiguous."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.Parameter(torch.randn(3 * staging.BUFFER // 4 + 5))
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(40))
        self.narrow = nn.Parameter(torch.randn(100, 33, dtype=torch.bfloat16))
        self.turned = nn.Parameter(torch.randn(30, 20).t())
        self.normed = nn.BatchNorm1d(16)
        self.register_buffer("mask", torch.rand(77) > 0.5)
        self.register_buffer("none", torch.zeros(0, 4))
        self.register_buffer("waves", torch.randn(9, dtype=torch.complex64))


@pytest.mark.parametrize("kind", ["pt", "safetensors", "strided"])
def test_transfer_is_what_torch_loads(kind: str, tmp_path: Path) -> None:
    """Bit for bit, while other work is under way on the device's stream."""
    torch.manual_seed(0)
    state = Net().state_dict()
    path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pt")
    if kind == "safetensors":
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    elif kind == "strided":
        torch.save({name: tensor.t().contiguous().t() if tensor.dim() == 2 else tensor for name, tensor in state.items()}, path)
    else:
        torch.save(state, path)
    ours, theirs = Net().cuda(), Net().cuda()
    theirs.load_state_dict(state)
    busy = torch.randn(4096, 4096, device="cuda")
    for _ in range(20):
        busy = busy @ busy
    report = cs.transfer(path, ours)
    assert not report.fresh
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name].flatten().view(torch.uint8), tensor.flatten().view(torch.uint8)), name
    cs.verify(path, ours)


def test_verify_on_the_device(tmp_path: Path) -> None:
    """A written file is loaded into a model there and compared."""
    torch.manual_seed(0)
    path, out = tmp_path / "a.pt", tmp_path / "b.safetensors"
    torch.save({name: value.contiguous() for name, value in Net().state_dict().items()}, path)
    cs.merge(path, Net(), out)
    assert cs.verify(out, Net(), device="cuda:0").bitwise
