"""Folds keys that differ in numbers or words: `layers.0.q.weight` … `layers.31.k.weight` become `layers.{0..31}.{q,k}.weight`. Pure text.

Rule: what is folded is a pattern that matches these keys and no other, unless it is shortened: `{0,4,…,90: 31}` stands for 31 numbers.
Only a number that reads back as itself folds: not `01`, not one of more than 18 digits, not one that is folded already. Words fold from the
last segment to the second: a key's first name stays whole, so that a line stands for one part of the model.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from ckptsurgeon.rules.patterns import MOST_CHOICES, listed, written

_NUMBER = re.compile(r"(?<![0-9{,])(?<!\.\.|: )(0|[1-9][0-9]{0,17})(?![0-9])")
_MOST_LISTED = 8  # numbers and runs of them
_MOST_WORDS = 8  # of one brace; more are several lines
_MOST_ROWS = 5000  # left after the numbers, beyond which words are not folded: nobody reads them
_MOST_SEGMENTS = 24  # words of longer keys are not folded: a step for each segment of half a million would not end
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_MOST_NUMBERS = 16  # of one key; a model has a few, and each is looked at in turn
_Table = dict[tuple[tuple[str, ...], Hashable], int]  # a key in pieces (text, number, text, …) and its common value: how many rows


@dataclass(frozen=True)
class Folded:
    """A folded key, what its rows have in common, and how many there are."""

    key: str
    common: Hashable
    count: int


_Piece = tuple[str, bool]  # a piece of a segment: its text, and whether it is a brace of folded numbers or words
_Segments = tuple[tuple[_Piece, ...], ...]


class Several(tuple[Hashable, ...]):
    """The values of a line's leaves, one each, where they differ."""


def fold(rows: Iterable[tuple[str, Hashable]], alike: Callable[[Any], Hashable] | None = None) -> list[Folded]:
    """Fold (key, common) rows by numbers, then by words; rows fold only when `common` is equal. In the order of each group's first row.

    Args:
        rows: keys, each with its `common` value.
        alike: the part of `common` in which the leaves of a module (`weight`, `bias`) must agree to share a line; the line's `common` is
            then a `Several` with the value of each leaf. Without it they must be equal.

    >>> [row.key for row in fold([("h.0.w", 1), ("h.1.w", 1), ("h.2.w", 2), ("out.w", 1)])]
    ['h.{0..1}.w', 'h.2.w', 'out.w']
    >>> [row.key for row in fold((f"a.{part}.{leaf}", 1) for part in "qkv" for leaf in ("weight", "bias"))]
    ['a.{q,k,v}.{weight,bias}']
    >>> fold([("fc.weight", "(2, 3)"), ("fc.bias", "(2,)")], lambda shape: "")
    [Folded(key='fc.{weight,bias}', common=('(2, 3)', '(2,)'), count=2)]
    """
    return _fold_words(_fold_numbers(rows), alike)


def fold_keys(keys: Iterable[str]) -> list[str]:
    """Fold keys without values.

    >>> fold_keys(["fc.weight", "fc.bias", "h.0.w", "h.1.w"])
    ['fc.{weight,bias}', 'h.{0..1}.w']
    """
    return [row.key for row in fold((key, ()) for key in keys)]


def _fold_numbers(rows: Iterable[tuple[str, Hashable]]) -> _Table:
    # Grouping by the first number in one pass leaves few rows, even of a million keys.
    alike: defaultdict[tuple[str, str | None, Hashable], list[str]] = defaultdict(list)
    find = _NUMBER.search
    for key, common in rows:
        match = find(key)
        if match is None:
            alike[key, None, common].append("")
        else:
            alike[key[: match.start()], key[match.end() :], common].append(match[0])
    table: _Table = {}
    for (head, tail, common), numbers in alike.items():
        rest = () if tail is None else _NUMBER.split(tail, _MOST_NUMBERS - 1)
        for times, same in _as_often(numbers):
            parts = (head,) if tail is None else (head, _range(same), *rest)
            table[parts, common] = times * len(same)
    widest = max((len(parts) for parts, _ in table), default=0)
    for position in range(3, widest, 2):
        table = _fold_at(table, position)
    return table


def _as_often(numbers: list[str]) -> list[tuple[int, list[str]]]:
    """The numbers grouped by how often they occur."""
    if len(set(numbers)) == len(numbers):
        return [(1, numbers)]
    by_times: dict[int, list[str]] = {}
    for number, times in Counter(numbers).items():
        by_times.setdefault(times, []).append(number)
    return list(by_times.items())


