"""Folders that training frameworks save by torch.distributed.checkpoint: named, read, and their optimizers' states found by name."""

from __future__ import annotations

import json
import pickle
import sys
import types
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

import ckptsurgeon as cs

DATA = Path(__file__).parent.parent / "formats/data/dcp"


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.emb, self.up, self.down = nn.Embedding(3, 6), nn.Linear(6, 6), nn.Linear(6, 4, bias=False)
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.down(self.up(self.emb(tokens)))  # type: ignore[no-any-return]


def groups(net: Net) -> torch.optim.AdamW:
    rest = [*net.up.parameters(), *net.down.parameters()]
    return torch.optim.AdamW([{"params": net.emb.parameters(), "lr": 0.1}, {"params": rest, "lr": 0.2}])


@pytest.fixture
def trained(place: Path) -> tuple[Net, torch.optim.AdamW]:
    """A model and its optimizer after one step."""
    torch.manual_seed(1)
    net = Net()
    optimizer = groups(net)
    net(torch.tensor([0, 2])).sum().backward()
    optimizer.step()
    return net, optimizer


def save(state: Any, folder: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder)


def carried(folder: str, trained: tuple[Net, torch.optim.AdamW], **how: Any) -> None:
    """The weights, moments and steps of a folder are those of the training that saved it."""
    net = Net()
    optimizer = groups(net)
    report = cs.transfer(folder, net, optimizer=optimizer, **how)
    assert len(report.transferred) == 5 and "carried         4" in str(report)
    assert all(torch.equal(value, trained[0].state_dict()[key]) for key, value in net.state_dict().items())
    state, wanted = optimizer.state_dict()["state"], trained[1].state_dict()["state"]
    assert state.keys() == wanted.keys() and all(torch.equal(state[at][slot], wanted[at][slot]) for at in state for slot in state[at])


def test_torchtitan(run: Callable[..., Any], trained: tuple[Net, torch.optim.AdamW]) -> None:
    """The model's keys at the top, the optimizer's state with one key for each value."""
    flat = get_optimizer_state_dict(*trained, options=StateDictOptions(flatten_optimizer_state_dict=True))
    save({**get_model_state_dict(trained[0]), "optimizer": flat, "train_state": {"step": 5}}, "step-5")
    told = run("inspect", "step-5", "--json").json
    assert [(root["root"], root["tensors"]) for root in told["roots"]] == [("", 5), ("optimizer", 12)]
    carried("step-5", trained)
    assert run("merge", "step-5", "-o", "o.safetensors").code == 0


def test_accelerate_and_the_trainer(run: Callable[..., Any], trained: tuple[Net, torch.optim.AdamW]) -> None:
    """Two folders in one: the model's and the optimizer's."""
    save({"model": get_model_state_dict(trained[0])}, "checkpoint-5/pytorch_model_fsdp_0")
    save({"optimizer": get_optimizer_state_dict(*trained)}, "checkpoint-5/optimizer_0")
    ended = run("inspect", "checkpoint-5")
    assert ended.code == 2 and "give one of them: checkpoint-5/optimizer_0, checkpoint-5/pytorch_model_fsdp_0" in ended.err
    assert "root optimizer: 12 tensors" in run("inspect", "checkpoint-5/optimizer_0").out
    assert "an optimizer's state and no model's" in run("merge", "checkpoint-5/optimizer_0", "-o", "o.pt").err
    carried("checkpoint-5/pytorch_model_fsdp_0", trained, optimizer_from="checkpoint-5/optimizer_0")
    checked = run("check", "checkpoint-5", "--json")
    assert [file["path"] for file in checked.json["files"]] == ["checkpoint-5/optimizer_0", "checkpoint-5/pytorch_model_fsdp_0"]


def test_lightning(run: Callable[..., Any], trained: tuple[Net, torch.optim.AdamW]) -> None:
    """A folder called .ckpt, with meta.pt in it."""
    save({"state_dict": get_model_state_dict(trained[0]), "optimizer_0": get_optimizer_state_dict(*trained)}, "last.ckpt")
    torch.save({"epoch": 1, "global_step": 5}, "last.ckpt/meta.pt")
    said = run("inspect", "last.ckpt").out
    assert "root state_dict: 5 tensors" in said and "root optimizer_0: 12 tensors" in said and "Lightning's: meta.pt" in said
    carried("last.ckpt", trained)


