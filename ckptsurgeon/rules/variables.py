"""Variables in adapters' arguments: `permute_rope(heads=heads)` with `heads = 32` in a rules file's `[set]`, or `--set heads=32`.

A variable is a bare word in place of a literal. Its number is filled in as text before a rule is parsed, so all other code sees only
numbers. A variable that is not set is an error that names it, and so is one that no rule uses.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from ckptsurgeon.errors import RuleError
from ckptsurgeon.hints import close_names

_TOKEN = re.compile(r"""\d\w*|[bBrRuUfF]{1,2}(?=['"])|'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|(?P<name>[^\W\d]\w*)|.""", re.DOTALL)
_WORDS = {"True", "False", "None"}
NAME = re.compile(r"[a-z][a-z0-9_]*")


def names_in(text: str) -> tuple[str, ...]:
    """The variables of a chain of adapters, in order.

    >>> names_in("reshape(shape=[heads, 3, -1]) | chunk(dim=1) | mylib:flip(by='x')")
    ('heads',)
    """
    return tuple(dict.fromkeys(text[start:stop] for start, stop in _spans(text)))


def filled(text: str, numbers: Mapping[str, int], used: set[str] | None = None) -> str:
    """A chain of adapters in which `numbers` replace their variables; the names that were replaced are added to `used`.

    >>> filled("permute_rope(heads=heads, to='pairs')", {"heads": 32})
    "permute_rope(heads=32, to='pairs')"
    """
    return _replaced(text, lambda name: str(numbers[name]) if name in numbers else name, used, numbers)


def blank(text: str) -> str:
    """A chain of adapters with 1 for each variable, so that its form can be checked.

    >>> blank("permute_rope(heads=heads)")
    'permute_rope(heads=1)'
    """
    return _replaced(text, lambda _name: "1", None, {})


def unset(text: str, numbers: Mapping[str, int]) -> str | None:
    """What to say about the first variable of a chain that is not set; None where all are set."""
    name = next((name for name in names_in(text) if name not in numbers), None)
    if name is None:
        return None
    close = close_names(name, numbers, 1)
    return f"{name!r} is not set" + (f"; is it {close[0]!r}?" if close else "")


def checked(numbers: Mapping[str, Any], where: str = "") -> dict[str, int]:
    """The numbers that a user gives, by variable. RuleError for a name that no variable can have, or a value that is no whole number."""
    for name, value in numbers.items():
        if not isinstance(name, str) or not NAME.fullmatch(name) or name in _WORDS:
            raise RuleError(f"{where}{str(name)[:40]!r} is no name of a variable", hint="small letters, as in heads=32")
        if type(value) is not int or abs(value) >= 1 << 62:
            raise RuleError(f"{where}{name} is set to {str(value)[:40]!r}, which is no whole number", hint=f"numbers={{{name!r}: 32}}")
    return dict(numbers)


def _replaced(text: str, become: Callable[[str], str], used: set[str] | None, numbers: Mapping[str, int]) -> str:
    parts, end = [], 0
    for start, stop in _spans(text):
        name = text[start:stop]
        if used is not None and name in numbers:
            used.add(name)
        parts += [text[end:start], become(name)]
        end = stop
    return "".join([*parts, text[end:]])


def _spans(text: str) -> Iterator[tuple[int, int]]:
    """The start and end of each variable: a word within brackets that is not called, is no argument's name and no part of a dotted name."""
    depth = 0
    for match in _TOKEN.finditer(text):
        token = match[0]
        depth += (token in "([{") - (token in ")]}") if len(token) == 1 else 0
        if match["name"] is None or depth < 1 or token in _WORDS:
            continue
        before, after = text[: match.start()].rstrip()[-1:], text[match.end() :].lstrip()[:2]
        if before not in (".", ":") and (after[:1] not in ("(", "=", ".") or after == "=="):
            yield match.span()
