"""Tensors as pieces of files: what a chain of ops makes of them without a byte being brought into memory, where that is possible.

Dense row-major tensors only. A cut or a join along the first dimension (or behind dimensions of size 1) is other pieces in another order, a
reshape the same ones; anything else is None, and goes through torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from ckptsurgeon.adapters.chain import infer_chain
from ckptsurgeon.adapters.op import Op, Shape
from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.tensors import Span, TensorMeta

Pieces = tuple[Span, ...]


@dataclass(frozen=True)
class Virtual:
    """A dense tensor of `shape` whose bytes are those of `pieces`, one after the other; `size` is an element's, in bytes."""

    shape: Shape
    size: int
    pieces: Pieces

    def cut(self, dim: int, start: int, stop: int) -> Virtual | None:
        """The elements from `start` to `stop` along `dim`; None where they do not lie together."""
        if prod(self.shape[:dim]) != 1:
            return None
        row = prod(self.shape[dim + 1 :]) * self.size
        shape = (*self.shape[:dim], stop - start, *self.shape[dim + 1 :])
        return Virtual(shape, self.size, _between(self.pieces, start * row, stop * row))


def _between(pieces: Pieces, start: int, stop: int) -> Pieces:
    """The bytes from `start` to `stop` of what the pieces are together."""
    found = []
    for piece in pieces:
        first, last = max(start, 0), min(stop, piece.nbytes)
        if first < last:
            found.append(replace(piece, offset=piece.offset + first, nbytes=last - first))
        start, stop = start - piece.nbytes, stop - piece.nbytes
    return tuple(found)


def _slice(given: Sequence[Virtual], op: Op) -> list[Virtual | None]:
    return [one.cut(op["dim"], op["start"], op["stop"]) for one in given]


def _chunk(given: Sequence[Virtual], op: Op) -> list[Virtual | None]:
    sizes = [one.shape[op["dim"]] // op["of"] for one in given]
    return [one.cut(op["dim"], op["index"] * size, (op["index"] + 1) * size) for one, size in zip(given, sizes, strict=True)]


def _unstack(given: Sequence[Virtual], op: Op) -> list[Virtual | None]:
    cuts = [one.cut(op["dim"], op["index"], op["index"] + 1) for one in given]
    return [None if cut is None else _without(cut, op["dim"]) for cut in cuts]


def _without(one: Virtual, dim: int) -> Virtual:
    return replace(one, shape=(*one.shape[:dim], *one.shape[dim + 1 :]))


def _concat(given: Sequence[Virtual], op: Op) -> list[Virtual | None]:
    groups = [given[start : start + op["of"]] for start in range(0, len(given), op["of"])]
    return [None if prod(group[0].shape[: op["dim"]]) != 1 else _joined(group) for group in groups]


def _joined(group: Sequence[Virtual]) -> Virtual:
    return replace(group[0], pieces=tuple(piece for one in group for piece in one.pieces))


def _reshape(given: Sequence[Virtual], _op: Op) -> list[Virtual | None]:
    return list(given)


def _rows(given: Sequence[Virtual], op: Op) -> list[Virtual | None]:
    if sum(count for _, _, count in op["runs"]) != op["rows"]:
        return [None for _ in given]  # rows that have no counterpart are made
    cuts = [[one.cut(op["dim"], start, start + count) for _, start, count in op["runs"]] for one in given]
    return [None if None in row or not row else _joined([cut for cut in row if cut is not None]) for row in cuts]


# The ops that may move bytes alone; their shapes are told by `infer_chain`.
BY_BYTES: Mapping[str, Callable[[Sequence[Virtual], Op], list[Virtual | None]]] = {
    "slice": _slice,
    "chunk": _chunk,
    "unstack": _unstack,
    "concat": _concat,
    "stack": _concat,
    "reshape": _reshape,
    "rows": _rows,
}


def pieces_of(tensors: Sequence[TensorMeta], ops: Sequence[Mapping[str, Any]]) -> Pieces | None:
    """The pieces of files that a chain of filled ops makes of dense tensors, one after the other; None where values change or scatter."""
    if not all(tensor.as_stored and tensor.span is not None for tensor in tensors):
        return None
    given = [Virtual(tensor.shape, BY_CODE[tensor.dtype].size, (tensor.span,)) for tensor in tensors if tensor.span is not None]
    for op in ops:
        if op["op"] not in BY_BYTES:
            return None
        found = BY_BYTES[op["op"]](given, op)
        shapes = infer_chain([op], [one.shape for one in given])
        kept = [replace(one, shape=shape) for one, shape in zip(found, shapes, strict=True) if one is not None]
        if len(kept) < len(found):
            return None
        given = kept
    return _merged(given[0].pieces) if len(given) == 1 else None


def _merged(pieces: Pieces) -> Pieces:
    """Neighbours in one file as one piece."""
    merged: list[Span] = []
    for piece in pieces:
        last = merged[-1] if merged else None
        if last is not None and (last.file, last.packed, last.offset + last.nbytes) == (piece.file, piece.packed, piece.offset):
            merged[-1] = replace(last, nbytes=last.nbytes + piece.nbytes)
        elif piece.nbytes:
            merged.append(piece)
    return tuple(merged)
