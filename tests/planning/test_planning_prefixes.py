"""Wrapper prefixes: found by names and shapes together, never where it is a toss-up or two keys would collide."""

import pytest
import torch
from hypothesis import given, settings
from planning_support import checkpoint, live, metas, model, shapes
from profiles import examples
from torch import nn

import ckptsurgeon as cs
from ckptsurgeon.errors import PlanError
from ckptsurgeon.planning.diff import compare
from ckptsurgeon.planning.plan import make_plan
from ckptsurgeon.planning.prefixes.find import Prefix, find_change, rename_all
from ckptsurgeon.rules.rules import Rule
from ckptsurgeon.tensors import Checkpoint

NET = {"conv.weight": (6, 3, 5, 5), "conv.bias": (6,), "layer1.0.bn.weight": (6,), "layer1.0.bn.running_mean": (6,), "fc.weight": (2, 6)}


def wrapped(before: str, keys=NET):
    return {before + key: shape for key, shape in keys.items()}


def find_prefix(source, target) -> Prefix:
    """The prefix that is applied unasked."""
    return find_change(source, target).applied.prefix


def reached(source, target) -> dict[str, str]:
    """Which target key each source key reaches, in name and shape."""
    given, goal = metas(source), metas(target)
    names = rename_all(given, goal, find_prefix(given, goal))
    return {key: name for key, name in names.items() if name in goal and goal[name].shape == given[key].shape}


@pytest.mark.parametrize(
    "before",
    ["module.", "_orig_mod.", "model.", "module._orig_mod.", "_orig_mod.module.", "model.module._orig_mod.", "module.model._orig_mod.",
     "_orig_mod.model.", "net.backbone.body.", "_forward_module.module.model.", "model._fsdp_wrapped_module.", "module.module."],
)  # fmt: skip
def test_wrappers_come_off_in_any_order(before):
    assert reached(wrapped(before), NET) == {before + key: key for key in NET}
    assert reached(NET, wrapped(before)) == {key: before + key for key in NET}


def test_what_was_stripped_and_added_is_told_in_two_words():
    assert find_prefix(metas(wrapped("module.")), metas(NET)) == Prefix(stripped="module.")
    assert find_prefix(metas(NET), metas(wrapped("backbone."))) == Prefix(added="backbone.")
    assert find_prefix(metas(wrapped("net.module.")), metas(NET)) == Prefix("net.module.")
    assert find_prefix(metas(NET), metas(NET)) == Prefix()
    assert str(Prefix("module.", "backbone.")) == "prefix module. stripped; prefix backbone. added" and not Prefix()


MIDDLE = {
    "layer1._orig_mod.conv.weight": "layer1.conv.weight",
    "layer1._orig_mod.conv.bias": "layer1.conv.bias",
    "layer2.0._checkpoint_wrapped_module.conv.weight": "layer2.0.conv.weight",
    "fc.weight": "fc.weight",
}


@pytest.mark.parametrize("before", ["", "module.", "model.", "_orig_mod.module.model."])
def test_wrappers_in_the_middle_of_a_key(before):
    inner, plain = {before + key: name for key, name in MIDDLE.items()}, list(MIDDLE.values())
    assert reached(list(inner), plain) == inner
    assert reached(plain, list(inner)) == {name: key for key, name in inner.items()}
    # A compiled layer on one side, a checkpointed one on the other.
    other = [key.replace("_orig_mod", "x").replace("_checkpoint_wrapped_module", "_orig_mod").replace("x.", "") for key in MIDDLE]
    assert len(reached(list(inner), other)) == len(MIDDLE)


def test_a_module_that_is_really_called_module_stays():
    keys = ["encoder.module.weight", "encoder.module.bias", "encoder.norm.weight"]
    assert reached(keys, keys) == {key: key for key in keys}
    assert reached([f"module.{key}" for key in keys], keys) == {f"module.{key}": key for key in keys}
    assert reached([*keys, "old.weight"], [*keys, "new.weight"]) == {key: key for key in keys}


def test_strip_and_add_with_a_wrapped_target():
    target = {**wrapped("module.backbone."), "module.head.weight": (2, 2)}
    for before in ("", "module.", "_orig_mod.", "module._orig_mod."):
        assert reached(wrapped(before), target) == {before + key: "module.backbone." + key for key in NET}
    for before in ("model.", "net."):  # that is an exchange, which nobody asked for
        assert reached(wrapped(before), target) == {}


