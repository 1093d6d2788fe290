"""Averages of whole checkpoints as plans: one weighted mean for each key, and what is no floating number from the first."""

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_support import checkpoint, metas, model, rule
from profiles import examples

from ckptsurgeon.errors import PlanError, RuleError
from ckptsurgeon.planning.plan import make_plan
from ckptsurgeon.planning.planfile import check_followable, from_json, to_json
from ckptsurgeon.tensors import Checkpoint

SHAPES = {"fc.w": (3, 2), "fc.b": (3,)}


def soups(*sources, **more):
    return [one if isinstance(one, Checkpoint) else checkpoint(one, f"{number}.pt", **more) for number, one in enumerate(sources)]


def refused(sources, target=None, rules=(), average=True, **more):
    with pytest.raises((RuleError, PlanError)) as caught:
        make_plan(sources, target, rules, average=average, **more)
    return caught.value


@settings(max_examples=examples(100))
@given(st.lists(st.floats(0, 1e300, allow_subnormal=False) | st.integers(0, 1 << 80), min_size=2, max_size=6).filter(any))
def test_each_key_is_the_mean_of_all_sources(weights):
    sources = soups(*[SHAPES] * len(weights))
    plan = make_plan(sources, None, average=weights)
    for step in plan.steps:
        assert step.action == "adapt" and step.sources == tuple((number, step.target) for number in range(len(weights)))
        (op,) = step.ops
        assert op["op"] == "average" and math.isclose(math.fsum(op["weights"]), 1)
        scaled = [weight / max(weights) * max(op["weights"]) for weight in weights]
        assert all(math.isclose(one, other, abs_tol=1e-12) for one, other in zip(op["weights"], scaled, strict=True))
    assert plan.dropped == () and plan.coverage.tensors == 1.0
    check_followable(plan, sources, None)


def test_equal_weights_without_any():
    plan = make_plan(soups(SHAPES, SHAPES, SHAPES, SHAPES), model(SHAPES), average=True)
    assert [step.ops for step in plan.steps] == [({"op": "average", "weights": [0.25] * 4},)] * 2
    assert {step.reason for step in plan.steps} == {"--average"}
    assert make_plan(soups(SHAPES), model(SHAPES), average=False).steps[0].action == "copy"


@pytest.mark.parametrize(
    ("average", "words"),
    [
        ([1], "1 weights for 2 sources"),
        ([], "0 weights for 2 sources"),
        ([1, 2, 3], "3 weights for 2 sources"),
        ([0, 0], "finite and not negative"),
        ([1, -1], "finite and not negative"),
        ([math.nan, 1], "finite and not negative"),
        ([math.inf, 1], "finite and not negative"),
        ([1, 10**400], "a number for each source"),
        (["a", "b"], "a number for each source"),
        ([None, 1], "a number for each source"),
        (3, "a number for each source"),
    ],
)
def test_weights_that_are_none(average, words):
    error = refused(soups(SHAPES, SHAPES), average=average)
    assert isinstance(error, PlanError) and words in str(error)


def test_one_source_has_no_mean():
    assert "needs two sources" in str(refused(soups(SHAPES)))
    assert "needs two sources" in str(refused([]))


def test_counters_and_values_that_are_no_tensors_are_the_first_sources():
    one, other = [
        Checkpoint(
            path, "torch-zip", path[0] * 64, metas({"w": (2,)}) | metas({"n": ()}, "I64") | metas({"m": (2,)}, "BOOL"), entries={"s": 1}
        )
        for path in ("0.pt", "1.pt")
    ]
    plan = make_plan([one, other], None, average=True)
    steps = {step.target: step for step in plan.steps}
    assert steps["w"].action == "adapt" and steps["n"].sources == ((0, "n"),)
    assert steps["m"].sources == ((0, "m"),) and [entry.source for entry in plan.entries] == [(0, "s")]
    assert {(row.file, row.source): row.reason for row in plan.dropped} == {
        (1, key): f"not averaged: {key} is the first source's" for key in ("n", "m", "s")
    }
    assert from_json(json.dumps(to_json(plan)).encode(), "p") == plan


def test_a_key_that_one_source_lacks_is_told():
    error = refused(soups(SHAPES, {"fc.w": (3, 2)}, {**SHAPES, "head": (2,)}))
    assert error.problems == (
        "'fc.b' is not in 1.pt, or a rule dropped it there",
        "'head' is not in 0.pt, or a rule dropped it there",
        "'head' is not in 1.pt, or a rule dropped it there",
    )
    plan = make_plan(soups(SHAPES, {**SHAPES, "head": (2,)}), None, [rule("drop", "head")], average=True)
    assert [step.target for step in plan.steps] == ["fc.w", "fc.b"]


def test_shapes_or_dtypes_that_differ_are_told():
    assert "average goes over (3, 2) and (2, 2), which differ" in str(refused(soups(SHAPES, {**SHAPES, "fc.w": (2, 2)})))
    assert "joins F16 and F32" in str(refused([*soups(SHAPES), checkpoint(SHAPES, "h.pt", dtype="F16")]))


