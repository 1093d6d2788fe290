"""A parameter is found under whatever names wrappers and hooks give it; torch's own objects and the model unwrapped are the judges."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing, checkpoint_wrapper

import ckptsurgeon as cs
from ckptsurgeon.errors import ModelError, TargetError
from ckptsurgeon.models.target.parameters import inner, named, named_tensors
from ckptsurgeon.models.training.depth import depths
from ckptsurgeon.models.training.groups import without_decay


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(3))
        self.head = nn.Linear(4, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        out: torch.Tensor = self.head(x)
        return out


def renames(net: nn.Module) -> nn.Module:
    """A hook of a person's own, that turns the names of keys round and calls weights kernels."""

    def renamed(_module: Any, state: Any, _prefix: str, _local: Any) -> Any:
        found = {"/".join(reversed(key.split("."))).replace("weight", "kernel"): value for key, value in state.items()}
        state.clear()
        state.update(found)
        return state

    net._register_state_dict_hook(renamed)

    def back(state: Any, *_: Any) -> None:
        found = {".".join(reversed(key.replace("kernel", "weight").split("/"))): value for key, value in state.items()}
        state.clear()
        state.update(found)

    net._register_load_state_dict_pre_hook(back)
    return net


def checkpointed(net: nn.Module) -> nn.Module:
    kinds = (nn.Linear, nn.Embedding, nn.BatchNorm1d, nn.Sequential)
    apply_activation_checkpointing(net, check_fn=lambda module: isinstance(module, kinds))
    return net


WRAPS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda net: net,
    "activation checkpointing": checkpointed,
    "compiled": torch.compile,  # type: ignore[dict-item]
    "compiled over activation checkpointing": lambda net: torch.compile(checkpointed(net)),  # type: ignore[dict-item,return-value]
    "DataParallel of all that": lambda net: nn.DataParallel(torch.compile(checkpoint_wrapper(checkpointed(net)))),  # type: ignore[arg-type]
    "activation checkpointing of the whole": lambda net: checkpoint_wrapper(checkpointed(net)),
    "activation checkpointing of what is compiled": lambda net: checkpoint_wrapper(torch.compile(net)),  # type: ignore[arg-type]
    "averaged": lambda net: torch.optim.swa_utils.AveragedModel(checkpointed(net)),
    "a hook": renames,
    "a hook on a wrapper's inside": lambda net: nn.DataParallel(checkpointed(renames(net))),
}


def tensors(model: nn.Module) -> list[torch.Tensor]:
    """Parameters and buffers in order, to be held against those of another model."""
    core = inner(model)
    return [*core.parameters(), *core.buffers()]


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("tied", [False, True])
def test_names_and_keys_are_those_under_which_torch_has_the_very_object(wrap: str, tied: bool) -> None:
    net = Net()
    if tied:
        net.blocks[2][0].weight = net.blocks[0][0].weight  # type: ignore[index,union-attr]
    model = WRAPS[wrap](net)
    parameters, buffers = named_tensors(model)
    assert [one.tensor for one in parameters.values()] == list(model.parameters())
    state = model.state_dict(keep_vars=True)
    for part, members in ((parameters, model.named_parameters), (buffers, model.named_buffers)):
        for first, one in part.items():
            assert list(one.names) == [name for name, own in members(remove_duplicate=False) if own is one.tensor]
            assert one.names[0] == first
            assert one.keys and list(one.keys) == [key for key, own in state.items() if own is one.tensor]
            assert set(one.bare) <= {name for name, own in Net().state_dict().items()} | {"n_averaged"}


def test_weight_norms_parametrizations_are_found_and_known_for_what_they_are() -> None:
    net = checkpointed(nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), nn.Linear(2, 2)))
    keys = [key for one in named(net).values() for key in one.keys]
    assert keys[:3] == ["0.bias", "0.parametrizations.weight.original0", "0.parametrizations.weight.original1"]
    embedded = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Embedding(3, 2)))
    assert len(without_decay(embedded, True)) == 2
    biased = nn.Linear(2, 2)
    nn.utils.parametrize.register_parametrization(biased, "bias", nn.Identity())
    biased.parametrizations.bias.original.data = torch.zeros(1, 2)  # type: ignore[union-attr]
    assert without_decay(biased, True) == {"parametrizations.bias.original"}


