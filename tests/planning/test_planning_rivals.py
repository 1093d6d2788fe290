"""Where nothing decides between prefixes, the lines that are offered are given back: no rival is left, and the listed mapping comes."""

from __future__ import annotations

import shlex
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from planning_support import checkpoint, model, names
from profiles import examples

from ckptsurgeon.command import as_words
from ckptsurgeon.errors import PlanError, RuleError
from ckptsurgeon.matching.proposals.propose import propose
from ckptsurgeon.planning.apply_rules import name_sources
from ckptsurgeon.planning.diff import compare
from ckptsurgeon.planning.plan import make_plan
from ckptsurgeon.planning.prefixes import rivals
from ckptsurgeon.planning.prefixes.rivals import rivals_with_rules
from ckptsurgeon.rules.rules import Rule
from ckptsurgeon.tensors import Checkpoint

NET = {"conv.weight": (4, 3), "conv.bias": (4,), "norm.0.weight": (5,), "norm.module.weight": (5,), "fc.weight": (2, 4), "scale": ()}
HEADS = ("", "module.", "_orig_mod.", "a.", "b.", "ema.", "module.a.", "a.module.", "ema.module.", "a.b.", "_orig_mod.b.", "module.module.")


@st.composite
def layouts(draw: st.DrawFn, least: int = 1, most: int = 2) -> dict[str, tuple[int, ...]]:
    """A net under a few prefixes, each with most of its keys, and a few keys of anything else."""
    found = {}
    for head in draw(st.lists(st.sampled_from(HEADS), min_size=least, max_size=most, unique=True)):
        lacking = draw(st.sampled_from([(), (), (), ("scale",), ("fc.weight", "scale"), ("norm.0.weight",)]))
        wrapped = draw(st.sampled_from(["", "", "", "conv", "fc"]))
        for key, shape in NET.items():
            if key not in lacking:
                found[head + (key.replace(f"{wrapped}.", f"{wrapped}._orig_mod.") if wrapped else key)] = shape
    more = draw(st.dictionaries(names, st.sampled_from([(4,), (7,)]), max_size=2))
    return {**found, **{key: shape for key, shape in more.items() if key not in found}}


def options(words: tuple[str, ...]) -> list[Rule]:
    """Rules as a command line reads them back from its words."""
    found: list[Rule] = []
    left = shlex.split(shlex.join(words))
    while left:
        kind: Any = left.pop(0).removeprefix("--")
        found.append(Rule(kind, left.pop(0), left.pop(0) if kind == "rename" else ""))
    return found


def tried(source: Checkpoint, target: Checkpoint, rules: list[Rule]) -> int:
    """How many ways a refusal lists, each of which was chosen."""
    try:
        make_plan([source], target, rules)
    except RuleError:
        return 0
    except PlanError as error:
        ways = compare(source, target, rules).rivals
        assert error.problems == tuple(map(str, ways)) and len(ways) >= 1
        for way in ways:
            assert way.rules, way
            plan = make_plan([source], target, [*rules, *options(as_words(way.options))])
            assert {step.sources[0][1]: step.target for step in plan.steps if step.sources} == way.mapping
        return len(ways)
    return 0


@settings(max_examples=examples(400), deadline=None)
@given(layouts(2, 3), layouts())
def test_each_offered_set_of_lines_gives_the_listed_mapping(source: dict[str, Any], target: dict[str, Any]) -> None:
    event(f"{tried(checkpoint(source), model(target), [])} ways")


@settings(max_examples=examples(200), deadline=None)
@given(layouts(2, 3), layouts(), st.data())
def test_they_do_beside_drops_of_the_persons_own(source: dict[str, Any], target: dict[str, Any], data: st.DataObject) -> None:
    gone = data.draw(st.lists(st.sampled_from(list(source)), min_size=1, max_size=2, unique=True))
    event(f"{tried(checkpoint(source), model(target), [Rule('drop', key) for key in gone])} ways")


@settings(max_examples=examples(200), deadline=None)
@given(layouts(2, 3), layouts(), layouts())
def test_they_do_for_one_of_several_sources(source: dict[str, Any], other: dict[str, Any], target: dict[str, Any]) -> None:
    sources, goal = [checkpoint(source), checkpoint(other, "b.pt")], model(target)
    try:
        found = name_sources(sources, goal, [])
    except RuleError:
        return
    for number, ways in enumerate(rivals_with_rules(sources, goal, found)):
        for way in ways:
            assert way.rules, way
            led = name_sources(sources, goal, [*options(as_words(way.options)), Rule("keep", "**")])
            assert not led.choices[number].rivals
            rows = [(key, name) for (place, key), given in led.names_of.items() if place == number for name in given if name in goal]
            assert {key: name for key, name in rows if goal[name].shape == sources[number][key].shape} == way.mapping


def test_rules_of_a_file_come_after_what_is_offered() -> None:
    """A command line's rules come before a file's: an offered `--drop '**'` must not take away what the file names."""
    source = checkpoint({**{f"{head}{key}": shape for head in ("a.", "b.") for key, shape in NET.items()}, "old": (9,)})
    goal = model({**NET, "new": (9,)})
    rules = [Rule("rename", "old", "new", "rules.toml", 1)]
    for way in compare(source, goal, rules).rivals:
        plan = make_plan([source], goal, [*way.rules, *rules])
        assert {step.sources[0][1]: step.target for step in plan.steps if step.sources} == {**way.mapping, "old": "new"}


def test_a_change_that_takes_many_rules_is_listed_without(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = ("conv.weight", "conv.bias", "norm.module.weight", "fc.weight", "scale")
    source = checkpoint(
        {**{f"module.{key}": NET[key] for key in keys}, **{f"_orig_mod.b.{key}": NET[key] for key in NET if key != "scale"}}
    )
    goal = model({f"_orig_mod.{key}": shape for key, shape in NET.items()} | {f"a.b.{key}": shape for key, shape in NET.items()})
    assert all(1 <= len(way.rules) <= 24 for way in compare(source, goal).rivals)
    monkeypatch.setattr(rivals, "MANY", 0)
    with pytest.raises(PlanError, match="a rule for each key") as error:
        make_plan([source], goal)
    *_, option, key, name = shlex.split(error.value.hint or "")
    assert option == "--rename" and key in source and name in goal and source[key].shape == goal[name].shape
    assert "No few rules choose it" in str(compare(source, goal))


def test_a_rival_is_left_out_by_its_own_prefix_and_what_is_offered_works_for_matching_too() -> None:
    net = {"conv1.weight": (4, 3, 3, 3), "layer1.0.conv1.weight": (4, 4, 3, 3), "layer1.0.bn1.weight": (4,)}
    towers = {f"module.encoder_{tower}.{key}": shape for tower in "qk" for key, shape in {**net, "fc.weight": (16, 4)}.items()}
    source, target = checkpoint(towers), model({**net, "fc.weight": (10, 4)})
    ways = compare(source, target).rivals
    assert [as_words(way.options) for way in ways] == [("--drop", "encoder_k.**"), ("--drop", "encoder_q.**")]
    for way in ways:
        found = propose(source, target, way.rules)
        assert {link.sources[0]: link.targets[0] for link in found.applied} == way.mapping and found.refusal() is None
