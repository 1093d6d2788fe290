"""Makes the folders beside it: what torch's own distributed writers save. Run it by torchrun, once with 2 processes and once with 4:

    torchrun --nproc-per-node 2 tests/formats/data/dcp/make.py
    torchrun --nproc-per-node 4 tests/formats/data/dcp/make.py

fsdp2, fsdp4: a model under FSDP2 (`fully_shard`) with its optimizer, on 2 and 4 ranks. tp2: tensor parallel on 2 ranks, so that some
weights are tiled along dim 1. ranks2: saved without collectives, each rank with its own `__N.metadata`. hf2: the files of
HuggingFaceStorageWriter.
"""

import os
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

HERE = Path(__file__).parent


class Net(nn.Module):
    """Two linear layers and an embedding of few rows: 3 over 4 ranks leaves one without any."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(3, 6)
        self.up = nn.Linear(6, 6)
        self.down = nn.Linear(6, 4, bias=False)
        self.register_buffer("seen", torch.tensor(7))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(self.emb(tokens))))


def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """The states of both after one step."""
    model(torch.tensor([[0, 1, 2]])).sum().backward()
    optimizer.step()
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optim": moments, "step": 3, "lst": [1, torch.arange(2)], "sched": {"last_lr": [0.1], "none": []}}


def new(name: str) -> str:
    """An empty folder, in which the name of no machine's folder gets into a file."""
    if dist.get_rank() == 0:
        shutil.rmtree(name, ignore_errors=True)
    dist.barrier()
    return name


os.chdir(HERE)
dist.init_process_group("gloo")
world = dist.get_world_size()
mesh = init_device_mesh("cpu", (world,))
torch.manual_seed(0)
net = Net()
fully_shard(net, mesh=mesh)
optimizer = torch.optim.AdamW(net.parameters(), lr=0.1) if world == 2 else torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
dcp.save(trained(net, optimizer), checkpoint_id=new(f"fsdp{world}"))
if world == 2:
    torch.manual_seed(0)
    net = Net()
    parallelize_module(net, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    dcp.save(trained(net, optimizer), checkpoint_id=new("tp2"))
    whole = torch.arange(24.0).reshape(6, 4)
    state = {
        "rows": distribute_tensor(whole, mesh, [Shard(0)]),
        "columns": distribute_tensor(whole + 100, mesh, [Shard(1)]),
        "all": DTensor.from_local(torch.arange(6).to(torch.float8_e4m3fn), mesh, [Replicate()]),
    }
    dcp.save(state, checkpoint_id=new("ranks2"), use_collectives=False)
    dcp.save({key: state[key] for key in ("rows", "all")}, storage_writer=HuggingFaceStorageWriter(path=new("hf2"), save_distributed=True))
dist.barrier()
dist.destroy_process_group()
