"""Parses TOML. Its length, its nesting and its number of keys are checked against limits before `tomllib` sees it.

The time of `tomllib` grows with the square of a dotted key's parts, and it recurses into nested values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from ckptsurgeon.limit_table import allowed, exceeded

# Bare text, a comment or a string. An unclosed string ends the scan, as it ends `tomllib`; no character is scanned twice.
_PART = re.compile(
    r"""(?P<bare>[^"'#]++)|\#[^\n]*+|\"{3}(?:[^"\\]|\\.|"(?!""))*+\"{3,5}|'{3}(?:[^']|'(?!''))*+'{3,5}"""
    r"""|"(?!"")(?:[^"\\\n]|\\.)*+"|'(?!'')[^'\n]*+'""",
    re.DOTALL,
)
_MARKS = re.compile(r"[\[\]{}\n=,.]")
_WORDS = {
    "toml-bytes": "is longer than {} bytes",
    "toml-nesting": "nests more than {} deep",
    "toml-keys": "has more than {} keys and values",
}
_DEEPER = {"[": 1, "{": 1, "]": -1, "}": -1}


def parse(text: str, path: str) -> dict[str, Any]:
    """The tables of `text`.

    Raises:
        LimitError: it is longer or deeper than a limit allows, or has more keys and values.
        ValueError: it is not TOML.

    >>> parse("[[drop]]\\nkey = 'a'", "rules.toml")
    {'drop': [{'key': 'a'}]}
    """
    measured = {"toml-bytes": len(text)}
    check(measured, path)
    measured["toml-nesting"], measured["toml-keys"] = _measured(text)
    check(measured, path)
    import tomllib

    return tomllib.loads(text)


def check(measured: dict[str, int], path: str) -> None:
    """LimitError for the first measure that exceeds its limit."""
    for name, value in measured.items():
        if value > allowed(name):
            raise exceeded(name, _WORDS[name].format(allowed(name)), value, path=path)


def _measured(text: str) -> tuple[int, int]:
    """How deep brackets or the parts of a key nest, and the number of keys and values, where each part of a dotted key counts."""
    deepest = depth = dots = keys = 0
    for mark in _marks(text):
        if mark == ".":
            dots += 1
        else:
            dots = 0
            depth = max(depth + _DEEPER.get(mark, 0), 0)
        deepest = max(deepest, depth, dots)
        keys += mark in "=[.,"
    return deepest, keys


def _marks(text: str) -> Iterator[str]:
    position = 0
    while position < len(text) and (match := _PART.match(text, position)) is not None:
        position = match.end()
        yield from _MARKS.findall(match["bare"] or "")