def test_wrappers_of_each_source_are_taken_off_by_the_first():
    wrapped = {f"module.{key}": shape for key, shape in SHAPES.items()}
    plan = make_plan(soups(SHAPES, wrapped), None, average=True)
    assert plan.steps[0].sources == ((0, "fc.w"), (1, "module.fc.w"))
    plan = make_plan(soups(wrapped, SHAPES), model(SHAPES), average=[3, 1])
    assert plan.steps[0].sources == ((0, "module.fc.w"), (1, "fc.w")) and plan.steps[0].ops[0]["weights"] == [0.75, 0.25]


def test_rules_are_for_the_keys_of_every_source():
    rules = [rule("rename", "fc.{p}", "head.{p}")]
    plan = make_plan(soups(SHAPES, SHAPES), model({"head.w": (3, 2), "head.b": (3,)}), rules, average=True)
    assert plan.steps[1].sources == ((0, "fc.b"), (1, "fc.b")) and plan.steps[1].reason == "--rename 'fc.{p}' 'head.{p}', --average"
    turned = make_plan(soups(SHAPES, SHAPES), model({"fc.w": (2, 3), "fc.b": (3,)}), [rule("adapt", "fc.w", "transpose")], average=True)
    assert [op["op"] for op in turned.steps[0].ops] == ["average", "transpose"]
    linked = [rule("adapt", "fc.w -> g.w", "transpose"), rule("rename", "fc.b", "g.b")]
    linked = make_plan(soups(SHAPES, SHAPES), model({"g.w": (2, 3), "g.b": (3,)}), linked, average=True)
    assert [op["op"] for op in linked.steps[0].ops] == ["transpose", "average"]
    renamed = [checkpoint({"a.w": (2,)}, "a.pt"), checkpoint({"b.w": (2,)}, "b.pt")]
    plan = make_plan(renamed, None, [rule("rename", "0:a.{p}", "c.{p}"), rule("rename", "1:b.{p}", "c.{p}")], average=True)
    assert plan.steps[0].target == "c.w" and plan.steps[0].sources == ((0, "a.w"), (1, "b.w"))


def test_what_can_not_be_averaged_in_the_same_run_is_told():
    two = soups({"a": (2,), "b": (2,)}, {"a": (2,), "b": (2,)})
    assert "'c' joins keys, and can't be averaged in the same run" in str(refused(two, None, [rule("adapt", "a + b -> c", "concat")]))
    error = refused(two, None, [rule("adapt", "0:a + 1:a -> b", "average"), rule("drop", "0:b")])
    assert error.problems == ("'b' joins keys of several sources, and can't be averaged in the same run",)
    error = refused(two, None, [rule("adapt", "0:a + 1:a -> c", "average")])
    assert error.problems == ("'c' joins keys of several sources, and can't be averaged in the same run",)
    unlike = refused(two, None, [rule("adapt", "0:a -> c", "reshape(shape=[2])"), rule("rename", "1:a", "c")])
    assert unlike.problems == ("'c' is made in another way in each source",)


def test_two_keys_of_one_source_on_one_name_name_their_rules():
    two = soups({"a": (2,), "b": (2,)}, {"a": (2,), "b": (2,)})
    found = refused(two, None, [rule("rename", "a", "c"), rule("rename", "b", "c")]).problems
    assert found[0] == "two keys of 0.pt land on 'c': 'a' (by --rename 'a' 'c') and 'b' (by --rename 'b' 'c')" and len(found) == 2


def test_a_mean_of_another_shape_than_the_targets_is_a_mismatch():
    two = soups({"fc.w": (10, 2), "x": (2,)}, {"fc.w": (10, 2), "x": (2,)})
    plan = make_plan(two, model({"fc.w": (4, 2), "x": (2,)}), average=True)
    assert plan.fresh == ("fc.w",) and {row.reason for row in plan.dropped} == {"shape (10, 2) does not fit (4, 2)"}
    cut = make_plan(two, model({"fc.w": (4, 2), "x": (2,)}), [rule("adapt", "fc.w", "slice")], average=True)
    assert [op["op"] for op in cut.steps[0].ops] == ["average", "slice"]
    assert "gives (5, 2), and the target has (4, 2)" in str(
        refused(two, model({"fc.w": (4, 2), "x": (2,)}), [rule("adapt", "fc.w", "slice(stop=5)")])
    )


def test_what_a_keep_rule_holds_is_not_averaged():
    plan = make_plan(soups(SHAPES, SHAPES), checkpoint(SHAPES, "t.pt"), [rule("keep", "fc.b")], average=True)
    assert [step.action for step in plan.steps] == ["adapt", "keep"]
    assert {(row.file, row.source): row.reason for row in plan.dropped} == {(n, "fc.b"): "--keep 'fc.b'" for n in (0, 1)}


def test_sources_that_two_versions_of_a_library_wrote():
    old = {"c.weight_g": (2, 1), "c.weight_v": (2, 3)}
    new = {"c.parametrizations.weight.original0": (2, 1), "c.parametrizations.weight.original1": (2, 3)}
    for sources in ((old, new), (new, old), (old, old)):
        plan = make_plan(soups(*sources), model(new), average=True, auto="safe")
        assert plan.coverage.tensors == 1.0 and [op["op"] for step in plan.steps for op in step.ops] == ["average"] * 2
        assert [step.sources for step in plan.steps] == [
            tuple((number, list(source)[place]) for number, source in enumerate(sources)) for place in (0, 1)
        ]
