"""The plan: every target key exactly one step, every source key exactly one fate, and torch agrees."""

from collections import Counter, OrderedDict
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_support import any_rules, checkpoint, live, metas, model, rule, shapes, targets
from profiles import examples
from torch import nn

from ckptsurgeon.errors import CheckpointError, PlanError, RuleError, UnsafeError
from ckptsurgeon.formats import read
from ckptsurgeon.planning.diff import Mismatch, compare
from ckptsurgeon.planning.plan import digest, make_plan
from ckptsurgeon.planning.roots import choose
from ckptsurgeon.rules.rules import Rule
from ckptsurgeon.tensors import Checkpoint, Refused, Span, TensorMeta


def actions(plan):
    return {step.target: step.action for step in plan.steps}


def reasons(plan):
    return {row.source: row.reason for row in plan.dropped}


# ---- every key is accounted for


@settings(max_examples=examples(400))
@given(shapes, targets(), any_rules, st.sampled_from([None, "source", "target", "F16"]))
def test_every_key_has_one_step_or_one_fate(drawn, target, rules, dtype):
    source = checkpoint(drawn)
    try:
        plan = make_plan([source], target, rules, dtype=dtype)
    except RuleError as error:
        assert error.problems
        return
    except PlanError as error:
        assert "prefix" in str(error) and compare(source, target, [one for one in rules if one.kind != "init"]).rivals
        return
    assert [step.target for step in plan.steps] == list(target)
    used = {key for step in plan.steps for _, key in step.sources}
    dropped = [row.source for row in plan.dropped]
    assert Counter([*used, *dropped]) == Counter(dict.fromkeys(source, 1))
    assert sorted([*plan.transferred, *plan.kept, *plan.fresh]) == sorted(target)
    assert plan.coverage.counts == (len(plan.transferred), len(target))
    assert all(step.reason for step in plan.steps) and all(row.reason for row in plan.dropped)
    for step in plan.steps:
        assert step.shape == target[step.target].shape
        assert all(source[key].shape == step.shape for _, key in step.sources)
        assert step.fresh == (step.action == "init") and bool(step.sources) == (step.action in ("copy", "rename"))
        assert step.action != "copy" or step.sources == ((0, step.target),)
    for group in target.ties:
        assert len({(step.action, str(step.ops)) for step in plan.steps if step.target in group and not step.sources}) <= 1
        assert len({bool(step.sources) for step in plan.steps if step.target in group}) == 1


@settings(max_examples=examples(400))
@given(shapes, targets(), any_rules)
def test_diff_and_plan_agree(drawn, target, rules):
    source = checkpoint(drawn)
    rules = [one for one in rules if one.kind != "init"]
    try:
        plan = make_plan([source], target, rules)
    except RuleError as error:
        with pytest.raises(RuleError) as caught:
            compare(source, target, rules)
        assert caught.value.problems == error.problems
        return
    except PlanError as error:  # nothing decides between prefixes, which a diff lists
        assert error.problems == tuple(map(str, compare(source, target, rules).rivals))
        return
    diff = compare(source, target, rules)
    assert not diff.rivals
    assert diff.matched == plan.transferred and diff.coverage == plan.coverage
    assert sorted([*diff.matched, *diff.missing, *(row.key for row in diff.mismatched)]) == sorted(target)
    used = {key for step in plan.steps for _, key in step.sources}
    fates = [*used, *diff.extra, *(row.source for row in diff.mismatched), *diff.dropped]
    assert Counter(fates) == Counter(dict.fromkeys(source, 1))
    assert {row.source for row in plan.dropped} == {*diff.extra, *(row.source for row in diff.mismatched), *diff.dropped}
    assert {row.key for row in diff.dtype_changed} == {step.target for step in plan.steps if step.sources and step.cast}
    strict = bool(diff.missing or diff.mismatched or diff.extra)
    assert strict or not plan.loose


@given(shapes, st.sampled_from([None, "F16", "source"]))
def test_converting_takes_every_key(drawn, dtype):
    plan = make_plan([checkpoint(drawn)], None, dtype=dtype)
    assert [step.target for step in plan.steps] == list(drawn) and plan.dropped == () and plan.coverage.tensors == 1.0
    assert all(step.dtype == ("F16" if dtype == "F16" else "F32") for step in plan.steps)


# ---- torch as the oracle


def small():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2)))


def other_head():
    net = small()
    net[2][2] = nn.Linear(5, 7)
    return net


def longer():
    net = small()
    net.append(nn.LayerNorm(2))
    return net


def without_norm():
    net = small()
    net[1] = nn.Identity()
    return net


