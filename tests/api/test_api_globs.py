"""The path patterns of a project's settings: what they match, and that none of them can take for ever."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from profiles import examples

from ckptsurgeon.api.checking.project import glob, read
from ckptsurgeon.errors import SettingsError

_AS_REGEX = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


def expression(words: str) -> str:
    """A pattern as a regular expression."""
    return "".join(_AS_REGEX.get(part) or re.escape(part) for part in re.findall(r"(?:(?<=/)|^)\*\*/|\*\*|\*|\?|[^*?]+", words))


@settings(max_examples=examples(400), deadline=None)
@given(
    st.lists(st.sampled_from(["**/", "**", "*", "?", "a", "b", ".", "/", ".pt", "é"]), min_size=1, max_size=7).map("".join),
    st.lists(st.sampled_from(["a", "b", "ab", "a.pt", ".", "..", "é.b"]), min_size=1, max_size=4).map("/".join),
)
@example("weights/**/*.pt", "weights/a.pt")
@example("**/*.pt", "a.b.pt")
@example("a?b", "a/b")
@example("?**/*", "a/a")
@example("a**/b", "ab")
def test_a_pattern_matches_as_its_regular_expression_does(words: str, path: str) -> None:
    bare = words.removeprefix("./").rstrip("/")
    assert glob(words).fits(path) is (bool(bare) and re.fullmatch(expression(bare), path, re.DOTALL) is not None)


@pytest.mark.parametrize(
    "words",
    ["**/" + "*a" * 90 + "*b", "**/*a" * 45 + "b", "*" * 20 + "/" + "?" * 80 + "b", "**a" * 60 + "/b", "*a*a*a*a*a*a*a*a*a*a*a*a/b"],
)
def test_a_pattern_made_to_be_tried_in_every_way_costs_little(words: str) -> None:
    began = time.process_time()
    assert not any(glob(words).fits(path) for path in ["a" * 4000, "a/" * 2000 + "a", "/".join(["a" * 60] * 60)] * 10)
    assert time.process_time() - began < 2


def test_one_with_too_many_wildcards_is_an_error_with_its_place(tmp_path) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "pyproject.toml").write_text(f'[[tool.ckptsurgeon.check.files]]\npath = "{"*a" * 101}"\n')
    with pytest.raises(SettingsError, match="more than 100 wildcards") as caught:
        read(str(tmp_path / "pyproject.toml"))
    assert caught.value.key == "tool.ckptsurgeon.check.files[1].path" and caught.value.path == str(tmp_path / "pyproject.toml")
