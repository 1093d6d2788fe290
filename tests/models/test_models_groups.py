"""Parameter groups: every trainable parameter in exactly one, and what goes wrong said clearly."""

import copy
from dataclasses import dataclass

import pytest
import torch
from groups_support import SCHEDULERS, ratios, steps
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import ckptsurgeon as cs
from ckptsurgeon.errors import ModelError, NoRecordError
from ckptsurgeon.models.training.groups import check_groups, fresh_keys, param_groups
from ckptsurgeon.report import Coverage, Report, Verification
from ckptsurgeon.tensors import Checkpoint


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1 = nn.Linear(4, 8)
        self.norm = nn.BatchNorm1d(8)
        self.fc2 = nn.Linear(8, 8)
        self.fc3 = nn.Linear(8, 2)

    def forward(self, x):
        return self.fc3(self.fc2(self.norm(self.fc1(x))).relu())


def report(*fresh, partial=()):
    return Report(("a.pt",), "model:Net", (), (), fresh, (), Coverage(0, 0), partial=partial)


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
        ({"lr": 1e-3}, "have no learning rate"),
        ({"lr": None}, "have no learning rate"),
        ({"lr": 1e-3, "fresh_lr": 1.0, "fresh_scale": 2.0}, "both given"),
        ({"lr": None, "fresh_scale": 2.0}, "fresh_scale multiplies lr, which is missing"),
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


def test_what_the_record_says_nothing_of_is_not_taken_for_transferred(tmp_path):
    """A layer that was added after the transfer, or a model that the record was not made for: its values may be fresh."""
    net, path, merged = Net(), tmp_path / "a.pt", tmp_path / "merged.pt"
    torch.save(Net().state_dict(), path)
    made = cs.transfer(path, net)
    records = (made, cs.plan(path, net), cs.merge(path, net, merged), cs.open(merged))
    net.extra = nn.Linear(2, 2)
    for record in records:
        with pytest.raises(ModelError, match=r"extra\.weight: is not in the record of what is fresh") as caught:
            cs.param_groups(net, record, lr=1.0, fresh_lr=2.0)
        assert caught.value.problems == ("extra.bias: nor is it",) and "overrides={'extra.{weight,bias}': 1e-2}" in caught.value.hint
        groups = cs.param_groups(net, record, lr=1.0, overrides={"extra.{weight,bias}": 1e-2})
        assert names(groups)["extra.{weight,bias}"] == ["extra.weight", "extra.bias"]
        with pytest.raises(ModelError, match="not in the record"):
            cs.freeze(net, record)
        assert all(parameter.requires_grad for parameter in net.parameters())
    with pytest.raises(ModelError, match="not in the record"):
        cs.param_groups(nn.Linear(2, 2), made, lr=1.0)
    net.extra.requires_grad_(False)
    assert [len(group["params"]) for group in cs.param_groups(net, made, lr=1.0)] == [8]


def test_a_record_holds_for_the_model_wrapped_or_unwrapped():
    for wrap, record in ((nn.DataParallel, HEAD), (torch.compile, HEAD), (lambda net: net, [f"_orig_mod.module.{key}" for key in HEAD])):
        model = wrap(Net())
        assert [len(group["params"]) for group in param_groups(model, report(*record), lr=1.0, fresh_lr=2.0)] == [6, 2]


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


