"""Tensors as ranges of bytes in files: what a chain of ops makes of them without a byte being brought into memory, where that is possible.

Dense row-major tensors of one dtype only. Each adapter says which ranges of its inputs' elements a result consists of; where one says
nothing, or they do not lie together, the answer is None, and the tensors go through torch.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from ckptsurgeon.adapters.chain import infer_chain
from ckptsurgeon.adapters.table import adapter_of
from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.storage.pieces import merged, runs
from ckptsurgeon.streaming.bands import side_by_side
from ckptsurgeon.tensors import Span, TensorMeta

Ranges = tuple[Span, ...]


def _between(ranges: Ranges, ends: Sequence[int], start: int, stop: int) -> Iterator[Span]:
    """The bytes from `start` to `stop` of what the ranges are together; `ends` says where in it each of them ends."""
    for number in range(bisect_right(ends, start), bisect_left(ends, stop) + 1 if start < stop else 0):
        each = ranges[number]
        begin = ends[number] - each.nbytes
        first, last = max(start - begin, 0), min(stop - begin, each.nbytes)
        yield replace(each, offset=each.offset + first, nbytes=last - first)


def ranges_of(tensors: Sequence[TensorMeta], ops: Sequence[Mapping[str, Any]]) -> Ranges | None:
    """The ranges of bytes that a chain of filled ops makes of dense tensors, one after the other; None where values change or scatter, or
    where the ranges of one are too short to be copied one by one."""
    dense = [tensor for tensor in tensors if tensor.as_stored and tensor.place is not None and not side_by_side(tensor)]
    given: list[Ranges] = [tuple(runs(tensor)) for tensor in dense] if len(dense) == len(tensors) else []
    if len(given) < len(tensors) or len({tensor.dtype for tensor in tensors}) != 1:
        return None
    if not ops:
        return given[0] if len(given) == 1 else None
    shapes, size = tuple(tensor.shape for tensor in tensors), BY_CODE[tensors[0].dtype].size
    for op in ops:
        taken = adapter_of(op).ranges
        found = [None] if taken is None else taken(op, shapes)
        kept = [row for row in found if row is not None]
        if len(kept) < len(found):
            return None
        ends = [list(accumulate(each.nbytes for each in ranges)) for ranges in given]
        given = [
            tuple(part for at, start, stop in row for part in _between(given[at], ends[at], start * size, stop * size)) for row in kept
        ]
        shapes = infer_chain([op], shapes)
    return tuple(merged(given[0])) if len(given) == 1 else None