@pytest.mark.parametrize("target", [small, other_head, longer, without_norm])
@pytest.mark.parametrize("source", [small, other_head, longer, without_norm])
def test_what_a_plan_takes_torch_takes(source, target):
    given, goal = source(), target()
    plan, diff = make_plan([live(given)], live(goal)), compare(live(given), live(goal))
    state = given.state_dict()
    taken = {step.target: state[step.sources[0][1]] for step in plan.steps if step.sources}
    bad = {row.key for row in diff.mismatched}
    left = OrderedDict((key, value) for key, value in state.items() if key not in bad)
    left._metadata = goal.state_dict()._metadata
    told = goal.load_state_dict(left, strict=False)
    assert set(told.missing_keys) == set(diff.missing) | bad
    assert set(told.unexpected_keys) == set(diff.extra)
    assert set(plan.fresh) == set(told.missing_keys) and taken.keys() == set(plan.transferred)
    if bad:
        with pytest.raises(RuntimeError) as caught:
            target().load_state_dict(state, strict=False)
        assert all(key in str(caught.value) for key in bad)
    assert diff.same == (not told.missing_keys and not told.unexpected_keys)


class Stateful(nn.Linear):
    def get_extra_state(self):
        return {"steps": 3}

    def set_extra_state(self, state):
        self.state = state


def test_extra_state_counts_as_torch_counts_it(tmp_path):
    with_state, without = nn.Sequential(Stateful(2, 2)), nn.Sequential(nn.Linear(2, 2))
    torch.save(with_state.state_dict(), tmp_path / "with.pt")
    torch.save(without.state_dict(), tmp_path / "without.pt")
    one, other = (choose(read(str(tmp_path / name))) for name in ("with.pt", "without.pt"))
    for file, module, goal in ((one, without, without), (other, with_state, with_state)):
        diff = compare(file, live(module))
        told = goal.load_state_dict(torch.load(file.path, weights_only=True), strict=False)
        assert (diff.missing, diff.extra) == (tuple(told.missing_keys), tuple(told.unexpected_keys)) and not diff.same
    plan = make_plan([one], live(without))
    assert reasons(plan) == {"0._extra_state": "not in the target"} and plan.loose == ("0._extra_state: not in the target",)
    plan = make_plan([other], live(with_state))
    assert plan.entries[0].source is None and plan.needs_model and plan.loose == ("0._extra_state: not in the source",)
    plan = make_plan([one], live(with_state))
    assert plan.entries[0].source == (0, "0._extra_state") and not plan.needs_model and not plan.loose
    assert compare(one, live(with_state)).same


def test_a_batch_norm_loads_as_version_2_after_a_rename(tmp_path):
    class Spy(nn.BatchNorm1d):
        versions: list

        def _load_from_state_dict(self, state_dict, prefix, local_metadata, *args):
            Spy.versions.append(local_metadata.get("version"))
            super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    source = nn.ModuleDict({"old": nn.BatchNorm1d(3), "fc": nn.Linear(3, 3)})
    torch.save(source.state_dict(), tmp_path / "a.pt")
    given = choose(read(str(tmp_path / "a.pt")))
    target = nn.ModuleDict({"new": Spy(3), "fc": nn.Linear(3, 3)})
    bare = replace(live(target), format="safetensors", kind="file", module_metadata={})
    plan = make_plan([given], bare, [rule("rename", "old.{p}", "new.{p}")])
    state = OrderedDict()
    for step in plan.steps:
        state[step.target] = source.state_dict()[step.sources[0][1]]
    state._metadata = plan.module_metadata
    Spy.versions = []
    target.load_state_dict(state)
    assert Spy.versions == [2]
    plan = make_plan([given], live(target), [rule("rename", "old.{p}", "new.{p}")])
    assert plan.module_metadata == {path: dict(local) for path, local in target.state_dict()._metadata.items()}


def test_two_sources_bring_their_metadata():
    one = checkpoint(["a.w"], "a.pt", module_metadata={"": {"version": 1}, "a": {"version": 2}})
    local = {"version": 3, "odd": float("nan"), "more": [1]}  # what JSON can't hold is left out
    two = checkpoint(["module.b.w"], "b.pt", module_metadata={"": {"version": 9}, "module.b": local})
    plan = make_plan([one, two], checkpoint(["a.w", "b.w"], "c.safetensors", "safetensors"))
    assert plan.module_metadata == {"": {"version": 1}, "a": {"version": 2}, "b": {"version": 3}}


# ---- shapes, dtypes, coverage


def test_a_scalar_is_not_a_vector_of_one():
    diff = compare(checkpoint({"s": (1,), "w": (2,)}), model({"s": (), "w": (2,)}))
    assert diff.mismatched == (Mismatch("s", (1,), (), "s"),) and diff.matched == ("w",)
    plan = make_plan([checkpoint({"s": (1,), "w": (2,)})], model({"s": (), "w": (2,)}))
    assert actions(plan) == {"s": "init", "w": "copy"} and reasons(plan) == {"s": "shape (1,) does not fit ()"}
    assert plan.steps[0].reason == "the source has another shape; the model's own value"