def test_megatron(run: Callable[..., Any], place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flat keys, layers stacked along a first dimension, a class of Megatron's around all: plain tensors are read, the class is named."""
    name = "megatron.core.dist_checkpointing.strategies.torch"
    for end in (8, 13, 32, 43, len(name)):
        module = types.ModuleType(name[:end])
        monkeypatch.setitem(sys.modules, module.__name__, module)

    @dataclass
    class MCoreMetadata(Metadata):
        mcore_data: Any = None

    MCoreMetadata.__module__, MCoreMetadata.__qualname__ = module.__name__, "MCoreMetadata"
    module.MCoreMetadata = MCoreMetadata  # type: ignore[attr-defined]
    stacked = torch.arange(24.0).reshape(2, 4, 3)
    key = "decoder.layers.mlp.weight"
    save({key: stacked, f"optimizer.state.exp_avg.{key}": stacked + 1, "rng_state/shard_0_1": b"x"}, "iter_5")
    path = Path("iter_5/.metadata")
    found = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(MCoreMetadata(found.state_dict_metadata, {}, found.storage_data, mcore_data={"a": {"b": (1, 2)}})))
    Path("iter_5/metadata.json").write_text(json.dumps({"sharded_backend": "torch_dist"}))
    torch.save({"iteration": 5}, "iter_5/common.pt")
    told = run("inspect", "iter_5", "--json").json
    assert [root["root"] for root in told["roots"]] == ["", "optimizer"] and "Megatron's torch_dist" in run("inspect", "iter_5").out
    assert told["globals"] == ["megatron.core.dist_checkpointing.strategies.torch.MCoreMetadata"]
    assert run("merge", "iter_5", "-o", "o.pt").code == 0
    made = torch.load("o.pt", weights_only=True)
    assert made.keys() == {key} and torch.equal(made[key], stacked)


def test_every_command_takes_a_folder_where_it_takes_a_file(run: Callable[..., Any], place: Path) -> None:
    """Sources and targets, averages, plans and groups; casts and renames of tensors that lie in pieces."""
    import shutil

    for name in ("fsdp2", "fsdp4", "tp2"):
        shutil.copytree(DATA / name, place / name)
    (place / "net.py").write_text(
        "from torch import nn, tensor\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        self.emb, self.up, self.head = nn.Embedding(3, 6), nn.Linear(6, 6), nn.Linear(6, 2)\n"
        "        self.register_buffer('seen', tensor(0))\n"
    )
    assert "matched         5" in run("diff", "fsdp2", "tp2").out and "matched         5" in run("match", "fsdp4", "tp2").out
    assert run("plan", "fsdp2", "net:Net", "-o", "plan.json").code == 0 and run("apply", "plan.json", "-o", "m.pt").code == 0
    assert run("groups", "m.pt", "net:Net", "--lr", "1e-3", "--fresh-lr", "1e-2").code == 0
    assert run("merge", "tp2", "m.pt", "-o", "kept.pt").code == 0 and run("merge", "m.pt", "tp2", "-o", "other.pt").code == 0
    assert run("skeleton", "tp2", "-o", "net.json").code == 0 and run("merge", "--average", "tp2", "fsdp2", "-o", "mean.pt").code == 0
    read = {name: by_torch(name) for name in ("tp2", "fsdp2")}
    mean = torch.load("mean.pt", weights_only=True)
    assert all(torch.equal(mean[key], (read["tp2"][key] + read["fsdp2"][key]) / 2) for key in mean if key != "seen")
    rules = ("--rename", "down.{p}", "head.{p}", "--dtype", "BF16", "--adapt", "up.weight", "slice(dim=0, start=1, stop=3)")
    ended = run("merge", "tp2", "-o", "cut.pt", *rules)
    assert ended.code == 0, ended.err
    cut = torch.load("cut.pt", weights_only=True)
    assert torch.equal(cut["head.weight"], read["tp2"]["down.weight"].bfloat16())
    assert torch.equal(cut["up.weight"], read["tp2"]["up.weight"][1:3].bfloat16())
    net = Net()
    assert len(cs.transfer("tp2", net).transferred) == 5 and torch.equal(net.down.weight, read["tp2"]["down.weight"])


def by_torch(folder: str) -> dict[str, torch.Tensor]:
    """The model's part, as dcp.load gives it."""
    state = {"model": Net().state_dict()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=folder)
    return state["model"]