def test_one_tower_of_many():
    source = {**wrapped("visual."), "text.emb.weight": (9, 4), "logit_scale": ()}
    assert reached(source, NET) == {"visual." + key: key for key in NET}
    lightning = {**wrapped("model."), "criterion.weight": (2,), "n_averaged": ()}
    assert reached(lightning, NET) == {"model." + key: key for key in NET}


@pytest.mark.parametrize(
    "heads", [("encoder_q.", "encoder_k."), ("module.encoder_q.", "module.encoder_k."), ("net._orig_mod.a.", "net._orig_mod.b.")]
)
def test_two_towers_that_fit_equally_are_a_tie(heads):
    both = {**wrapped(heads[0]), **wrapped(heads[1]), "queue": (128, 16)}
    assert find_prefix(metas(both), metas(NET)) == Prefix()
    assert find_prefix(metas(NET), metas(both)) == Prefix()
    # One more key that fits, and it is a tie no longer.
    less = {key: shape for key, shape in both.items() if key != heads[1] + "fc.weight"}
    assert reached(less, NET) == {heads[0] + key: key for key in NET}


def test_a_prefix_under_which_two_keys_collide_is_never_taken():
    source = {**wrapped("module."), "fc.weight": (2, 6)}
    assert find_prefix(metas(source), metas(NET)) == Prefix()
    mid = ["a._orig_mod.w", "a.w", "b._orig_mod.w", "c._orig_mod.w"]
    assert reached(mid, ["a.w", "b.w", "c.w"]) == {"a.w": "a.w"}


def test_a_name_counts_only_with_its_shape():
    assert find_prefix(metas({"module.w": (3,)}), metas({"w": (2,)})) == Prefix()
    tall = {"big." + key: (9, *shape) for key, shape in NET.items()}
    assert reached({**wrapped("small."), **tall}, NET) == {"small." + key: key for key in NET}
    # The wrapper is there by name, and half of the shapes are not the target's.
    source = {"module.conv.weight": (6, 3, 5, 5), "module.fc.weight": (10, 6)}
    assert find_prefix(metas(source), metas({"conv.weight": (6, 3, 5, 5), "fc.weight": (2, 6)})) == Prefix("module.")


def test_names_as_they_are_win_over_a_prefix_that_does_no_better():
    source = {"a.w": (2,), "b.x.w": (2,)}
    assert reached(source, {"a.w": (2,), "x.w": (2,)}) == {"a.w": "a.w", "b.x.w": "x.w"}
    assert find_prefix(metas({"a.w": (2,), "x.b.w": (2,), "c": (1,)}), metas({"a.w": (2,), "b.w": (2,), "d": (1,)})) == Prefix("x.")
    assert find_prefix(metas(["w", "x.v"]), metas(["w", "q", "x.w"])) == Prefix()
    # Stripping `a.` would win a key and lose two.
    assert find_prefix(metas(["a.b.w", "a.c.w", "a.d.w"]), metas(["a.b.w", "a.c.w", "d.w", "q"])) == Prefix()


def test_a_module_alone_does_not_stand_for_any_other():
    assert find_prefix(metas(["fc.weight", "fc.bias"]), metas(["dense.weight", "dense.bias"])) == Prefix()
    assert find_prefix(metas(["fc.weight", "fc.bias"]), metas(["weight", "bias"])) == Prefix("fc.")
    layers = [f"h.{number}.w" for number in range(9)]
    assert find_prefix(metas(layers), metas([key.replace("h", "layers") for key in layers])) == Prefix()


def test_without_a_target_nothing_is_stripped():
    plan = make_plan([checkpoint(wrapped("module."))], None)
    assert [step.target for step in plan.steps] == list(wrapped("module."))
    assert plan.sources[0].prefix == {}


def test_nothing_in_common_and_nothing_at_all():
    assert find_prefix({}, {}) == find_prefix({}, metas(NET)) == find_prefix(metas(NET), {}) == Prefix()
    assert find_prefix(metas(["a.b", "c"]), metas(["x.y", "z"])) == Prefix()
    assert find_prefix(metas(["module"]), metas(["module.module", "w"])) == Prefix(added="module.")


@settings(max_examples=examples(300))
@given(shapes, shapes)
def test_a_prefix_never_costs_a_key_and_never_makes_two_one(source, target):
    given, goal = metas(source), metas(target)
    names = rename_all(given, goal, find_prefix(given, goal))
    assert list(names) == list(given) and len(set(names.values())) == len(names)
    assert len(reached(source, target)) >= sum(target.get(key) == shape for key, shape in source.items())


