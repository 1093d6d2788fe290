"""What a stranger's rules file or pyproject.toml costs is bounded before it is parsed, by limits with names."""

from __future__ import annotations

import re
import time
import tomllib
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from profiles import examples

from ckptsurgeon.api._rules import load_rules
from ckptsurgeon.api.checking.project import read
from ckptsurgeon.errors import CheckpointError, LimitError, RuleError
from ckptsurgeon.limit_table import limits
from ckptsurgeon.rules.toml_text import parse

SIZE = 999_800
HOSTILE = {
    "lists in lists": ("toml-nesting", "a=" + "[" * 50_000),
    "closed lists in lists": ("toml-nesting", "a=" + "[" * 500 + "]" * 500),
    "tables in tables": ("toml-nesting", "a=" + "{a=" * 50_000),
    "a dotted key": ("toml-nesting", "a" + ".a" * 50_000 + "=1"),
    "a dotted key with blanks": ("toml-nesting", "a" + " . a" * 50_000 + "=1"),
    "a dotted key of strings": ("toml-nesting", "'a'" + ".'a'" * 50_000 + "=1"),
    "a dotted header": ("toml-nesting", "[" + "a." * 50_000 + "a]"),
    "dotted keys": ("toml-keys", "\n".join(f"k{number}" + ".a" * 20 + "=1" for number in range(15_000))),
    "dotted headers": ("toml-keys", "\n".join(f"[k{number}" + ".a" * 20 + "]" for number in range(15_000))),
    "keys": ("toml-keys", "\n".join(f"k{number}=1" for number in range(101_000))),
    "tables": ("toml-keys", "[[drop]]\nkey='a'\n" * 40_000),
    "values": ("toml-keys", "a=[" + "1," * 200_000 + "]"),
    "long": ("toml-bytes", "a='" + "a" * (2 << 20) + "'"),
}


@pytest.mark.parametrize("case", HOSTILE)
@pytest.mark.parametrize("reader", [load_rules, read])
def test_it_costs_little_and_names_its_limit(case: str, reader: object, tmp_path: Path) -> None:
    name, text = HOSTILE[case]
    path = tmp_path / "it.toml"
    path.write_text(text)
    began = time.process_time()
    with pytest.raises(LimitError) as caught:
        reader(str(path))  # type: ignore[operator]
    assert time.process_time() - began < 4
    assert f"--limit {name}=" in (caught.value.hint or "") and caught.value.path == str(path)


def test_a_limit_is_raised_for_a_file_that_is_trusted(tmp_path: Path) -> None:
    deep, many = "a" + ".a" * 40 + " = 1", "a = [" + "1," * 60_000 + "]\n" + "b = [" + "1," * 60_000 + "]"
    long = "#" * (1 << 20) + "\na = 1"
    for text, raised in (
        (deep, {"toml_nesting": 64}),
        (many, {"toml_keys": 200_000}),
        (long, {"toml_bytes": "2MiB"}),
    ):
        with pytest.raises(LimitError):
            parse(text, "it")
        with limits(**raised):
            assert parse(text, "it") == tomllib.loads(text)


words = st.sampled_from(
    ["a", "=", " ", "\n", "1", '"', "'", '"""', "'''", "\\", '\\"', "#", "[", "]", "{", "}", ".", ",", "[[b]]\n", "c = 1\n"]
)


@settings(max_examples=examples(800), deadline=None)
@given(st.lists(words, max_size=14).map("".join))
@example('a = """x\\"""" # " [[[[\nb = 1')
@example("a = '''[[['''''\nb = '[[['")
def test_what_is_within_the_limits_is_tomllibs(text: str) -> None:
    try:
        truth = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        with pytest.raises(tomllib.TOMLDecodeError, match=re.escape(str(error))):
            parse(text, "it")
        return
    assert parse(text, "it") == truth


@settings(max_examples=examples(300), deadline=None)
@given(st.lists(words, max_size=10).map("".join), st.integers(0, 40))
@example("a = 1 # ' \n", 40)
@example('a = """ \\""" \n"""\n', 40)
def test_nothing_before_it_hides_what_nests(before: str, deep: int) -> None:
    """Wherever `tomllib` would go down, the measure goes down too."""
    text = f"{before}\nzz = {'[' * deep}{']' * deep}"
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return
    within = '"""' not in before and "'''" not in before and "zz" in tomllib.loads(text)
    try:
        with limits(toml_nesting=20):
            parse(text, "it")
        assert deep <= 20 or not within
    except LimitError:
        assert deep > 20 or before.count("[") + before.count("{") + before.count(".") > 20


RULES = {
    "choices": ("[[drop]]\nkey = [" + ",".join(["'{0..9999}'"] * 70_000) + "]", "--limit choices="),
    "choices of one pattern": ("[[drop]]\nkey = '" + "{0..9999}" * 100_000 + "'", "choices"),
    "parts of one pattern": ("[[drop]]\nkey = '" + "{a}." * 200_000 + "'", "parts"),
    "blanks": ("[[adapt]]\nkey = '" + " " * SIZE + "'\nop = 'transpose'", "not well formed"),
    "blanks before a plus": ("[[rename]]\nfrom = '{a}'\nto = '/" + " " * (SIZE - 50) + "'", ""),
    "pluses": ("[[rename]]\nfrom = 'a'\nto = 'b" + "+b" * 400_000 + "'", ""),
    "braces": ("[[drop]]\nkey = '" + "{" * SIZE + "'", "odd brace"),
    "unknown names": ("\n".join(f"k{number} = 1" for number in range(30_000)), "not well formed"),
    "unknown fields": ("".join(f"[[drop]]\nke{number} = 'a'\n" for number in range(20_000)), "not well formed"),
    "a long name": ("a" * SIZE + " = 1", "not well formed"),
}


@pytest.mark.parametrize("case", RULES)
def test_nor_do_the_rules_in_it_cost_much(case: str, tmp_path: Path) -> None:
    text, says = RULES[case]
    (tmp_path / "it.toml").write_text(text)
    began = time.process_time()
    try:
        load_rules(tmp_path / "it.toml")
        assert not says
    except CheckpointError as error:
        assert isinstance(error, (RuleError, LimitError)) and says and says in str(error)
    assert time.process_time() - began < 8


def test_choices_may_be_raised(tmp_path: Path) -> None:
    (tmp_path / "it.toml").write_text("[[drop]]\nkey = ['a.{0..5}', 'b.{x,y}']")
    with limits(choices=7), pytest.raises(LimitError, match="choices=10"):
        load_rules(tmp_path / "it.toml")
    with limits(choices=10):
        assert len(load_rules(tmp_path / "it.toml")) == 2
