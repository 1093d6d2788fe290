"""Rules turned round: they lead back to the names, shapes and values that were there, or say which of them can't."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_support import checkpoint, model, rule
from planning_worlds import KINDS, STAGE, followed, worlds
from profiles import examples
from test_planning_adapt_plans import equal, shapes_of

from ckptsurgeon.errors import RuleError
from ckptsurgeon.planning.plan import make_plan
from ckptsurgeon.rules.reversing import reverse
from ckptsurgeon.rules.rules import Rule, compile_rules


def refused(*rules):
    with pytest.raises(RuleError) as caught:
        reverse(rules)
    assert caught.value.reason == "rules that can't be turned round"
    return caught.value.problems


# ---- one rule at a time


@pytest.mark.parametrize(
    ("given", "back"),
    [
        (("rename", "a", "b"), ("rename", "b", "a")),
        (("rename", "encoder_layer_{i}.{p}", "blocks.{i+1}.{p}"), ("rename", "blocks.{i}.{p}", "encoder_layer_{i-1}.{p}")),
        (("rename", "h.{i}.w", "g.{ i - 12 }.w"), ("rename", "g.{i}.w", "h.{i+12}.w")),
        (("rename", "a.{**rest}", "b.{rest}"), ("rename", "b.{**rest}", "a.{**rest}")),
        (("rename", "h.{i=0..90..3}.w", "g.{i}.w"), ("rename", "g.{i=0..90..3}.w", "h.{i}.w")),
        (("rename", "h.{i=0,4,9}.{p=a,b}", "{p}.{i+1}.w"), ("rename", "{p=a,b}.{i=1,5,10}.w", "h.{i-1}.{p}")),
        (("rename", "h.{i=3..6}.w", "g.{i - 3}.w"), ("rename", "g.{i=0..3}.w", "h.{i+3}.w")),
        (("adapt", "h.{i=0,2,4,7}.w", "transpose"), ("adapt", "h.{i=0,2,4,7}.w", "transpose")),
        (("rename", "a\\{b\\}\\*.{p}", "b\\+.{p}"), ("rename", "b\\+.{p}", "a\\{b\\}\\*.{p}")),
        (("rename", "a.{p}.{p}", "b.{p}"), ("rename", "b.{p}", "a.{p}.{p}")),
        (("rename", "a.{p}", "b.{p}.{p}"), ("rename", "b.{p}.{p}", "a.{p}")),
        (("adapt", "qkv.{p} -> q.{p} + k.{p} + v.{p}", "chunk(dim=0)"), ("adapt", "q.{p} + k.{p} + v.{p} -> qkv.{p}", "concat(dim=0)")),
        (("adapt", "a.{i} -> b.{i+1}", "transpose | permute(dims=[1, 2, 0])"),
         ("adapt", "b.{i} -> a.{i-1}", "permute(dims=[2, 0, 1]) | transpose")),
        (("adapt", "e.{e}.w -> e.w", "stack(dim=1)"), ("adapt", "e.w -> e.{e}.w", "unstack(dim=1)")),
        (("adapt", "pos", "transpose"), ("adapt", "pos", "transpose")),
        (("adapt", "**.w", "transpose"), ("adapt", "**.w", "transpose")),
        (("adapt", "w", "rows(index=[2, 0, 1])"), ("adapt", "w", "rows(index=[1, 2, 0])")),
    ],
)  # fmt: skip
def test_a_rule_and_its_way_back(given, back):
    assert reverse([Rule(*given, file="r.toml", line=4)]) == (Rule(*back),)
    (found,) = reverse([Rule(*given, file="r.toml", line=4)])
    assert (found.file, found.line) == ("r.toml", 4)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        (("drop", "a"), "what is dropped can't be had back"),
        (("keep", "a"), "keep says what a target's own keys get"),
        (("init", "a", "zeros"), "init says what a target's own keys get"),
        (("rename", "a.*.{p}", "b.{p}"), "has a '*' without a name"),
        (("rename", "a.**", "b"), "has a '*' without a name"),
        (("rename", "/a(.*)/", "b{1}"), "is a regular expression"),
        (("rename", "0:a", "b"), "is for one source of several"),
        (("rename", "a.{i}", "b.{i} + c.{i}"), "one key goes to several"),
        (("rename", "a.{i}", "b.{2*i}"), "can't be solved"),
        (("rename", "a.{i}", "b.{i//2}"), "can't be solved"),
        (("rename", "a.{i=x,y}", "b.{i+1}"), "counts with what are no digits"),
        (("rename", "a.{i}.{p}", "b.{p}"), "uses {i}"),
        (("rename", "a.{i}", "b.{i}.{i+1}"), "counts with {i} in two ways"),
        (("rename", "a.{i}", "b.{i+2}.{i+1}"), "counts with {i} in two ways"),
        (("adapt", "a.{i} -> b.{i} + c.{i+1}", "chunk"), "counts with {i} in two ways"),
        (("adapt", "a + b -> c", "average"), "loses what would be needed"),
        (("adapt", "a", "slice(dim=0, stop=3)"), "loses what would be needed"),
        (("adapt", "a", "pad"), "loses what would be needed"),
        (("adapt", "a", "transpose | interpolate"), "loses what would be needed"),
        (("adapt", "a", "my:flip"), "loses what would be needed"),
        (("adapt", "a -> b -> c", "transpose"), "more than one ' -> '"),
        (("adapt", "a", "nope"), "there is no adapter 'nope'"),
    ],
)
def test_a_rule_that_can_not_be_turned_says_why(given, why):
    (problem,) = refused(Rule(*given, file="r.toml", line=4))
    assert problem.startswith(f"{Rule(*given, file='r.toml', line=4)}: ") and why in problem


def test_all_rules_that_can_not_be_turned_are_told():
    found = refused(rule("drop", "a"), rule("rename", "a", "b"), STAGE, rule("keep", "c"), rule("rename", "x.{i}", "y.{i%2}"))
    assert [problem.partition(":")[0] for problem in found] == ["--drop 'a'", "--keep 'c'", "--rename 'x.{i}' 'y.{i%2}'"]


def test_stages_come_in_the_opposite_order():
    assert reverse([rule("rename", "a", "b"), STAGE, rule("rename", "b", "c"), rule("rename", "x", "y")]) == (
        rule("rename", "c", "b"),
        rule("rename", "y", "x"),
        STAGE,
        rule("rename", "b", "a"),
    )
    assert reverse([]) == () == reverse([STAGE])[1:]


def test_an_adapter_of_a_targets_key_is_undone_before_its_name_is():
    rules = [rule("rename", "a.{p}", "b.{p}"), rule("adapt", "b.w", "transpose")]
    assert reverse(rules) == (rule("adapt", "b.w -> b.w", "transpose"), STAGE, rule("rename", "b.{p}", "a.{p}"))
    (problem,) = refused(rules[0], rule("adapt", "b.*", "transpose"))
    assert problem.startswith("--adapt 'b.*' 'transpose': 'b.*' has a '*' without a name")


# ---- there and back


@settings(max_examples=examples(400), deadline=None)
@given(worlds(KINDS), st.randoms(use_true_random=False))
def test_the_way_back_leads_to_the_names_shapes_and_values_that_were_there(world, random):
    there = make_plan([checkpoint(shapes_of(world.source))], model(shapes_of(world.target)), world.rules)
    keys = [step.target for step in there.steps]
    random.shuffle(keys)
    back = make_plan([checkpoint({key: world.target[key].shape for key in keys})], model(shapes_of(world.source)), reverse(world.rules))
    assert back.coverage.tensors == 1.0 and not back.dropped and not back.fresh
    assert equal(followed(back, world.target), world.source)


@settings(max_examples=examples(300), deadline=None)
@given(worlds(KINDS))
def test_rules_turned_round_twice_do_what_they_did(world):
    twice = reverse(reverse(world.rules))
    plan = make_plan([checkpoint(shapes_of(world.source))], model(shapes_of(world.target)), twice)
    assert equal(followed(plan, world.source), world.target)
    assert {(one.kind, one.pattern, one.result) for one in reverse(reverse(twice))} == {
        (one.kind, one.pattern, one.result) for one in twice
    }


_sides = st.lists(
    st.sampled_from(["a", "b.{p}", "c.{i}.{p}", "c.{i+1}.{p}", "d.{**r}", "e.{i-1}", "f.{i//2}", "g.*", "{p}{i}", "/x/", "0:h", "{", " "]),
    min_size=1, max_size=3,
).map(" + ".join)  # fmt: skip


@settings(max_examples=examples(500))
@given(
    st.lists(
        st.one_of(
            st.just(STAGE),
            st.tuples(_sides, _sides).map(lambda pair: rule("rename", *pair)),
            st.tuples(_sides, _sides, st.sampled_from(["chunk", "concat", "stack", "unstack", "transpose", "reshape", "average", ""])).map(
                lambda row: rule("adapt", f"{row[0]} -> {row[1]}", row[2])
            ),
            st.tuples(_sides, st.sampled_from(["transpose", "slice", "(", "rows(index=[0, 0])", "permute"])).map(
                lambda row: rule("adapt", *row)
            ),
            st.tuples(st.sampled_from(["drop", "keep"]), _sides).map(lambda row: rule(*row)),
        ),
        max_size=4,
    )
)
def test_any_rules_are_turned_to_rules_or_refused_by_name(rules):
    try:
        found = reverse(rules)
    except RuleError as error:
        assert len(error.problems) >= 1
        return
    compile_rules(found)
