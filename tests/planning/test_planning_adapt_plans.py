"""Plans with adapters: total whatever the rules, and each value where the rules say, by NumPy."""

import json
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_support import checkpoint, model, rule
from planning_worlds import followed, worlds
from profiles import examples

from ckptsurgeon.errors import PlanError, RuleError
from ckptsurgeon.planning.plan import make_plan
from ckptsurgeon.planning.planfile import check_followable, from_json, to_json
from ckptsurgeon.rules.rulefile import parse_rules, to_toml


def shapes_of(arrays):
    return {key: (2,) if array is None else array.shape for key, array in arrays.items()}


def equal(one, other):
    return one.keys() == other.keys() and all(
        (one[key] is None) == (other[key] is None) and (one[key] is None or np.array_equal(one[key], other[key])) for key in one
    )


@settings(max_examples=examples(400), deadline=None)
@given(worlds(), st.randoms(use_true_random=False), st.booleans())
def test_every_value_goes_where_the_rules_say_and_every_key_has_a_step_or_a_fate(world, random, written):
    keys = list(world.source)
    random.shuffle(keys)
    sources = [checkpoint({key: world.source[key].shape for key in keys})]
    target = model(shapes_of(world.target))
    rules = parse_rules(to_toml(world.rules), "r") if written else world.rules
    plan = make_plan(sources, target, rules)
    assert [step.target for step in plan.steps] == list(target)
    assert equal(followed(plan, world.source), world.target)
    used = {key for step in plan.steps for _, key in step.sources}
    assert Counter([*used, *(row.source for row in plan.dropped)]) == Counter(keys)
    assert {row.source for row in plan.dropped} == world.dropped
    again = from_json(json.dumps(to_json(plan)).encode(), "plan.json")
    assert again == plan
    check_followable(again, sources, target)


# ---- an adapter of one of the target's keys


def test_the_first_rule_that_names_a_key_adapts_it():
    source = checkpoint({"a.w": (3, 2), "b.w": (4, 2), "c.w": (2, 3)})
    target = model({"a.w": (2, 3), "b.w": (2, 2), "c.w": (2, 3)})
    plan = make_plan([source], target, [rule("adapt", "a.*", "transpose"), rule("adapt", "{k}.w", "slice")])
    steps = {step.target: step for step in plan.steps}
    assert [step.action for step in plan.steps] == ["adapt"] * 3
    assert steps["a.w"].ops == ({"op": "transpose", "dims": [0, 1]},) and steps["a.w"].reason == "--adapt 'a.*' 'transpose'"
    assert steps["b.w"].ops == ({"op": "slice", "dim": 0, "start": 0, "stop": 2},)


def test_a_chain_ends_in_what_the_target_needs_or_says_what_it_gives():
    source, target = checkpoint({"a": (6, 2), "n": (6, 2)}), model({"a": (2, 3), "n": (6, 2)})
    plan = make_plan([source], target, [rule("adapt", "a", "transpose | slice(dim=1)")])
    assert plan.steps[0].ops == ({"op": "transpose", "dims": [0, 1]}, {"op": "slice", "dim": 1, "start": 0, "stop": 3})
    for op, words in (
        ("transpose", "--adapt 'a' 'transpose': a: gives (2, 6), and the target has (2, 3)"),
        ("slice(dim=4)", "a: slice"),
        ("unstack", "a: unstack does not know which one to take"),
        ("chunk(dim=0, index=7, of=3)", "a: chunk"),
        ("reshape", "a: reshape makes (2, 3) of (6, 2)"),
    ):
        with pytest.raises(RuleError) as caught:
            make_plan([source], target, [rule("adapt", "a", op), rule("adapt", "n", "transpose")])
        assert any(words in problem for problem in caught.value.problems), caught.value.problems
        assert any("n: gives (2, 6), and the target has (6, 2)" in problem for problem in caught.value.problems)


def test_values_are_computed_of_floats_alone_and_dtypes_are_not_mixed():
    whole = checkpoint({"a": (2,), "b": (2,)}, dtype="I64")
    link = rule("adapt", "a + b -> c", "average")
    with pytest.raises(RuleError, match=r"c: computes values, and a is I64"):
        make_plan([whole], model({"c": (2,)}, dtype="I64"), [link])
    mixed = [checkpoint({"a": (2,)}, "a.pt"), checkpoint({"a": (2,)}, "b.pt", dtype="F16")]
    with pytest.raises(RuleError, match="joins F16 and F32"):
        make_plan(mixed, model({"c": (2,)}), [rule("adapt", "0:a + 1:a -> c", "average")])
    with pytest.raises(RuleError, match="leaves 2 tensors of 2"):
        make_plan([checkpoint({"a": (2,), "b": (2,)})], model({"c": (2,)}), [rule("adapt", "a + b -> c", "reshape")])


