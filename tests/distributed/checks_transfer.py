"""What transfer puts into models that are spread over ranks, against torch's own load into the model on one machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from checks import bits, check, device, ids, mesh, on_all, refusal, same, saved, seeded, sharded
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import ckptsurgeon as cs


def file_of(
    folder: Path, name: str = "net.safetensors", classes: int = 7, dtype: torch.dtype = torch.float32
) -> tuple[Path, dict[str, Any]]:
    """A file of a model's values, and these."""
    state = seeded(1, classes, dtype).state_dict()
    return saved({"model": state, "epoch": 3} if name.endswith(".pt") else state, folder / name), state


def tensor_parallel(net: nn.Module, over: Any) -> nn.Module:
    plan = {"layers.0": ColwiseParallel(), "layers.2": RowwiseParallel(), "embed": RowwiseParallel(input_layouts=Replicate())}
    return parallelize_module(net, over, plan)


@check(1, 2, 4)
def one_file_into_fsdp(folder: Path) -> None:
    path, state = file_of(folder)
    model = sharded(seeded(2))
    report = cs.transfer(path, model)
    assert len(set(on_all(str(report)))) == 1
    assert set(report.transferred) == set(state)
    same(model, state)


@check(1, 2)
def a_torch_file_with_its_root(folder: Path) -> None:
    path, state = file_of(folder, "net.pt")
    model = sharded(seeded(2))
    assert cs.transfer(path, model, root="model").roots == ("model",)
    same(model, state)


@check(1, 2)
def copies_of_ddp(folder: Path) -> None:
    path, state = file_of(folder)
    model = DistributedDataParallel(seeded(2).to(device()))
    report = cs.transfer(path, model)
    assert len(set(on_all(str(report)))) == 1
    same(model, state)


@check(2)
def tensor_parallelism(folder: Path) -> None:
    path, state = file_of(folder, classes=6)
    model = tensor_parallel(seeded(2, 6), mesh(2))
    cs.transfer(path, model)
    same(model, state)


@check(4)
def fsdp_of_tensor_parallelism(folder: Path) -> None:
    path, state = file_of(folder, classes=6)
    both = mesh(2, 2)
    model = sharded(tensor_parallel(seeded(2, 6), both["model"]), both["data"])
    cs.transfer(path, model)
    same(model, state)


@check(4)
def hybrid_shards_are_equal_in_all_replicas(folder: Path) -> None:
    path, state = file_of(folder)
    model = sharded(seeded(2 + dist.get_rank() // 2), mesh(2, 2))
    cs.transfer(path, model)
    same(model, state)
    parts = on_all(
        {key: bits(value.to_local()) if hasattr(value, "to_local") else bits(value) for key, value in model.state_dict().items()}
    )
    assert parts[0] == parts[2] and parts[1] == parts[3]


@check(2)
def compiled_and_checkpointed(folder: Path) -> None:
    path, state = file_of(folder)
    net = seeded(2)
    apply_activation_checkpointing(net, check_fn=lambda module: isinstance(module, nn.Linear) and module.out_features == 6)
    net.layers[2] = torch.compile(net.layers[2])
    model = torch.compile(sharded(net))
    report = cs.transfer(path, model)
    assert report.coverage.tensors == 1.0
    same(model, state)


@check(1, 2)
def hugging_face_shards(folder: Path) -> None:
    from safetensors.torch import save_file

    state = {key: value.clone() for key, value in seeded(1).state_dict().items()}
    if dist.get_rank() == 0:
        keys, files = list(state), ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
        rows = {key: files[number % 2] for number, key in enumerate(keys)}
        for file in files:
            save_file({key: state[key] for key in keys if rows[key] == file}, folder / file, {"format": "pt"})
        import json

        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": rows}))
    dist.barrier()
    model = sharded(seeded(2))
    cs.transfer(folder, model)
    same(model, state)


@check(2)
def a_live_model_and_a_live_sharded_one(folder: Path) -> None:
    source = seeded(1)
    model = sharded(seeded(2))
    cs.transfer(source, model)
    same(model, source.state_dict())
    other = nn.Module()
    other.weight = nn.Parameter(distribute_tensor(torch.randn(5, 3), mesh(2), [Shard(0)]))
    goal = nn.Module()
    goal.weight = nn.Parameter(distribute_tensor(torch.zeros(5, 3), mesh(2), [Shard(1)]))
    cs.transfer(other, goal)
    assert bits(goal.weight.full_tensor()) == bits(other.weight.full_tensor())


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, shape in {"q": (3, 4), "k": (3, 4), "v": (3, 4), "t": (4, 5), "new": (3,), "grown": (9, 2), "copy": (3,)}.items():
            setattr(self, name, nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(len(name)))))


