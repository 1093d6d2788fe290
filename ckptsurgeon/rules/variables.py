"""Variables in adapters' arguments: `permute_rope(heads=heads)` with `heads = 32` in a rules file's `[set]`, or `--set heads=32`.

A variable is a bare word in place of a literal. Its number is filled in as text before a rule is parsed, so all other code sees only
numbers. A variable that is not set, and one that no rule uses, is an error that names it.
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
    return tuple(dict.fromkeys(text[start:stop] for start, stop in _places(text)))


def filled(text: str, numbers: Mapping[str, int], used: set[str] | None = None) -> str:
    """A chain of adapters with numbers for its variables; `used` gets the names of those that it has. Others stay.

    >>> filled("permute_rope(heads=heads, to='pairs')", {"heads": 32})
    "permute_rope(heads=32, to='pairs')"
    """
    return _replaced(text, lambda name: str(numbers[name]) if name in numbers else name, used, numbers)


def blank(text: str) -> str:
    """The same with 1 for each variable, to check only the form.

    >>> blank("permute_rope(heads=heads)")
    'permute_rope(heads=1)'
    """
    return _replaced(text, lambda _name: "1", None, {})


def unset(text: str, numbers: Mapping[str, int]) -> str | None:
    """The problem of a chain with a variable that is not set; None where all are set."""
    name = next((name for name in names_in(text) if name not in numbers), None)
    if name is None:
        return None
    close = close_names(name, numbers, 1)
    return f"{name!r} is not set" + (f"; is it {close[0]!r}?" if close else "")


def checked(numbers: Mapping[str, Any], where: str = "") -> dict[str, int]:
    """Numbers by name, as a person gives them. RuleError for a name or a value that can't be one."""
    for name, value in numbers.items():
        if not isinstance(name, str) or not NAME.fullmatch(name) or name in _WORDS:
            raise RuleError(f"{where}{str(name)[:40]!r} is no name of a variable", hint="small letters, as in heads=32")
        if type(value) is not int or abs(value) >= 1 << 62:
            raise RuleError(f"{where}{name} is set to {str(value)[:40]!r}, which is no whole number", hint=f"numbers={{{name!r}: 32}}")
    return dict(numbers)


def _replaced(text: str, become: Callable[[str], str], used: set[str] | None, numbers: Mapping[str, int]) -> str:
    parts, end = [], 0
    for start, stop in _places(text):
        name = text[start:stop]
        if used is not None and name in numbers:
            used.add(name)
        parts += [text[end:start], become(name)]
        end = stop
    return "".join([*parts, text[end:]])


def _places(text: str) -> Iterator[tuple[int, int]]:
    """Where variables stand: bare words within brackets that are neither called, nor the names of arguments, nor parts of dotted names."""
    depth = 0
    for found in _TOKEN.finditer(text):
        token = found[0]
        depth += (token in "([{") - (token in ")]}") if len(token) == 1 else 0
        if found["name"] is None or depth < 1 or token in _WORDS:
            continue
        before, after = text[: found.start()].rstrip()[-1:], text[found.end() :].lstrip()[:2]
        if before not in (".", ":") and (after[:1] not in ("(", "=", ".") or after == "=="):
            yield found.span()
