"""The table of checks that run under torchrun, and what they share: models, meshes, and how one is run on all ranks."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard

import ckptsurgeon as cs

CHECKS: dict[str, Check] = {}


@dataclass(frozen=True)
class Check:
    """A function that takes a folder of its own, shared by all ranks, and fails by an exception; and on how many ranks it is run."""

    run: Callable[[Path], None]
    sizes: tuple[int, ...]


def check(*sizes: int) -> Callable[[Callable[[Path], None]], Callable[[Path], None]]:
    def added(function: Callable[[Path], None]) -> Callable[[Path], None]:
        name = f"{function.__module__.removeprefix('checks_')}-{function.__name__}"
        assert name not in CHECKS
        CHECKS[name] = Check(function, sizes)
        return function

    return added


def names(size: int) -> list[str]:
    return [name for name, one in CHECKS.items() if size in one.sizes]


def run_all(folder: Path, name: str | None = None) -> dict[str, str]:
    """Each check of this number of ranks to what went wrong on any of them, `""` for nothing."""
    results = {}
    for number, each in enumerate(names(dist.get_world_size())):
        if name is not None and name not in each:
            continue
        own = folder / str(number)
        if dist.get_rank() == 0:
            own.mkdir()
        dist.barrier()
        try:
            CHECKS[each].run(own)
            wrong = ""
        except BaseException:  # noqa: BLE001
            wrong = traceback.format_exc()
        rows: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(rows, wrong)
        results[each] = "\n".join(f"rank {rank}: {row}" for rank, row in enumerate(rows) if row)
    return results


class Net(nn.Module):
    """Few rows, so that four ranks share them unevenly and one may have none; a norm with buffers; two names for one tensor."""

    def __init__(self, classes: int = 7) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.layers = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 4))
        self.tail = nn.Linear(4, 3, bias=False)
        self.norm = nn.LayerNorm(4)
        self.head = nn.Linear(4, classes)
        if classes == 7:
            self.head.weight = self.embed.weight

    def forward(self, ids: torch.Tensor) -> Any:
        hidden = self.layers(self.embed(ids))
        return self.head(self.norm(hidden)).sum() + self.tail(hidden).sum()


def device() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def ids() -> torch.Tensor:
    """An input of `Net`."""
    return torch.arange(6, device=device())


def mesh(*sizes: int) -> DeviceMesh:
    names = ("data", "model")[: len(sizes)] if len(sizes) > 1 else ("data",)
    return init_device_mesh(device(), sizes, mesh_dim_names=names)


def seeded(seed: int, classes: int = 7, dtype: torch.dtype = torch.float32) -> Net:
    """A model with values of its own in every tensor, the same on every rank."""
    torch.manual_seed(seed)
    net = Net(classes).to(dtype)
    with torch.no_grad():
        for tensor in (*net.parameters(), *net.buffers()):
            tensor.copy_(torch.randint(1, 9, tensor.shape) if not tensor.is_floating_point() else torch.randn(tensor.shape))
    return net


def sharded(net: nn.Module, over: DeviceMesh | None = None) -> nn.Module:
    """By FSDP2, one group for the layers and one for the rest."""
    net.to(device()) if not any(one.is_meta for one in net.parameters()) else None
    fully_shard(net.layers, mesh=over or mesh(dist.get_world_size()))
    fully_shard(net, mesh=over or mesh(dist.get_world_size()))
    return net


def whole(model: nn.Module) -> dict[str, torch.Tensor]:
    """A model's whole values, as torch gathers them on every rank; names without wrappers."""
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=False))


def same(model: nn.Module, wanted: dict[str, torch.Tensor]) -> None:
    """Fail unless the model's whole values are these, bit for bit."""
    found = whole(model)
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    for key, value in wanted.items():
        assert bits(found[key]) == bits(value), key


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, torch.Size, bytes]:
    dense = tensor.detach().cpu().contiguous()
    return dense.dtype, dense.shape, bytes(dense.view(-1).view(torch.uint8).numpy())


def saved(state: dict[str, Any], path: Path) -> Path:
    """Written by rank 0 as safetensors or by torch.save, and there on all."""
    if dist.get_rank() == 0:
        if path.suffix == ".safetensors":
            save_file({key: value.clone().contiguous() for key, value in state.items()}, path)
        else:
            torch.save(state, path)
    dist.barrier()
    return path


def refusal(call: Callable[[], Any]) -> str:
    """The kind of error of ours that a call raises, with its text; `""` for none."""
    try:
        call()
    except cs.CheckpointError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def on_all(value: Any) -> list[Any]:
    rows: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(rows, value)
    return rows


def kinds(call: Callable[[], Any]) -> list[str]:
    """The kind of error of ours that a call raises on each rank; `""` for none."""
    return [wrong.partition(":")[0] for wrong in on_all(refusal(call))]