def test_an_empty_key_is_a_key_like_any_other():
    diff = compare(checkpoint(["", "b"]), model(["a", "b"]))
    assert (diff.matched, diff.missing, diff.extra) == (("b",), ("a",), ("",))


def test_coverage_by_hand():
    source = checkpoint({"a": (2, 3), "b": (4,), "d": ()})
    plan = make_plan([source], model({"a": (2, 3), "b": (5,), "c": (8,), "d": ()}))
    assert plan.coverage.tensors == 2 / 4 and plan.coverage.elements == 7 / 20 and plan.coverage.counts == (2, 4)
    assert compare(source, model({"e": (0, 3)})).coverage.elements == 0.0
    assert compare(checkpoint({"e": (0, 3)}), model({"e": (0, 3)})).coverage.elements == 1.0


@pytest.mark.parametrize(
    ("choice", "wanted"),
    [
        (None, {"w": "F16", "n": "I64", "m": "F16", "new": "F16"}),
        ("target", {"w": "F16", "n": "I64", "m": "F16", "new": "F16"}),
        ("source", {"w": "F32", "n": "I32", "m": "I32", "new": "F16"}),
        ("BF16", {"w": "BF16", "n": "I64", "m": "F16", "new": "BF16"}),
        ("F32", {"w": "F32", "n": "I64", "m": "F16", "new": "F32"}),
    ],
)
@pytest.mark.parametrize("format", ["model", "torch-zip"])
def test_whose_dtype_wins(choice, wanted, format):
    source = Checkpoint("a.pt", "torch-zip", "0", metas(["w"]) | metas(["n", "m"], "I32"))
    target = Checkpoint("b", format, "1", metas(["w", "m", "new"], "F16") | metas(["n"], "I64"))
    plan = make_plan([source], target, dtype=choice)
    assert {step.target: step.dtype for step in plan.steps} == wanted
    given = {"w": "F32", "n": "I32", "m": "I32", "new": "F16"}
    assert {step.target: step.cast for step in plan.steps} == {key: None if dtype == given[key] else dtype for key, dtype in wanted.items()}
    assert {row.key: (row.source_dtype, row.target_dtype) for row in compare(source, target).dtype_changed} == {
        "w": ("F32", "F16"), "n": ("I32", "I64"), "m": ("I32", "F16")
    }  # fmt: skip


def test_choices_that_are_none():
    for more in ({"dtype": "I64"}, {"dtype": "f16"}, {"seed": -1}, {"seed": 1 << 63}):
        with pytest.raises(PlanError):
            make_plan([checkpoint(["w"])], model(["w"]), **more)
    with pytest.raises(RuleError):
        make_plan([checkpoint(["w"])], model(["w"]), allow_cast=["{"])
    assert make_plan([checkpoint(["w"])], model(["w"]), allow_cast="bn.*").allow_cast == ("bn.*",)
    with pytest.raises(PlanError, match="skeleton"):
        make_plan([checkpoint(["w"], "net.json", "skeleton")], model(["w"]))


# ---- what a key gets that no source gives


def test_missing_keys_by_the_kind_of_target():
    source = checkpoint(["w"])
    assert actions(make_plan([source], model(["w", "new"]))) == {"w": "copy", "new": "init"}
    assert make_plan([source], model(["w", "new"])).steps[1].ops == ({"op": "init", "scheme": "model"},)
    plan = make_plan([source], checkpoint(["w", "new"], "b.pt"))
    assert actions(plan) == {"w": "copy", "new": "keep"} and plan.kept == ("new",) and plan.fresh == ()
    with pytest.raises(PlanError) as caught:
        make_plan([source], model(["w", "new", "newer"], format="skeleton"))
    assert caught.value.problems == ("new", "newer") and "init={'new': " in (caught.value.hint or "")
    plan = make_plan([source], model(["w", "new"], format="skeleton"), [rule("init", "new", "zeros")])
    assert plan.fresh == ("new",) and not plan.needs_model
    with pytest.raises(PlanError) as caught:
        make_plan([source], model(["w", *(f"n{i}" for i in range(30))], format="skeleton"))
    assert len(caught.value.problems) == 21 and caught.value.problems[-1] == "and 10 more"


