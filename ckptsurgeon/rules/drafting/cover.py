"""Patterns for a set of keys: few, and so general as matches none that must not be matched. Pure text.

Rule: a number is `*` where that is harmless, words that differ are listed (`{weight,bias}`), and a whole module is `module.**`.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Collection, Iterable, Sequence

from ckptsurgeon.rules.drafting.drafts import Known
from ckptsurgeon.rules.drafting.numbers import cut
from ckptsurgeon.rules.patterns import literal
from ckptsurgeon.rules.rules import Rule, compile_rule

_WORD = re.compile(r"[A-Za-z0-9_]+")
_FEW = 3  # words that are listed within one segment, before a pattern of its own is clearer
_DEEPEST = 3


def cover(keys: Iterable[str], forbidden: Collection[str]) -> list[str]:
    """Patterns that match all `keys` and nothing in `forbidden`.

    >>> cover(["h.0.attn.w", "h.1.attn.w", "h.0.mlp.w", "h.1.mlp.w"], ["h.0.attn.b"])
    ['h.*.{attn,mlp}.w']
    """
    others = Known(forbidden)
    templates: dict[tuple[str, ...], list[str]] = {}
    for key in map(literal, keys):
        templates.setdefault(cut(key).texts, []).append(key)
    rows: list[list[str]] = []
    for texts, same in templates.items():
        open_ = "".join(f"{text}*" for text in texts[:-1]) + texts[-1]
        rows += [open_.split(".")] if len(same) > 1 and _harmless(open_, others) else [key.split(".") for key in same]
    by_length: dict[int, list[list[str]]] = {}
    for row in rows:
        by_length.setdefault(len(row), []).append(row)
    return [pattern for same in by_length.values() for pattern in _joined(same, others, _DEEPEST)]


def modules(keys: Collection[str], forbidden: Collection[str]) -> tuple[list[str], list[str]]:
    """Patterns for whole modules all of whose keys are meant, and the keys that are in none of them.

    >>> modules(["aux.0.w", "aux.1.w", "head.w"], ["head.b"])
    (['aux.**'], ['head.w'])
    """
    kept = sorted(forbidden)
    found: dict[str, list[str]] = {}
    rest = []
    for key in keys:
        place = bisect_left(kept, key)  # what shares most with a key is beside it in this order
        shared = max((_shared(key, other) for other in kept[max(place - 1, 0) : place + 1]), default=0)
        end = key.find(".", shared)
        if end < 0:
            rest.append(key)
        else:
            found.setdefault(key[:end], []).append(key)
    few = [whole for whole, named in found.items() if len(named) < 2]
    return [f"{literal(whole)}.**" for whole in found if whole not in few], [*rest, *(key for whole in few for key in found[whole])]


def dropping(keys: Collection[str], forbidden: Collection[str], number: str = "") -> tuple[Rule, ...]:
    """Rules that drop all `keys` (of the source with this number and a colon) and nothing in `forbidden`.

    >>> [rule.pattern for rule in dropping(["ema.w", "ema.b", "scale"], ["w", "b"])]
    ['ema.**', 'scale']
    """
    whole, rest = modules(sorted(keys), forbidden)
    return tuple(Rule("drop", number + pattern) for pattern in (*whole, *cover(rest, forbidden)))


def _shared(one: str, other: str) -> int:
    """The characters with which both begin."""
    return next((place for place, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def _harmless(pattern: str, others: Known) -> bool:
    return not others.matched(compile_rule(Rule("drop", pattern)))


def _joined(rows: Sequence[Sequence[str]], others: Known, depth: int) -> list[str]:
    """One pattern for rows of as many segments, or where that is not harmless, several: by the segment that gives the fewest."""
    columns = [list(dict.fromkeys(column)) for column in zip(*rows, strict=True)]
    if all(len(column) == 1 or all(_WORD.fullmatch(word) for word in column) for column in columns):
        several = [column for column in columns if len(column) > 1]
        pattern = ".".join(column[0] if len(column) == 1 else f"{{{','.join(column)}}}" for column in columns)
        if len(rows) == 1 or (all(len(column) <= _FEW or len(several) == 1 for column in columns) and _harmless(pattern, others)):
            return [pattern]
    if not depth:
        return [".".join(row) for row in rows]
    found = []
    for place, column in enumerate(columns):
        if len(column) > 1:
            parts = [[row for row in rows if row[place] == word] for word in column]
            found.append([pattern for part in parts for pattern in _joined(part, others, depth - 1)])
    return min(found, key=len)
