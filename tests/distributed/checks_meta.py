"""Models that were built on the meta device: memory, and the same initial values on every mesh."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from checks import Net, bits, check, device, ids, mesh, on_all, refusal, saved, seeded, sharded, whole
from torch import nn
from torch.distributed.fsdp import fully_shard

import ckptsurgeon as cs


def on_meta(classes: int = 6) -> nn.Module:
    with torch.device("meta"):
        return Net(classes)


def body(folder: Path) -> tuple[Path, dict[str, Any]]:
    state = {key: value for key, value in seeded(1, 6).state_dict().items() if not key.startswith(("head.", "layers.1."))}
    return saved(state, folder / "body.safetensors"), state


@check(1, 2, 4)
def fresh_values_are_the_same_on_every_mesh(folder: Path) -> None:
    """They are what the layer's own reset_parameters gives a model on one machine, by the seed."""
    path, state = body(folder)
    plain = seeded(2, 6)
    wanted = cs.transfer(path, plain, init={"head.*": "reset", "layers.1.*": "reset"}, seed=3)
    model = sharded(on_meta())
    report = cs.transfer(path, model, seed=3)
    assert report.fresh == wanted.fresh and len(set(on_all(str(report)))) == 1
    found = whole(model)
    for key, value in plain.state_dict().items():
        assert bits(found[key]) == bits(value), key
    assert {str(one.device).partition(":")[0] for one in model.state_dict().values()} == {device()}
    assert not bool((found["head.weight"] == 0).all())
    assert found.keys() == state.keys() | set(report.fresh)


@check(1, 2)
def a_named_scheme_and_a_tie(folder: Path) -> None:
    state = {key: value for key, value in seeded(1).state_dict().items() if key not in ("head.bias",)}
    path = saved(state, folder / "net.safetensors")
    model = sharded(on_meta(7))
    cs.transfer(path, model, init={"head.bias": "constant(2)"})
    assert model.head.weight is model.embed.weight
    found = whole(model)
    assert found["head.bias"].tolist() == [2.0] * 7 and bits(found["embed.weight"]) == bits(state["embed.weight"])
    model(ids()).backward()


@check(1, 2)
def a_failure_leaves_it_on_meta(folder: Path) -> None:
    path, _ = body(folder)
    model = sharded(on_meta())
    assert refusal(lambda: cs.transfer(path, model, init={"layers.1.num_batches_tracked": "normal"})).startswith("RuleError")
    assert all(one.is_meta for one in model.parameters())
    torn = saved({"embed.weight": torch.full((7, 4), 1e30)}, folder / "torn.safetensors")
    with torch.device("meta"):
        half = nn.Module()
        half.embed = nn.Embedding(7, 4, dtype=torch.float16)
    fully_shard(half, mesh=mesh(dist.get_world_size()))
    assert refusal(lambda: cs.transfer(torn, half)).startswith("CastError")
    assert all(one.is_meta for one in half.parameters())


@check(2)
def what_the_state_dict_does_not_show_is_refused(folder: Path) -> None:
    path = saved({"w": torch.zeros(4)}, folder / "w.safetensors")
    with torch.device("meta"):
        model = nn.Module()
        model.w = nn.Parameter(torch.zeros(4))
        model.register_buffer("frequencies", torch.zeros(3), persistent=False)
    fully_shard(model, mesh=mesh(dist.get_world_size()))
    wrong = refusal(lambda: cs.transfer(path, model))
    assert wrong.startswith("ModelError: frequencies") and len(set(on_all(wrong))) == 1
    model.frequencies = torch.arange(3.0)
    torn = saved({"w": torch.full((4,), 1e300, dtype=torch.float64)}, folder / "torn.safetensors")
    assert refusal(lambda: cs.transfer(torn, model)).startswith("CastError")
    assert model.w.is_meta and model.frequencies.tolist() == [0.0, 1.0, 2.0]
    cs.transfer(path, model)
    assert model.frequencies.tolist() == [0.0, 1.0, 2.0] and model.w.to_local().tolist() == [0.0, 0.0]


@check(2)
def what_has_values_does_not_lose_them(folder: Path) -> None:
    """A buffer keeps its own, though the source has none for it; parameters that have some are refused."""
    path = saved({"w": torch.ones(4)}, folder / "w.safetensors")
    with torch.device("meta"):
        model = nn.Module()
        model.w = nn.Parameter(torch.zeros(4))
    model.register_buffer("scale", torch.tensor(3.0))
    fully_shard(model, mesh=mesh(dist.get_world_size()))
    assert cs.transfer(path, model).fresh == ("scale",)
    assert model.scale.item() == 3.0
    with torch.device("meta"):
        half = nn.Sequential(nn.Linear(2, 2))
    half.append(nn.Linear(2, 2))
    fully_shard(half, mesh=mesh(dist.get_world_size()))
    before = half[1].weight.to_local().clone()
    body = saved({"0.weight": torch.ones(2, 2), "0.bias": torch.ones(2)}, folder / "body.safetensors")
    assert refusal(lambda: cs.transfer(body, half)).startswith("ModelError: 1.weight: has values")
    assert half[0].weight.is_meta and torch.equal(half[1].weight.to_local(), before)


@check(1, 2)
def an_optimizer_of_a_meta_model(folder: Path) -> None:
    """Sharded parameters stay the objects that they were, so that an optimizer which was made first goes on with them."""
    path, _ = body(folder)
    model = sharded(on_meta())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cs.transfer(path, model)
    model(ids()).backward()
    before = whole(model)["norm.weight"].clone()
    optimizer.step()
    assert not torch.equal(before, whole(model)["norm.weight"])
