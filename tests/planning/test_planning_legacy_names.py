"""What `auto="safe"` renames and fills unasked: names that libraries gave up, held against the libraries themselves."""

import warnings

import pytest
import torch
from planning_support import checkpoint, live, metas, model, rule
from torch import nn
from torch.nn.utils import parametrizations

from ckptsurgeon.errors import RuleError
from ckptsurgeon.planning.legacy_names import RENAMED
from ckptsurgeon.planning.plan import make_plan
from ckptsurgeon.tensors import Checkpoint


def quietly(wrap, *args, **more):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return wrap(*args, **more)


class Net(nn.Module):
    def __init__(self, wrap, name="weight", **more):
        super().__init__()
        layer = nn.LSTM(2, 3) if name.endswith("l0") else nn.Conv1d(2, 3, 3)
        self.layers = nn.Sequential(nn.Sequential(quietly(wrap, layer, name, **more)), nn.Linear(2, 2))


def moved(state, plan):
    """The state_dict that a plan without adapters makes."""
    return {step.target: state[step.sources[0][1]] for step in plan.steps}


@pytest.mark.parametrize("name", ["weight", "weight_hh_l0"])
@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
@pytest.mark.parametrize("back", [False, True])
def test_a_norm_of_weights_under_its_old_and_its_new_names(kind, name, back):
    more = {"dim": 0} if kind == "spectral_norm" else {}
    old, new = Net(getattr(nn.utils, kind), name, **more), Net(getattr(parametrizations, kind), name, **more)
    given, goal = (new, old) if back else (old, new)
    assert set(make_plan([live(given)], live(goal)).fresh)
    plan = make_plan([live(given)], live(goal), auto="safe")
    assert plan.coverage.tensors == 1.0 and plan.loose == () and not plan.fresh
    named = [step for step in plan.steps if step.action == "rename"]
    assert named and all(step.reason.startswith("rename ") and step.reason.endswith("(--auto safe)") for step in named)
    assert all(row.reason == "not in the target" for row in plan.dropped)
    goal.load_state_dict(moved(given.state_dict(), plan))
    given.eval(), goal.eval()
    one, other = given.layers[0][0], goal.layers[0][0]
    if name == "weight":
        inputs = torch.randn(1, 2, 5)
        torch.testing.assert_close(one(inputs), other(inputs))


def test_a_layer_that_is_the_whole_model_is_repaired_too():
    old, new = quietly(nn.utils.weight_norm, nn.Linear(2, 3)), parametrizations.weight_norm(nn.Linear(2, 3))
    plan = make_plan([live(old)], live(new), auto="safe")
    assert plan.coverage.tensors == 1.0
    new.load_state_dict(moved(old.state_dict(), plan))
    torch.testing.assert_close(new(torch.ones(2)), old(torch.ones(2)))


def test_layer_norms_of_tensorflows_names():
    source = checkpoint({"bert.LayerNorm.gamma": (4,), "bert.LayerNorm.beta": (4,), "gamma": (2,)})
    target = model({"bert.LayerNorm.weight": (4,), "bert.LayerNorm.bias": (4,), "weight": (2,)})
    plan = make_plan([source], target, auto="safe")
    assert [step.sources[0][1] for step in plan.steps] == list(source)
    back = make_plan(
        [checkpoint({key: target[key].shape for key in target})], model({key: source[key].shape for key in source}), auto="safe"
    )
    assert back.coverage.tensors == 1.0


def test_a_densenet_before_torchvision_0_3():
    layer = "features.denseblock1.denselayer{}"
    old = {f"{layer}.norm.1.weight": (4,), f"{layer}.conv.2.weight": (4, 4, 3, 3), f"{layer}.norm.2.running_mean": (4,)}
    new = {key.replace("norm.", "norm").replace("conv.", "conv"): shape for key, shape in old.items()}
    old, new = ({key.format(3): shape for key, shape in one.items()} for one in (old, new))
    assert make_plan([checkpoint(old)], model(new), auto="safe").coverage.tensors == 1.0
    assert make_plan([checkpoint(old)], model(new)).coverage.tensors == 0.0


