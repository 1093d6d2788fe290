"""Whose each position of an optimizer is, where the model's keys were sorted or stand in another file; the next step of training judges."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import program
from safetensors.torch import load_file, save_file, save_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

import ckptsurgeon as cs
from ckptsurgeon.errors import ModelError, SettingsError

NAMES = ("q", "k", "v", "o")  # not in the order of the alphabet
NETS = """
from torch import nn
class Net(nn.Module):
    names = ("q", "k", "v", "o")
    def __init__(self):
        super().__init__()
        for name in self.names:
            self.add_module(name, nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)))
    def forward(self, x):
        for name in self.names:
            x = self._modules[name](x)
        return x
class Turned(Net):
    names = ("k", "q", "v", "o")
    def forward(self, x):
        for name in Net.names:
            x = self._modules[name](x)
        return x
"""
space: dict[str, Any] = {}
exec(NETS, space)
Net, Turned = space["Net"], space["Turned"]


def split(net: nn.Module) -> list[dict[str, Any]]:
    """Weight decay for matrices alone, as the Trainer has it."""
    own = list(net.parameters())
    return [
        {"params": [one for one in own if one.ndim > 1], "weight_decay": 0.1},
        {"params": [one for one in own if one.ndim < 2], "weight_decay": 0.0},
    ]


def halves(net: nn.Module) -> list[dict[str, Any]]:
    """Two groups that both have parameters of every shape."""
    own = list(net.named_parameters())
    return [{"params": [one for name, one in own if name[0] in part], "lr": lr} for part, lr in (("qv", 0.1), ("ko", 0.01))]


def trainable(net: nn.Module) -> list[nn.Parameter]:
    return [one for name, one in net.named_parameters() if name[0] in "kv"]


MAKE: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "AdamW": lambda net: torch.optim.AdamW(net.parameters(), lr=0.1),
    "SGD": lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9),
    "decay split": lambda net: torch.optim.SGD(split(net), lr=0.1, momentum=0.9),
    "halves": lambda net: torch.optim.Adam(halves(net), lr=0.1),
    "a part alone": lambda net: torch.optim.RMSprop(trainable(net), lr=0.1, momentum=0.5),
    "a decay split of a part": lambda net: torch.optim.AdamW(
        [{"params": [one for one in trainable(net) if one.ndim > 1]}, {"params": [one for one in trainable(net) if one.ndim < 2]}]
    ),
}


def step(net: nn.Module, optimizer: torch.optim.Optimizer, number: int) -> None:
    optimizer.zero_grad()
    net(torch.randn(8, 4, generator=torch.Generator().manual_seed(number))).square().mean().backward()
    optimizer.step()


def trained(make: Callable[[nn.Module], torch.optim.Optimizer], kind: Any = Net) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = kind()
    optimizer = make(net)
    for number in range(3):
        step(net, optimizer, number)
    return net, optimizer


def goes_on(net: nn.Module, optimizer: torch.optim.Optimizer, new: nn.Module, resumed: torch.optim.Optimizer) -> None:
    """The next step of both trainings gives the same weights, bit for bit."""
    step(net, optimizer, 9)
    step(new, resumed, 9)
    truth = net.state_dict()
    for key, value in new.state_dict().items():
        assert torch.equal(value, truth[key.replace("_orig_mod.", "")]), key


def through_safetensors(state: dict[str, torch.Tensor], folder: Path) -> dict[str, torch.Tensor]:
    save_file(state, folder / "m.safetensors")
    return load_file(folder / "m.safetensors")


SORTED: dict[str, Callable[[dict[str, torch.Tensor], Path], Any]] = {
    "safetensors": through_safetensors,
    "sorted": lambda state, _: dict(sorted(state.items())),
    "a plain dict": lambda state, _: dict(state.items()),
    "as torch gives it": lambda state, _: state,
}


@pytest.mark.parametrize("how", SORTED)
@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("legacy", [False, True])
def test_the_live_model_and_its_optimizer_tell_whose_moments_these_are(how: str, make: str, legacy: bool, tmp_path: Path) -> None:
    net, optimizer = trained(MAKE[make])
    saved = {"model": SORTED[how](net.state_dict(), tmp_path), "optimizer": optimizer.state_dict()}
    torch.save(saved, tmp_path / "run.pt", _use_new_zipfile_serialization=not legacy)
    new = Net()
    resumed = MAKE[make](new)
    names: Any = None
    if "part" in make:  # another part of the same size may have been trained
        with pytest.raises(ModelError, match="in several") as error:
            cs.transfer(tmp_path / "run.pt", new, optimizer=resumed)
        assert "optimizer_names='model'" in str(error.value.hint) and not resumed.state
        names = "model"
    report = cs.transfer(tmp_path / "run.pt", new, optimizer=resumed, optimizer_names=names)
    assert report.optimizer is not None and report.optimizer.zeroed == () and report.optimizer.not_carried == ()
    goes_on(net, optimizer, new, resumed)


def test_new_groups_and_a_new_head_do_not_matter_where_the_model_has_one_order(tmp_path: Path) -> None:
    """The file is sorted; the new optimizer has other groups; the last layer is another, so that nothing of it is carried."""
    net, optimizer = trained(MAKE["AdamW"])
    net.add_module("head", nn.Linear(4, 2))
    optimizer = MAKE["AdamW"](net)
    net.head(net(torch.randn(3, 4))).square().sum().backward()  # type: ignore[operator]
    optimizer.step()
    torch.save({"model": dict(sorted(net.state_dict().items())), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    new = Net()
    new.add_module("head", nn.Linear(4, 3))
    resumed = torch.optim.AdamW(split(new))
    report = cs.transfer(tmp_path / "run.pt", new, optimizer=resumed)
    assert report.optimizer is not None and report.optimizer.by == "model"
    assert set(report.optimizer.zeroed) == {"head.weight", "head.bias"}
    for (name, one), (other, old) in zip(new.named_parameters(), net.named_parameters(), strict=True):
        assert name == other
        if "head" not in name:
            assert torch.equal(resumed.state[one]["exp_avg"], optimizer.state[old]["exp_avg"])


def test_an_old_head_under_another_name_has_shapes_of_its_own(tmp_path: Path) -> None:
    def with_head(name: str, size: int) -> nn.Module:
        net: nn.Module = Net()
        net.add_module(name, nn.Linear(4, size))
        return net

    for size, told in ((5, True), (4, False)):
        net = with_head("fc", size)
        optimizer = MAKE["AdamW"](net)
        net.fc(net(torch.randn(3, 4))).square().sum().backward()  # type: ignore[operator]
        optimizer.step()
        torch.save({"model": through_safetensors(net.state_dict(), tmp_path), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
        new = with_head("head", 3)
        resumed = MAKE["AdamW"](new)
        if not told:
            with pytest.raises(ModelError, match="sorted"):
                cs.transfer(tmp_path / "run.pt", new, optimizer=resumed)
            continue
        cs.transfer(tmp_path / "run.pt", new, optimizer=resumed)
        for (name, one), old in zip(new.named_parameters(), net.parameters(), strict=True):
            if "head" not in name:
                assert torch.equal(resumed.state[one]["exp_avg"], optimizer.state[old]["exp_avg"])


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.middle, self.head = nn.Embedding(4, 4), nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(self.middle(self.tokens(x.abs().long() % 4))).mean(1)
        return out


@pytest.mark.parametrize("how", ["safetensors", "sorted", "clones", "as torch gives it"])
def test_a_tied_parameter_is_one_position_though_the_file_has_copies(how: str, tmp_path: Path) -> None:
    net, optimizer = trained(MAKE["AdamW"], Tied)
    state = {key: value.clone() for key, value in sorted(net.state_dict().items())}
    if how == "safetensors":
        save_model(net, str(tmp_path / "m.safetensors"))
        state = load_file(tmp_path / "m.safetensors")
    elif how != "clones":
        state = SORTED[how](net.state_dict(), tmp_path)
    torch.save({"model": state, "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    new = Tied()
    resumed = MAKE["AdamW"](new)
    cs.transfer(tmp_path / "a.pt", new, optimizer=resumed)
    goes_on(net, optimizer, new, resumed)


def test_another_part_of_the_same_size_gets_no_moments(tmp_path: Path) -> None:
    net, optimizer = trained(MAKE["a part alone"])
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    new = Net()
    other = torch.optim.RMSprop([one for name, one in new.named_parameters() if name[0] in "vo"], momentum=0.5)
    with pytest.raises(ModelError, match="in several"):
        cs.transfer(tmp_path / "a.pt", new, optimizer=other)
    assert not other.state


def test_a_part_in_an_optimizer_over_all_is_refused_with_a_hint_that_works(tmp_path: Path) -> None:
    net, optimizer = trained(MAKE["a part alone"])
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    new = Net()
    resumed = torch.optim.RMSprop(new.parameters(), lr=0.1, momentum=0.5)
    with pytest.raises(ModelError, match="in several") as error:
        cs.transfer(tmp_path / "a.pt", new, optimizer=resumed)
    assert "if parameter.requires_grad]" in str(error.value.hint) and "'model'" not in str(error.value.hint)
    net.requires_grad_(False)
    for one in trainable(net):
        one.requires_grad_(True)
    names = [name for name, one in net.named_parameters() if one.requires_grad]
    cs.transfer(tmp_path / "a.pt", new, optimizer=resumed, optimizer_names=names)
    for (name, one), old in zip(new.named_parameters(), net.parameters(), strict=True):
        assert (one in resumed.state) == (name in names)
        if name in names:
            assert torch.equal(resumed.state[one]["square_avg"], optimizer.state[old]["square_avg"])


@pytest.mark.parametrize("how", ["as torch gives it", "a plain dict"])
def test_a_model_that_registers_in_another_order(how: str, tmp_path: Path) -> None:
    """`_metadata` proves the file's order; without it either order may be the right one, and the hint helps."""
    net, optimizer = trained(MAKE["SGD"])
    torch.save({"model": SORTED[how](net.state_dict(), tmp_path), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    new = Turned()
    new.add_module("fresh", nn.Linear(4, 4))
    resumed = MAKE["SGD"](new)
    names = None
    if how == "a plain dict":
        before = {key: value.clone() for key, value in new.state_dict().items()}
        with pytest.raises(ModelError, match=r"q\.0\.weight and to k\.0\.weight") as error:
            cs.transfer(tmp_path / "run.pt", new, optimizer=resumed)
        assert "optimizer_names=[name for name, _ in source_model.named_parameters()]" in str(error.value.hint)
        assert all(torch.equal(value, before[key]) for key, value in new.state_dict().items()) and not resumed.state
        names = [name for name, _ in Net().named_parameters()]
    cs.transfer(tmp_path / "run.pt", new, optimizer=resumed, optimizer_names=names)
    del new.fresh
    goes_on(net, optimizer, new, resumed)


def test_the_models_order_by_name(tmp_path: Path) -> None:
    net, optimizer = trained(MAKE["SGD"], Turned)
    torch.save(
        {"model": {key: net.state_dict()[key] for key in Net().state_dict()}, "optimizer": optimizer.state_dict()}, tmp_path / "a.pt"
    )
    new = Turned()
    resumed = MAKE["SGD"](new)
    with pytest.raises(ModelError, match="the file's order and the model's"):
        cs.transfer(tmp_path / "a.pt", new, optimizer=resumed)
    report = cs.transfer(tmp_path / "a.pt", new, optimizer=resumed, optimizer_names="model")
    assert report.optimizer is not None and report.optimizer.by == "model"
    goes_on(net, optimizer, new, resumed)
    with pytest.raises(ModelError, match="optimizer_names can't be 'models'"):
        cs.transfer(tmp_path / "a.pt", new, optimizer=resumed, optimizer_names="models")  # type: ignore[arg-type]


def test_groups_that_can_not_be_the_same_are_not_taken_for_the_same(tmp_path: Path) -> None:
    """Groups of the same sizes, with the decay on the other one: shapes fit by accident."""
    net = Net()
    own = list(net.parameters())
    groups = [{"params": own[:8], "weight_decay": 0.0}, {"params": own[8:], "weight_decay": 0.1}]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    step(net, optimizer, 0)
    torch.save({"model": dict(sorted(net.state_dict().items())), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    new = Net()
    own = list(new.parameters())
    for first, second, words in (({"weight_decay": 0.1}, {"weight_decay": 0.0}, "sorted"),):
        resumed = torch.optim.SGD([{"params": own[8:], **first}, {"params": own[:8], **second}], lr=0.1, momentum=0.9)
        with pytest.raises(ModelError, match=words):
            cs.transfer(tmp_path / "a.pt", new, optimizer=resumed)


def checkpointed(net: nn.Module) -> nn.Module:
    apply_activation_checkpointing(net, check_fn=lambda module: isinstance(module, (nn.Linear, nn.LayerNorm)))
    return net


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("wrap", [checkpointed, lambda net: torch.compile(checkpointed(net), backend="eager"), nn.DataParallel])
def test_under_wrappers_with_names_and_without(named: bool, wrap: Any, tmp_path: Path) -> None:
    net = wrap(Net())
    optimizer = torch.optim.Adam(net.named_parameters() if named else net.parameters(), lr=0.1)
    step(net, optimizer, 0)
    torch.save({"model": dict(sorted(net.state_dict().items())), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    new = Net()
    resumed = torch.optim.Adam(new.parameters(), lr=0.1)
    report = cs.transfer(tmp_path / "a.pt", new, optimizer=resumed)
    assert report.optimizer is not None and report.optimizer.by == ("names" if named else "model")
    for one, old in zip(new.parameters(), net.parameters(), strict=True):
        assert torch.equal(resumed.state[one]["exp_avg"], optimizer.state[old]["exp_avg"])
    cs.transfer(tmp_path / "a.pt", wrap(new), optimizer=resumed)


def test_names_that_a_hook_keeps_out_of_the_file(tmp_path: Path) -> None:
    def hooked() -> nn.Module:
        net: nn.Module = Net()
        net._register_state_dict_hook(lambda _m, state, *_: [state.update({key[::-1]: state.pop(key)}) for key in list(state)] and None)
        return net

    net = hooked()
    optimizer = torch.optim.Adam(net.named_parameters(), lr=0.1)
    step(net, optimizer, 0)
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "a.pt")
    new = hooked()
    resumed = torch.optim.Adam(new.named_parameters(), lr=0.1)
    cs.transfer(tmp_path / "a.pt", new, optimizer=resumed)
    for one, old in zip(new.parameters(), net.parameters(), strict=True):
        assert torch.equal(resumed.state[one]["exp_avg"], optimizer.state[old]["exp_avg"])


def run(*arguments: object, ok: int = 0) -> str:
    ended = program(*arguments)
    assert ended.code == ok, ended.out + ended.err
    return ended.out + ended.err


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets.py").write_text(NETS)
    return "nets.py:Net"


def resumed_from(path: Path, make: Callable[[nn.Module], torch.optim.Optimizer]) -> tuple[nn.Module, torch.optim.Optimizer]:
    """By torch alone."""
    value = torch.load(path, weights_only=True)
    new = Net()
    new.load_state_dict(value["model"])
    optimizer = make(new)
    optimizer.load_state_dict(value["optimizer"])
    return new, optimizer


@pytest.mark.parametrize("make", ["AdamW", "decay split"])
@pytest.mark.parametrize("form", ["model", "lines", "JSON"])
def test_on_the_command_line_the_person_says_whose(make: str, form: str, nets: str, tmp_path: Path) -> None:
    net, optimizer = trained(MAKE[make])
    torch.save({"model": dict(sorted(net.state_dict().items())), "optimizer": optimizer.state_dict()}, "run.pt")
    told = run("merge", "run.pt", nets, "-o", "out.pt", "--with-optimizer", ok=2)
    assert "--optimizer-names model" in told and "sorted" in told and not Path("out.pt").exists()
    names = {id(one): name for name, one in net.named_parameters()}
    order = [names[id(one)] for group in optimizer.param_groups for one in group["params"]]
    Path("names.txt").write_text("\n".join(order) + "\n" if form == "lines" else json.dumps(order))
    word = "model" if form == "model" else "names.txt"
    told = run("merge", "run.pt", nets, "-o", "out.pt", "--with-optimizer", "--optimizer-names", word)
    assert "carried        16" in told
    goes_on(net, optimizer, *resumed_from(tmp_path / "out.pt", MAKE[make]))


def test_names_that_are_none(nets: str) -> None:
    net, optimizer = trained(MAKE["SGD"])
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, "run.pt")
    Path("wrong.json").write_text("[1]")
    Path("wrong.bin").write_bytes(b"\xff\xfe\x00")
    Path("short.txt").write_text("q.0.weight\n")
    for name, words in (("wrong.json", "other than names"), ("wrong.bin", "no text"), ("short.txt", "1 names"), ("absent", "absent")):
        assert words in run("merge", "run.pt", nets, "-o", "o.pt", "--with-optimizer", "--optimizer-names", name, ok=2)
    run("merge", "run.pt", nets, "-o", "o.pt", "--optimizer-names", "model", ok=2)


class Rows(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"x": torch.randn(4, generator=torch.Generator().manual_seed(index))}


class Losing(nn.Module):
    """A network that gives its loss, as the Trainer wants it."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": self.net(x).square().mean()}


def trainer_files(folder: Path) -> tuple[Path, nn.Module, torch.optim.Optimizer, Any]:
    from transformers import Trainer, TrainingArguments, set_seed

    set_seed(0)
    arguments = TrainingArguments(
        str(folder),
        max_steps=2,
        save_steps=2,
        per_device_train_batch_size=4,
        weight_decay=0.1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = Trainer(model=Losing(), args=arguments, train_dataset=Rows())
    trainer.train()
    optimizer = trainer.optimizer
    return folder / "checkpoint-2", trainer.model, getattr(optimizer, "optimizer", optimizer), trainer.lr_scheduler  # type: ignore[return-value]


def accelerate_files(folder: Path) -> tuple[Path, nn.Module, torch.optim.Optimizer, Any]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    net = Losing()
    optimizer = torch.optim.AdamW(split(net), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    model, prepared, planned = accelerator.prepare(net, optimizer, scheduler)
    for number in range(2):
        prepared.zero_grad()
        accelerator.backward(model(torch.randn(4, 4, generator=torch.Generator().manual_seed(number)))["loss"])
        prepared.step()
        planned.step()
    accelerator.save_state(str(folder))
    return folder, net, optimizer, scheduler


@pytest.mark.parametrize("files", [trainer_files, accelerate_files])
def test_the_state_stands_in_a_file_of_its_own(files: Any, nets: str, tmp_path: Path) -> None:
    """As the Trainer and accelerate write it: model.safetensors, and beside it the optimizer's file and the scheduler's."""
    folder, net, optimizer, scheduler = files(tmp_path / "run")
    state = next(path for path in (folder / "optimizer.pt", folder / "optimizer.bin") if path.exists())
    schedule = next(path for path in (folder / "scheduler.pt", folder / "scheduler.bin") if path.exists())
    for source in (state, folder, torch.load(state)):
        new = Losing()
        resumed = torch.optim.AdamW(split(new), lr=1.0)
        planned = torch.optim.lr_scheduler.StepLR(resumed, 1, gamma=0.5) if isinstance(scheduler, torch.optim.lr_scheduler.StepLR) else None
        more = {"scheduler": planned, "scheduler_from": schedule} if planned is not None else {}
        report = cs.transfer(folder / "model.safetensors", new, optimizer=resumed, optimizer_from=source, **more)
        assert report.optimizer is not None and len(report.optimizer.carried) == 16 and report.optimizer.not_carried == ()
        assert (f"optimizer state from {state}" in str(report)) == isinstance(source, Path)
        for one, old in zip(new.parameters(), net.parameters(), strict=True):
            assert torch.equal(one, old)
            for slot, value in optimizer.state[old].items():
                assert torch.equal(resumed.state[one][slot], value)
        if planned is not None:
            assert planned.state_dict() == scheduler.state_dict() and report.optimizer.others == ("scheduler",)
    (tmp_path / "losing.py").write_text(NETS + "class Losing(nn.Module):\n def __init__(self):\n  super().__init__()\n  self.net = Net()\n")
    merge = ("merge", folder / "model.safetensors", "losing.py:Losing", "-o", "out.pt", "--optimizer", state, "--overwrite")
    told = run(*merge, "--optimizer-names", "model")
    assert "carried        16" in told and "verified" in told
    value = torch.load("out.pt", weights_only=True)
    names = [name for group in value["optimizer"]["param_groups"] for name in group["param_names"]]
    parameters = dict(net.named_parameters())
    assert value["optimizer"]["param_groups"][1]["weight_decay"] == 0 and len(names) == 16
    for position, name in enumerate(names):
        for slot, own in optimizer.state[parameters[name]].items():
            assert torch.equal(torch.as_tensor(value["optimizer"]["state"][position][slot]), torch.as_tensor(own))


def test_what_stands_beside_the_weights_is_written_along(nets: str, tmp_path: Path) -> None:
    net, optimizer = trained(MAKE["SGD"])
    torch.save({"net": net.state_dict(), "epoch": 3}, "m.pt")
    torch.save(optimizer.state_dict(), "optimizer.pt")
    told = run("merge", "m.pt", nets, "-o", "out.pt", "--optimizer", "optimizer.pt")
    assert "also carried: epoch" in told and "optimizer state from optimizer.pt" in told
    value = torch.load("out.pt", weights_only=True)
    assert list(value) == ["epoch", "net", "optimizer"] and value["epoch"] == 3
    torch.save({"model": value["net"], "optimizer": value["optimizer"]}, "again.pt")
    goes_on(net, optimizer, *resumed_from(tmp_path / "again.pt", MAKE["SGD"]))
    assert "no optimizer" in run("merge", "m.pt", nets, "-o", "o.pt", "--optimizer", "m.pt", ok=2)
    run("merge", "m.pt", nets, "-o", "o.safetensors", "--optimizer", "optimizer.pt", ok=2)
    run("merge", "m.pt", nets, "-o", "o.pt", "--optimizer", "optimizer.pt", "--dry-run")


def test_a_second_file_may_hold_more_and_must_hold_it(tmp_path: Path) -> None:
    net, optimizer = trained(MAKE["SGD"])
    torch.save(net.state_dict(), tmp_path / "m.pt")
    torch.save({"epoch": 3, "optim": optimizer.state_dict()}, tmp_path / "beside.pt")
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pt")
    new = Net()
    resumed = MAKE["SGD"](new)
    report = cs.transfer(tmp_path / "m.pt", new, optimizer=resumed, optimizer_from=tmp_path / "beside.pt")
    assert report.optimizer is not None and report.optimizer.place == f"{tmp_path / 'beside.pt'}: optim"
    goes_on(net, optimizer, new, resumed)
    with pytest.raises(cs.CheckpointError, match="no optimizer state"):
        cs.transfer(tmp_path / "m.pt", new, optimizer=resumed, optimizer_from=tmp_path / "other.pt")
    with pytest.raises(SettingsError, match="optimizer-from"):
        cs.transfer(tmp_path / "m.pt", new, optimizer_from=tmp_path / "beside.pt")
    with pytest.raises(cs.CheckpointError, match="optimizer_from: takes a path"):
        cs.transfer(tmp_path / "m.pt", new, optimizer=resumed, optimizer_from=Iterable)
