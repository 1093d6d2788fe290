"""What is offered for a pattern that matches nothing matches something, by Python's own regular expressions; of the common slips it is the
one that a person meant."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptsurgeon.rules.meant import meant, meant_words
from ckptsurgeon.rules.patterns import compile_pattern

KEYS = ["encoder.0.attn.weight", "encoder.0.attn.bias", "head.weight", "model.fc.weight", "layer1.0.conv1.weight"]


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("encoder.*", "encoder.**"),
        ("encoder.*.weight", "encoder.**.weight"),
        ("*.weight", None),
        ("layer*", "layer*.**"),
        ("encoder.{p}", "encoder.{**p}"),
        ("encoder.{i}.{p}", "encoder.{i}.{**p}"),
        ("encoder.{i}", "encoder.{i}.**"),
        ("encoder", "encoder.**"),
        ("encoder.", "encoder.**"),
        ("fc.*", "**.fc.*"),
        ("attn", "**.attn.**"),
        (r"encoder\..*", r"/encoder\..*/"),
        ("^encoder", "/encoder.*/"),
        ("(encoder|head).*", "/(encoder|head).*/"),
        (".*attn.*", "/.*attn.*/"),
        ("encoder/0/attn/*", "encoder.0.attn.*"),
        ("no.such", None),
        ("/regex/", None),
    ],
)
def test_the_common_slips(wrong: str, right: str | None) -> None:
    keys = [key for key in KEYS if compile_pattern(wrong).match(key) is None] if not wrong.startswith("*.") else ["a.b"]
    assert meant(wrong, keys) == right


def translated(pattern: str) -> re.Pattern[str]:
    """A pattern of stars as a regular expression, by hand."""
    if pattern.startswith("/"):
        return re.compile(pattern[1:-1])
    parts = re.split(r"(\*\*\.|\*\*|\*|\{\*\*\w+\}|\{\w+\})", pattern)
    by = {"**.": r"(?:.+\.)?", "**": ".*", "*": "[^.]*"}

    def one(part: str) -> str:
        return by.get(part) or (".+" if part.startswith("{**") else "[^.]+" if part.startswith("{") else re.escape(part))

    return re.compile("".join(map(one, parts)))


SEGMENT = st.sampled_from(["a", "b", "fc", "w0", "bias"])
KEY = st.lists(SEGMENT, min_size=1, max_size=4).map(".".join)
PATTERN = st.lists(st.one_of(SEGMENT, st.sampled_from(["*", "{p}", "f*", "w{i}"])), min_size=1, max_size=3).map(".".join)


@given(st.lists(KEY, min_size=1, max_size=6), PATTERN)
def test_what_is_offered_matches(keys: list[str], pattern: str) -> None:
    if pattern.count("{p}") > 1 or any(translated(pattern).fullmatch(key) for key in keys):
        return
    found = meant(pattern, keys)
    if found is not None:
        assert any(translated(found).fullmatch(key) for key in keys), found


@given(st.lists(SEGMENT, min_size=1, max_size=2), st.lists(SEGMENT, min_size=2, max_size=3))
def test_two_stars_for_one(module: list[str], rest: list[str]) -> None:
    prefix = ".".join(module)
    keys = [".".join([*module, *rest])]
    assert meant(f"{prefix}.*", keys) == f"{prefix}.**" and meant(f"{prefix}.{{p}}", keys) == f"{prefix}.{{**p}}"


def test_close_names_where_nothing_is_meant() -> None:
    assert meant_words("fc4.weight", ["fc1.weight"]) == " (close: fc1.weight)"