@given(shapes, shapes)
def test_the_order_of_the_keys_does_not_matter(source, target):
    turned = dict(reversed(source.items())), dict(reversed(target.items()))
    assert reached(source, target) == reached(*turned)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)


def loads_as(source: Checkpoint, target: Checkpoint) -> dict[str, str]:
    plan = make_plan([source], target)
    return {step.sources[0][1]: step.target for step in plan.steps if step.sources}


def test_torchs_own_wrappers():
    plain = live(Net())
    compiled = live(torch.compile(Net()))
    parallel = live(nn.DataParallel(Net()))
    averaged = live(torch.optim.swa_utils.AveragedModel(Net()))
    both = live(nn.DataParallel(torch.compile(Net())))
    for one in (plain, compiled, parallel, averaged, both):
        for other in (plain, compiled, parallel, averaged, both):
            diff = compare(one, other)
            assert not diff.mismatched and set(diff.extra) | set(diff.missing) <= {"n_averaged"}, (one, other)
    inner = Net()
    inner.conv = torch.compile(inner.conv)
    assert loads_as(live(inner), plain)["conv._orig_mod.weight"] == "conv.weight"
    assert loads_as(plain, live(inner))["conv.weight"] == "conv._orig_mod.weight"


def test_metadata_follows_the_prefix():
    source = live(nn.DataParallel(Net()))
    target = Checkpoint("b.safetensors", "safetensors", "1", live(Net()).tensors)
    metadata = make_plan([source], target).module_metadata
    assert metadata == {"": {"version": 1}, "conv": {"version": 1}, "bn": {"version": 2}, "fc": {"version": 1}}
    added = make_plan([live(Net())], Checkpoint("b.safetensors", "safetensors", "1", live(nn.DataParallel(Net())).tensors))
    assert added.module_metadata["module.bn"] == {"version": 2}


def test_an_extra_state_follows_the_prefix():
    source = checkpoint(wrapped("module."), entries={"module.fc._extra_state": 7})
    plan = make_plan([source], model(NET, entries={"fc._extra_state": None}))
    assert [(entry.target, entry.source) for entry in plan.entries] == [("fc._extra_state", (0, "module.fc._extra_state"))]
    middle = checkpoint(list(MIDDLE.values()), entries={"layer1._extra_state": 7})
    plan = make_plan([middle], model(list(MIDDLE), entries={"layer1._orig_mod._extra_state": None}))
    assert plan.entries[0].source == (0, "layer1._extra_state")


# ---- never exchanged, and never one of several


EXCHANGES = [("actor.", "critic."), ("text_model.", "vision_model."), ("encoder_q.", "encoder_k."), ("model.student.", "model.teacher.")]


@pytest.mark.parametrize(("source", "target"), EXCHANGES)
@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.module."])
@pytest.mark.parametrize("more", [(), ("queue",)])
def test_one_prefix_is_not_exchanged_for_another_but_offered(source, target, wrapper, more):
    given = checkpoint({**wrapped(wrapper + source), **{wrapper + key: (7,) for key in more}})
    goal = model(wrapped(target))
    assert make_plan([given], goal).transferred == ()
    diff = compare(given, goal)
    (way,) = diff.exchanges
    assert not diff.matched and source.split(".")[-2] in str(way) and target in str(way) and len(way.mapping) == len(NET)
    # What is offered does what it says: torch would load the same keys if the person had renamed them.
    plan = make_plan([given], goal, way.rules)
    assert {step.target: step.sources[0][1] for step in plan.steps} == {target + key: wrapper + source + key for key in NET}


def choose_each(source, target):
    """The target keys that each of the ways that a refusal lists leads to, when its rules are followed."""
    with pytest.raises(PlanError) as error:
        make_plan([source], target)
    ways = compare(source, target).rivals
    assert error.value.exit_code == 2 and error.value.problems == tuple(map(str, ways)) and error.value.hint is not None
    found = []
    for way in ways:
        plan = make_plan([source], target, way.rules)
        assert not compare(source, target, way.rules).rivals
        assert {step.sources[0][1]: step.target for step in plan.steps if step.sources} == way.mapping
        found.append({step.target: step.sources[0][1] for step in plan.steps if step.sources})
    return found


