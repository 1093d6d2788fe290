"""Saves a small FSDP2 model and its optimizer by a framework's own code, under torchrun with 2 ranks: `save_by_frameworks.py lightning`.

`accelerate` writes `checkpoint-5/pytorch_model_fsdp_0` and `checkpoint-5/optimizer_0`, `lightning` the folder `last.ckpt`; beside them
`full.pt` has the whole weights and moments, as torch gathers them.
"""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict
from torch.distributed.fsdp import StateDictType, fully_shard


def net() -> nn.Sequential:
    """The model that is saved; also what it is loaded into."""
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(3, 6), nn.Linear(6, 6), nn.Linear(6, 4, bias=False))


def step(model: Any, optimizer: Any) -> None:
    """One step of training."""
    model(torch.tensor([0, 2])).sum().backward()
    optimizer.step()


def by_accelerate() -> tuple[Any, Any]:
    """What accelerate's `save_state` does with a model in shards; its `Accelerator` takes no FSDP2 model on a CPU."""
    from accelerate import PartialState
    from accelerate.utils.fsdp_utils import save_fsdp_model, save_fsdp_optimizer

    state = PartialState(cpu=True)
    model = fully_shard(net(), mesh=torch.distributed.init_device_mesh("cpu", (state.num_processes,)))
    optimizer = torch.optim.AdamW(model.parameters())
    step(model, optimizer)
    plugin = SimpleNamespace(
        fsdp_version=2, state_dict_type=StateDictType.SHARDED_STATE_DICT, state_dict_config=SimpleNamespace(offload_to_cpu=True)
    )
    save_fsdp_model(plugin, state, model, "checkpoint-5")
    save_fsdp_optimizer(plugin, state, optimizer, model, "checkpoint-5")
    return model, optimizer


def by_lightning() -> tuple[Any, Any]:
    """Lightning's Fabric, through its public calls."""
    from lightning.fabric import Fabric
    from lightning.fabric.strategies import ModelParallelStrategy

    strategy = ModelParallelStrategy(
        parallelize_fn=lambda model, mesh: fully_shard(model, mesh=mesh["data_parallel"]), data_parallel_size=2, tensor_parallel_size=1
    )
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy)
    fabric.launch()
    model = fabric.setup(net())
    optimizer = fabric.setup_optimizers(torch.optim.AdamW(model.parameters()))
    step(model, optimizer)
    fabric.save("last.ckpt", {"state_dict": model, "optimizer_0": optimizer, "epoch": 1, "global_step": 5})
    return model.module, optimizer.optimizer


def main() -> None:
    """Save, and gather the same on rank 0."""
    model, optimizer = {"accelerate": by_accelerate, "lightning": by_lightning}[sys.argv[1]]()
    whole = StateDictOptions(full_state_dict=True, cpu_offload=True)
    full = {"model": get_model_state_dict(model, options=whole), "optimizer": get_optimizer_state_dict(model, optimizer, options=whole)}
    if torch.distributed.get_rank() == 0:
        torch.save(full, "full.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
