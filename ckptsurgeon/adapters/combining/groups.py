"""What adapters that join tensors share: each `of` consecutive tensors make one result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from typing import TypeVar

from ckptsurgeon.adapters.op import Op, Range, Shape
from ckptsurgeon.adapters.shapes import need, refused, whole_ranges

T = TypeVar("T")


def groups(op: Op, items: Sequence[T]) -> Iterator[Sequence[T]]:
    """The items of each result: `of` consecutive ones. RuleError where some are left over.

    >>> list(groups({"op": "concat", "of": 2}, "abcd"))
    ['ab', 'cd']
    """
    of = need(op, "of")
    if of < 1 or len(items) % of or not items:
        raise refused(op, f"joins {of} tensors at a time, and {len(items)} come in")
    return (items[start : start + of] for start in range(0, len(items), of))


def joined_ranges(op: Op, shapes: Sequence[Shape]) -> list[list[Range] | None]:
    """Whole tensors one after the other, where they are joined along the first dim whose size is not 1; else None."""
    ranges = [group[0] for group in whole_ranges(op, shapes)]
    return [list(group) if prod(shapes[group[0][0]][: op["dim"]]) == 1 else None for group in groups(op, ranges)]
