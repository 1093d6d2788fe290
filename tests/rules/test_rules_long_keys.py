"""A pattern's answer on a long key is its regular expression's, part for part, and does not take for ever."""

from __future__ import annotations

import re
import time
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from profiles import examples

from ckptsurgeon.errors import RuleError
from ckptsurgeon.rules import long_keys, patterns
from ckptsurgeon.rules.patterns import LONG, compile_pattern

tokens = st.sampled_from(["*", "**", "{p}", "{q}", "{**r}", "{**s}", "a", "b", ".", ".", "_", "{a,ab,b}", "{0..2}", "ab", "1"])
keys = st.text(alphabet="ab._1", max_size=24)


@settings(max_examples=examples(1500), deadline=None)
@given(text=st.lists(tokens, min_size=1, max_size=9).map("".join), key=keys)
@example(text="**.{p}_{q}.*", key="a.b.a_b_a.b")
@example(text="**.b", key="b")
@example(text="**.b", key=".b")
@example(text="a.**.b", key="a.b")
@example(text="a.**", key="a.")
@example(text="{**r}.{**s}", key="a.b.1")
@example(text="{**r}.{**s}", key="a..b")
@example(text="{a,ab,b}{p}*", key="ab.")
@example(text="{a,ab,b}{p}{a,ab,b}*", key="abab")
@example(text="{p}*{p}", key="aba")
@example(text="*a{p}_*.{q}b.", key="aa_a.ab.")
def test_it_is_the_regular_expressions_answer(text: str, key: str) -> None:
    try:
        pattern = compile_pattern(text)
    except RuleError:
        return
    if pattern.regex is None:
        return
    found = pattern.regex.fullmatch(key)
    if any(token.kind == "repeated" for token in pattern.tokens):
        assert long_keys.fits(pattern.tokens, key) or found is None  # it may only rule out
        return
    assert long_keys.fits(pattern.tokens, key) is (found is not None)
    assert long_keys.parts(pattern.tokens, key) == (None if found is None else {part: found[part] for part in pattern.parts})


def test_a_pattern_takes_the_one_way_or_the_other() -> None:
    pattern = compile_pattern("**.{a}_{b}.{**rest}")
    key = "x." * LONG + "one_two_three.attn.weight"
    expected = pattern.regex.fullmatch(key)
    assert expected is not None and pattern.match(key) == {part: expected[part] for part in pattern.parts} and pattern.fits(key)
    assert pattern.match("x" * 100) is None and not pattern.fits("x" * 100)
    assert replace(pattern, short=patterns.NO_LENGTH).match(key) == pattern.match(key)


@pytest.mark.parametrize(
    ("pattern", "key"),
    [
        ("{a}_{b}.x", "_" * 200_000),
        ("**.{a}_{b}.*", "a_" * 50_000),
        ("{p}{q}**.{a}_{b}.*", "x" * 100_000),
        ("*a*a*a*a.{x}", "a" * 100_000 + "."),
        ("**.a.**.a.**.a.**.b", "a." * 50_000),
        ("{**a}.{**b}.{**c}.{**d}.x", "a." * 50_000),
    ],
)
def test_a_key_made_to_be_tried_in_every_way_costs_little(pattern: str, key: str) -> None:
    """One key of a stranger's file against an ordinary pattern: by a regular expression, these take from minutes to years."""
    began = time.process_time()
    assert compile_pattern(pattern).match(key) is None
    assert time.process_time() - began < 2


@pytest.mark.parametrize(
    ("pattern", "key"),
    [
        (".".join(["*a*a*a*"] * 4) + "b", ".".join(["a" * 15] * 4)),
        (".".join(["{x}a{y}a*a*"] + ["*a*a*a*"] * 3) + "b", ".".join(["a" * 15] * 4)),
        ("{**a}.{**b}.{**c}.{**d}.x", "a." * 30),
        ("**a**a**a**b", "a" * 64),
        ("**.*_*_*_*.**.*_*_*_*.x", "_" * 30 + "." + "_" * 30),
        ("*" + "a" * 50_000 + "b", "a" * 200_000),
        ("{p}" + "{0..4999}" * 2 + "x", "1" * 64),
    ],
)
def test_nor_does_a_key_as_long_as_those_of_models(pattern: str, key: str) -> None:
    """What a stranger's pattern can do with an ordinary key, times a hundred keys."""
    compiled = compile_pattern(pattern)
    began = time.process_time()
    assert all(compiled.match(key) is None for _ in range(100 if len(key) < 100 else 1))
    assert time.process_time() - began < 2


@settings(max_examples=examples(1500), deadline=None)
@given(text=st.lists(tokens, min_size=1, max_size=9).map("".join), key=keys)
@example(text="{p}_{q}.*a*b", key="a_b_a.aab")
@example(text="**.{p}{a,ab,b}*.**", key="ab.abab.a")
def test_ways_that_are_not_tried_would_change_nothing(text: str, key: str) -> None:
    """Against the expression that goes through all ways."""
    try:
        pattern = compile_pattern(text)
    except RuleError:
        return
    if pattern.regex is not None:
        plain = re.compile("".join(map(patterns._regex, pattern.tokens)), re.DOTALL).fullmatch(key)
        assert replace(pattern, short=patterns.NO_LENGTH).match(key) == (None if plain is None else plain.groupdict())