def test_init_rules_run_in_order_and_only_where_nothing_is_taken():
    target = model({"w": (2,), "fc.weight": (2,), "fc.bias": (2,), "x": (2,)})
    plan = make_plan([checkpoint(["w"])], target, [rule("init", "*.bias", "zeros"), rule("init", "fc.*", "xavier_normal")])
    assert {step.target: step.ops[0]["scheme"] for step in plan.steps if step.fresh} == {
        "fc.weight": "xavier_normal", "fc.bias": "zeros", "x": "model"
    }  # fmt: skip
    for rules, words in [
        ([rule("init", "w", "zeros")], "only keys that take weights"),
        ([rule("init", "fcc.*", "zeros")], r"matches nothing in the target \(close: fc"),
        ([rule("init", "fc.*", "zeros"), rule("init", "fc.bias", "ones")], "never gets a turn"),
        ([rule("init", "fc.*", "")], "names no scheme"),
    ]:
        with pytest.raises(RuleError) as caught:
            make_plan([checkpoint(["w"])], target, rules)
        assert len(caught.value.problems) == 1
        with pytest.raises(RuleError, match=words):
            make_plan([checkpoint(["w"])], target, rules)


def test_a_mismatched_key_can_be_initialised_by_a_rule():
    plan = make_plan([checkpoint({"fc.w": (10, 2)})], model({"fc.w": (2, 2)}), [rule("init", "fc.*", "zeros")])
    assert plan.fresh == ("fc.w",) and reasons(plan) == {"fc.w": "shape (10, 2) does not fit (2, 2)"} and plan.loose == ()


# ---- ties


def tied_target(**more):
    return model({"emb.weight": (5, 2), "head.weight": (5, 2)}, ties=(("emb.weight", "head.weight"),), **more)


@pytest.mark.parametrize("key", ["emb.weight", "head.weight"])
def test_a_tied_key_is_filled_from_the_other(key):
    source, other = checkpoint({key: (5, 2)}), {"emb.weight": "head.weight", "head.weight": "emb.weight"}[key]
    plan = make_plan([source], tied_target())
    assert all(step.sources == ((0, key),) for step in plan.steps) and plan.coverage.tensors == 1.0
    assert {step.target: step.action for step in plan.steps} == {key: "copy", other: "rename"}
    assert next(step.reason for step in plan.steps if step.target == other) == f"tied to {key}"
    diff = compare(source, tied_target())
    assert diff.same and diff.matched == ("emb.weight", "head.weight")
    wrapped = make_plan([checkpoint({f"module.{key}": (5, 2)})], tied_target())
    assert wrapped.coverage.tensors == 1.0 and [finding.code for finding in wrapped.findings] == ["prefix"]


def test_a_tied_key_of_another_shape_follows_the_one_that_fits():
    source = checkpoint({"emb.weight": (7, 2), "head.weight": (5, 2)})
    plan = make_plan([source], tied_target())
    assert [step.sources for step in plan.steps] == [((0, "head.weight"),)] * 2
    assert reasons(plan) == {"emb.weight": "shape (7, 2) does not fit (5, 2)"}
    assert compare(source, tied_target()).extra == ("emb.weight",)


def test_ties_of_the_target_that_are_apart_in_the_source():
    apart = checkpoint({"emb.weight": (5, 2), "head.weight": (5, 2)})
    (finding,) = make_plan([apart], tied_target()).findings
    assert (finding.code, finding.level, finding.key) == ("untied", "warning", "emb.weight")
    together = replace(apart, ties=(("emb.weight", "head.weight"),))
    assert make_plan([together], tied_target()).findings == ()
    assert make_plan([apart], model({"emb.weight": (5, 2), "head.weight": (5, 2)})).findings == ()


def test_real_ties_from_memory_and_from_a_file(tmp_path):
    net = nn.ModuleDict({"emb": nn.Embedding(5, 2), "head": nn.Linear(2, 5, bias=False)})
    loose = live(net)
    net["head"].weight = net["emb"].weight
    torch.save(net.state_dict(), tmp_path / "a.pt")
    file = choose(read(str(tmp_path / "a.pt")))
    assert live(net).ties == file.ties == (("emb.weight", "head.weight"),)
    for source in (live(net), file):
        assert make_plan([source], live(net)).findings == ()
    assert [found.code for found in make_plan([loose], live(net)).findings] == ["untied"]


def test_an_init_rule_for_one_of_tied_keys_holds_for_all():
    plan = make_plan([checkpoint(["w"])], model({**dict.fromkeys(["w"], (2,)), "emb": (5,), "head": (5,)}, ties=(("emb", "head"),)),
                     [rule("init", "head", "zeros")])  # fmt: skip
    assert [step.ops[0]["scheme"] for step in plan.steps if step.fresh] == ["zeros", "zeros"] and plan.loose == ()


# ---- rules


NET = {"fc1.weight": (4, 3), "fc1.bias": (4,), "fc2.weight": (4, 4), "fc2.bias": (4,)}


