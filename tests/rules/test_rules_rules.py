"""Rules as they meet keys: first match, stages, one to many, many to one, and every problem told at once."""

import json
import re
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_support import checkpoint, model, rule
from profiles import examples

from ckptsurgeon.errors import PlanError, RuleError
from ckptsurgeon.hints import close_words
from ckptsurgeon.planning.apply_rules import name_sources
from ckptsurgeon.planning.plan import make_plan
from ckptsurgeon.planning.planfile import check_followable, from_json, to_json
from ckptsurgeon.rules.rules import Outside, Rule, compile_rule, compile_rules, from_arguments, path_of_file
from ckptsurgeon.tensors import Checkpoint

STAGE = Rule("stage")


def names(source, rules, target=None):
    """What each key is called after the rules; a key that is dropped has no row."""
    return {key: list(found) for (_, key), found in name_sources([checkpoint(source)], target, rules).names_of.items()}


def problems(source, rules, target=None):
    with pytest.raises(RuleError) as caught:
        name_sources(source if isinstance(source[0], Checkpoint) else [checkpoint(source)], target, rules)
    return caught.value.problems


# ---- what a pattern touches


def test_matches_are_span_exact():
    keys = ["fc", "fc_in.fc", "fc.fc", "fcfc", "a.fc"]
    assert names(keys, [rule("rename", "fc", "dense")]) == {key: ["dense" if key == "fc" else key] for key in keys}
    assert names(keys, [rule("rename", "fc.{p}", "dense.{p}")])["fc_in.fc"] == ["fc_in.fc"]
    assert names(["fc.w", "fc_in.w"], [rule("drop", "fc.*")]) == {"fc_in.w": ["fc_in.w"]}


def test_the_issues_example():
    found = names(
        [f"encoder.layers.encoder_layer_{i}.{m}.{p}" for i in (0, 11) for m in ("ln_1", "mlp") for p in ("weight", "bias")],
        [rule("rename", "encoder.layers.encoder_layer_{i}.ln_1.{p}", "blocks.{i}.norm1.{p}")],
    )
    assert found["encoder.layers.encoder_layer_11.ln_1.bias"] == ["blocks.11.norm1.bias"]
    assert found["encoder.layers.encoder_layer_0.mlp.bias"] == ["encoder.layers.encoder_layer_0.mlp.bias"]