@pytest.mark.parametrize(("old", "new"), RENAMED)
def test_every_repair_works_both_ways(old, new):
    names = [text.replace("{n}", "weight").replace("{d}", "1").replace("{p}", "bias") for text in (old, new)]
    for given, wanted in (names, names[::-1]):
        for head in ("", "a.b."):
            anchors = {f"k{n}": (1,) for n in range(9)}
            plan = make_plan([checkpoint({**anchors, head + given: (2,)})], model({**anchors, head + wanted: (2,)}), auto="safe")
            assert plan.steps[-1].sources == ((0, head + given),) and plan.steps[-1].action == "rename"


# ---- what is no repair


def test_a_name_that_is_somebody_elses_is_left_alone():
    source = checkpoint({"n.gamma": (2,), "n.weight": (2,), "m.gamma": (2,)})
    target = model({"n.weight": (2,), "n.bias": (2,), "m.gamma": (2,), "m.weight": (2,)})
    plan = make_plan([source], target, auto="safe")
    assert {step.target: step.sources for step in plan.steps if step.sources} == {
        "n.weight": ((0, "n.weight"),),
        "m.gamma": ((0, "m.gamma"),),
    }
    assert {row.source for row in plan.dropped} == {"n.gamma"} and plan.fresh == ("n.bias", "m.weight")


def test_what_two_keys_could_become_neither_does():
    source = checkpoint({"a.parametrizations.weight.original1": (2,), "a.parametrizations.weight.0._v": (2,)})
    plan = make_plan([source], model({"a.weight_v": (2,)}), auto="safe")
    assert plan.fresh == ("a.weight_v",) and len(plan.dropped) == 2


def test_rules_come_before_repairs():
    source, target = checkpoint({"n.gamma": (2,)}), model({"n.weight": (2,), "x.y": (2,)})
    assert make_plan([source], target, [rule("rename", "n.gamma", "x.y")], auto="safe").transferred == ("x.y",)
    assert make_plan([source], target, [rule("drop", "n.gamma")], auto="safe").transferred == ()
    first = [rule("rename", "n.gamma", "n.weight_g")]
    plan = make_plan(
        [source], model({"n.parametrizations.weight.original0": (2,)}), first, auto="safe"
    )  # a rename, and then a repair of it
    assert plan.steps[0].reason.startswith("--rename 'n.gamma' 'n.weight_g', rename ")


def test_a_key_in_two_sources_is_repaired_in_neither_silently():
    two = [checkpoint({"n.gamma": (2,)}, "a.pt"), checkpoint({"n.gamma": (2,)}, "b.pt")]
    with pytest.raises(RuleError, match=r"two sources land on 'n.weight'"):
        make_plan(two, model({"n.weight": (2,)}), auto="safe")
    mixed = [checkpoint({"n.weight": (2,)}, "a.pt"), checkpoint({"n.gamma": (2,), "w": (3,)}, "b.pt")]
    plan = make_plan(mixed, model({"n.weight": (2,), "w": (3,)}), auto="safe")
    assert plan.steps[0].sources == ((0, "n.weight"),) and plan.dropped[0].source == "n.gamma"


# ---- BatchNorm's counter


def test_a_batch_norm_without_its_counter_begins_at_0():
    target = nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3))
    state = {key: value for key, value in target.state_dict().items() if "tracked" not in key}
    source = checkpoint({key: value.shape for key, value in state.items()})
    plan = make_plan([source], live(target), auto="safe")
    (step,) = [step for step in plan.steps if not step.sources]
    assert (step.target, step.action, step.dtype) == ("0.num_batches_tracked", "init", "I64")
    assert step.ops == ({"op": "init", "scheme": "zeros"},) and step.fresh and "(--auto safe)" in step.reason
    assert plan.loose == ()  # a repair has said so
    without = make_plan([source], live(target))
    assert [op["scheme"] for step in without.steps for op in step.ops] == ["model"] and len(without.loose) == 1


def test_a_batch_norm_alone_for_a_skeleton_or_a_file():
    wanted = metas({"weight": (3,)}) | metas({"num_batches_tracked": ()}, "I64")
    for kind, action in (("skeleton", "init"), ("model", "init"), ("file", "keep")):
        plan = make_plan([checkpoint({"weight": (3,)})], Checkpoint("t", kind, "t", wanted, kind=kind), auto="safe")
        assert [step.action for step in plan.steps] == ["copy", action]
    ruled = make_plan(
        [checkpoint({"weight": (3,)})],
        Checkpoint("t", "model", "t", wanted, kind="model"),
        [rule("init", "*tracked", "constant(7)")],
        auto="safe",
    )
    assert ruled.steps[1].ops[0]["scheme"] == "constant(7)"