def test_a_rename_and_a_drop():
    target = model({"fc1.weight": (4, 3), "fc1.bias": (4,), "dense.weight": (4, 4), "dense.bias": (4,)})
    plan = make_plan([checkpoint(NET)], target, [rule("rename", "fc2.{p}", "dense.{p}"), rule("drop", "fc1.bias")])
    assert actions(plan) == {"fc1.weight": "copy", "fc1.bias": "init", "dense.weight": "rename", "dense.bias": "rename"}
    assert plan.steps[2].reason == "--rename 'fc2.{p}' 'dense.{p}'" and reasons(plan) == {"fc1.bias": "--drop 'fc1.bias'"}
    assert plan.steps[1].reason == "dropped from the source by a rule; the model's own value"


def test_the_first_rule_that_matches_decides():
    rules = [rule("rename", "fc1.weight", "a"), rule("drop", "fc1.*"), rule("rename", "{**all}", "{all}")]
    plan = make_plan([checkpoint(NET)], model({"a": (4, 3), "fc2.weight": (4, 4), "fc2.bias": (4,)}), rules)
    assert plan.coverage.tensors == 1.0 and reasons(plan) == {"fc1.bias": "--drop 'fc1.*'"}


def test_patterns_see_the_names_after_the_prefix():
    source = checkpoint({f"module.{key}": shape for key, shape in NET.items()})
    target = model({"fc1.weight": (4, 3), "fc1.bias": (4,), "dense.weight": (4, 4), "dense.bias": (4,)})
    plan = make_plan([source], target, [rule("rename", "fc2.{p}", "dense.{p}")])
    assert plan.coverage.tensors == 1.0 and plan.steps[2].sources == ((0, "module.fc2.weight"),)
    assert plan.sources[0].prefix == {"stripped": "module.", "added": "", "unwrapped": []}
    # Where no pattern matches what is left, it may match the name as it stands in the file.
    assert make_plan([source], target, [rule("rename", "module.fc2.{p}", "dense.{p}")]).coverage.tensors == 1.0
    diff = compare(source, target, [rule("drop", "fc2.bias")])
    assert diff.dropped == ("module.fc2.bias",) and diff.extra == ("module.fc2.weight",) and diff.missing == ("dense.weight", "dense.bias")
    # With a prefix that is added, a rename's result is a name of the target as it stands.
    added = model({f"net.{key}": shape for key, shape in NET.items() if key != "fc2.bias"} | {"head.bias": (4,)})
    assert make_plan([checkpoint(NET)], added, [rule("rename", "fc2.bias", "head.bias")]).coverage.tensors == 1.0


def problems(*rules, source=NET, target=NET, sources=None):
    with pytest.raises(RuleError) as caught:
        make_plan(sources or [checkpoint(source)], model(target), rules)
    with pytest.raises(RuleError) as again:
        compare((sources or [checkpoint(source)])[0], model(target), rules) if not sources else make_plan(sources, model(target), rules)
    assert again.value.problems == caught.value.problems and caught.value.exit_code == 2
    return caught.value


def test_a_rule_that_matches_nothing_gets_close_names():
    error = problems(rule("drop", "fc3.weight"), rule("rename", "xyz", "fc1.bias"))
    assert error.problems[0].startswith("--drop 'fc3.weight' matches nothing (close: fc")
    assert error.problems[1] == "--rename 'xyz' 'fc1.bias' matches nothing"


def test_a_rule_that_earlier_ones_leave_nothing():
    assert problems(rule("drop", "fc1.*"), rule("drop", "fc1.bias")).problems == (
        "--drop 'fc1.bias' never gets a turn: earlier rules match all of its keys",
    )
    assert len(problems(rule("drop", "fc1.*"), rule("drop", "fc1.*")).problems) == 1
    same = rule("drop", "fc1.*")
    assert len(problems(same, same).problems) == 1


def test_a_rename_none_of_whose_results_is_in_the_target():
    (problem,) = problems(rule("rename", "fc2.{p}", "fc3.{p}")).problems
    assert problem.startswith("--rename 'fc2.{p}' 'fc3.{p}' gives 'fc3.weight', and none of its results is in the target (close: fc")
    # One of them is enough.
    plan = make_plan([checkpoint(NET)], model({"fc3.bias": (4,)}), [rule("rename", "fc2.{p}", "fc3.{p}")])
    assert reasons(plan)["fc2.weight"] == "not in the target, as fc3.weight"
    plan = make_plan([checkpoint({f"net.{key}": shape for key, shape in NET.items()} | {"net.x.a": (3,)})], model(NET))
    assert reasons(plan)["net.x.a"] == "not in the target"  # the same words for all that a prefix is stripped from, so that they fold


