"""The first rule that matches a name: what asking each rule in turn would say."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import examples

from ckptsurgeon.errors import RuleError
from ckptsurgeon.planning.apply_rules import FirstMatch
from ckptsurgeon.rules.patterns import compile_pattern
from ckptsurgeon.rules.rules import CompiledRule, Match, Rule, compile_rule

PIECES = ["a", "b.", "h", ".", "0", "3", "12", "{i}", "{j=0,3,12}", "{0..12..3}", "{a,h}", "*", "**", "{**r}", "\\*", "w"]
patterns = st.lists(st.sampled_from(PIECES), min_size=1, max_size=5).map("".join)
names = st.lists(st.sampled_from(["a", "b", "h", ".", "0", "3", "12", "*", "w"]), min_size=1, max_size=6).map("".join)


def compiled(pattern: str) -> CompiledRule | None:
    try:
        return compile_rule(Rule("drop", pattern))
    except RuleError:
        return None


def in_turn(rules: list[CompiledRule], name: str, source: int) -> tuple[int, Match] | None:
    return next(((place, match) for place, rule in enumerate(rules) if (match := rule.match(name, source)) is not None), None)


@settings(max_examples=examples(300), deadline=None)
@given(st.lists(st.one_of(patterns, patterns.map("1:{}".format)), max_size=8), st.lists(names, min_size=1), st.integers(0, 1))
def test_it_is_the_rule_that_asking_in_turn_finds(texts: list[str], asked: list[str], source: int) -> None:
    rules = [rule for text in texts if (rule := compiled(text)) is not None]
    first = FirstMatch(rules)
    assert [first.find(name, source) for name in asked] == [in_turn(rules, name, source) for name in asked]


@settings(max_examples=examples(300), deadline=None)
@given(patterns, st.lists(names, min_size=1))
def test_every_key_that_matches_begins_with_a_head_of_the_pattern(text: str, keys: list[str]) -> None:
    if compiled(text) is None:
        return
    pattern = compile_pattern(text)
    assert all(key.startswith(pattern.heads) for key in keys if pattern.fits(key))
