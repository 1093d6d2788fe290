"""Rows of numbers as few products of sets, such as layers 0, 3, 6 times experts 0 to 7. Pure integers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import prod

Box = dict[int, frozenset[int]]  # by slot, the numbers that it may have


def boxes(rows: Collection[tuple[int, ...]], slots: Sequence[int]) -> list[Box]:
    """Products of sets that together are these rows, each row in exactly one. Slots outside `slots` have the same number in all rows.

    >>> [{slot: sorted(numbers) for slot, numbers in box.items()} for box in boxes({(0, 1), (0, 2), (3, 1), (3, 2), (4, 9)}, [0, 1])]
    [{0: [0, 3], 1: [1, 2]}, {0: [4], 1: [9]}]
    """
    values: Box = {slot: frozenset(row[slot] for row in rows) for slot in slots}
    if prod(map(len, values.values())) == len(rows):
        return [values]
    groups = min((_grouped(rows, slot) for slot in slots), key=len)
    slot = groups[0][0]
    rest = [remaining for remaining in slots if remaining != slot]
    return [{slot: numbers, **box} for _, numbers, other_rows in groups for box in boxes(other_rows, rest)]


def _grouped(rows: Collection[tuple[int, ...]], slot: int) -> list[tuple[int, frozenset[int], frozenset[tuple[int, ...]]]]:
    """The numbers of one slot, grouped by the rows in which they occur: the slot, the numbers, and the rows with 0 in this slot."""
    by_number: dict[int, set[tuple[int, ...]]] = {}
    for row in rows:
        by_number.setdefault(row[slot], set()).add((*row[:slot], 0, *row[slot + 1 :]))
    groups: dict[frozenset[tuple[int, ...]], list[int]] = {}
    for number, other_rows in sorted(by_number.items()):
        groups.setdefault(frozenset(other_rows), []).append(number)
    return [(slot, frozenset(numbers), other_rows) for other_rows, numbers in groups.items()]
