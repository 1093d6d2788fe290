"""Parameter groups: every trainable parameter in exactly one, and what goes wrong said clearly."""

import copy
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from ckptsurgeon.errors import ModelError, NoRecordError
from ckptsurgeon.models.groups import fresh_keys, param_groups
from ckptsurgeon.report import Report, Verification
from ckptsurgeon.tensors import Checkpoint, Coverage


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.fc2 = nn.Linear(8, 8)
        self.fc3 = nn.Linear(8, 2)

    def forward(self, x):
        return self.fc3(self.fc2(self.norm(self.fc1(x))).relu())


def report(*fresh):
    return Report(("a.pt",), "model:Net", (), (), fresh, (), Coverage(0, 0))


def names(groups):
    return {group["name"]: group["param_names"] for group in groups}


HEAD = ("fc3.weight", "fc3.bias")


def test_transferred_and_fresh_learn_at_their_own_rates():
    model = Net()
    groups = param_groups(model, report(*HEAD, "norm.running_mean"), lr=1e-3, fresh_lr=1e-2, weight_decay=1e-4)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [("transferred", 1e-3, 1e-4), ("fresh", 1e-2, 1e-4)]
    assert groups[1]["params"][0] is model.fc3.weight and groups[1]["params"][1] is model.fc3.bias
    assert len(groups[0]["params"]) == 6
    assert param_groups(model, report(*HEAD), lr=1e-3, fresh_scale=10)[1]["lr"] == pytest.approx(1e-2)


@pytest.mark.parametrize("make", [lambda groups: torch.optim.SGD(groups, momentum=0.9), lambda groups: torch.optim.AdamW(groups)])
def test_torchs_optimizers_take_them_and_their_state_comes_back(make):
    torch.manual_seed(0)
    model = Net()
    groups = param_groups(model, HEAD, lr=1e-3, fresh_lr=1e-2, weight_decay=1e-4, overrides={"fc2.*": 5e-3})
    optimizer = make(copy.copy(groups))
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 4)).square().mean().backward()
        optimizer.step()
    scheduler.step()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([1e-4, 1e-3, 5e-4])
    saved = optimizer.state_dict()
    assert [group["param_names"] for group in saved["param_groups"]] == [group["param_names"] for group in groups]
    twin = copy.deepcopy(model)
    other = make(param_groups(twin, HEAD, lr=1e-3, fresh_lr=1e-2, weight_decay=1e-4, overrides={"fc2.*": 5e-3}))
    other.load_state_dict(copy.deepcopy(saved))
    for pair in ((optimizer, model), (other, twin)):
        pair[0].zero_grad()
        pair[1](torch.ones(4, 4)).square().mean().backward()
        pair[0].step()
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), twin.parameters(), strict=True))


def test_fresh_really_learns_faster():
    model = Net()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(param_groups(model, HEAD, lr=0.0, fresh_lr=1e-1))
    model(torch.randn(4, 4)).sum().backward()
    optimizer.step()
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved <= set(HEAD) and "fc3.bias" in moved


def test_overrides_come_before_all_else_and_the_first_wins():
    groups = param_groups(Net(), HEAD, lr=1.0, fresh_lr=2.0, overrides={"fc3.bias": 3.0, "fc3.*": 4.0, "fc*.weight": 5.0})
    assert names(groups) == {
        "transferred": ["fc1.bias", "norm.weight", "norm.bias", "fc2.bias"],
        "fc3.bias": ["fc3.bias"],
        "fc3.*": ["fc3.weight"],
        "fc*.weight": ["fc1.weight", "fc2.weight"],
    }
    assert [group["lr"] for group in groups] == [1.0, 3.0, 4.0, 5.0]


def test_overrides_that_take_everything_fresh_need_no_fresh_rate():
    assert list(names(param_groups(Net(), HEAD, lr=1.0, overrides={"fc3.*": 2.0}))) == ["transferred", "fc3.*"]


def test_a_pattern_named_like_a_group_is_not_mixed_up_with_it():
    model = nn.ParameterDict({"fresh": nn.Parameter(torch.zeros(1)), "other": nn.Parameter(torch.zeros(1))})
    groups = param_groups(model, ["other"], lr=1.0, fresh_lr=2.0, overrides={"fresh": 3.0})
    assert [(group["lr"], group["param_names"]) for group in groups] == [(2.0, ["other"]), (3.0, ["fresh"])]


def test_nothing_fresh_is_one_group_and_frozen_parameters_are_in_none():
    model = Net()
    model.fc1.requires_grad_(False)
    groups = param_groups(model, report(), lr=1e-3)
    assert [group["name"] for group in groups] == ["transferred"] and "fc1.weight" not in groups[0]["param_names"]


def test_without_a_rate_the_optimizers_own_is_left():
    groups = param_groups(Net(), HEAD, lr=None, fresh_lr=1e-2)
    assert "lr" not in groups[0] and "weight_decay" not in groups[0]
    assert [group["lr"] for group in torch.optim.SGD(groups, lr=0.5).param_groups] == [0.5, 1e-2]


def tied():
    model = nn.ModuleDict({"embed": nn.Embedding(4, 3), "head": nn.Linear(3, 4)})
    model["head"].weight = model["embed"].weight
    return model