@given(st.integers(0, 10**6))
def test_results_count(i):
    templates = {"{i+1}": i + 1, "{i//2}": i // 2, "{2*i+1}": 2 * i + 1, "{i%3}": i % 3, "{(i+1)*2}": (i + 1) * 2}
    for template, wanted in templates.items():
        assert names([f"h.{i}.w"], [rule("rename", "h.{i}.w", f"g.{template}.w")]) == {f"h.{i}.w": [f"g.{wanted}.w"]}


def test_one_source_goes_to_many_targets():
    source = [f"layers.{i}.{p}" for i in range(3) for p in ("w", "b")]
    grow = rule("rename", "layers.{i}.{p}", "layers.{2*i}.{p} + layers.{2*i+1}.{p}")
    found = names(source, [grow])
    assert found["layers.2.b"] == ["layers.4.b", "layers.5.b"]
    target = model([f"layers.{i}.{p}" for i in range(6) for p in ("w", "b")])
    plan = make_plan([checkpoint(source)], target, [grow])
    assert {step.target: step.sources for step in plan.steps} == {
        f"layers.{i}.{p}": ((0, f"layers.{i // 2}.{p}"),) for i in range(6) for p in ("w", "b")
    }
    assert plan.coverage.tensors == 1.0 and not plan.dropped and not plan.fresh


def test_the_first_rule_wins_and_nothing_chains_without_a_stage():
    first, second = rule("rename", "a", "b"), rule("rename", "b", "c")
    assert names(["a", "b"], [first, second]) == {"a": ["b"], "b": ["c"]}
    assert names(["a"], [first, STAGE, second]) == {"a": ["c"]}
    assert problems(["a"], [first, second]) == ("--rename 'b' 'c' matches nothing",)
    assert names(["a", "b"], [rule("rename", "a", "b"), rule("rename", "b", "a")]) == {"a": ["b"], "b": ["a"]}  # a swap
    assert names(["x.a"], [STAGE, rule("drop", "x.*"), STAGE, STAGE]) == {}
    assert names(["a", "k"], [first, STAGE, rule("drop", "b")]) == {"k": ["k"]}


def test_the_number_of_a_source_before_a_pattern():
    two = [checkpoint(["a.w", "h.w"], "a.pt"), checkpoint(["a.w", "h.w"], "b.pt")]
    found = name_sources(two, None, [rule("drop", "0:h.*"), rule("drop", "1:a.*")])
    assert found.names_of == {(0, "a.w"): ("a.w",), (1, "h.w"): ("h.w",)}
    target = model(["a.w", "h.w"])
    plan = make_plan(two, target, [rule("drop", "1:a.{p}"), rule("drop", "0:h.{p}")])
    assert [step.sources for step in plan.steps] == [((0, "a.w"),), ((1, "h.w"),)]
    assert problems(two, [rule("drop", "2:a.w"), rule("drop", "1:z"), rule("drop", "1:**")]) == (
        "--drop '2:a.w' matches nothing: there is no source 2, the first is 0",
        "--drop '1:z' matches nothing",
    )


# ---- two sources on one target


def test_two_sources_on_one_target_name_both_rules():
    one, other = Rule("rename", "a.{p}", "c.{p}", "x.toml", 3), Rule("rename", "b.{p}", "c.{p}", "x.toml", 7)
    (found,) = problems(["a.w", "b.w"], [one, other], model(["c.w"]))
    assert found == (
        "two sources land on 'c.w': 'a.w' (by rename 'a.{p}' 'c.{p}' (x.toml:3)) and 'b.w' (by rename 'b.{p}' 'c.{p}' (x.toml:7))"
    )
    (found,) = problems(["a.w", "c.w"], [one], model(["c.w"]))
    assert "'a.w' (by rename" in found and found.endswith("and 'c.w'")
    (found,) = problems(["h.2.w", "h.3.w"], [rule("rename", "h.{i}.w", "g.{i//2}.w")], model(["g.1.w"]))
    assert found.startswith("two sources land on 'g.1.w'") and found.count("--rename 'h.{i}.w'") == 2


def test_what_a_keep_rule_holds_two_sources_may_claim():
    two = [checkpoint(["a.w", "h.w"], "a.pt"), checkpoint(["a.w", "h.w", "z.w"], "b.pt")]
    target = checkpoint(["a.w", "h.w", "z.w"], "target.pt")
    plan = make_plan(two, target, [rule("keep", "h.*"), rule("drop", "1:a.*")])
    assert {step.target: step.action for step in plan.steps} == {"a.w": "copy", "h.w": "keep", "z.w": "copy"}
    assert {(row.file, row.source): row.reason for row in plan.dropped} == {
        (0, "h.w"): "--keep 'h.*'",
        (1, "h.w"): "--keep 'h.*'",
        (1, "a.w"): "--drop '1:a.*'",
    }


# ---- all problems at once, with close names


def test_all_problems_of_all_stages_at_once():
    source = ["fc1.w", "fc2.w", "fc3.w", "h.x.w", "aux.w", "conv.w"]
    target = model(["dense1.w", "dense2.w", "g.0.w"])
    rules = [
        rule("rename", "fc9.{p}", "dense9.{p}"),
        rule("rename", "fc1.{p}", "dense2.{p}"),
        rule("rename", "fc2.{p}", "dense2.{p}"),
        rule("rename", "fc3.{p}", "dens3.{p}"),
        rule("rename", "h.{i}.w", "g.{i+1}.w"),
        rule("drop", "aux.*"),
        rule("drop", "aux.w"),
        STAGE,
        rule("drop", "fc1.w"),
        rule("adapt", "conv.w -> g.0.w + g.1.w", "unstack"),
    ]
    found = problems(source, rules, target)
    assert len(found) == 7
    words = "\n".join(found)
    assert "gives 'g.1.w', which is not in the target, and a part of the source would be lost" in words
    assert "--rename 'h.{i}.w' 'g.{i+1}.w': the result 'g.{i+1}.w' counts with {i+1}, but 'i' matched 'x', in 'h.x.w'" in words
    assert re.search(r"--rename 'fc9.\{p\}' 'dense9.\{p\}' matches nothing \(close: fc\d", words)
    assert "--drop 'aux.w' never gets a turn: earlier rules match all of its keys" in words
    assert "--drop 'fc1.w' matches nothing: an earlier stage gives other names" in words
    assert "gives 'dens3.w', and none of its results is in the target (close: dense" in words
    assert "two sources land on 'dense2.w'" in words


def test_rules_that_are_not_well_formed_at_once():
    rules = [
        rule("rename", "a.{p}", "b.{q}"),
        rule("drop", "{"),
        rule("rename", "a", ""),
        rule("init", "a"),
        rule("adapt", "a"),
        rule("adapt", "a", "transpos"),
        rule("adapt", "a", "chunk(dim='x')"),
        rule("adapt", "a -> b -> c", "transpose"),
        rule("adapt", "a.{i} + b.{j} -> c", "concat"),
        rule("adapt", "a -> b.{i} + c", "unstack"),
        rule("adapt", "a.{i} -> b.{i} + c", "chunk"),
        rule("adapt", "a -> b.{i}", "transpose"),
        rule("adapt", "a", "my.module:flip"),
        rule("drop", "fine"),
    ]
    with pytest.raises(RuleError) as caught:
        compile_rules(rules)
    assert len(caught.value.problems) == len(rules) - 1
    words = "\n".join(caught.value.problems)
    wanted = (
        "uses {q}",
        "odd brace",
        "names no scheme",
        "names no adapter",
        "no adapter 'transpos'",
        "dim can't be 'x'",
        "than one ' -> '",
    )
    for word in (*wanted, "name other parts", "results that use other parts", "'my.module:flip' was not imported"):
        assert word in words
    assert compile_rule(rule("adapt", "a", "my.module:flip"))  # well formed; that it is there is known only when it is imported
    assert compile_rules([rule("adapt", "a", "my.module:flip")], Outside(shapes={"my.module:flip": lambda shapes: shapes[0]}))


def test_rules_against_the_target_that_match_nothing():
    source, target = checkpoint(["a.w"]), model({"a.w": (2,), "head.w": (2,)})
    for rules, words in (
        ([rule("keep", "haed.*")], "--keep 'haed.*' matches nothing in the target (close: head.w"),
        ([rule("adapt", "haed.w", "transpose")], "--adapt 'haed.w' 'transpose' matches nothing in the target (close: head.w"),
        ([rule("adapt", "head.w", "transpose")], "no source gives 'head.w': rename one to it, or link it: 'a.w -> head.w'"),
        ([rule("adapt", "a.*", "slice"), rule("adapt", "a.w", "slice")], "--adapt 'a.w' 'slice' never gets a turn"),
        ([rule("init", "haed.*", "zeros")], "--init 'haed.*' 'zeros' matches nothing in the target (close: head.w"),
        ([rule("init", "a.*", "zeros")], "matches only keys that take weights from the source"),
        ([rule("init", "**", "zeros"), rule("init", "head.*", "ones")], "--init 'head.*' 'ones' never gets a turn"),
    ):
        with pytest.raises(RuleError) as caught:
            make_plan([source], target, rules)
        assert any(words in problem for problem in caught.value.problems), (words, caught.value.problems)


def test_a_rename_one_of_whose_results_is_in_the_target_has_its_effect():
    make_plan([checkpoint(["a.w", "a.b"])], model(["c.w"]), [rule("rename", "a.{p}", "c.{p}")])
    make_plan([checkpoint(["a.w"])], model(["c.w"]), [rule("rename", "a.{p}", "b.{p}"), STAGE, rule("rename", "b.{p}", "c.{p}")])
    make_plan([checkpoint(["a.w", "c.w"])], model(["c.w"]), [rule("rename", "a.{p}", "b.{p}"), STAGE, rule("drop", "b.w")])


# ---- keep, from(KEY)


def test_a_kept_key_keeps_the_targets_value_whatever_the_source_has():
    source = checkpoint({"a": (2,), "b": (3,), "c": (2,)})
    target = checkpoint({"a": (2,), "b": (2,), "c": (2,), "d": (2,)}, "t.pt", ties=(("a", "d"),))
    plan = make_plan([source], target, [rule("keep", "a"), rule("keep", "b")])
    assert {step.target: step.action for step in plan.steps} == {"a": "keep", "b": "keep", "c": "copy", "d": "keep"}
    assert {row.source: row.reason for row in plan.dropped} == {"a": "--keep 'a'", "b": "--keep 'b'"}
    assert plan.loose == ()
    fresh = make_plan([source], model({"a": (2,), "b": (2,), "c": (2,)}), [rule("keep", "{k}"), rule("keep", "z*")][:1])
    assert fresh.fresh == ("a", "b", "c") and {op["scheme"] for step in fresh.steps for op in step.ops} == {"model"}


def test_from_another_key_takes_the_parts_of_its_pattern():
    source = checkpoint({f"h.{i}.w": (2,) for i in range(3)})
    target = model({f"h.{i}.w": (2,) for i in range(5)} | {"odd": (3,), "half": (2,)})
    plan = make_plan([source], target, [rule("init", "h.{i}.{p}", "from(h.{i-2}.{p})")])
    assert {step.target: step.ops[0]["scheme"] for step in plan.steps if step.target in ("h.3.w", "h.4.w")} == {
        "h.3.w": "from('h.1.w')",
        "h.4.w": "from('h.2.w')",
    }
    for scheme in ("from(h.0.w)", "from('h.0.w')", 'from("h.0.w")', " from ( h.0.w ) "):
        plan = make_plan([source], target, [rule("init", "half", scheme)])
        assert next(step for step in plan.steps if step.target == "half").ops == ({"op": "init", "scheme": "from('h.0.w')"},)
    for key, scheme, words in (
        ("odd", "from(h.0.w)", r"odd: is F32 \(3,\), and 'h.0.w', which it copies, F32 \(2,\)"),
        ("half", "from(h.9.w)", "half: copies 'h.9.w', which is not in the target .close: h"),
        ("half", "from(half)", "half: copies 'half', which copies it in turn"),
        ("h.{i}.w", "from(h.{i-4}.w)", "comes to -1"),
        ("h.{i}.w", "from(h.{j}.w)", "uses {j}"),
    ):
        with pytest.raises(RuleError) as caught:
            make_plan([source], target, [rule("init", key, scheme)])
        assert any(re.search(words, problem) for problem in caught.value.problems), caught.value.problems


# ---- what a rule is


def test_rules_from_arguments_and_their_text():
    found = from_arguments({"a": "b"}, "x.*", [("h", "zeros")], {"w": "transpose"}, ["k"])
    assert found == (
        rule("drop", "x.*"),
        rule("rename", "a", "b"),
        rule("keep", "k"),
        rule("adapt", "w", "transpose"),
        rule("init", "h", "zeros"),
    )
    assert str(found[1]) == "--rename 'a' 'b'" and str(found[2]) == "--keep 'k'"
    assert rule("drop", "a") == Rule("drop", "a", file="r.toml", line=4) and str(Rule("drop", "a", "", "r.toml")) == "drop 'a' (r.toml)"


@pytest.mark.parametrize(
    ("file", "path", "found"),
    [("r.toml", "v.txt", "v.txt"), ("c/r.toml", "v.txt", "c/v.txt"), ("/c/r.toml", "v.txt", "/c/v.txt"), ("/r.toml", "v.txt", "/v.txt"),
     ("c/r.toml", "/v.txt", "/v.txt"), ("", "v.txt", "v.txt"), ("c/r.toml", "../v.txt", "c/../v.txt")],
)  # fmt: skip
def test_a_file_is_looked_for_beside_the_rules_that_name_it(file, path, found):
    assert path_of_file(Rule("adapt", "w", "rows", file, 1), path) == found


def test_close_names():
    assert close_words("fc9.*", ["conv.w", "fc1.w", "fc1.w"]) == " (close: fc1.w)"
    assert close_words("zzz", ["a.w"]) == "" == close_words("", []) == close_words("{p}", ["a"])


# ---- any rules: every key is accounted for

_heads = st.sampled_from(["a", "b", "c", "h.0", "h.1", "h.2"])
_sources = st.dictionaries(
    st.tuples(_heads, st.sampled_from(["w", "b"])).map(".".join), st.sampled_from([(4,), (2, 4), (4, 4)]), min_size=1
)
_rules = st.lists(
    st.one_of(
        st.tuples(_heads, _heads).map(lambda pair: rule("rename", f"{pair[0]}.{{p}}", f"{pair[1]}.{{p}}")),
        st.sampled_from(
            [rule("rename", "h.{i}.{p}", "h.{2*i}.{p} + h.{2*i+1}.{p}"), rule("rename", "h.{i}.{p}", "g.{i}.{p}"), STAGE,
             rule("adapt", "a.{p} + b.{p} -> c.{p}", "concat"), rule("adapt", "a.{p} -> b.{p} + c.{p}", "chunk"), rule("drop", "a.*"),
             rule("adapt", "h.{i}.{p} -> c.{p}", "stack"), rule("adapt", "h.{i}.{p} -> h.{i//2}.{p}", "average"), rule("keep", "b.*"),
             rule("adapt", "c.{p} -> h.{e}.{p}", "unstack"), rule("adapt", "a.*", "slice"), rule("init", "**", "zeros"),
             rule("adapt", "c.w", "pad(fill='init')"), rule("init", "c.{p}", "from(b.{p})"), rule("adapt", "*.w", "transpose")]
        ),
    ),
    max_size=4,
)  # fmt: skip


@settings(max_examples=examples(1000), deadline=None)
@given(
    st.lists(_sources, min_size=1, max_size=2),
    _sources,
    _rules,
    st.sampled_from([None, "safe"]),
    st.sampled_from(["model", "torch-zip", "skeleton", None]),
    st.booleans(),
)
def test_every_key_has_one_step_or_one_fate_whatever_the_rules(given, wanted, rules, auto, kind, average):
    sources = [checkpoint(one, f"{number}.pt") for number, one in enumerate(given)]
    target = None if kind is None else model(wanted, format=kind)
    if len(given) > 1 and not average:
        rules = [*rules, rule("drop", "1:h.*")]
    try:
        plan = make_plan(sources, target, rules, auto=auto, average=average and len(given) > 1)
    except (RuleError, PlanError) as error:
        assert error.problems or error.hint
        return
    if target is not None:
        assert [step.target for step in plan.steps] == list(wanted) and all(step.shape == wanted[step.target] for step in plan.steps)
        assert sorted([*plan.transferred, *plan.kept, *plan.fresh]) == sorted(wanted)
    used = {place for step in plan.steps for place in step.sources}
    every = [(number, key) for number, one in enumerate(given) for key in one]
    assert Counter([*used, *((row.file, row.source) for row in plan.dropped)]) == Counter(every)
    assert all(row.reason for row in plan.dropped) and all(step.reason for step in plan.steps)
    assert plan.coverage.counts == (len(plan.transferred), len(plan.steps))
    assert all(len(set(step.sources)) == len(step.sources) for step in plan.steps)
    check_followable(from_json(json.dumps(to_json(plan)).encode(), "plan.json"), sources, target)