def _fold_at(table: _Table, position: int) -> _Table:
    """Fold the number at one position. Only rows that stand for equally many keys fold, so that the count of a folded key is exact."""
    groups: dict[tuple[tuple[str, ...], Hashable, int], list[str]] = {}
    for (parts, common), count in table.items():
        rest = (*parts[:position], "", *parts[position + 1 :]) if position < len(parts) else parts
        groups.setdefault((rest, common, count), []).append(parts[position] if position < len(parts) else "")
    folded: _Table = {}
    for (rest, common, count), numbers in groups.items():
        parts = (*rest[:position], _range(numbers), *rest[position + 1 :]) if position < len(rest) else rest
        folded[(parts, common)] = count * len(numbers)
    return folded


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


@dataclass(slots=True)
class _Row:
    segments: _Segments
    common: Hashable
    count: int


def _fold_words(table: _Table, alike: Callable[[Any], Hashable] | None) -> list[Folded]:
    """Fold words segment by segment, from the last one to the second."""
    rows = [_Row(_segments(parts), common, count) for (parts, common), count in table.items()]
    if len(rows) > _MOST_ROWS:
        return [Folded(_text(row.segments), row.common, row.count) for row in rows]
    deepest = min(max((len(row.segments) for row in rows), default=0), _MOST_SEGMENTS)
    if alike is not None:
        rows = _fold_segment(rows, 1, alike)
    for from_the_end in range(1, deepest):
        rows = _fold_segment(rows, from_the_end, lambda common: common)
    return [Folded(_text(row.segments), row.common, row.count) for row in rows]


def _fold_segment(rows: list[_Row], from_the_end: int, alike: Callable[[Any], Hashable]) -> list[_Row]:
    """Fold the words of one segment of rows whose other segments are equal, and that stand for equally many keys."""
    groups: dict[Hashable, list[_Row]] = {}
    for position, row in enumerate(rows):
        index = len(row.segments) - from_the_end
        if not 0 < index < _MOST_SEGMENTS or _word(row.segments[index]) is None:
            groups[position] = [row]
        else:
            rest = (row.segments[:index], row.segments[index + 1 :], row.count, alike(row.common))
            groups.setdefault(rest, []).append(row)
    return [row for group in groups.values() for row in (_joined(group, from_the_end) if len(group) > 1 else group)]


def _joined(group: Sequence[_Row], from_the_end: int) -> list[_Row]:
    """Rows that differ in one segment, joined into as few as possible."""
    rows: list[_Row] = []
    for start in range(0, len(group), _MOST_WORDS):
        some = group[start : start + _MOST_WORDS]
        common = some[0].common if len({row.common for row in some}) == 1 else Several(row.common for row in some)
        words = [_word(row.segments[-from_the_end]) for row in some]
        if len(some) == 1 or len(set(words)) < len(words):  # a key that stands there twice
            rows += some
            continue
        before, after = some[0].segments[:-from_the_end], some[0].segments[len(some[0].segments) - from_the_end + 1 :]
        brace = (f"{{{','.join(map(str, words))}}}", True)
        rows.append(_Row((*before, (brace,), *after), common, sum(row.count for row in some)))
    return rows


def _word(segment: tuple[_Piece, ...]) -> str | None:
    """The segment where it is one word and nothing else; None for others."""
    ((text, folded),) = segment if len(segment) == 1 else (("", True),)
    return text if not folded and _WORD.fullmatch(text) else None


def _segments(parts: Sequence[str]) -> _Segments:
    """A key in pieces (text, number, text, …) by its dots; a number that is not folded is text.

    A key with so many segments that no word of it folds is one segment: half a million would take a second and 100 MB.
    """
    if sum(part.count(".") for part in parts[::2]) >= 2 * _MOST_SEGMENTS - 2:  # no index is near enough to both ends
        return (tuple((part, index % 2 == 1 and part[:1] == "{") for index, part in enumerate(parts)),)
    if len(parts) == 1:
        return tuple(((segment, False),) for segment in parts[0].split("."))
    segments: list[list[_Piece]] = [[]]
    plain = ""
    for position, part in enumerate(parts):
        if position % 2 and part[:1] == "{":
            segments[-1] += [(plain, False)] * bool(plain) + [(part, True)]
            plain = ""
            continue
        first, *more = part.split(".") if position % 2 == 0 else [part]
        plain += first
        for text in more:
            if plain or not segments[-1]:
                segments[-1].append((plain, False))
            segments.append([])
            plain = text
    if plain or not segments[-1]:
        segments[-1].append((plain, False))
    return tuple(map(tuple, segments))


def _text(segments: _Segments) -> str:
    """The key as a pattern if anything of it is folded, else as it is."""
    texts: list[list[str]] = [[]]
    braces: list[str] = []
    for position, segment in enumerate(segments):
        texts[-1].append("." if position else "")
        for text, folded in segment:
            if folded:
                braces.append(text)
                texts.append([])
            else:
                texts[-1].append(text)
    plain = ["".join(parts) for parts in texts]
    return written(plain, braces) if braces else plain[0]