def test_copies_that_a_hook_makes_are_told_by_name() -> None:
    net = checkpointed(Net())
    net._register_state_dict_hook(lambda _m, state, *_: state.update({key: value.clone() for key, value in state.items()}))
    assert [one.keys for one in named(net).values()] == [one.bare for one in named(net).values()]


def test_a_state_dict_without_keep_vars_is_read_all_the_same() -> None:
    class Own(nn.Linear):
        def state_dict(self) -> dict[str, torch.Tensor]:  # type: ignore[override]
            return {"kernel": self.weight.data, "bias": self.bias.data}

    assert {first: one.keys for first, one in named(Own(3, 2)).items()} == {"weight": ("kernel",), "bias": ("bias",)}


def source_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """All of a model's keys but its head's."""
    head = {id(own) for own in inner(model).head.parameters()}  # type: ignore[union-attr]
    return {key: torch.ones_like(value).detach() for key, value in model.state_dict(keep_vars=True).items() if id(value) not in head}


def transferred(model: nn.Module) -> Any:
    """A transfer's report; where torch does not take the keys back that it gave, a record of the same."""
    head = {id(own) for own in inner(model).head.parameters()}  # type: ignore[union-attr]
    try:
        return cs.transfer(source_of(model), model)
    except TargetError:
        return Recorded(tuple(key for key, value in model.state_dict(keep_vars=True).items() if id(value) in head))


@pytest.mark.parametrize("wrap", WRAPS)
def test_what_is_fresh_is_found_by_groups_and_by_freeze(wrap: str) -> None:
    model = WRAPS[wrap](Net())
    head = {id(own) for own in inner(model).head.parameters()}  # type: ignore[union-attr]
    report = transferred(model)
    groups = {group["name"]: group for group in cs.param_groups(model, report, lr=1e-3, fresh_lr=1e-2)}
    assert {id(own) for own in groups["fresh"]["params"]} == head
    assert {id(own) for own in groups["transferred"]["params"]} == {id(own) for own in model.parameters()} - head
    frozen = cs.freeze(model, report)
    assert {id(own) for own in model.parameters() if own.requires_grad} == head
    assert len(frozen.modules) == 3 and not any(layer.training for layer in model.train().modules() if isinstance(layer, nn.BatchNorm1d))


@pytest.mark.parametrize("wrap", WRAPS)
def test_depth_decay_and_thawing_are_those_of_the_model_within(wrap: str) -> None:
    plain, model = Net(), WRAPS[wrap](Net())
    flat = [
        {id(own): (group["name"], group["lr"], group["weight_decay"]) for group in groups for own in group["params"]}
        for groups in (
            cs.param_groups(one, (), lr=1.0, layer_decay=0.5, no_decay=True, weight_decay=0.1, overrides={"head.bias": 3.0})
            for one in (plain, model)
        )
    ]
    assert [flat[0][id(own)] for own in plain.parameters()] == [flat[1][id(own)] for own in model.parameters()]
    by_hand = [depths(one, "blocks.{i}.**").of.values() for one in (plain, model)]
    assert list(by_hand[0]) == list(by_hand[1]) == list(depths(model).of.values())
    stages = []
    for one in (plain, model):
        cs.freeze(one, ["embed.*", "blocks.**"])
        optimizer = torch.optim.SGD([own for own in one.parameters() if own.requires_grad], lr=0.1)
        thaw = cs.Thaw(one, optimizer, lr=0.1)
        given = cs.Thaw(one, optimizer, ["blocks.2.*.weight", "embed.*"], lr=0.1)
        rows = []
        for schedule in (thaw, given):
            rows.append([[index for index, first in enumerate(named(one)) if first in stage.keys] for stage in schedule.stages])
        thaw.step()
        rows.append([[index for index, own in enumerate(one.parameters()) if own.requires_grad]])
        stages.append(rows)
    assert stages[0] == stages[1] and stages[0][0][0]


@pytest.mark.parametrize("wrap", WRAPS)
def test_initialize_gives_every_layer_its_own_scheme(wrap: str) -> None:
    model = WRAPS[wrap](Net())
    report = transferred(model)
    before = [own.clone() for own in tensors(model)]
    assert len(cs.initialize(model, report)) == 2
    now, old = (sorted_like_state(model, values) for values in (tensors(model), before))
    changed = [name for name, one, other in zip(Net().state_dict(), now, old, strict=True) if not torch.equal(one, other)]
    assert changed == ["head.weight", "head.bias"]
    head: Any = inner(model).head
    assert not inner(head).bias.any() and 0 < inner(head).weight.std() < 0.05
    cs.initialize(model, report, {"head.weight": "constant(3)", "head.bias": "reset"})
    assert (inner(head).weight == 3).all() and inner(head).bias.any()