def test_two_sources_on_one_name():
    (problem,) = problems(rule("rename", "fc1.{p}", "fc2.{p}")).problems[:1]
    assert problem == "two sources land on 'fc2.weight': 'fc1.weight' (by --rename 'fc1.{p}' 'fc2.{p}') and 'fc2.weight'"
    error = problems(rule("rename", "fc*.bias", "fc1.bias"))
    assert len(error.problems) == 1 and "'fc1.bias' (by" in error.problems[0] and "'fc2.bias' (by" in error.problems[0]
    assert error.hint == "drop one of the two: --drop fc2.bias"
    # Followed, the hint solves it.
    rules = [rule("drop", "fc2.bias"), rule("rename", "fc*.bias", "fc1.bias")]
    assert make_plan([checkpoint(NET)], model(NET), rules).fresh == ("fc2.bias",)
    # A name that is not in the target is no place to collide on.
    plan = make_plan([checkpoint({**NET, "x1.x": (2,)})], model({"x.x": (2,)}), [rule("rename", "/(fc|x).*(x|bias)/", "x.{2}")])
    assert plan.transferred == ("x.x",) and reasons(plan)["fc1.bias"] == reasons(plan)["fc2.bias"] == "not in the target, as x.bias"
    with pytest.raises(RuleError, match="two sources land on 'x'"):
        make_plan([checkpoint(NET)], None, [rule("rename", "*.bias", "x")])


def test_all_problems_at_once():
    error = problems(
        rule("drop", "nope"), rule("rename", "fc1.weight", "gone"), rule("rename", "fc2.{p}", "fc1.{p}"), rule("drop", "fc2.bias")
    )
    text = str(error)
    for words in ("'nope' matches nothing", "gives 'gone'", "never gets a turn", "two sources land on 'fc1.bias'"):
        assert words in text
    error = problems(rule("rename", "{", "a"), rule("rename", "a", "*"), rule("drop", ""))
    assert len(error.problems) == 3
    assert len(problems(*(rule("drop", f"nope{i}") for i in range(40))).problems) == 21


def test_a_result_that_can_not_be_counted_names_its_rule_and_key():
    (problem,) = problems(rule("rename", "{m}.bias", "fc{m+1}.bias")).problems
    assert problem.startswith("--rename '{m}.bias' 'fc{m+1}.bias': ") and "'fc1.bias'" in problem
    many = {f"layer{i}.w": (2,) for i in "abcdefgh"}
    assert len(problems(rule("rename", "layer{i}.w", "l.{i+1}"), source=many).problems) <= 8


def test_a_rename_of_many_layers_at_once():
    source = checkpoint({f"h.{i}.{p}": (2,) for i in range(100) for p in ("w", "b")})
    target = model({f"layers.{i}.{p}": (2,) for i in range(1, 101) for p in ("w", "b")})
    assert make_plan([source], target, [rule("rename", "h.{i}.{p}", "layers.{i+1}.{p}")]).coverage.tensors == 1.0
    shifted = [rule("rename", "h.{i}.{p}", "h.{i+1}.{p}")]
    plan = make_plan([source], model({f"h.{i}.{p}": (2,) for i in range(101) for p in ("w", "b")}), shifted)
    assert plan.fresh == ("h.0.w", "h.0.b") and plan.dropped == ()


# ---- several sources


def test_two_sources_fill_one_target():
    one, two = checkpoint({"module.a.w": (2,), "old": (3,)}, "a.pt"), checkpoint({"b.w": (2,), "old": (3,)}, "b.pt")
    plan = make_plan([one, two], model({"a.w": (2,), "b.w": (2,)}))
    assert [step.sources for step in plan.steps] == [((0, "module.a.w"),), ((1, "b.w"),)]
    # What no target key wants may be in both.
    assert [(row.file, row.source) for row in plan.dropped] == [(0, "old"), (1, "old")]


def test_a_key_in_two_sources_needs_a_rule_for_one_of_them():
    sources = [checkpoint(NET, "a.pt"), checkpoint({"fc2.weight": (4, 4), "fc2.bias": (4,)}, "b.pt")]
    error = problems(sources=sources)
    assert error.problems == tuple(f"two sources land on 'fc2.{p}': 'fc2.{p}' of a.pt and 'fc2.{p}' of b.pt" for p in ("weight", "bias"))
    assert error.hint == "give one of the two files only: b.pt has nothing else"
    plan = make_plan(sources, model(NET), [rule("drop", "0:fc2.*")])
    assert [step.sources[0][0] for step in plan.steps] == [0, 0, 1, 1] and {row.file for row in plan.dropped} == {0}
    with pytest.raises(PlanError, match="rules drop all of its keys") as refused:
        make_plan(sources, model(NET), [rule("drop", "1:**")])
    assert refused.value.path == "b.pt"
    # Without a number a rule is for both.
    three = [sources[0], checkpoint({**NET, "aux.weight": (4, 4)}, "b.pt")]
    found = make_plan(three, model({**NET, "aux.weight": (4, 4)}), [rule("drop", "fc2.*"), rule("drop", "1:fc1.*")])
    assert found.fresh == ("fc2.weight", "fc2.bias")
    error = problems(sources=three)
    assert error.hint == "drop one of the two: --drop '1:fc1.**' --drop '1:fc2.**'"
    target = model({**NET, "aux.weight": (4, 4), "aux.bias": (4,)})
    assert make_plan(sources, target, [rule("rename", "1:fc2.{p}", "aux.{p}")]).coverage.tensors == 1.0
    assert "there is no source 2" in problems(rule("drop", "2:fc2.*"), sources=sources).problems[0]