@pytest.mark.parametrize("wrapper", ["", "module."])
def test_two_towers_are_listed_and_the_rules_choose(wrapper):
    both = {**wrapped(f"{wrapper}encoder_q."), **wrapped(f"{wrapper}encoder_k."), f"{wrapper}queue": (128, 16)}
    ways = choose_each(checkpoint(both), model(NET))
    assert ways == [{key: f"{wrapper}{head}{key}" for key in NET} for head in ("encoder_q.", "encoder_k.")]
    # A target with two places for one source: a rename says which.
    ways = choose_each(checkpoint(NET), model({**wrapped("a."), **wrapped("b.")}))
    assert ways == [{head + key: key for key in NET} for head in ("a.", "b.")]
    # A person's own rename for one of them is enough.
    plan = make_plan([checkpoint(both)], model(NET), [Rule("rename", "encoder_k.{**rest}", "{**rest}")])
    assert all(step.sources[0][1].startswith(f"{wrapper}encoder_k.") for step in plan.steps)


MANY = {f"block.{number}.weight": (number + 1, 2) for number in range(20)}


def test_a_rival_explains_nine_tenths_as_many():
    heads = list(MANY)
    for lacking, near in ((1, True), (2, True), (3, False)):
        less = {f"b.{key}": MANY[key] for key in heads[lacking:]}
        source, goal = checkpoint({**wrapped("a.", MANY), **less}), model(MANY)
        if near:
            assert len(choose_each(source, goal)) == 2
        else:
            assert make_plan([source], goal).coverage.tensors == 1.0


def test_names_as_they_are_can_be_the_rival():
    """The raw weights lack a key, and their average under a prefix has it."""
    raw = {key: shape for key, shape in MANY.items() if key != "block.7.weight"}
    source, goal = checkpoint({**raw, **wrapped("ema.", MANY)}), model(MANY)
    average, own = choose_each(source, goal)
    assert all(key.startswith("ema.") for key in average.values()) and set(own.values()) == set(raw)
    # Names that are equal as they stand, all of them, leave nothing to ask.
    plan = make_plan([checkpoint({**MANY, **wrapped("ema.", MANY)})], goal)
    assert {step.sources[0][1] for step in plan.steps} == set(MANY)
    # A prefix that only adds a key to those is no reason to ask, nor is it taken.
    extra = {f"aux.{key}": shape for key, shape in MANY.items() if key == "block.7.weight"}
    assert make_plan([checkpoint({**raw, **extra})], goal).fresh == ("block.7.weight",)


@pytest.mark.parametrize(("count", "taken"), [(10, True), (9, False)])
def test_a_prefix_explains_at_least_half_of_the_smaller_side(count, taken):
    given = {f"net.{key}": shape if number < count else (1, 1, 1) for number, (key, shape) in enumerate(MANY.items())}
    assert (len(make_plan([checkpoint(given)], model(MANY)).transferred), not taken) == (count if taken else 0, not taken)


@pytest.mark.parametrize("place", ["optimizer.exp_avg.", "exp_avg_sq.", "optimizer_state_dict.momentum_buffer."])
def test_moments_by_name_are_no_weights(place):
    source = checkpoint({**wrapped(place), **wrapped("model.")})
    assert {step.sources[0][1] for step in make_plan([source], model(NET)).steps} == set(wrapped("model."))
    assert make_plan([checkpoint(wrapped(place))], model(NET)).transferred == ()
    rule = Rule("rename", place + "{**rest}", "{**rest}")
    assert make_plan([checkpoint(wrapped(place))], model(NET), [rule]).coverage.tensors == 1.0


def test_the_plan_names_the_prefix():
    for before, words in (("module.", "prefix module. stripped"), ("net.", "prefix net. stripped")):
        (finding,) = make_plan([checkpoint(wrapped(before))], model(NET)).findings
        assert (finding.code, finding.level, finding.message) == ("prefix", "note", f"a.pt: {words}")


def test_one_module_at_two_places_is_no_rival_of_itself(tmp_path):
    """Both prefixes give the same bytes; as copies, or read another way, they are two that may differ."""
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    both = nn.ModuleDict({"net": net, "loss": nn.ModuleDict({"net": net})})
    torch.save(net.state_dict(), tmp_path / "net.pt")
    torch.save(both.state_dict(), tmp_path / "shared.pt")
    plan = cs.plan(tmp_path / "shared.pt", tmp_path / "net.pt")
    assert plan.coverage.tensors == 1 and plan.sources[0].prefix["stripped"] in ("net.", "loss.net.")
    torch.save({key: value.clone() for key, value in both.state_dict().items()}, tmp_path / "copies.pt")
    state = both.state_dict()
    torch.save({key: value.T if key == "loss.net.0.weight" else value for key, value in state.items()}, tmp_path / "turned.pt")
    for name in ("copies.pt", "turned.pt"):
        with pytest.raises(PlanError, match="2 ways"):
            cs.plan(tmp_path / name, tmp_path / "net.pt")
