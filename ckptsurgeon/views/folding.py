"""Folds keys that differ in numbers only: `layers.0.q.weight` … `layers.31.q.weight` become `layers.{0..31}.q.weight`. Pure text.

Rule: what is folded is a pattern that matches these keys and no other, unless it is shortened: `{0,4,…,90: 31}` stands for 31 numbers.
Only a number that reads back as itself folds: not `01`, not one of more than 18 digits, not one that is folded already.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from ckptsurgeon.rules.patterns import MOST_CHOICES, listed, literal, written

_NUMBER = re.compile(r"(?<![0-9{,])(?<!\.\.|: )(0|[1-9][0-9]{0,17})(?![0-9])")
_DOTS = re.compile(r"\\.|\{[^{}]*\}|(\.)", re.DOTALL)
_MOST_LISTED = 8  # numbers and runs of them
_WORD = re.compile(r"[A-Za-z0-9_]+")
_MOST_NUMBERS = 16  # of one key; a model has a few, and each is looked at in turn
_Table = dict[tuple[tuple[str, ...], Hashable], int]  # a key in pieces (text, number, text, …) and its common value: how many rows


@dataclass(frozen=True)
class Folded:
    """A folded key, what its rows have in common, and how many there are."""

    key: str
    common: Hashable
    count: int


def fold(rows: Iterable[tuple[str, Hashable]]) -> list[Folded]:
    """Fold (key, common) rows; rows fold only when `common` is equal. In the order of each group's first row.

    >>> [row.key for row in fold([("h.0.w", 1), ("h.1.w", 1), ("h.2.w", 2), ("out.w", 1)])]
    ['h.{0..1}.w', 'h.2.w', 'out.w']
    """
    # By the first number at once: what then is left to fold is little, where there are a million keys.
    alike: defaultdict[tuple[str, str | None, Hashable], list[str]] = defaultdict(list)
    find = _NUMBER.search
    for key, common in rows:
        found = find(key)
        if found is None:
            alike[key, None, common].append("")
        else:
            alike[key[: found.start()], key[found.end() :], common].append(found[0])
    table: _Table = {}
    for (head, tail, common), numbers in alike.items():
        rest = () if tail is None else _NUMBER.split(tail, _MOST_NUMBERS - 1)
        for times, same in _as_often(numbers):
            parts = (head,) if tail is None else (head, _range(same), *rest)
            table[parts, common] = times * len(same)
    widest = max((len(parts) for parts, _ in table), default=0)
    for position in range(3, widest, 2):
        table = _fold_at(table, position)
    return [Folded(_joined(parts), common, count) for (parts, common), count in table.items()]


def _as_often(numbers: list[str]) -> list[tuple[int, list[str]]]:
    """Numbers by how often they stand there."""
    if len(set(numbers)) == len(numbers):
        return [(1, numbers)]
    found: dict[int, list[str]] = {}
    for number, times in Counter(numbers).items():
        found.setdefault(times, []).append(number)
    return list(found.items())


def _fold_at(table: _Table, position: int) -> _Table:
    """Fold the number at one position. Only rows that stand for equally many keys fold, so that a folded key says how many it is."""
    groups: dict[tuple[tuple[str, ...], Hashable, int], list[str]] = {}
    for (parts, common), count in table.items():
        rest = (*parts[:position], "", *parts[position + 1 :]) if position < len(parts) else parts
        groups.setdefault((rest, common, count), []).append(parts[position] if position < len(parts) else "")
    folded: _Table = {}
    for (rest, common, count), numbers in groups.items():
        parts = (*rest[:position], _range(numbers), *rest[position + 1 :]) if position < len(rest) else rest
        folded[(parts, common)] = count * len(numbers)
    return folded


def _joined(parts: Sequence[str]) -> str:
    """A key in pieces as a pattern where numbers of it are folded, else as it stands."""
    numbers = parts[1::2]
    return written(parts[::2], numbers) if any(number[0] == "{" for number in numbers if number) else "".join(parts)


def _range(numbers: list[str]) -> str:
    """Numbers in braces: all by one step, or each run of three or more as its ends; of more than a few, the first two and the last.

    >>> _range(["0", "1", "2", "5", "7", "8"]), _range(["0", "3", "6"]), _range([str(i * i) for i in range(9)])
    ('{0..2,5,7,8}', '{0..6..3}', '{0,1,…,64: 9}')
    """
    if len(numbers) == 1:
        return numbers[0]
    values = sorted(map(int, numbers))
    choices = listed(values)
    if choices.count(",") < _MOST_LISTED and len(values) <= MOST_CHOICES:
        return f"{{{choices}}}"
    return f"{{{values[0]},{values[1]},…,{values[-1]}: {len(values)}}}"


def fold_siblings(keys: Iterable[str]) -> list[str]:
    """Fold bare keys by numbers, then by module, where nothing else is said of them.

    >>> fold_siblings(["fc.weight", "fc.bias", "h.0.w", "h.1.w"])
    ['fc.{weight,bias}', 'h.{0..1}.w']
    """
    modules: dict[tuple[str, bool], list[str]] = {}
    for row in fold((key, ()) for key in keys):
        plain = row.count == 1
        module, leaf = _split(row.key, plain)
        modules.setdefault((module, plain), []).append(leaf)
    folded = []
    for (module, plain), leaves in modules.items():
        words = [leaf for leaf in leaves if _WORD.fullmatch(leaf)] if module else []
        if len(words) < 2:
            words = []
        else:
            folded.append(f"{literal(module) if plain else module}.{{{','.join(words)}}}")
        folded += [f"{module}.{leaf}" if module else leaf for leaf in leaves if leaf not in words]
    return folded


def _split(key: str, plain: bool) -> tuple[str, str]:
    """A key's module and last segment; where it is folded, not `plain`, a dot within braces divides nothing."""
    dots = [found.start() for found in _DOTS.finditer(key) if found[1]] if not plain else [key.rfind(".")]
    end = dots[-1] if dots else -1
    return (key[:end], key[end + 1 :]) if end >= 0 else ("", key)
