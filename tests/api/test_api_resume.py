"""A training that is resumed in a changed model goes on where it was; torch's own optimizer, run without a break, is the judge."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from importlib.resources import files as resources
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from data import digits
from jsonschema import Draft202012Validator
from model import Net
from torch import Tensor, nn
from variants import NetDeeper, NetGrey, NetRenamed, NetTwoClasses

import ckptsurgeon as cs
from ckptsurgeon.errors import ArgumentError, CheckpointError, FormatError, ModelError, RootError, StaleError
from ckptsurgeon.views import json as json_view

Make = Callable[[Iterable[Tensor]], torch.optim.Optimizer]
MAKERS: dict[str, Make] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, weight_decay=1e-3),
    "SGD without momentum": lambda p: torch.optim.SGD(p, lr=0.02),
    "Nesterov": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-3, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-3),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3),
    "centered": lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True, momentum=0.5),
}
MOVING = [name for name in MAKERS if name != "SGD without momentum"]
RENAME = {"fc2.{p}": "dense2.{p}"}
STEPS, MORE = 12, 6


class NetSplit(NetGrey):
    """Net whose fc1 is two halves."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 5)


DATA = digits()


def train(net: nn.Module, optimizer: Any, scheduler: Any, start: int, stop: int) -> list[float]:
    """The losses of steps `start` to `stop`, each on the batch of its own number."""
    losses = []
    for number in range(start, stop):
        index = torch.randperm(len(DATA.train_y), generator=torch.Generator().manual_seed(number))[:32]
        optimizer.zero_grad()
        loss = F.cross_entropy(net(DATA.train_x[index]), DATA.train_y[index])
        loss.backward()
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        losses.append(loss.item())
    return losses


def schedule(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 5, gamma=0.5)


def begun(make: Make, path: Path, **more: Any) -> tuple[list[float], Net]:
    """Train, save to `path`, train on: the losses after the save, and the network as saved."""
    torch.manual_seed(0)
    net = Net()
    optimizer = make(net.parameters())
    scheduler = schedule(optimizer)
    train(net, optimizer, scheduler, 0, STEPS)
    saved = {"model": net.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict(), "epoch": 3, **more}
    torch.save(saved, path)
    kept = Net()
    kept.load_state_dict(net.state_dict())
    return train(net, optimizer, scheduler, STEPS, STEPS + MORE), kept


def renewed(kind: type[nn.Module], make: Make) -> tuple[nn.Module, Any, Any]:
    torch.manual_seed(7)
    net = kind()
    optimizer = make(net.parameters())
    return net, optimizer, schedule(optimizer)


def sources(path: Path) -> list[Any]:
    return [path, str(path), cs.open(path, root="model"), torch.load(path)]


@pytest.mark.parametrize("name", MAKERS)
def test_under_another_name_the_losses_are_the_same_bit_for_bit(name: str, tmp_path: Path) -> None:
    expected, _ = begun(MAKERS[name], tmp_path / "a.pt")
    for source in sources(tmp_path / "a.pt"):
        net, optimizer, scheduler = renewed(NetRenamed, MAKERS[name])
        report = cs.transfer(source, net, rename=RENAME, optimizer=optimizer, scheduler=scheduler)
        carried = report.optimizer
        assert carried is not None and str(carried)
        assert carried.carried == tuple(key for key, _ in net.named_parameters())
        assert (carried.adapted, carried.zeroed, carried.not_carried, carried.others) == ((), (), (), ("scheduler",))
        assert (carried.place, carried.by) == ("optimizer", "order")
        assert train(net, optimizer, scheduler, STEPS, STEPS + MORE) == expected


@pytest.mark.parametrize("name", MOVING)
def test_without_the_state_the_losses_are_others(name: str, tmp_path: Path) -> None:
    expected, _ = begun(MAKERS[name], tmp_path / "a.pt")
    net, optimizer, scheduler = renewed(NetRenamed, MAKERS[name])
    assert cs.transfer(tmp_path / "a.pt", net, rename=RENAME, root="model").optimizer is None
    assert train(net, optimizer, scheduler, STEPS, STEPS + MORE) != expected
    net, optimizer, _ = renewed(NetRenamed, MAKERS[name])
    cs.transfer(tmp_path / "a.pt", net, rename=RENAME, optimizer=optimizer)  # without the schedule the rate is the new one
    assert train(net, optimizer, None, STEPS, STEPS + MORE) != expected


