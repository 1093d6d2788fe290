"""Patterns for a set of keys: few, and as general as possible without matching a forbidden key. Pure text.

Rule: a number is `*` where that matches no forbidden key, words that differ are listed (`{weight,bias}`), and a whole module is
`module.**`.
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
_FEW = 3  # words that are listed within one segment; with more, several patterns are clearer
_DEEPEST = 3  # segments by which rows are split, one after the other


def cover(keys: Iterable[str], forbidden: Collection[str]) -> list[str]:
    """Patterns that match all `keys` and nothing in `forbidden`.

    >>> cover(["h.0.attn.w", "h.1.attn.w", "h.0.mlp.w", "h.1.mlp.w"], ["h.0.attn.b"])
    ['h.*.{attn,mlp}.w']
    """
    avoided = Known(forbidden)
    templates: dict[tuple[str, ...], list[str]] = {}
    for key in map(literal, keys):
        templates.setdefault(cut(key).texts, []).append(key)
    rows: list[list[str]] = []
    for texts, same in templates.items():
        general = "".join(f"{text}*" for text in texts[:-1]) + texts[-1]
        rows += [general.split(".")] if len(same) > 1 and _harmless(general, avoided) else [key.split(".") for key in same]
    by_length: dict[int, list[list[str]]] = {}
    for row in rows:
        by_length.setdefault(len(row), []).append(row)
    return [pattern for same in by_length.values() for pattern in _joined(same, avoided, _DEEPEST)]


def modules(keys: Collection[str], forbidden: Collection[str]) -> tuple[list[str], list[str]]:
    """Patterns for modules with at least two of the `keys` and no forbidden key, and the keys outside of these modules.

    >>> modules(["aux.0.w", "aux.1.w", "head.w"], ["head.b"])
    (['aux.**'], ['head.w'])
    """
    ordered = sorted(forbidden)
    by_module: dict[str, list[str]] = {}
    rest = []
    for key in keys:
        position = bisect_left(ordered, key)  # the keys that share most with a key are next to it in this order
        shared = max((_shared(key, neighbour) for neighbour in ordered[max(position - 1, 0) : position + 1]), default=0)
        end = key.find(".", shared)
        if end < 0:
            rest.append(key)
        else:
            by_module.setdefault(key[:end], []).append(key)
    single = [module for module, same_module in by_module.items() if len(same_module) < 2]
    rest += [key for module in single for key in by_module[module]]
    return [f"{literal(module)}.**" for module in by_module if module not in single], rest


def dropping(keys: Collection[str], forbidden: Collection[str], number: str = "") -> tuple[Rule, ...]:
    """Rules that drop all `keys` and nothing in `forbidden`. `number` is "" or the only source that they are for, as `0:`.

    >>> [rule.pattern for rule in dropping(["ema.w", "ema.b", "scale"], ["w", "b"])]
    ['ema.**', 'scale']
    """
    whole, rest = modules(sorted(keys), forbidden)
    return tuple(Rule("drop", number + pattern) for pattern in (*whole, *cover(rest, forbidden)))


def _shared(first: str, second: str) -> int:
    """How many characters at their beginnings are equal."""
    return next((index for index, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), min(len(first), len(second)))


def _harmless(pattern: str, avoided: Known) -> bool:
    return not avoided.matched(compile_rule(Rule("drop", pattern)))


def _joined(rows: Sequence[Sequence[str]], avoided: Known, depth: int) -> list[str]:
    """One pattern for rows of equally many segments; if it matches a forbidden key, several: split by the segment that gives the fewest."""
    columns = [list(dict.fromkeys(column)) for column in zip(*rows, strict=True)]
    if all(len(column) == 1 or all(_WORD.fullmatch(word) for word in column) for column in columns):
        differing = [column for column in columns if len(column) > 1]
        pattern = ".".join(column[0] if len(column) == 1 else f"{{{','.join(column)}}}" for column in columns)
        if len(rows) == 1 or (all(len(column) <= _FEW or len(differing) == 1 for column in columns) and _harmless(pattern, avoided)):
            return [pattern]
    if not depth:
        return [".".join(row) for row in rows]
    splits = []
    for position, column in enumerate(columns):
        if len(column) > 1:
            parts = [[row for row in rows if row[position] == word] for word in column]
            splits.append([pattern for part in parts for pattern in _joined(part, avoided, depth - 1)])
    return min(splits, key=len)