def sorted_like_state(model: nn.Module, values: list[torch.Tensor]) -> list[torch.Tensor]:
    """Values of `tensors(model)` in the order of an unwrapped model's state_dict."""
    core = inner(model)
    place = {id(own): value for own, value in zip([*core.parameters(), *core.buffers()], values, strict=True)}
    return [place[id(own)] for own in in_module_order(core)]


def in_module_order(module: nn.Module) -> list[torch.Tensor]:
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return own + [tensor for child in module.children() for tensor in in_module_order(child)]


def test_keys_that_torch_would_not_take_back_are_an_error_not_silence() -> None:
    """The hook within DataParallel renames the keys of the whole, and nothing renames them back before DataParallel looks at them."""
    model = nn.DataParallel(checkpointed(renames(Net())))
    source = source_of(model)
    assert set(source) <= set(model.load_state_dict(model.state_dict(), strict=False).unexpected_keys)
    before = [own.clone() for own in tensors(model)]
    with pytest.raises(TargetError, match="would be lost"):
        cs.transfer(source, model)
    assert all(map(torch.equal, before, tensors(model)))


def test_a_merged_file_says_what_is_fresh_in_the_wrapped_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    torch.save(source_of(Net()), tmp_path / "a.pt")
    spec = f"{__file__}:wrapped"
    cs.merge(tmp_path / "a.pt", spec, tmp_path / "b.pt", init={"head.weight": "per_layer_type"})
    truth = torch.load(tmp_path / "b.pt")["head.weight"]
    assert 0 < truth.std() < 0.05
    for model in (wrapped(), Net(), torch.compile(wrapped()), nn.DataParallel(Net())):
        groups = cs.param_groups(model, tmp_path / "b.pt", lr=1.0, fresh_lr=2.0)
        assert {id(own) for own in groups[1]["params"]} == {id(own) for own in inner(model).head.parameters()}


def wrapped() -> nn.Module:
    return checkpointed(Net())


def test_distributed_data_parallel(tmp_path: Path) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(checkpointed(Net()))
        report = cs.transfer(source_of(model), model)
        assert [len(group["params"]) for group in cs.param_groups(model, report, lr=1.0, fresh_lr=2.0)] == [13, 2]
        assert [len(group["params"]) for group in cs.param_groups(model, ["head.weight"], lr=1.0, fresh_lr=2.0)] == [14, 1]
    finally:
        torch.distributed.destroy_process_group()


def test_a_fresh_key_is_claimed_by_exactly_one_group_or_refused() -> None:
    packed = Net()
    packed._register_state_dict_hook(
        lambda _m, state, *_: state.update(packed=torch.cat([state.pop("head.weight"), state.pop("head.bias")[:, None]], 1))
    )
    for call in (lambda: cs.param_groups(packed, ["packed"], lr=1.0, fresh_lr=2.0), lambda: cs.freeze(packed, Recorded(("packed",)))):
        with pytest.raises(ModelError, match=r"packed.*no parameter or buffer"):
            call()
    with pytest.raises(ModelError, match=r"head\.weight.*not in the state_dict"):
        cs.param_groups(packed, ["embed.weight"], lr=1.0, fresh_lr=2.0)
    groups = cs.param_groups(packed, ["embed.weight"], lr=1.0, fresh_lr=2.0, overrides={"head.*": 3.0})
    assert [len(group["params"]) for group in groups] == [12, 1, 2]
    shared = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    shared["b"].weight = nn.Parameter(shared["a"].weight.data)

    def one_key(_module: Any, state: Any, *_: Any) -> None:
        state["both"] = state.pop("a.weight").detach()
        del state["b.weight"]

    shared._register_state_dict_hook(one_key)
    assert [len(group["params"]) for group in cs.param_groups(shared, ["both"], lr=1.0, fresh_lr=2.0)] == [2]
    with pytest.raises(ModelError, match=r"both.*2 parameters.*in different groups"):
        cs.param_groups(shared, ["both"], lr=1.0, fresh_lr=2.0, overrides={"a.*": 3.0})


class Recorded:
    """A record of what is fresh."""

    def __init__(self, fresh: tuple[str, ...]) -> None:
        self.fresh = fresh