def test_an_adapted_tensor_is_cast_after_it():
    plan = make_plan([checkpoint({"a": (3, 2)})], model({"a": (2, 3)}, dtype="BF16"), [rule("adapt", "a", "transpose")])
    assert plan.steps[0].ops == ({"op": "transpose", "dims": [0, 1]}, {"op": "cast", "dtype": "BF16"}) and plan.steps[0].dtype == "BF16"


def test_what_fills_up_takes_the_scheme_of_an_init_rule():
    source, target = checkpoint({"a": (3, 2)}), model({"a": (5, 2)})
    adapt = rule("adapt", "a", "pad(fill='init')")
    for rules, scheme in (
        ([adapt], "model"),
        ([adapt, rule("init", "a", "zeros")], "zeros"),
        ([rule("adapt", "a", "pad(fill='init', scheme='ones')"), rule("init", "a", "zeros")], "ones"),
    ):
        (step,) = make_plan([source], target, rules).steps
        assert len(step.ops) == 1 and step.ops[0].items() >= {"op": "pad", "dim": 0, "size": 5, "fill": "init", "scheme": scheme}.items()
        assert step.action == "adapt" and not step.fresh and step.schemes == (scheme,)
    for kind in ("skeleton", "torch-zip"):
        if kind == "skeleton":  # nothing has a value there that could fill it up; a file has its own
            with pytest.raises(RuleError, match=r"a would get a value of the model itself \(model\), and the target is none"):
                make_plan([source], model({"a": (5, 2)}, format=kind), [adapt])
        else:
            assert make_plan([source], model({"a": (5, 2)}, format=kind), [adapt]).steps[0].schemes == ("model",)
        plan = make_plan([source], model({"a": (5, 2)}, format=kind), [adapt, rule("init", "a", "ones")])
        assert plan.steps[0].schemes == ("ones",)
        with pytest.raises(RuleError, match=r"b would get a value of the model itself \(reset\)"):
            make_plan([source], model({"a": (3, 2), "b": (2,)}, format=kind), [rule("init", "b", "reset")])
    with pytest.raises(RuleError, match="a can't be filled up with another key's value"):
        make_plan([source], model({"a": (5, 2), "b": (5, 2)}), [adapt, rule("init", "a", "from(b)")])


def test_tied_keys_are_adapted_together():
    target = model({"head.w": (5, 2), "embed.w": (5, 2)}, ties=(("embed.w", "head.w"),))
    plan = make_plan([checkpoint({"embed.w": (3, 2)})], target, [rule("adapt", "embed.w", "pad")])
    assert plan.steps[0].ops == plan.steps[1].ops and plan.steps[0].ops[0].items() >= {"op": "pad", "size": 5, "fill": "zeros"}.items()
    assert plan.steps[0].reason == "--adapt 'embed.w' 'pad', tied to embed.w"


def test_an_own_adapter_is_followed_by_the_shape_that_its_function_tells():
    from ckptsurgeon.rules.rules import Outside

    outside = Outside(shapes={"my:flip": lambda shapes, times=1: shapes[0][::-1] if times % 2 else shapes[0]})
    source, target = checkpoint({"a": (3, 2)}), model({"a": (2, 3)})
    (step,) = make_plan([source], target, [rule("adapt", "a", "my:flip(times=3)")], outside=outside).steps
    assert step.ops == ({"op": "my:flip", "arguments": {"times": 3}, "shape": [2, 3]},)
    with pytest.raises(RuleError, match=r"gives \(3, 2\), and the target has \(2, 3\)"):
        make_plan([source], target, [rule("adapt", "a", "my:flip(times=2)")], outside=outside)


# ---- what is applied unasked


def test_only_what_can_not_change_a_meaning_is_applied_unasked_and_only_when_asked_to():
    shapes = [((2, 1, 3), (2, 3)), ((3,), (1, 3, 1)), ((), (1,)), ((2, 3), (3, 2)), ((4, 3), (2, 3)), ((2, 3), (6,)), ((2, 3, 1), (3, 2))]
    source = checkpoint({f"k{n}": given for n, (given, _) in enumerate(shapes)})
    target = model({f"k{n}": wanted for n, (_, wanted) in enumerate(shapes)})
    assert make_plan([source], target).transferred == ()
    plan = make_plan([source], target, auto="safe")
    assert plan.transferred == ("k0", "k1", "k2")
    assert all(step.ops[0]["op"] == "reshape" and "(--auto safe)" in step.reason for step in plan.steps[:3])
    kept = make_plan([source], target, [rule("drop", "k0"), rule("keep", "k1"), rule("adapt", "k2", "reshape")], auto="safe")
    assert kept.transferred == ("k2",) and "auto" not in kept.steps[2].reason
    with pytest.raises(PlanError, match="nothing that may be applied unasked"):
        make_plan([source], target, auto="all")
