"""Sets of numbers that go together: rows of numbers as few products of sets, such as layers 0, 3, 6 with experts 0 to 7. Pure integers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import prod

Box = dict[int, frozenset[int]]  # by slot, the numbers that it may be


def boxes(rows: Collection[tuple[int, ...]], slots: Sequence[int]) -> list[Box]:
    """Products of sets that together are these rows, each row in one of them; the slots that are left out have one number each.

    >>> [{slot: sorted(numbers) for slot, numbers in box.items()} for box in boxes({(0, 1), (0, 2), (3, 1), (3, 2), (4, 9)}, [0, 1])]
    [{0: [0, 3], 1: [1, 2]}, {0: [4], 1: [9]}]
    """
    values: Box = {slot: frozenset(row[slot] for row in rows) for slot in slots}
    if prod(map(len, values.values())) == len(rows):
        return [values]
    found = min((_alike(rows, slot) for slot in slots), key=len)
    slot = found[0][0]
    rest = [other for other in slots if other != slot]
    return [{slot: numbers, **box} for _, numbers, others in found for box in boxes(others, rest)]


def _alike(rows: Collection[tuple[int, ...]], slot: int) -> list[tuple[int, frozenset[int], frozenset[tuple[int, ...]]]]:
    """The numbers of one slot that stand with the same others, and these others as rows; the slot itself is 0 in them."""
    beside: dict[int, set[tuple[int, ...]]] = {}
    for row in rows:
        beside.setdefault(row[slot], set()).add((*row[:slot], 0, *row[slot + 1 :]))
    groups: dict[frozenset[tuple[int, ...]], list[int]] = {}
    for number, others in sorted(beside.items()):
        groups.setdefault(frozenset(others), []).append(number)
    return [(slot, frozenset(numbers), others) for others, numbers in groups.items()]
