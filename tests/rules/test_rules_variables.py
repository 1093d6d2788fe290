"""Variables in adapters' arguments: where they stand, what fills them in, and what is refused by name."""

from __future__ import annotations

import ast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptsurgeon.errors import RuleError
from ckptsurgeon.rules.rulefile import parse_rules
from ckptsurgeon.rules.variables import blank, checked, filled, names_in, unset

NAMES = ["heads", "kv_heads", "n"]
values = st.recursive(
    st.sampled_from([*NAMES, "3", "-1", "'heads'", '"a, b=(n"', "True", "None"]),
    lambda one: st.lists(one, max_size=3).map(lambda some: f"[{', '.join(some)}]"),
)
calls = st.lists(st.tuples(st.sampled_from(["dim", "heads", "of"]), values), max_size=3, unique_by=lambda row: row[0]).map(
    lambda rows: f"op({', '.join(f'{name}={value}' for name, value in rows)})"
)


def names_by_python(text: str) -> set[str]:
    """The names that Python itself reads as values."""
    tree = ast.parse(text.replace(" | ", "; "))
    called = {id(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    return {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and id(node) not in called}


@given(st.lists(calls, min_size=1, max_size=3).map(" | ".join))
def test_variables_are_what_python_reads_as_names(text: str) -> None:
    assert set(names_in(text)) == names_by_python(text)
    numbers = {name: at + 7 for at, name in enumerate(NAMES)}
    used: set[str] = set()
    full = filled(text, numbers, used)
    assert used == set(names_in(text)) and not names_in(full) and not names_in(blank(text))
    for one in full.split(" | ") if "|" not in full.replace(" | ", "") else ():
        for keyword in ast.parse(one, mode="eval").body.keywords:  # type: ignore[attr-defined]
            ast.literal_eval(keyword.value)


def test_what_is_no_variable() -> None:
    assert names_in("transpose | mylib/x.py:flip(by=mod.name, at='heads') | f(a == b)") == ("a", "b")
    assert names_in("from(heads)") == ("heads",) and names_in("heads") == ()


FILE = """
[set]
heads = 4

[[adapt]]
from = "a.wq"
to = "b.q"
op = "permute_rope(heads=heads, to='halves')"
"""


def test_a_rules_file_sets_its_own_and_the_command_line_goes_before() -> None:
    assert parse_rules(FILE, "r.toml")[0].result == "permute_rope(heads=4, to='halves')"
    used: set[str] = set()
    assert parse_rules(FILE, "r.toml", {"heads": 8, "other": 1}, used)[0].result == "permute_rope(heads=8, to='halves')"
    assert used == {"heads"}
    without = FILE.replace("[set]\nheads = 4\n", "")
    assert parse_rules(without, "r.toml", {"heads": 2})[0].result == "permute_rope(heads=2, to='halves')"


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("heads = 4", "head = 4", "line 5: 'heads' is not set; is it 'head'? (in [set], or by --set NAME=NUMBER)"),
        ("heads = 4", "heads = 4\nspare = 1", "line 4: [set] has 'spare', and no rule uses it"),
        ("heads = 4", 'heads = "4"', "line 2: [set]: heads is set to '4', which is no whole number"),
        ("heads = 4", "Heads = 4", "'Heads' is no name of a variable"),
        ("[set]", "[[set]]", "write one table [set]"),
    ],
)
def test_what_is_wrong_is_told_with_its_line(old: str, new: str, words: str) -> None:
    with pytest.raises(RuleError) as caught:
        parse_rules(FILE.replace(old, new), "r.toml")
    assert words in str(caught.value)


def test_numbers_are_whole() -> None:
    assert checked({"heads": 32}) == {"heads": 32}
    for wrong in ({"heads": True}, {"heads": 1.5}, {"9": 1}, {"True": 1}):
        with pytest.raises(RuleError):
            checked(wrong)
    assert unset("op(heads=heads)", {"heads": 1}) is None