RULES = """
[[adapt]]
from = "qkv"
to = ["q", "k", "v"]
op = "chunk(dim=0)"

[[adapt]]
from = "turned"
to = "t"
op = "transpose"

[[adapt]]
key = "grown"
op = "pad(dim=0, fill='init')"

[[rename]]
from = "old"
to = "new"

[[init]]
key = "copy"
scheme = "from(new)"
"""


@check(1, 2, 4)
def rules_move_and_compute(folder: Path) -> None:
    """A matrix cut in three, which moves bytes only, one turned and one grown by the model's own rows, and another key's value."""
    state = {"qkv": torch.randn(9, 4), "turned": torch.randn(5, 4), "old": torch.randn(3), "grown": torch.randn(6, 2)}
    state = on_all(state)[0]
    path, rules = saved(state, folder / "f.safetensors"), folder / "rules.toml"
    if dist.get_rank() == 0:
        rules.write_text(RULES)
    dist.barrier()
    plain, model = Parts(), fully_sharded(Parts())
    one, other = cs.transfer(path, plain, rules=[rules]), cs.transfer(path, model, rules=[rules])
    assert (one.transferred, one.adapted, one.partial, one.fresh) == (other.transferred, other.adapted, other.partial, other.fresh)
    assert (
        bits(plain.k) == bits(state["qkv"][3:6]) and bits(plain.t) == bits(state["turned"].t()) and bits(plain.copy) == bits(state["old"])
    )
    same(model, {key: value.detach() for key, value in plain.state_dict().items()})


@check(1, 2)
def casts_are_counted_once(folder: Path) -> None:
    path, state = file_of(folder)
    plain, model = seeded(2).to(torch.bfloat16), sharded(seeded(2).to(torch.bfloat16))
    wanted, found = cs.transfer(path, plain), cs.transfer(path, model)
    assert found.casts == wanted.casts and found.casts
    assert len(set(on_all(str(found.casts)))) == 1
    goal = seeded(3).to(torch.bfloat16)
    goal.load_state_dict(state)
    same(model, goal.state_dict())


@check(2)
def a_cast_that_overflows_on_one_rank_is_refused_on_all(folder: Path) -> None:
    state = {"w": torch.ones(4, 3)}
    state["w"][3, 2] = 1e30
    path = saved(state, folder / "w.safetensors")
    model = nn.Module()
    model.w = nn.Parameter(torch.zeros(4, 3, dtype=torch.float16))
    model = fully_sharded(model)
    assert len(set(on_all(refusal(lambda: cs.transfer(path, model))))) == 1 and refusal(lambda: cs.transfer(path, model)).startswith(
        "CastError"
    )
    same(model, {"w": torch.zeros(4, 3, dtype=torch.float16)})


@check(2)
def a_plain_tensor_among_sharded_ones_grows_too(folder: Path) -> None:
    path = saved({"rows": torch.ones(4, 3), "plain": torch.ones(2, 3)}, folder / "f.safetensors")
    model = nn.Module()
    model.rows = nn.Parameter(distribute_tensor(torch.zeros(5, 3), mesh(2), [Shard(0)]))
    model.plain = nn.Parameter(torch.full((3, 3), 7.0))
    report = cs.transfer(path, model, adapt={"{n}": "pad(dim=0, fill='init')"})
    assert report.partial == ("rows", "plain")
    same(model, {"rows": torch.tensor([[1.0] * 3] * 4 + [[0.0] * 3]), "plain": torch.tensor([[1.0] * 3] * 2 + [[7.0] * 3])})


def fully_sharded(net: nn.Module) -> nn.Module:
    fully_shard(net.to(device()), mesh=mesh(dist.get_world_size()))
    return net


@check(1, 2)
def an_optimizer_by_name(folder: Path) -> None:
    """Moments of a training on one machine come to a sharded optimizer as torch's own set_optimizer_state_dict puts them."""
    net = seeded(1)
    first = torch.optim.AdamW(net.parameters(), lr=0.1)
    net(ids().cpu()).backward()
    first.step()
    path = saved({"model": net.state_dict(), "optimizer": first.state_dict()}, folder / "train.pt")
    model = sharded(seeded(2))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    report = cs.transfer(path, model, root="model", optimizer=optimizer)
    assert len(set(on_all(str(report.optimizer)))) == 1 and len(report.optimizer.carried) == len(optimizer.state)
    options = StateDictOptions(full_state_dict=True)
    wanted = get_optimizer_state_dict(net, first, options=options)["state"]
    found = get_optimizer_state_dict(model, optimizer, options=options)["state"]
    assert found.keys() == wanted.keys()
    for name, moments in wanted.items():
        for slot, value in moments.items():
            assert bits(found[name][slot]) == bits(value), (name, slot)
    model(ids()).backward()
    optimizer.step()


