"""The scheme `from(KEY)`, which takes the value of another key: how it is parsed, and how a chain of copies is followed."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Mapping

from ckptsurgeon.rules.patterns import Pattern
from ckptsurgeon.rules.templates import check_template, expand

# The key may be written without quotes, and may use the parts of a pattern: {i-1}.
_FROM = re.compile(
    r"""\s*from\s*\(\s*(?:key\s*=\s*)?(?:(?P<plain>(?:[^\s'"(),={}]|\{[^{}'"]*\})+)|(?P<quoted>['"].*['"]))\s*\)\s*""", re.DOTALL
)


def copied(scheme: str) -> str | None:
    """The key of a `from(KEY)`; None for any other scheme.

    >>> copied("from(layers.{i-1}.w)"), copied("from('it is')"), copied("zeros")
    ('layers.{i-1}.w', 'it is', None)
    """
    match = _FROM.fullmatch(scheme)
    if match is None or match["plain"]:
        return match and match["plain"]
    try:
        key = ast.literal_eval(match["quoted"])
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return None
    return key if isinstance(key, str) else None


def filled_in(scheme: str, pattern: Pattern, parts: Mapping[str, str] | None) -> str:
    """The scheme; in `from(KEY)` the parts of a match are filled in, or, without `parts`, the key is only checked against the pattern.

    >>> from ckptsurgeon.rules.patterns import compile_pattern
    >>> filled_in("from(layers.{i-1}.w)", compile_pattern("layers.{i}.w"), {"i": "3"})
    "from('layers.2.w')"
    """
    key = copied(scheme)
    if key is None:
        return scheme
    check_template(key, pattern)
    return scheme if parts is None else f"from({expand(key, dict(parts))!r})"


def follow(key: str, copies: Callable[[str], str | None]) -> list[str] | None:
    """The keys through which a key gets its value: itself, the key that it copies, and so on to the key that has its own value.

    Args:
        copies: returns the key that a key copies, None for a key that copies none.

    Returns:
        The keys in order, or None where they lead in a circle.

    >>> follow("c", {"c": "b", "b": "a"}.get), follow("c", {"c": "b", "b": "c"}.get)
    (['c', 'b', 'a'], None)
    """
    keys = {key: None}
    while (source := copies(key)) is not None:
        if source in keys:
            return None
        keys[key := source] = None
    return list(keys)
