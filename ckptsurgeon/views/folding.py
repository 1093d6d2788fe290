"""Folds keys that differ in numbers only: `layers.0.q.weight` … `layers.31.q.weight` become `layers.{0..31}.q.weight`. Pure text."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable
from dataclasses import dataclass

_NUMBER = re.compile(r"(\d+)")


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
    table: dict[tuple[tuple[str, ...], Hashable], int] = {}
    for key, common in rows:
        place = (tuple(_NUMBER.split(key)), common)
        table[place] = table.get(place, 0) + 1
    widest = max((len(parts) for parts, _ in table), default=0)
    for position in range(1, widest, 2):
        table = _fold_at(table, position)
    return [Folded("".join(parts), common, count) for (parts, common), count in table.items()]


def _fold_at(table: dict[tuple[tuple[str, ...], Hashable], int], position: int) -> dict[tuple[tuple[str, ...], Hashable], int]:
    groups: dict[tuple[tuple[str, ...], Hashable, int], list[tuple[str, int]]] = {}
    for (parts, common), count in table.items():
        if position < len(parts):
            place = ((*parts[:position], "", *parts[position + 1 :]), common, count)
            groups.setdefault(place, []).append((parts[position], count))
        else:
            groups.setdefault((parts, common, count), []).append(("", count))
    folded: dict[tuple[tuple[str, ...], Hashable], int] = {}
    for (parts, common, _), found in groups.items():
        if position >= len(parts):
            folded[(parts, common)] = found[0][1]
            continue
        word = _range([number for number, _ in found])
        folded[((*parts[:position], word, *parts[position + 1 :]), common)] = sum(count for _, count in found)
    return folded


def _range(numbers: list[str]) -> str:
    if len(numbers) == 1:
        return numbers[0]
    values = sorted({int(number) for number in numbers})
    if values == list(range(values[0], values[-1] + 1)):
        return f"{{{values[0]}..{values[-1]}}}"
    return "{" + ",".join(map(str, values)) + "}"


def fold_siblings(keys: Iterable[str]) -> list[str]:
    """Fold bare keys by numbers, then by module, where nothing else is said of them.

    >>> fold_siblings(["fc.weight", "fc.bias", "h.0.w", "h.1.w"])
    ['fc.{weight,bias}', 'h.{0..1}.w']
    """
    modules: dict[str, list[str]] = {}
    for row in fold((key, ()) for key in keys):
        module, _, leaf = row.key.rpartition(".")
        modules.setdefault(module, []).append(leaf)
    folded = []
    for module, leaves in modules.items():
        head = f"{module}." if module else ""
        folded += [f"{head}{leaves[0]}"] if len(leaves) == 1 else [f"{head}{{{','.join(leaves)}}}"] if module else leaves
    return folded