@check(1, 2)
def groups_freezing_and_thawing(folder: Path) -> None:
    state = {key: value for key, value in seeded(1, 6).state_dict().items() if not key.startswith("head.")}
    path = saved(state, folder / "net.safetensors")
    plain, model = seeded(2, 6), sharded(seeded(2, 6))
    wanted, report = cs.transfer(path, plain), cs.transfer(path, model)
    one, other = (cs.param_groups(each, said, lr=1e-3, fresh_lr=1e-2) for each, said in ((plain, wanted), (model, report)))
    assert [(row["name"], row["lr"], row["param_names"]) for row in one] == [(row["name"], row["lr"], row["param_names"]) for row in other]
    optimizer = torch.optim.SGD(other, momentum=0.9)
    frozen = cs.freeze(model, report)
    assert frozen.trainable == ("head.weight", "head.bias")
    model(ids()).backward()
    assert model.embed.weight.grad is None and model.head.weight.grad is not None
    optimizer.step()
    thaw = cs.Thaw(model, optimizer_over(model), ["norm.*", "layers.**"], lr=0.1, at=1)
    thaw.step()
    assert model.norm.weight.requires_grad and not model.tail.weight.requires_grad
    model(ids()).backward()
    assert model.norm.weight.grad is not None
    assert cs.unfreeze(model, "tail.*").trainable == ("tail.weight", "norm.weight", "norm.bias", "head.weight", "head.bias")


def optimizer_over(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD([one for one in model.parameters() if one.requires_grad], lr=0.1)


@check(1, 2, 4)
def initialize_draws_the_same_as_on_one_machine(folder: Path) -> None:
    schemes = {"head.weight": "xavier_normal", "head.bias": "from(norm.bias)", "layers.0.*": "reset", "layers.2.*": "per_layer_type"}
    plain, model = seeded(2, 4), sharded(seeded(2, 4))
    keys = [f"{layer}.{leaf}" for layer in ("head", "layers.0", "layers.2") for leaf in ("weight", "bias")]
    wanted, found = (cs.initialize(each, keys, schemes, seed=5) for each in (plain, model))
    assert wanted == found and len(found) == 6
    same(model, plain.state_dict())


@check(1, 2)
def an_averaged_copy_in_shards(folder: Path) -> None:
    net, average = seeded(1), seeded(3)
    path = saved({"model": net.state_dict(), "ema": average.state_dict()}, folder / "train.pt")
    model, copy = sharded(seeded(2)), sharded(seeded(4))
    report = cs.transfer(path, model, ema=copy)
    assert report.optimizer.others == ("ema",) and len(set(on_all(str(report.optimizer.ema)))) == 1
    same(model, net.state_dict())
    same(copy, average.state_dict())


@check(1, 2)
def again_after_a_step_of_training(folder: Path) -> None:
    """After a forward pass FSDP2 may hold whole parameters, which must not be what is written to."""
    path, state = file_of(folder)
    model = sharded(seeded(2))
    model(ids())
    cs.transfer(path, model)
    same(model, state)
    plain = seeded(1)
    assert bits(model.eval()(ids())) == bits(plain.to(device()).eval()(ids()))


@check(2)
def progress_is_each_ranks_own_and_cannot_cut_it_in_two(folder: Path) -> None:
    path, state = file_of(folder)
    model, seen = sharded(seeded(2)), []
    cs.transfer(path, model, progress=seen.append)
    (last,) = [row for row in seen if row.phase == "transferring" and row.done == row.total]
    parts = {key: getattr(value, "to_local", lambda value=value: value)() for key, value in model.state_dict().items()}
    assert last.total == sum(part.nbytes for key, part in parts.items() if key != "head.weight")  # tied to another

    def stops(event: Any) -> None:
        if dist.get_rank() == 1 and event.phase == "transferring":
            raise InterruptedError

    model, came = sharded(seeded(3)), ""
    try:
        cs.transfer(path, model, progress=stops)
    except InterruptedError:
        came = "stopped"
    assert on_all(came) == ["", "stopped"]
    same(model, state)
