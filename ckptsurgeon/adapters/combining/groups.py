"""What adapters share that join tensors: those that make one result stand in a row, `of` at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import TypeVar

from ckptsurgeon.adapters.op import Op, Range, Shape
from ckptsurgeon.adapters.shapes import need, refused, whole_ranges

T = TypeVar("T")


def groups(op: Op, given: Sequence[T]) -> Iterator[Sequence[T]]:
    """What one result is made of, result by result: each `of` in a row. RuleError where some are left.

    >>> list(groups({"op": "concat", "of": 2}, "abcd"))
    ['ab', 'cd']
    """
    of = need(op, "of")
    if of < 1 or len(given) % of or not given:
        raise refused(op, f"joins {of} tensors at a time, and {len(given)} come in")
    return (given[start : start + of] for start in range(0, len(given), of))


def joined_ranges(op: Op, shapes: Sequence[Shape]) -> list[list[Range] | None]:
    """Whole tensors one after the other, where they are joined along the first dim that is not 1."""
    wholes = [group[0] for group in whole_ranges(op, shapes)]
    return [list(group) if prod(shapes[group[0][0]][: op["dim"]]) == 1 else None for group in groups(op, wholes)]