# ---- strict


def test_loose_is_every_key_that_no_rule_names():
    source, target = checkpoint({"a": (2,), "b": (3,), "c": (2,)}), model({"a": (2,), "b": (2,), "d": (2,)})
    assert make_plan([source], target).loose == (
        "b: the source has another shape; the model's own value",
        "d: not in the source; the model's own value",
        "b: shape (3,) does not fit (2,)",
        "c: not in the target",
    )
    named = [rule("drop", "b"), rule("drop", "c"), rule("init", "d", "zeros")]
    assert make_plan([source], target, named).loose == ()  # a drop names the target's key that it leaves without a source
    assert make_plan([source], target, [rule("init", "b", "zeros"), rule("init", "d", "zeros"), rule("drop", "c")]).loose == ()
    assert make_plan([source], target, [rule("rename", "c", "d")]).loose[-1] == "b: shape (3,) does not fit (2,)"
    assert make_plan([checkpoint(["w"])], model(["w"])).loose == ()


# ---- values that are no tensors


def test_values_that_can_not_be_carried_are_refused_by_name_all_at_once():
    entries = {"module.x": Refused("an object of a.B"), "module.y:z": Refused("a sparse tensor")}
    source = checkpoint({f"module.{key}": shape for key, shape in NET.items()}, entries=entries)
    with pytest.raises(UnsafeError) as caught:
        make_plan([source], model(NET))
    assert caught.value.problems == ("module.x: an object of a.B", "module.y:z: a sparse tensor")
    assert caught.value.path == "a.pt" and caught.value.hint == "leave them out: drop=['x', 'y:z']"
    diff = compare(source, model(NET))
    assert diff.refused == {"module.x": "an object of a.B", "module.y:z": "a sparse tensor"} and not diff.same and diff.extra == ()
    plan = make_plan([source], model(NET), [rule("drop", "x"), rule("drop", "y:z")])
    assert reasons(plan) == {"module.x": "--drop 'x'", "module.y:z": "--drop 'y:z'"} and plan.entries == ()
    with pytest.raises(UnsafeError) as caught:
        make_plan([checkpoint(["w"]), replace(source, path="second.pt")], model(NET | {"w": (2,)}))
    assert caught.value.path == "second.pt"
    with pytest.raises(UnsafeError, match="can't be kept"):
        make_plan([checkpoint(NET)], checkpoint(NET, "b.pt", entries={"x": Refused("an object of a.B")}))


def test_values_are_carried_kept_or_the_models_own():
    source = checkpoint(["w"], entries={"a._extra_state": 1, "b._extra_state": 2})
    plan = make_plan([source], None)
    assert [(entry.target, entry.source) for entry in plan.entries] == [(key, (0, key)) for key in source.entries]
    kept = checkpoint(["w"], "b.pt", entries={"a._extra_state": 0, "c._extra_state": 3})
    plan = make_plan([source], kept)
    assert [(entry.target, entry.source) for entry in plan.entries] == [("a._extra_state", (0, "a._extra_state")), ("c._extra_state", None)]
    assert reasons(plan) == {"b._extra_state": "not in the target"} and not plan.needs_model
    with pytest.raises(PlanError, match="extra state"):
        make_plan([source], model(["w"], format="skeleton", entries={"c._extra_state": None}))
    plan = make_plan([source], model(["w"], entries={"n._extra_state": None}), [rule("rename", "a.{p}", "n.{p}"), rule("drop", "b.*")])
    assert plan.entries[0].source == (0, "a._extra_state") and plan.loose == ()
    with pytest.raises(RuleError, match=r"two sources land on 'b\._extra_state'"):
        make_plan([source], model(["w"], entries={"b._extra_state": None}), [rule("rename", "a.{p}", "b.{p}")])
    assert reasons(make_plan([checkpoint(["w"], entries={"v._extra_state": 1})], model(["w", "v._extra_state"]))) == {
        "v._extra_state": "no tensor, which the target has there"
    }


def test_what_else_a_file_holds_is_left_behind():
    plan = make_plan(
        [checkpoint(["w"], left_behind=("optimizer", "epoch")), checkpoint(["v"], "b.pt", left_behind=("epoch",))], model(["w", "v"])
    )
    assert plan.left_behind == ("optimizer", "epoch")


