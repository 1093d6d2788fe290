"""Folds keys that differ in numbers only: `layers.0.q.weight` … `layers.31.q.weight` become `layers.{0..31}.q.weight`. Pure text.

Only a number that reads back as itself folds: not `01`, not one of more than 18 digits, not one that is folded already.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

_NUMBER = re.compile(r"(?<![0-9{,])(?<!\.\.)(0|[1-9][0-9]{0,17})(?![0-9])")
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
    return [Folded("".join(parts), common, count) for (parts, common), count in table.items()]


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


def _range(numbers: list[str]) -> str:
    """Numbers in braces, each run of three or more as its ends.

    >>> _range(["0", "1", "2", "5", "7", "8"])
    '{0..2,5,7,8}'
    """
    if len(numbers) == 1:
        return numbers[0]
    values = sorted(map(int, numbers))
    if values[-1] - values[0] == len(values) - 1:
        return f"{{{values[0]}..{values[-1]}}}"
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    return "{" + ",".join(f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs) + "}"


def fold_siblings(keys: Iterable[str]) -> list[str]:
    """Fold bare keys by numbers, then by module, where nothing else is said of them.

    >>> fold_siblings(["fc.weight", "fc.bias", "h.0.w", "h.1.w"])
    ['fc.{weight,bias}', 'h.{0..1}.w']
    """
    modules: dict[str, list[str]] = {}
    for row in fold((key, ()) for key in keys):
        module, leaf = _split(row.key)
        modules.setdefault(module, []).append(leaf)
    folded = []
    for module, leaves in modules.items():
        if len(leaves) > 1 and module:
            folded.append(f"{module}.{{{','.join(leaves)}}}")
        else:
            folded += [f"{module}.{leaf}" if module else leaf for leaf in leaves]
    return folded


def _split(key: str) -> tuple[str, str]:
    """A folded key's module and last segment; a dot within braces divides nothing."""
    depth = 0
    for index in range(len(key) - 1, -1, -1):
        if key[index] in "{}":
            depth += 1 if key[index] == "}" else -1
        elif key[index] == "." and depth <= 0:
            return key[:index], key[index + 1 :]
    return "", key