@pytest.mark.parametrize("name", MOVING)
def test_a_layer_split_in_two_takes_the_two_parts_of_its_moments(name: str, tmp_path: Path) -> None:
    expected, _ = begun(MAKERS[name], tmp_path / "a.pt")
    net, optimizer, scheduler = renewed(NetSplit, MAKERS[name])
    adapt = {"fc1.{p} -> left.{p} + right.{p}": "chunk"}
    report = cs.transfer(tmp_path / "a.pt", net, adapt=adapt, optimizer=optimizer, scheduler=scheduler)
    assert report.optimizer is not None
    assert report.optimizer.adapted == ("left.weight", "left.bias", "right.weight", "right.bias")
    assert report.optimizer.zeroed == ()
    assert train(net, optimizer, scheduler, STEPS, STEPS + MORE) == pytest.approx(expected, rel=2e-4)
    bare, optimizer, scheduler = renewed(NetSplit, MAKERS[name])
    cs.transfer(tmp_path / "a.pt", bare, adapt=adapt, root="model")
    assert train(bare, optimizer, scheduler, STEPS, STEPS + MORE) != pytest.approx(expected, rel=2e-4)


def test_two_halves_that_become_one_keep_their_moments(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = NetSplit()
    optimizer = MAKERS["AdamW"](net.parameters())
    train(net, optimizer, None, 0, STEPS)
    torch.save({"state_dict": net.state_dict(), "optimizer_state_dict": optimizer.state_dict()}, tmp_path / "a.pt")
    expected = train(net, optimizer, None, STEPS, STEPS + MORE)
    one, optimizer, _ = renewed(Net, MAKERS["AdamW"])
    report = cs.transfer(tmp_path / "a.pt", one, adapt={"left.{p} + right.{p} -> fc1.{p}": "concat"}, optimizer=optimizer)
    assert report.optimizer is not None and report.optimizer.adapted == ("fc1.weight", "fc1.bias")
    assert train(one, optimizer, None, STEPS, STEPS + MORE) == pytest.approx(expected, rel=2e-4)


def test_parts_with_unlike_steps_keep_the_most_and_say_so(tmp_path: Path) -> None:
    net = NetSplit()
    optimizer = MAKERS["Adam"](net.parameters())
    train(net, optimizer, None, 0, 3)
    net.left.requires_grad_(False)
    train(net, optimizer, None, 3, 5)
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    one, optimizer, _ = renewed(Net, MAKERS["Adam"])
    report = cs.transfer(tmp_path / "a.pt", one, adapt={"left.{p} + right.{p} -> fc1.{p}": "concat"}, optimizer=optimizer)
    assert report.optimizer is not None
    assert ("fc1.weight", "its parts had taken 3 and 5 steps; the largest number is kept") in report.optimizer.not_carried
    assert optimizer.state[one.fc1.weight]["step"].item() == 5


def test_what_is_fresh_starts_at_zero_and_what_is_computed_is_told(tmp_path: Path) -> None:
    _, old = begun(MAKERS["AdamW"], tmp_path / "a.pt")
    saved = torch.load(tmp_path / "a.pt")["optimizer"]["state"]
    net, optimizer, _ = renewed(NetDeeper, MAKERS["AdamW"])
    report = cs.transfer(tmp_path / "a.pt", net, optimizer=optimizer)
    assert report.optimizer is not None
    assert report.optimizer.zeroed == ("norm1.weight", "norm1.bias")
    assert dict(report.optimizer.not_carried)["norm1.weight"] == "is fresh"
    assert net.norm1.weight not in optimizer.state
    # Position 2 is conv2.weight in the source, and norm1.weight here: nothing shifted.
    assert torch.equal(optimizer.state[net.conv2.weight]["exp_avg"], saved[2]["exp_avg"])
    train(net, optimizer, None, 0, 1)
    assert optimizer.state[net.norm1.weight]["step"].item() == 1
    assert optimizer.state[net.conv1.weight]["step"].item() == STEPS + 1

    head, optimizer, _ = renewed(NetTwoClasses, MAKERS["AdamW"])
    report = cs.transfer(tmp_path / "a.pt", head, optimizer=optimizer)
    assert report.optimizer is not None
    told = dict(report.optimizer.not_carried)
    assert told["fc3.weight of the source"] == "its parameter is not used"
    assert "fc3.weight" in report.optimizer.zeroed

    grey, optimizer, _ = renewed(NetGrey, MAKERS["AdamW"])
    adapt = {"fc1.{p} -> left.{p} + right.{p}": "chunk", "conv1.weight": "in_channels"}
    report = cs.transfer(tmp_path / "a.pt", grey, adapt=adapt, optimizer=optimizer)
    assert report.optimizer is not None
    assert "in_channels" in dict(report.optimizer.not_carried)["conv1.weight"]
    assert report.optimizer.zeroed == ("conv1.weight",)
    assert "in_channels" in str(report)
    del old


def test_the_unchanged_model_gets_what_torch_itself_loads(tmp_path: Path) -> None:
    for name, make in MAKERS.items():
        begun(make, tmp_path / "a.pt")
        net, ours, _ = renewed(Net, make)
        theirs = make(net.parameters())
        theirs.load_state_dict(torch.load(tmp_path / "a.pt")["optimizer"])
        cs.transfer(tmp_path / "a.pt", net, optimizer=ours)
        for parameter in net.parameters():
            one, other = ours.state[parameter], theirs.state[parameter]
            kept = {slot: value for slot, value in other.items() if value is not None}
            assert sorted(one) == sorted(kept), name
            assert all(torch.equal(one[slot], value) and one[slot].dtype == value.dtype for slot, value in kept.items()), name


def test_hyper_parameters_are_the_new_optimizers(tmp_path: Path) -> None:
    begun(MAKERS["AdamW"], tmp_path / "a.pt")
    net = Net()
    groups = [{"params": list(net.fc3.parameters()), "lr": 3.0}, {"params": [p for n, p in net.named_parameters() if "fc3" not in n]}]
    optimizer = torch.optim.AdamW(groups, lr=5.0, betas=(0.5, 0.6), weight_decay=0.25)
    report = cs.transfer(tmp_path / "a.pt", net, optimizer=optimizer)
    assert [(group["lr"], group["betas"], group["weight_decay"]) for group in optimizer.param_groups] == [
        (3.0, (0.5, 0.6), 0.25),
        (5.0, (0.5, 0.6), 0.25),
    ]
    assert report.optimizer is not None and report.optimizer.carried[:2] == ("fc3.weight", "fc3.bias")
    saved = torch.load(tmp_path / "a.pt")["optimizer"]["state"]
    assert torch.equal(optimizer.state[net.fc3.weight]["exp_avg_sq"], saved[8]["exp_avg_sq"])


def test_another_optimizer_takes_nothing_and_says_why(tmp_path: Path) -> None:
    begun(MAKERS["centered"], tmp_path / "a.pt")  # RMSprop's momentum_buffer is none for SGD
    net, optimizer, _ = renewed(Net, MAKERS["SGD"])
    report = cs.transfer(tmp_path / "a.pt", net, optimizer=optimizer)
    assert report.optimizer is not None and len(report.optimizer.zeroed) == 10 and not optimizer.state
    assert "'dampening'" in dict(report.optimizer.not_carried)["SGD"]
    optimizer = torch.optim.Adagrad(net.parameters())
    report = cs.transfer(tmp_path / "a.pt", net, optimizer=optimizer)
    assert report.optimizer is not None and "none of SGD" in dict(report.optimizer.not_carried)["Adagrad"]
    assert "sum" in optimizer.state[net.conv1.weight]


def test_a_slot_more_starts_at_zero_and_a_slot_less_is_told(tmp_path: Path) -> None:
    begun(MAKERS["Adam"], tmp_path / "a.pt")
    net, optimizer, _ = renewed(Net, MAKERS["amsgrad"])
    report = cs.transfer(tmp_path / "a.pt", net, optimizer=optimizer)
    assert report.optimizer is not None
    assert ("conv1.weight", "max_exp_avg_sq starts at zero: the source has none") in report.optimizer.not_carried
    train(net, optimizer, None, 0, 1)
    begun(MAKERS["amsgrad"], tmp_path / "b.pt")
    net, optimizer, _ = renewed(Net, MAKERS["Adam"])
    report = cs.transfer(tmp_path / "b.pt", net, optimizer=optimizer)
    assert report.optimizer is not None
    assert report.optimizer.not_carried == (("max_exp_avg_sq", "the new optimizer does not keep it"),)


def test_a_vocabulary_that_grows_keeps_the_moments_of_its_rows(tmp_path: Path) -> None:
    old = nn.Sequential(nn.Embedding(4, 3))
    optimizer = MAKERS["Adam"](old.parameters())
    old(torch.tensor([0, 1, 2, 3])).square().sum().backward()
    optimizer.step()
    torch.save({"model": old.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    new = nn.Sequential(nn.Embedding(6, 3))
    fresh = MAKERS["Adam"](new.parameters())
    cs.transfer(tmp_path / "a.pt", new, adapt={"0.weight": "rows(index=[3, -1, 0, 1, -1, 2], fill='mean')"}, optimizer=fresh)
    before, after = optimizer.state[old[0].weight], fresh.state[new[0].weight]
    for slot in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(after[slot][[0, 2, 3, 5]], before[slot][[3, 0, 1, 2]])
        assert not after[slot][[1, 4]].any()
    assert after["step"].item() == 1


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.middle = nn.Linear(3, 3)
        self.out = nn.Linear(3, 5, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.middle(self.embed(x)))


@pytest.mark.parametrize("kept", ["embed.weight", "out.weight", "both"])
def test_a_tied_parameter_counts_once(kept: str, tmp_path: Path) -> None:
    old = Tied()
    optimizer = MAKERS["Adam"](old.parameters())
    old(torch.tensor([0, 1])).square().sum().backward()
    optimizer.step()
    state = {
        key: value for key, value in old.state_dict().items() if kept == "both" or key not in ("embed.weight", "out.weight") or key == kept
    }
    names = ["out.weight" if kept == "out.weight" and n == "embed.weight" else n for n, _ in old.named_parameters()]
    torch.save({"model": state, "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    new = Tied()
    fresh = MAKERS["Adam"](new.parameters())
    report = cs.transfer(tmp_path / "a.pt", new, optimizer=fresh, optimizer_names=None if kept == "both" else names)
    assert report.optimizer is not None and report.optimizer.carried == ("embed.weight", "middle.weight", "middle.bias")
    assert torch.equal(fresh.state[new.embed.weight]["exp_avg"], optimizer.state[old.embed.weight]["exp_avg"])


def test_names_in_the_file_and_names_by_hand(tmp_path: Path) -> None:
    """Two layers of one shape in two groups: no order tells them apart."""
    old = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    groups = [{"params": list(old[1].named_parameters(prefix="1"))}, {"params": list(old[0].named_parameters(prefix="0"))}]
    named = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    plain = torch.optim.SGD([{"params": list(old[1].parameters())}, {"params": list(old[0].parameters())}], lr=0.1, momentum=0.9)
    old(torch.eye(3)).square().sum().backward()
    named.step()
    plain.step()
    new = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    for optimizer, names in ((named, None), (plain, ["1.weight", "1.bias", "0.weight", "0.bias"])):
        torch.save({"model": old.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
        fresh = torch.optim.SGD(new.parameters(), lr=0.1, momentum=0.9)
        report = cs.transfer(tmp_path / "a.pt", new, optimizer=fresh, optimizer_names=names)
        assert report.optimizer is not None and report.optimizer.by == "names"
        for ours, theirs in zip(new.parameters(), old.parameters(), strict=True):
            assert torch.equal(fresh.state[ours]["momentum_buffer"], optimizer.state[theirs]["momentum_buffer"])
    before = {key: value.clone() for key, value in new.state_dict().items()}
    old[0].weight.data.add_(1)
    torch.save({"model": old.state_dict(), "optimizer": plain.state_dict()}, tmp_path / "a.pt")
    with pytest.raises(ModelError, match="in no way, or in several") as error:
        cs.transfer(tmp_path / "a.pt", new, optimizer=torch.optim.SGD(new.parameters(), lr=0.1, momentum=0.9))
    assert "optimizer_names=" in str(error.value.hint)
    assert all(torch.equal(value, before[key]) for key, value in new.state_dict().items())


def test_lightnings_lists_and_a_place_by_name(tmp_path: Path) -> None:
    expected, _ = begun(MAKERS["AdamW"], tmp_path / "a.pt")
    saved = torch.load(tmp_path / "a.pt")
    light = {
        "state_dict": {f"model.{key}": value for key, value in saved["model"].items()},
        "optimizer_states": [saved["optimizer"]],
        "lr_schedulers": [saved["scheduler"]],
    }
    torch.save(light, tmp_path / "light.ckpt")
    net, optimizer, scheduler = renewed(Net, MAKERS["AdamW"])
    report = cs.transfer(tmp_path / "light.ckpt", net, optimizer=optimizer, scheduler=scheduler)
    assert report.optimizer is not None and report.optimizer.place == "optimizer_states.0"
    assert train(net, optimizer, scheduler, STEPS, STEPS + MORE) == expected
    light["optimizer_states"] *= 2
    torch.save(light, tmp_path / "two.ckpt")
    with pytest.raises(RootError, match="2 optimizer states") as error:
        cs.transfer(tmp_path / "two.ckpt", net, optimizer=optimizer)
    assert "optimizer_root='optimizer_states.0'" in str(error.value.hint)
    report = cs.transfer(tmp_path / "two.ckpt", net, optimizer=optimizer, optimizer_root="optimizer_states.1")
    assert report.optimizer is not None and report.optimizer.place == "optimizer_states.1"


SCHEDULES: dict[str, Callable[[Any], Any]] = {
    "MultiStep": lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [4, 9, 14], gamma=0.5),
    "Cosine": lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 30),
    "OneCycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 0.05, total_steps=30),
    "Lambda": lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "Sequential": lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.ConstantLR(o, 0.5, 4), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [6]
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("maker", ["SGD", "AdamW"])
def test_schedules_go_on_where_they_were(name: str, maker: str, tmp_path: Path) -> None:
    net, optimizer, _ = renewed(Net, MAKERS[maker])
    optimizer = MAKERS[maker](net.parameters())
    scheduler = SCHEDULES[name](optimizer)
    train(net, optimizer, scheduler, 0, STEPS)
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict(), "lr_scheduler": scheduler.state_dict()}, tmp_path / "a.pt")
    expected = train(net, optimizer, scheduler, STEPS, STEPS + MORE)
    new = NetRenamed()
    optimizer = MAKERS[maker](new.parameters())
    scheduler = SCHEDULES[name](optimizer)
    report = cs.transfer(tmp_path / "a.pt", new, rename=RENAME, optimizer=optimizer, scheduler=scheduler)
    assert report.optimizer is not None and report.optimizer.others == ("scheduler",)
    assert train(new, optimizer, scheduler, STEPS, STEPS + MORE) == expected


def test_a_schedule_of_another_kind_or_for_other_groups_is_told(tmp_path: Path) -> None:
    begun(MAKERS["SGD"], tmp_path / "a.pt")
    net, optimizer, _ = renewed(Net, MAKERS["SGD"])
    other = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
    before = other.state_dict()
    report = cs.transfer(tmp_path / "a.pt", net, optimizer=optimizer, scheduler=other)
    assert report.optimizer is not None and "lacks" in dict(report.optimizer.not_carried)["scheduler"]
    assert other.state_dict() == before and report.optimizer.carried
    groups = cs.param_groups(net, ["fc3.weight", "fc3.bias"], lr=0.1, fresh_lr=0.2)
    optimizer = torch.optim.SGD(groups, momentum=0.9)
    report = cs.transfer(tmp_path / "a.pt", net, optimizer=optimizer, scheduler=schedule(optimizer))
    assert report.optimizer is not None
    assert dict(report.optimizer.not_carried)["scheduler"] == "is for 1 groups, but the optimizer has 2"
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.2]


def test_a_scaler(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=7)
    begun(MAKERS["SGD"], tmp_path / "a.pt", scaler=scaler.state_dict())
    net = Net()
    new = torch.amp.GradScaler("cpu")
    report = cs.transfer(tmp_path / "a.pt", net, scaler=new)
    assert report.optimizer is not None and report.optimizer.others == ("scaler",)
    assert new.state_dict() == scaler.state_dict()
    off = torch.amp.GradScaler("cpu", enabled=False)
    report = cs.transfer(tmp_path / "a.pt", net, scaler=off)
    assert report.optimizer is not None and "not enabled" in dict(report.optimizer.not_carried)["scaler"]


def test_an_averaged_copy_follows_by_the_same_rules(tmp_path: Path) -> None:
    torch.manual_seed(3)
    averaged = torch.optim.swa_utils.AveragedModel(Net())
    averaged.n_averaged.fill_(41)
    begun(MAKERS["SGD"], tmp_path / "a.pt", model_ema=averaged.state_dict())
    for source in (tmp_path / "a.pt", torch.load(tmp_path / "a.pt"), cs.open(tmp_path / "a.pt", root="model")):
        net = NetRenamed()
        ema = torch.optim.swa_utils.AveragedModel(NetRenamed())
        report = cs.transfer(source, net, rename=RENAME, ema=ema, strict=True)
        assert report.optimizer is not None and report.optimizer.ema is not None
        assert report.optimizer.ema.dropped == () and len(report.optimizer.ema.transferred) == 10
        assert torch.equal(ema.module.dense2.weight, averaged.module.fc2.weight)
        assert torch.equal(net.dense2.weight, torch.load(tmp_path / "a.pt")["model"]["fc2.weight"])
        assert ema.n_averaged.item() == 41
    begun(MAKERS["SGD"], tmp_path / "b.pt", state_dict_ema=averaged.module.state_dict())
    bare = NetRenamed()
    cs.transfer(tmp_path / "b.pt", NetRenamed(), rename=RENAME, ema=bare)
    assert torch.equal(bare.dense2.weight, averaged.module.fc2.weight)


def test_the_count_of_an_average_is_had_where_lightning_has_it_or_its_lack_is_told(tmp_path: Path) -> None:
    """With `n_averaged` at 0, AveragedModel's first update would copy the trained weights over the average."""
    trained, averaged = Net(), Net()
    lightning = {
        "state_dict": {f"model.{key}": value for key, value in averaged.state_dict().items()},
        "current_model_state": {f"model.{key}": value for key, value in trained.state_dict().items()},
        "averaging_state": {"n_averaged": torch.tensor(8)},
    }
    torch.save(lightning, tmp_path / "lightning.ckpt")
    for source in (tmp_path / "lightning.ckpt", lightning):
        net, ema = Net(), torch.optim.swa_utils.AveragedModel(Net())
        report = cs.transfer(source, net, ema=ema)
        assert ema.n_averaged.item() == 8 and report.optimizer is not None and report.optimizer.not_carried == ()
        assert torch.equal(net.fc2.weight, trained.fc2.weight) and torch.equal(ema.module.fc2.weight, averaged.fc2.weight)
        ema.update_parameters(net)
        assert not torch.equal(ema.module.fc2.weight, trained.fc2.weight)
    torch.save({"model": trained.state_dict(), "model_ema": averaged.state_dict()}, tmp_path / "bare.pt")
    report = cs.transfer(tmp_path / "bare.pt", Net(), ema=torch.optim.swa_utils.AveragedModel(Net()))
    assert report.optimizer is not None and "copies the model over" in dict(report.optimizer.not_carried)["n_averaged"]
    assert "n_averaged" in str(report)


def everything(*things: Any) -> list[bytes]:
    """All values of models and optimizers, and the states of schedulers."""
    found = []
    for thing in things:
        if isinstance(thing, nn.Module):
            found += [tensor.detach().numpy().tobytes() for tensor in thing.state_dict().values()]
        elif isinstance(thing, torch.optim.Optimizer):
            found += [repr({k: v for k, v in group.items() if k != "params"}).encode() for group in thing.param_groups]
            found += [value.numpy().tobytes() for state in thing.state.values() for value in state.values() if value is not None]
        else:
            found.append(repr(thing.state_dict()).encode())
    return found


class Refuses(NetRenamed):
    """A model that takes no values: its state_dict is a copy, and loading it fails."""

    def load_state_dict(self, *_args: Any, **_more: Any) -> Any:  # type: ignore[override]
        raise RuntimeError("no")

    def state_dict(self, *args: Any, **more: Any) -> Any:  # type: ignore[override]
        found = super().state_dict(*args, **more)
        return found if getattr(self, "open", False) else type(found)((key, value.clone()) for key, value in found.items())


def test_all_or_nothing(tmp_path: Path) -> None:
    averaged = torch.optim.swa_utils.AveragedModel(Net())
    begun(MAKERS["SGD"], tmp_path / "a.pt", model_ema=averaged.state_dict())
    net, optimizer, scheduler = renewed(NetRenamed, MAKERS["SGD"])
    train(net, optimizer, scheduler, 0, 2)
    ema = torch.optim.swa_utils.AveragedModel(NetRenamed())
    before = everything(net, optimizer, scheduler, ema)

    hook = optimizer.register_load_state_dict_post_hook(lambda _: 1 / 0)
    with pytest.raises(CheckpointError, match="ZeroDivisionError"):
        cs.transfer(tmp_path / "a.pt", net, rename=RENAME, optimizer=optimizer, scheduler=scheduler, ema=ema)
    hook.remove()
    assert everything(net, optimizer, scheduler, ema) == before
    with pytest.raises(RootError):
        cs.transfer(tmp_path / "a.pt", net, rename=RENAME, optimizer=optimizer, scheduler=scheduler, ema=ema, ema_root="nothing")
    assert everything(net, optimizer, scheduler, ema) == before
    with pytest.raises(CheckpointError):
        cs.transfer(tmp_path / "a.pt", net, rename=RENAME, optimizer=optimizer, scheduler=object())
    assert everything(net, optimizer, scheduler, ema) == before

    closed = Refuses()
    optimizer = MAKERS["SGD"](closed.parameters())
    scheduler = schedule(optimizer)
    before = everything(closed, optimizer, scheduler, ema)
    with pytest.raises(CheckpointError):
        cs.transfer(tmp_path / "a.pt", closed, rename=RENAME, optimizer=optimizer, scheduler=scheduler, ema=ema)
    assert everything(closed, optimizer, scheduler, ema) == before


def test_what_is_asked_for_must_be_there(tmp_path: Path) -> None:
    net, optimizer, scheduler = renewed(Net, MAKERS["SGD"])
    torch.save(net.state_dict(), tmp_path / "bare.pt")
    with pytest.raises(RootError, match="no optimizer state"):
        cs.transfer(tmp_path / "bare.pt", net, optimizer=optimizer)
    with pytest.raises(RootError, match="no scheduler state"):
        cs.transfer(tmp_path / "bare.pt", net, scheduler=scheduler)
    with pytest.raises(RootError, match="no averaged copy"):
        cs.transfer(tmp_path / "bare.pt", net, ema=Net())
    cs.merge(tmp_path / "bare.pt", None, tmp_path / "bare.safetensors")
    with pytest.raises(FormatError, match="no training state"):
        cs.transfer(tmp_path / "bare.safetensors", net, optimizer=optimizer)
    with pytest.raises(ModelError, match="no training state"):
        cs.transfer(Net(), net, optimizer=optimizer)
    begun(MAKERS["SGD"], tmp_path / "a.pt")
    with pytest.raises(ModelError, match="no parameter of the model"):
        cs.transfer(tmp_path / "a.pt", net, optimizer=MAKERS["SGD"](Net().parameters()))
    with pytest.raises(ArgumentError, match="takes an optimizer"):
        cs.transfer(tmp_path / "a.pt", net, optimizer="adam")  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="another optimizer"):
        cs.transfer(tmp_path / "a.pt", net, optimizer=MAKERS["SGD"](net.parameters()), scheduler=scheduler)
    with pytest.raises(RootError, match="nothing at 'nowhere'"):
        cs.transfer(tmp_path / "a.pt", net, optimizer=optimizer, optimizer_root="nowhere")
    torch.save({"model": net.state_dict(), "optimizer": optimizer}, tmp_path / "whole.pt")
    with pytest.raises(CheckpointError, match="SGD"):
        cs.transfer(tmp_path / "whole.pt", net, optimizer=optimizer)


def test_a_file_that_changed_since_it_was_opened_is_stale(tmp_path: Path) -> None:
    begun(MAKERS["SGD"], tmp_path / "a.pt")
    opened = cs.open(tmp_path / "a.pt", root="model")
    begun(MAKERS["SGD"], tmp_path / "a.pt", more=1)
    net, optimizer, _ = renewed(Net, MAKERS["SGD"])
    with pytest.raises(StaleError):
        cs.transfer(opened, net, optimizer=optimizer)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype_casts_the_moments_as_torch_does(dtype: torch.dtype, tmp_path: Path) -> None:
    begun(MAKERS["AdamW"], tmp_path / "a.pt")
    saved = torch.load(tmp_path / "a.pt")["optimizer"]["state"]
    net = Net().to(dtype)
    optimizer = MAKERS["AdamW"](net.parameters())
    report = cs.transfer(tmp_path / "a.pt", net, optimizer=optimizer)
    state = optimizer.state[net.fc1.weight]
    assert torch.equal(state["exp_avg"], saved[4]["exp_avg"].to(dtype))
    assert state["step"].dtype == torch.float32
    assert report.optimizer is not None and bool(report.optimizer.casts) == (dtype == torch.bfloat16)


def test_a_moment_that_the_dtype_cannot_hold_is_not_carried(tmp_path: Path) -> None:
    begun(MAKERS["AdamW"], tmp_path / "a.pt")
    saved = torch.load(tmp_path / "a.pt")
    saved["optimizer"]["state"][4]["exp_avg_sq"][0, 0] = 1e30
    torch.save(saved, tmp_path / "a.pt")
    net = Net().half()
    optimizer = MAKERS["AdamW"](net.parameters())
    report = cs.transfer(tmp_path / "a.pt", net, optimizer=optimizer)
    assert report.optimizer is not None and report.optimizer.zeroed == ("fc1.weight",)
    assert dict(report.optimizer.not_carried)["fc1.weight"] == "the source's exp_avg_sq has values that F16 can't hold"
    assert net.fc1.weight not in optimizer.state


def test_the_report_fits_its_schema(tmp_path: Path) -> None:
    begun(MAKERS["AdamW"], tmp_path / "a.pt", model_ema=Net().state_dict())
    net, optimizer, scheduler = renewed(NetGrey, MAKERS["AdamW"])
    adapt = {"fc1.{p} -> left.{p} + right.{p}": "chunk", "conv1.weight": "in_channels"}
    report = cs.transfer(tmp_path / "a.pt", net, adapt=adapt, optimizer=optimizer, scheduler=scheduler, ema=NetGrey())
    schema = json.loads((resources("ckptsurgeon") / "views" / "schemas" / "merge.json").read_text())
    value = json.loads(json.dumps(json_view.report(report)))
    Draft202012Validator(schema).validate(value)
    assert set(value["optimizer"]) == set(schema["properties"]["optimizer"]["properties"])
    text = str(report)
    for words in (
        "optimizer state from optimizer",
        "carried        11   4 of them adapted",
        "also carried: scheduler, ema",
        "averaged copy",
    ):
        assert words in text