def test_notes_and_overlaps_are_found():
    first, second = (
        replace(meta.span, offset=offset, storage="0") for meta, offset in zip(metas(["a", "b"], file="a.pt").values(), (0, 4), strict=True)
    )
    tensors = {"a": TensorMeta("a", "F32", (2,), (1,), first), "b": TensorMeta("b", "F32", (2,), (1,), second)}
    plan = make_plan([Checkpoint("a.pt", "torch-zip", "0", tensors, notes=("big-endian",))], model(["a", "b"]))
    assert [(found.code, found.level) for found in plan.findings] == [("overlap", "note"), ("source", "note")]


# ---- the digest


def test_the_digest_is_of_what_a_plan_does():
    source, target = checkpoint(NET), model({**NET, "x": (2,)})
    plan = make_plan([source], target)
    assert digest(plan) == digest(make_plan([replace(source, path="/else/where.pt")], replace(target, path="other:Net")))
    others = [
        make_plan([source], target, seed=1),
        make_plan([replace(source, fingerprint="f")], target),
        make_plan([replace(source, root="ema")], target),
        make_plan([source], replace(target, fingerprint="f")),
        make_plan([source], target, dtype="F16"),
        make_plan([source], target, [rule("init", "x", "zeros")]),
        make_plan([source], target, [rule("drop", "fc1.bias")]),
        make_plan([source], replace(target, module_metadata={"": {"version": 2}})),
        make_plan([source], replace(target, ties=(("fc1.bias", "fc2.bias"),))),
        make_plan([source], replace(target, format="torch-zip", kind="file")),
        make_plan([source], model({"x": (2,), **NET})),
        make_plan([source], replace(target, entries={"e": None})),
    ]
    digests = {digest(one) for one in [plan, *others]}
    assert len(digests) == len(others) + 1 and all(len(one) == 64 for one in digests)


def test_nothing_but_a_checkpoint_error_comes_of_odd_targets():
    for target in (model([]), checkpoint([], "b.pt"), model([], format="skeleton")):
        plan = make_plan([checkpoint(NET)], target)
        assert plan.steps == () and len(plan.dropped) == 4
    assert make_plan([checkpoint([])], model(NET)).transferred == ()
    with pytest.raises(CheckpointError):
        make_plan([checkpoint([])], model(NET), [rule("drop", "*")])


def test_a_refused_value_that_the_target_has_is_missing():
    source = checkpoint(["w"], entries={"a._extra_state": Refused("an object of a.B")})
    target = model(["w"], entries={"a._extra_state": None})
    diff = compare(source, target)
    assert diff.missing == ("a._extra_state",) and diff.matched == ("w",) and list(diff.refused) == ["a._extra_state"]
    with pytest.raises(UnsafeError):
        make_plan([source, replace(checkpoint(["v"], "b.pt"), entries=source.entries)], target)


def test_a_prefix_does_not_come_from_the_few_keys_that_chance_makes_equal():
    """Rules name the file's keys as they stand; one that happens to be equal without `model.` must not change what they see."""
    source = checkpoint({"model.layers.0.w": (3,), "model.layers.1.w": (3,), "model.norm.weight": (2,)})
    target = model({"blocks.0.w": (3,), "blocks.1.w": (3,), "norm.weight": (2,)})
    layers = rule("rename", "model.layers.{i}.w", "blocks.{i}.w")
    for rules in ([layers], [layers, rule("rename", "model.norm.weight", "norm.weight")]):
        plan = make_plan([source], target, rules)
        assert plan.coverage.tensors == 1.0 and not plan.dropped


def test_the_command_line_overrides_a_rules_file_without_a_word():
    rules = [rule("drop", "fc2.*"), Rule("rename", "fc2.{p}", "head.{p}", "rules.toml", 1)]
    assert make_plan([checkpoint(NET)], model(NET), rules).coverage.tensors == 0.5
    with pytest.raises(RuleError, match="never gets a turn"):
        make_plan([checkpoint(NET)], model(NET), [rule("drop", "fc2.*"), rule("rename", "fc2.{p}", "head.{p}")])


def test_a_tied_source_key_follows_the_one_that_is_taken():
    tensor = TensorMeta("emb", "F32", (4, 2), (2, 1), Span("a.pt", 0, 32, "s"))
    source = Checkpoint("a.pt", "torch-zip", "0", {"emb": tensor, "head": replace(tensor, name="head")}, ties=(("emb", "head"),))
    target = model({"emb": (3, 2), "head": (3, 2)}, ties=(("emb", "head"),))
    plan = make_plan([source], target, [rule("adapt", "emb", "slice(stop=3)")])
    assert plan.coverage.tensors == 1.0 and not plan.loose
    assert [(row.source, row.reason) for row in plan.dropped] == [("head", "tied to emb, which is taken")]
