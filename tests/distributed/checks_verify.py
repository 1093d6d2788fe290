"""verify of live models, which compares what they hold: each rank its own part."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from checks import Net, check, kinds, on_all, saved, seeded, sharded
from torch.nn.parallel import DistributedDataParallel

import ckptsurgeon as cs


@check(1, 2, 4)
def one_wrong_bit_on_one_rank(folder: Path) -> None:
    state = seeded(1).state_dict()
    path = saved({"model": state}, folder / "net.pt")
    model = sharded(seeded(2))
    assert not cs.verify(path, model).ok
    cs.transfer(path, model)
    found = cs.verify(path, model)
    assert found.ok and found.bitwise and found.tensors == len(state) and found.root == "model"
    last = len(state["layers.0.weight"].chunk(dist.get_world_size())) - 1  # of six rows over four ranks, one has none
    with torch.no_grad():
        own = model.layers[0].weight.to_local()
        if dist.get_rank() == last:
            own[-1, 2] = -own[-1, 2]
    found = cs.verify(path, model)
    assert len(set(on_all(str(found)))) == 1
    wrong = [(row.code, row.key, row.message) for row in found.findings if row.level == "error"]
    assert wrong == [("differs", "layers.0.weight", "1 of 24 elements differ from the file, the first at (5, 2)")]


@check(2)
def copies_of_ddp_and_names_without_wrappers(folder: Path) -> None:
    state = seeded(1).state_dict()
    path = saved(state, folder / "net.safetensors")
    model = DistributedDataParallel(seeded(1))
    assert cs.verify(path, model).ok
    with torch.no_grad():
        model.module.norm.bias[0] += dist.get_rank()
    found = cs.verify(path, model)
    assert [row.key for row in found.findings if row.level == "error"] == ["norm.bias"] and len(set(on_all(str(found)))) == 1


@check(2)
def damage_is_told_on_all(folder: Path) -> None:
    state = {"w": torch.arange(6.0)}
    path = saved(state, folder / "net.pt")
    if dist.get_rank() == 0:
        data = bytearray(path.read_bytes())
        place = bytes(data).index(state["w"].numpy().tobytes())
        data[place] ^= 1
        path.write_bytes(data)
    dist.barrier()
    model = torch.nn.Module()
    model.w = torch.nn.Parameter(torch.arange(6.0))
    torch.distributed.fsdp.fully_shard(model)
    codes = [(row.code, row.key) for row in cs.verify(path, model).findings if row.level == "error"]
    assert on_all(codes) == [[("differs", "w"), ("checksum", "w")]] * 2, codes


@check(2)
def a_missing_file_on_one_rank(folder: Path) -> None:
    path = saved(seeded(1).state_dict(), folder / "net.safetensors")
    model = sharded(seeded(1))
    own = path if dist.get_rank() == 0 else folder / "no.safetensors"
    assert kinds(lambda: cs.verify(own, model)) == ["UnreadableError"] * 2


@check(1, 2)
def a_model_on_meta_is_refused(folder: Path) -> None:
    path = saved(seeded(1).state_dict(), folder / "net.safetensors")
    with torch.device("meta"):
        model = sharded(Net())
    assert kinds(lambda: cs.verify(path, model)) == ["ModelError"] * dist.get_world_size()
