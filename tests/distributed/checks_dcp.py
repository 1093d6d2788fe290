"""Folders of torch.distributed.checkpoint into models over other meshes; torch's own `dcp.load` gives what they must hold."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from checks import bits, check, device, on_all, saved, whole
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import ckptsurgeon as cs

FOLDERS = Path(__file__).parents[1] / "formats" / "data" / "dcp"


class Saved(nn.Module):
    """The model that `tests/formats/data/dcp/make.py` saves."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(3, 6)
        self.up = nn.Linear(6, 6)
        self.down = nn.Linear(6, 4, bias=False)
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(self.emb(tokens))))


def in_shards(kind: str) -> nn.Module:
    model, over = Saved().to(device()), init_device_mesh(device(), (dist.get_world_size(),))
    if kind == "columns":
        return parallelize_module(model, over, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fully_shard(model, mesh=over)
    return model


def resumes(name: str, kind: str, make: Any) -> None:
    """Weights and moments as dcp.load and set_state_dict put them, and the same next step of the training."""
    ours, theirs = in_shards(kind), in_shards(kind)
    mine, other = make(ours), make(theirs)
    report = cs.transfer(FOLDERS / name, ours, root="model", optimizer=mine)
    assert len(set(on_all(str(report) + str(report.optimizer)))) == 1
    theirs(torch.tensor([[0, 1, 2]], device=device())).sum().backward()
    other.step()  # torch fills what is there
    weights, moments = get_state_dict(theirs, other)
    state = {"model": weights, "optim": moments}
    dcp.load(state, checkpoint_id=FOLDERS / name)
    set_state_dict(theirs, other, model_state_dict=state["model"], optim_state_dict=state["optim"])
    for key, value in whole(theirs).items():
        assert bits(whole(ours)[key]) == bits(value), key
    pairs = list(zip(ours.parameters(), theirs.parameters(), strict=True))
    assert set(mine.state) == {one for one, _ in pairs}
    for one, two in pairs:
        assert mine.state[one].keys() == other.state[two].keys()
        for slot, value in other.state[two].items():
            found = mine.state[one][slot]
            assert bits(local(found)) == bits(local(value)), slot


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@check(1, 2, 4)
def adamw_of_two_ranks(folder: Path) -> None:
    resumes("fsdp2", "rows", lambda model: torch.optim.AdamW(model.parameters(), lr=0.1))


@check(1, 2, 4)
def momentum_of_four_ranks(folder: Path) -> None:
    resumes("fsdp4", "rows", lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))


@check(2)
def columns_and_rows_both_ways(folder: Path) -> None:
    resumes("tp2", "rows", lambda model: torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9))
    resumes("fsdp2", "columns", lambda model: torch.optim.AdamW(model.parameters(), lr=0.1))


@check(2)
def the_saved_root_is_proven_in_place(folder: Path) -> None:
    model = in_shards("rows")
    cs.transfer(FOLDERS / "fsdp4", model, root="model")
    assert cs.verify(FOLDERS / "fsdp4", model, root="model").ok
    with torch.no_grad():
        local(model.up.weight)[:1] += 1
    assert not cs.verify(FOLDERS / "fsdp4", model, root="model").ok


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.uint8, torch.bool, torch.complex64)
DTYPES += (torch.float8_e4m3fn,)
DRAWS = int(os.environ.get("CHECKS_DRAWS", "12"))


def drawn(chance: random.Random) -> tuple[torch.Tensor, Any]:
    """A tensor of any bits, and where it is laid: over which mesh, with which placements."""
    shape = [chance.randint(0 if chance.random() < 0.1 else 1, 9) for _ in range(chance.randint(0, 3))]
    dtype = chance.choice(DTYPES)
    count = torch.empty(shape).numel() * torch.empty(0, dtype=dtype).element_size()
    raw = torch.tensor([chance.randrange(2 if dtype == torch.bool else 256) for _ in range(count)], dtype=torch.uint8)
    return raw.view(dtype).view(shape), None


def placed(value: torch.Tensor, over: Any, placements: list[Any], filled: bool) -> DTensor:
    """A whole value laid over a mesh by hand: nothing is sent, so that every dtype can be."""
    part = value
    for dim, placement in enumerate(placements):
        if isinstance(placement, Shard):
            parts = part.chunk(over.size(dim), placement.dim)
            number = over.get_coordinate()[dim]
            empty = part.narrow(placement.dim, 0, 0)
            part = parts[number] if number < len(parts) else empty
    own = part.clone().contiguous() if filled else torch.zeros_like(part).contiguous()
    return DTensor.from_local(own.to(device()), over, placements, run_check=False, shape=value.shape, stride=value.contiguous().stride())


def random_place(chance: random.Random, dims: int, over: Any) -> list[Any]:
    return [Shard(chance.randrange(dims)) if dims and chance.random() < 0.7 else Replicate() for _ in range(over.ndim)]


@check(1, 2, 4)
def what_any_mesh_saves_any_other_gets(folder: Path) -> None:
    """Random tensors, meshes and placements, saved by dcp.save on one mesh, and put into another by transfer and by dcp.load."""
    world = dist.get_world_size()
    shapes = [(world,), (1, world), (world, 1)] + ([(2, 2)] if world == 4 else [])
    meshes = [init_device_mesh(device(), shape) for shape in shapes]
    for draw in range(DRAWS):
        chance = random.Random(1000 * world + draw)
        values = {f"t{number}": drawn(chance)[0] for number in range(4)}
        state, ours, theirs = {}, nn.Module(), {}
        for key, value in values.items():
            source, goal = chance.choice(meshes), chance.choice(meshes)
            state[key] = placed(value, source, random_place(chance, value.dim(), source), True)
            place = random_place(chance, value.dim(), goal)
            ours.register_buffer(key, placed(value, goal, place, False))
            theirs[key] = placed(value, goal, place, False)
        path = folder / str(draw)
        dcp.save(state, checkpoint_id=path)
        if chance.random() < 0.5:  # the same from one file, whose tensors may be turned
            turned = {key: value.t().contiguous().t() if value.dim() == 2 else value for key, value in values.items()}
            cs.transfer(saved(turned, folder / f"{draw}.pt"), ours)
        else:
            cs.transfer(path, ours)
        dcp.load(theirs, checkpoint_id=path)
        for key in values:
            assert bits(local(getattr(ours, key))) == bits(local(theirs[key])), (draw, key, values[key].dtype, values[key].shape)
        assert cs.verify(path, ours).ok, draw
