"""Adapt rules with `->`: which keys go together, in which order, and what is told where one is not there."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from planning_support import checkpoint, model, rule

from ckptsurgeon.errors import RuleError
from ckptsurgeon.planning.apply_rules import name_sources
from ckptsurgeon.planning.plan import make_plan
from ckptsurgeon.rules.rules import Rule
from ckptsurgeon.tensors import Checkpoint

STAGE = Rule("stage")


def plan_of(source, target, *rules, **more):
    sources = source if isinstance(source, list) and isinstance(source[0], Checkpoint) else [checkpoint(source)]
    return make_plan(sources, None if target is None else model(target), rules, **more)


def steps(*args, **more):
    """For each target key: the source keys in order, and the ops."""
    return {step.target: ([key for _, key in step.sources], [dict(op) for op in step.adapters]) for step in plan_of(*args, **more).steps}


def refused(*args, **more):
    with pytest.raises(RuleError) as caught:
        plan_of(*args, **more)
    return caught.value.problems


# ---- one to many


def test_one_key_in_parts_by_the_results_own_sizes():
    link = rule("adapt", "{**m}.qkv.{p} -> {m}.q.{p} + {m}.k.{p} + {m}.v.{p}", "chunk(dim=0)")
    source = {"h.0.qkv.w": (12, 4), "h.0.qkv.b": (12,)}
    equal = {f"h.0.{n}.{p}": (4, 4) if p == "w" else (4,) for n in "qkv" for p in "wb"}
    found = steps(source, equal, link)
    assert found["h.0.k.w"] == (["h.0.qkv.w"], [{"op": "chunk", "dim": 0, "index": 1, "of": 3}])
    assert found["h.0.v.b"] == (["h.0.qkv.b"], [{"op": "chunk", "dim": 0, "index": 2, "of": 3}])
    grouped = {"h.0.q.w": (8, 4), "h.0.k.w": (2, 4), "h.0.v.w": (2, 4), "h.0.q.b": (8,), "h.0.k.b": (2,), "h.0.v.b": (2,)}
    found = steps(source, grouped, link)
    assert [found[f"h.0.{n}.w"][1] for n in "qkv"] == [
        [{"op": "slice", "dim": 0, "start": start, "stop": stop}] for start, stop in ((0, 8), (8, 10), (10, 12))
    ]
    # Sizes that do not add up to what is there are no sizes to cut by: the parts are equal, and do not fit.
    assert "gives (4, 4), and the target has (8, 4)" in refused(source, grouped | {"h.0.v.w": (3, 4)}, link)[0]


def test_a_part_that_no_pattern_names_counts_what_unstack_gives():
    link = rule("adapt", "experts.w{n} -> experts.{e}.w{n}", "unstack(dim=0)")
    source = {"experts.w1": (3, 2, 4), "experts.w2": (3, 4, 2)}
    target = {f"experts.{e}.w{n}": (2, 4) if n == 1 else (4, 2) for e in range(3) for n in (1, 2)}
    found = steps(source, target, link)
    assert found["experts.2.w1"] == (["experts.w1"], [{"op": "unstack", "dim": 0, "index": 2}])
    turned = rule("adapt", "experts.w{n} -> experts.{e}.w{n}", "permute(dims=[0, 1, 2]) | unstack")
    assert steps(source, target, turned)["experts.1.w2"][1][1] == {"op": "unstack", "dim": 0, "index": 1}
    beyond = rule("adapt", "experts.w1 -> experts.{e}.w1", "unstack(dim=3)")
    assert "unstacks dim 3 of shape (3, 2, 4)" in refused(source, target, beyond)[0]
    huge = {"w": (100_001, 1)}
    assert "at most 100000 are" in refused(huge, {"w.0": (1,)}, rule("adapt", "w -> w.{e}", "unstack"))[0]
    assert "unstacks dim 0 of shape ()" in refused({"w": ()}, {"w.0": ()}, rule("adapt", "w -> w.{e}", "unstack"))[0]


def test_a_part_of_what_is_unstacked_may_be_left_out_but_not_all():
    link = rule("adapt", "w -> w.{e}", "unstack")
    assert steps({"w": (3, 2)}, {"w.0": (2,)}, link) == {"w.0": (["w"], [{"op": "unstack", "dim": 0, "index": 0}])}
    assert "none of its results is in the target" in refused({"w": (3, 2)}, {"x.0": (2,)}, link)[0]


# ---- many to one


@given(st.permutations(range(12)))
def test_keys_are_gathered_in_numerical_order_whatever_theirs_in_the_file(order):
    source = {f"experts.{e}.w": (2, 3) for e in order}
    found = steps(source, {"experts.w": (12, 2, 3)}, rule("adapt", "experts.{e}.{p} -> experts.{p}", "stack(dim=0)"))
    assert found == {"experts.w": ([f"experts.{e}.w" for e in range(12)], [{"op": "stack", "dim": 0, "of": 12}])}


def test_patterns_join_in_the_order_in_which_they_are_written():
    source = {"v": (1, 3), "k": (1, 3), "q": (2, 3)}
    assert steps(source, {"qkv": (4, 3)}, rule("adapt", "q + k + v -> qkv", "concat"))["qkv"][0] == ["q", "k", "v"]
    assert steps(source, {"qkv": (4, 3)}, rule("adapt", "v + q + k -> qkv", "concat(dim=0)"))["qkv"][0] == ["v", "q", "k"]


def test_words_are_gathered_after_numbers():
    source = {f"e.{e}.w": (1,) for e in ("b", "10", "a", "9")}
    assert steps(source, {"w": (4,)}, rule("adapt", "e.{e}.w -> w", "concat"))["w"][0] == ["e.9.w", "e.10.w", "e.a.w", "e.b.w"]


def test_layers_that_results_only_count_with_are_gathered():
    average = rule("adapt", "h.{i}.{p} -> g.{i//2}.{p}", "average")
    found = steps({f"h.{i}.w": (2,) for i in (3, 2, 1, 0)}, {"g.0.w": (2,), "g.1.w": (2,)}, average)
    assert found["g.1.w"] == (["h.2.w", "h.3.w"], [{"op": "average", "weights": [0.5, 0.5]}])
    odd = rule("adapt", "h.{i}.w -> g.{i%2}.w", "concat")  # 0 2 4 and 1 3: no gap is a lack here
    assert steps({f"h.{i}.w": (2,) for i in range(5)}, {"g.0.w": (6,), "g.1.w": (4,)}, odd)["g.0.w"][0] == ["h.0.w", "h.2.w", "h.4.w"]
    shifted = rule("adapt", "h.{i}.w -> g.{i+1}.w", "transpose")
    assert steps({"h.1.w": (2, 3)}, {"g.2.w": (3, 2)}, shifted)["g.2.w"][0] == ["h.1.w"]


# ---- across sources


def test_these_from_one_source_and_those_from_another():
    two = [checkpoint({"body.w": (2,), "head.w": (2,)}, "a.pt"), checkpoint({"body.w": (2,), "head.w": (2,)}, "b.pt")]
    plan = plan_of(two, {"body.w": (2,), "head.w": (2,)}, rule("drop", "1:body.*"), rule("drop", "0:head.*"))
    assert {step.target: step.sources for step in plan.steps} == {"body.w": ((0, "body.w"),), "head.w": ((1, "head.w"),)}
    mean = plan_of(
        two,
        {"body.w": (2,), "head.w": (2,)},
        rule("adapt", "0:body.{p} + 1:body.{p} -> body.{p}", "average(weights=[3, 1])"),
        rule("drop", "0:head.*"),
    )
    assert mean.steps[0].sources == ((0, "body.w"), (1, "body.w")) and mean.steps[0].ops == ({"op": "average", "weights": [0.75, 0.25]},)
    assert mean.steps[1].sources == ((1, "head.w"),) and mean.steps[1].action == "copy"


def test_a_link_without_numbers_is_for_each_source_by_itself():
    two = [checkpoint({"q": (2,), "k": (2,)}, "a.pt"), checkpoint({"q": (2,), "k": (2,)}, "b.pt")]
    link = rule("adapt", "q + k -> qk", "concat")
    (problem,) = refused(two, {"qk": (4,)}, link)
    assert problem.startswith("two sources land on 'qk': 'q' of a.pt (by --adapt") and "'q' of b.pt (by --adapt" in problem
    split = [checkpoint({"q": (2,)}, "a.pt"), checkpoint({"k": (2,)}, "b.pt")]
    words = refused(split, {"qk": (4,)}, link)
    assert any("'qk' lacks what 'k' names" in problem for problem in words)
    assert steps(split, {"qk": (4,)}, rule("adapt", "0:q + 1:k -> qk", "concat"))["qk"][0] == ["q", "k"]
    assert "two keys by one pattern" in refused(two, {"qk": (4,)}, rule("adapt", "0:q + k -> qk", "concat"))[0]


# ---- what is not there


@pytest.mark.parametrize(
    ("source", "link", "words"),
    [
        (["h.0.q", "h.0.k", "h.1.q"], ("h.{i}.q + h.{i}.k -> g.{i}", "concat"), "'g.1' lacks what 'h.{i}.k' names"),
        (["e.0.a", "e.0.b", "e.1.a"], ("e.{e}.a + e.{e}.b -> g.0", "concat"), "'g.0' lacks what 'e.{e}.b' names for e=1"),
        (["e.0", "e.1", "e.3"], ("e.{e} -> g.0", "concat"), "'g.0' lacks e=2, between 0 and 3"),
        (["e.0", "e.00"], ("e.{e} -> g.0", "concat"), "gives 'g.0' two keys by one pattern"),
        (["a.x", "a.y"], ("a.* -> g.0", "concat"), "gives 'g.0' two keys by one pattern"),
        (["q", "k"], ("q + k -> g.0 + g.1", "concat(of=3)"), "concat"),
        (["a.x"], ("a.{i} -> g.{i+1}", "transpose"), "counts with {i+1}, but 'i' matched 'x', in 'a.x'"),
    ],
)
def test_what_a_link_lacks_is_told(source, link, words):
    found = refused(source, {"g.0": (2,), "g.1": (2,)}, rule("adapt", *link))
    assert any(words in problem and "--adapt" in problem for problem in found), found


def test_a_value_that_is_no_tensor_can_not_be_linked():
    source = checkpoint({"a.w": (2,)}, entries={"a._extra_state": 1})
    (problem,) = refused([source], {"b.w": (2,)}, rule("adapt", "a.{p} -> b.{p}", "reshape"))
    assert "is for tensors, and this is none, in 'a._extra_state'" in problem
    plan = plan_of([source], {"b.w": (2,)}, rule("drop", "a._extra_state"), rule("adapt", "a.{p} -> b.{p}", "reshape"))
    assert plan.transferred == ("b.w",)


# ---- stages


def test_a_chain_grows_from_stage_to_stage():
    rules = [rule("adapt", "a -> b", "transpose"), STAGE, rule("rename", "b", "c"), STAGE, rule("adapt", "c -> d.{n}", "unstack")]
    found = steps({"a": (3, 2)}, {"d.0": (3,), "d.1": (3,)}, *rules)
    assert found["d.1"] == (["a"], [{"op": "transpose", "dims": [0, 1]}, {"op": "unstack", "dim": 0, "index": 1}])
    joined = [rule("adapt", "{n}.w -> m.{n}.w", "transpose"), STAGE, rule("adapt", "m.{n}.w -> all", "concat")]
    found = steps({"q.w": (3, 2), "k.w": (3, 2)}, {"all": (4, 3)}, *joined)
    assert found["all"] == (["k.w", "q.w"], [{"op": "transpose", "dims": [0, 1]}, {"op": "concat", "dim": 0, "of": 2}])
    cut = [
        rule("adapt", "h.{i}.qkv -> h.{i}.q + h.{i}.k + h.{i}.v", "chunk"),
        STAGE,
        rule("adapt", "h.{i}.q -> q", "stack"),
        rule("adapt", "h.{i}.v -> v", "stack"),
        rule("adapt", "h.{i}.k -> k", "stack"),
    ]
    found = steps({f"h.{i}.qkv": (6,) for i in range(4)}, dict.fromkeys("qkv", (4, 2)), *cut)
    assert found["v"] == (
        [f"h.{i}.qkv" for i in range(4)],
        [{"op": "chunk", "dim": 0, "index": 2, "of": 3}, {"op": "stack", "dim": 0, "of": 4}],
    )
    unlike = [rule("adapt", "q -> m.q", "transpose"), rule("rename", "k", "m.k"), STAGE, rule("adapt", "m.q + m.k -> all", "concat")]
    (problem,) = refused({"q": (3, 2), "k": (2, 3)}, {"all": (4, 3)}, *unlike)
    assert "joins keys for 'all' that earlier stages adapted, each in its own way" in problem
    twice = [rule("adapt", "q -> m.q", "concat"), rule("adapt", "k -> m.k", "concat"), STAGE, rule("adapt", "m.q + m.k -> all", "stack")]
    assert "each in its own way" in refused({"q": (3,), "k": (3,)}, {"all": (2, 3)}, *twice)[0]


def test_every_rule_that_led_to_a_key_is_its_reason():
    rules = [Rule("adapt", "a -> b", "transpose", "r.toml", 1), STAGE, Rule("rename", "b", "c", "r.toml", 9)]
    (step,) = plan_of({"a": (3, 2)}, {"c": (2, 3)}, *rules).steps
    assert step.reason == "adapt 'a -> b' 'transpose' (r.toml:1), rename 'b' 'c' (r.toml:9)"


def test_a_converted_file_is_adapted_too():
    plan = plan_of({"q": (2,), "k": (2,), "x": (3,)}, None, rule("adapt", "q + k -> qk", "concat"))
    assert [(step.target, step.shape, step.action) for step in plan.steps] == [("qk", (4,), "adapt"), ("x", (3,), "copy")]


def test_a_link_that_wants_the_targets_shape_says_so_without_a_target():
    assert "write slice(dim=0, stop=...)" in refused({"a": (4,)}, None, rule("adapt", "a -> b", "slice"))[0]


def test_what_a_rule_names_of_another_layer_is_found_by_name_and_not_by_shape():
    names = name_sources([checkpoint(["a.0.w", "a.1.w"])], None, [rule("adapt", "a.{i}.w -> b.{i}.w", "reshape(shape=[2])")])
    assert {name: claim.source_keys for name, claim in names.claims.items()} == {"b.0.w": ((0, "a.0.w"),), "b.1.w": ((0, "a.1.w"),)}