class Stack(nn.Module):
    """An embedding, three blocks of a linear layer and a norm, a norm, a head."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(3))
        self.norm, self.head = nn.LayerNorm(4), nn.Linear(4, 2)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.head(self.norm(x).mean(1))


STACK_HEAD = ("head.weight", "head.bias")


def test_layer_decay_multiplies_by_depth_and_fresh_parameters_keep_their_rate():
    groups = param_groups(Stack(), report(*STACK_HEAD), lr=1.0, fresh_lr=3.0, layer_decay=0.5, overrides={"blocks.1.0.bias": 7.0})
    assert [(group["name"], group["lr"], len(group["params"])) for group in groups] == [
        ("transferred/stem", 0.5**4, 1),
        ("transferred/layer 0", 0.5**3, 4),
        ("transferred/layer 1", 0.5**2, 3),
        ("transferred/layer 2", 0.5, 4),
        ("transferred/head", 1.0, 2),
        ("fresh", 3.0, 2),
        ("blocks.1.0.bias", 7.0, 1),
    ]
    by_pattern = param_groups(Stack(), report(*STACK_HEAD), lr=1.0, fresh_lr=3.0, layer_decay=0.5, layers="blocks.{i}.**")
    assert [group["lr"] for group in by_pattern] == [0.5**4, 0.5**3, 0.5**2, 0.5, 1.0, 3.0]
    by_order = param_groups(Net(), HEAD, lr=1.0, fresh_lr=3.0, layer_decay=0.5, layers=["fc1.*", "fc2.*"])
    assert [(group["name"], group["lr"]) for group in by_order] == [
        ("transferred/layer 0", 0.25),
        ("transferred/layer 1", 0.5),
        ("fresh", 3.0),
    ]


def test_no_decay_for_biases_norms_and_embeddings():
    groups = param_groups(Stack(), report(*STACK_HEAD), lr=1.0, fresh_lr=3.0, weight_decay=0.1, no_decay=True)
    assert {group["name"]: (group["weight_decay"], group["param_names"]) for group in groups} == {
        "transferred": (0.1, [f"blocks.{i}.0.weight" for i in range(3)]),
        "transferred/no decay": (
            0.0,
            [
                "embed.weight",
                *(f"blocks.{i}.{leaf}" for i in range(3) for leaf in ("0.bias", "1.weight", "1.bias")),
                "norm.weight",
                "norm.bias",
            ],
        ),
        "fresh": (0.1, ["head.weight"]),
        "fresh/no decay": (0.0, ["head.bias"]),
    }
    deep = param_groups(Stack(), STACK_HEAD, lr=1.0, fresh_lr=3.0, weight_decay=0.1, no_decay=True, layer_decay=0.5)
    assert [group["name"] for group in deep][1:3] == ["transferred/layer 0", "transferred/layer 0/no decay"]


def test_no_decay_by_pattern_and_by_each_reason():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2, add_bias_kv=True)  # bias_k has three dimensions
            self.scale = nn.Parameter(torch.zeros(3))
            self.norm = nn.LayerNorm((2, 2))  # a norm whose weight has two
            self.embed = nn.Embedding(4, 4)
            self.out = nn.Linear(4, 4, bias=False)
            self.out.weight = self.embed.weight

    def bare(rule):
        groups = param_groups(Odd(), [], lr=1.0, weight_decay=0.1, no_decay=rule)
        return {name for group in groups if group["weight_decay"] == 0 for name in group["param_names"]}

    usual = bare(True)
    assert usual >= {"attention.bias_k", "attention.in_proj_bias", "scale", "norm.weight", "embed.weight"}
    assert not usual & {"attention.in_proj_weight", "attention.out_proj.weight"}
    assert bare("scale") == {"scale"} and bare(False) == set() and bare(["out.weight", "scale"]) == {"embed.weight", "scale"}
    assert bare([True, "attention.in_proj_weight"]) == usual | {"attention.in_proj_weight"}
    with pytest.raises(ModelError, match="matches no parameter"):
        bare("nothing.*")
    with pytest.raises(ModelError, match="no_decay can't be"):
        bare([3])


def test_without_weight_decay_only_the_groups_that_want_none_have_one():
    groups = param_groups(Net(), HEAD, lr=1.0, fresh_lr=2.0, no_decay=True)
    assert [group.get("weight_decay") for group in groups] == [None, 0.0, None, 0.0]
    assert [group["weight_decay"] for group in torch.optim.AdamW(groups, weight_decay=0.3).param_groups] == [0.3, 0.0, 0.3, 0.0]


def test_partly_transferred_tensors_count_as_the_person_chooses():
    record = report(*STACK_HEAD, partial=("embed.weight",))
    assert "embed.weight" in names(param_groups(Stack(), record, lr=1.0, fresh_lr=2.0))["transferred"]
    assert names(param_groups(Stack(), record, lr=1.0, fresh_lr=2.0, partial="fresh"))["fresh"] == ["embed.weight", *STACK_HEAD]
    merged = Checkpoint("m.pt", "torch-zip", "", {}, provenance={"fresh": list(STACK_HEAD), "partial": ["embed.weight"]})
    assert "embed.weight" in names(param_groups(Stack(), merged, lr=1.0, fresh_lr=2.0, partial="fresh"))["fresh"]
    before = Checkpoint("m.pt", "torch-zip", "", {}, provenance={"fresh": list(STACK_HEAD)})
    assert "embed.weight" in names(param_groups(Stack(), before, lr=1.0, fresh_lr=2.0))["transferred"]
    with pytest.raises(NoRecordError, match="partly transferred"):
        param_groups(Stack(), before, lr=1.0, fresh_lr=2.0, partial="fresh")
    with pytest.raises(ModelError, match="1 keys recorded as partly transferred"):
        param_groups(Stack(), report(partial=("embedding.weight",)), lr=1.0, fresh_lr=2.0, partial="fresh")


def test_a_tied_pair_of_which_one_is_partial_and_one_fresh_can_count_as_fresh():
    record = report("head.weight", "head.bias", partial=("embed.weight",))
    assert names(param_groups(tied(), record, lr=1.0, fresh_lr=2.0, partial="fresh")) == {"fresh": ["embed.weight", "head.bias"]}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layer_decay": 0.0}, "layer_decay can't be 0.0"),
        ({"layer_decay": 1.5}, "layer_decay can't be 1.5"),
        ({"layer_decay": float("nan")}, "layer_decay can't be nan"),
        ({"layer_decay": 0.5, "lr": None}, "layer_decay multiplies lr"),
        ({"layers": "blocks.{i}.**"}, "layers are given without layer_decay"),
        ({"layer_decay": 0.5, "layers": "block.{i}.**"}, "match no parameter"),
        ({"partial": "both"}, "partial can't be 'both'"),
    ],
)
def test_choices_that_can_not_be(arguments, message):
    with pytest.raises(ModelError, match=message) as caught:
        param_groups(Stack(), report(*STACK_HEAD), **{"lr": 1.0, "fresh_lr": 2.0, **arguments})
    assert caught.value.hint


def test_what_is_in_no_group_or_in_two_or_frozen_is_named():
    model = Net()
    model.fc1.weight.requires_grad_(False)
    rest = [parameter for name, parameter in model.named_parameters() if name not in ("fc1.weight", "fc1.bias", "fc3.bias")]
    check_groups(model, [{"params": [*rest, model.fc1.bias, model.fc3.bias]}])
    for groups, key, reason in (
        ([{"name": "a", "params": [*rest, model.fc1.bias]}], "fc3.bias", "in no group"),
        ([{"name": "a", "params": [*rest, model.fc1.bias, model.fc3.bias, model.fc1.bias]}], "fc1.bias", "in 2 groups: 'a', 'a'"),
        ([{"name": "a", "params": [*rest, model.fc1.bias, model.fc3.bias]}, {"params": [model.fc3.bias]}], "fc3.bias", "'a', '1'"),
        ([{"name": "a", "params": [*rest, *model.fc1.parameters(), model.fc3.bias]}], "fc1.weight", "is frozen, but in the group 'a'"),
    ):
        with pytest.raises(ModelError, match=reason) as caught:
            check_groups(model, groups)
        assert caught.value.key == key
    with pytest.raises(ModelError, match="2 parameters are not in exactly one group") as caught:
        check_groups(model, [{"params": rest}])
    assert caught.value.problems == ("fc1.bias: is trainable, but in no group", "fc3.bias: is trainable, but in no group")
    with pytest.raises(ModelError, match="is no parameter of the model"):
        check_groups(model, [{"params": [*rest, model.fc1.bias, model.fc3.bias, nn.Parameter(torch.zeros(2))]}])


def full(model):
    return param_groups(
        model, report(*STACK_HEAD), lr=1e-3, fresh_scale=10, weight_decay=0.1, layer_decay=0.5, no_decay=True, overrides={"norm.bias": 1e-4}
    )


@given(st.data())
def test_with_every_choice_each_trainable_parameter_is_in_exactly_one_group(data):
    model = Stack()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in ("head.weight", "norm.bias", "norm.weight") or data.draw(st.booleans()))
    groups = full(model)
    placed = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(placed) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert len({group["name"] for group in groups}) == len(groups)


OPTIMIZERS = [
    pytest.param(getattr(torch.optim, name), {}, id=name)
    for name in sorted(dir(torch.optim))
    if isinstance(getattr(torch.optim, name), type)
    and issubclass(getattr(torch.optim, name), torch.optim.Optimizer)
    # no groups; sparse gradients only; matrices only; a rate that is the first step alone, never below 1e-6
    and name not in ("Optimizer", "LBFGS", "SparseAdam", "Muon", "Rprop")
] + [
    pytest.param(torch.optim.SGD, {"momentum": 0.9, "foreach": True}, id="SGD-foreach"),
    pytest.param(torch.optim.SGD, {"momentum": 0.9, "fused": True}, id="SGD-fused"),
    pytest.param(torch.optim.AdamW, {"foreach": True}, id="AdamW-foreach"),
    pytest.param(torch.optim.AdamW, {"fused": True}, id="AdamW-fused"),
]


@pytest.mark.parametrize(("optimizer", "options"), OPTIMIZERS)
def test_every_optimizer_honours_the_rates_and_shows_the_names(optimizer, options):
    torch.manual_seed(0)
    model = Stack()
    groups = full(model)
    expected = [(group["name"], group["lr"], list(group["param_names"])) for group in groups]
    for group in groups:
        group["lr"] = 0.0 if group["name"].startswith("transferred") else group["lr"]
    made = optimizer(groups, **options)
    assert [(group["name"], group["param_names"]) for group in made.param_groups] == [(name, own) for name, _, own in expected]
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for _ in range(3):
        steps(model, made, 1, lambda: torch.randint(5, (8, 3)))
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert "head.weight" in moved and moved <= {"head.weight", "head.bias", "norm.bias"}
    saved = made.state_dict()["param_groups"]
    assert [(group["name"], group["param_names"]) for group in saved] == [(name, own) for name, _, own in expected]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_keeps_the_ratio_between_groups(name):
    model = Stack()
    groups = full(model)
    wanted = ratios(groups)
    optimizer = torch.optim.SGD(groups, lr=1.0, momentum=0.9)
    scheduler = SCHEDULERS[name](optimizer)
    changed = set()
    for _ in range(7):
        steps(model, optimizer, 1, lambda: torch.randint(5, (2, 3)))
        scheduler.step(*([1.0] if name == "ReduceLROnPlateau" else []))
        changed.add(optimizer.param_groups[0]["lr"])
        assert ratios(optimizer.param_groups) == pytest.approx(wanted)
    assert len(changed) > 1


def test_lightning_takes_them_from_configure_optimizers(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Stack()

        def training_step(self, batch, _index):
            return self.net(batch[0]).square().mean()

        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(full(self.net))
            return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)}

    torch.manual_seed(0)
    module = Module()
    wanted = ratios(full(module.net))
    before = copy.deepcopy(module.net.state_dict())
    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.randint(5, (8, 3))), batch_size=4)
    trainer = lightning.Trainer(
        max_epochs=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(module, data)
    found = trainer.optimizers[0].param_groups
    assert ratios(found) == pytest.approx(wanted) and found[-1]["lr"] == pytest.approx(1e-4 * 0.25)
    assert [group["name"] for group in found] == [group["name"] for group in full(module.net)]
    assert not torch.equal(module.net.head.weight, before["head.weight"])


def test_hugging_faces_trainer_takes_them_as_optimizers(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate", reason="the Trainer needs it")
    config = transformers.BertConfig(
        vocab_size=12, hidden_size=8, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16, max_position_embeddings=8
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    fresh = ["classifier.weight", "classifier.bias"]
    groups = param_groups(model, fresh, lr=1e-3, fresh_scale=10, weight_decay=0.1, layer_decay=0.5, no_decay=True)
    wanted, before = ratios(groups), copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(groups)
    schedule = transformers.get_linear_schedule_with_warmup(optimizer, 1, 8)
    rows = [{"input_ids": torch.randint(12, (4,)), "labels": torch.tensor(number % 2)} for number in range(8)]
    arguments = transformers.TrainingArguments(
        tmp_path, max_steps=4, per_device_train_batch_size=2, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows, optimizers=(optimizer, schedule))
    trainer.train()
    found = trainer.optimizer.param_groups
    assert ratios(found) == pytest.approx(wanted) and found[0]["lr"] < groups[0]["initial_lr"]
    assert [group["name"] for group in found][:2] == ["transferred/stem/no decay", "transferred/layer 0"]
    assert not torch.equal(model.classifier.weight, before["classifier.weight"])


def test_a_fresh_stack_is_no_candidate_for_the_layers():
    model = nn.ModuleDict({"encoder": nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(2))})
    model["decoder"] = nn.ModuleList(nn.Sequential(nn.Linear(2, 2)) for _ in range(2))
    with pytest.raises(ModelError, match="2 stacks"):
        param_groups(model, [], lr=1.0, layer_decay=0.5)
    fresh = [name for name, _ in model.named_parameters() if name.startswith("decoder")]
    groups = param_groups(model, fresh, lr=1.0, fresh_lr=2.0, layer_decay=0.5)
    assert [group["name"] for group in groups] == ["transferred/layer 0", "transferred/layer 1", "fresh"]
    by_override = param_groups(model, [], lr=1.0, layer_decay=0.5, overrides={"decoder.**": 2.0})
    assert [group["name"] for group in by_override] == ["transferred/layer 0", "transferred/layer 1", "decoder.**"]


def test_a_group_that_lost_a_parameter_is_never_handed_out(monkeypatch):
    from ckptsurgeon.models.training import groups

    whole = groups._group
    monkeypatch.setattr(groups, "_group", lambda *row: {**whole(*row), "params": whole(*row)["params"][1:]})
    with pytest.raises(ModelError, match="in no group") as caught:
        param_groups(Net(), HEAD, lr=1.0, fresh_lr=2.0)
    assert caught.value.key == "fc1.weight"