def test_a_tied_parameter_is_fresh_only_if_all_its_names_are():
    assert names(param_groups(tied(), ["head.weight", "head.bias"], lr=1.0, fresh_lr=2.0)) == {
        "transferred": ["embed.weight"],
        "fresh": ["head.bias"],
    }
    every = ["embed.weight", "head.weight", "head.bias"]
    assert names(param_groups(tied(), every, lr=1.0, fresh_lr=2.0)) == {"fresh": ["embed.weight", "head.bias"]}
    assert names(param_groups(tied(), [], lr=1.0, overrides={"head.weight": 2.0}))["head.weight"] == ["embed.weight"]


@given(st.data())
def test_every_trainable_parameter_is_in_exactly_one_group(data):
    model = nn.ModuleDict({f"l{i}": nn.Linear(1, 1) for i in range(4)})
    if data.draw(st.booleans()):
        model["l3"].weight = model["l0"].weight
    for parameter in model.parameters():
        parameter.requires_grad_(data.draw(st.booleans()))
    model["l1"].weight.requires_grad_(True)
    fresh = data.draw(st.sets(st.sampled_from(sorted(model.state_dict()))))
    overrides = data.draw(st.sampled_from([None, {"l1.*": 1.0}, {"*.weight": 1.0, "l1.weight": 2.0}]))
    groups = param_groups(model, sorted(fresh), lr=1e-3, fresh_lr=1e-2, overrides=overrides)
    placed = [parameter for group in groups for parameter in group["params"]]
    assert sorted(map(id, placed)) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert all(group["params"] for group in groups)
    by_name = dict(model.named_parameters())
    assert all(by_name[name] is p for group in groups for name, p in zip(group["param_names"], group["params"], strict=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr": 1e-3}, "no rate is given"),
        ({"lr": None}, "no rate is given"),
        ({"lr": 1e-3, "fresh_lr": 1.0, "fresh_scale": 2.0}, "both given"),
        ({"lr": None, "fresh_scale": 2.0}, "no lr is given"),
        ({"lr": -1.0, "fresh_lr": 1.0}, "lr can't be -1.0"),
        ({"lr": float("nan"), "fresh_lr": 1.0}, "lr can't be nan"),
        ({"lr": 1.0, "fresh_lr": float("inf")}, "fresh_lr can't be inf"),
        ({"lr": 1.0, "fresh_lr": 1.0, "weight_decay": -1.0}, "weight_decay can't be"),
        ({"lr": 1.0, "fresh_lr": 1.0, "overrides": {"fc3.*": -1.0}}, r"fc3\.\* can't be"),
        ({"lr": 1.0, "fresh_lr": 1.0, "overrides": {"fc9.weight": 1.0}}, "matches no parameter"),
        ({"lr": 1.0, "fresh_lr": 1.0, "overrides": {"fc9.*": 1.0, "fc8.*": 1.0}}, "2 patterns match nothing"),
        ({"lr": 1.0, "fresh_lr": 1.0, "overrides": {"fc1.*": 1.0}}, "frozen parameters only"),
    ],
)
def test_rates_and_patterns_that_can_not_be(arguments, message):
    model = Net()
    model.fc1.requires_grad_(False)
    with pytest.raises(ModelError, match=message) as caught:
        param_groups(model, HEAD, **arguments)
    assert caught.value.hint


def test_a_pattern_that_misses_is_answered_with_close_names():
    with pytest.raises(ModelError) as caught:
        param_groups(Net(), HEAD, lr=1.0, fresh_lr=1.0, overrides={"fc33.weight": 1.0})
    assert "fc3.weight" in caught.value.hint


def test_a_record_of_another_model_is_refused():
    with pytest.raises(ModelError, match="2 keys") as caught:
        param_groups(Net(), report("fc9.weight", "fc9.bias"), lr=1.0, fresh_lr=1.0)
    assert caught.value.problems == ("fc9.bias", "fc9.weight")
    with pytest.raises(ModelError) as caught:
        param_groups(nn.ModuleDict({"module": Net()}), report(*HEAD), lr=1.0, fresh_lr=1.0)
    assert "model.module" in caught.value.hint


def test_nothing_trainable_and_lazy_parameters_are_refused():
    model = Net()
    model.requires_grad_(False)
    for odd, message in ((model, "no trainable"), (nn.ReLU(), "no trainable"), (nn.LazyLinear(2), "lazy")):
        with pytest.raises(ModelError, match=message):
            param_groups(odd, [], lr=1.0)


def test_what_is_fresh_comes_from_any_record():
    @dataclass
    class Plan:
        fresh: tuple[str, ...]

    merged = Checkpoint("m.pt", "torch-zip", "", {}, provenance={"fresh": ["a"]})
    sources = [report("a"), Plan(("a",)), merged, ["a"], {"a"}, Verification("cpu", 1, fresh=("a",))]
    assert all(fresh_keys(source) == {"a"} for source in sources)


@pytest.mark.parametrize("provenance", [None, {}, {"tool": "x"}])
def test_no_record_is_a_no(provenance):
    with pytest.raises(NoRecordError) as caught:
        fresh_keys(Checkpoint("m.pt", "torch-zip", "", {}, provenance=provenance))
    assert caught.value.path == "m.pt" and caught.value.hint
    with pytest.raises(NoRecordError):
        fresh_keys(Verification("cpu", 1))


@pytest.mark.parametrize("source", ["fc3.weight", b"x", 3, None, [3]])
def test_other_things_do_not_say_what_is_fresh(source):
    with pytest.raises((ModelError, NoRecordError)):
        fresh_keys(source)
