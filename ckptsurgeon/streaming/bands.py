"""Reads a tensor whose pieces lie side by side, in bands: a few megabytes of its rows at a time.

In a weight that is tiled along another dimension than the first, each row is in as many places as there are tiles. Where these ranges are
short, reading each by itself is slow; so the rows of a band are read from each piece at once, and put side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from math import prod
from typing import Literal

from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.storage.copying import BUFFER
from ckptsurgeon.storage.pieces import stretches
from ckptsurgeon.tensors import Piece, Span, TensorMeta, contiguous_stride

SHORT = 1 << 16  # bytes of a range, below which reading it by itself is slow
_STRIDED = 64  # bytes of a range, below which elements are put in their places column by column
_FORMATS: Mapping[int, Literal["B", "H", "I", "Q"]] = {1: "B", 2: "H", 4: "I", 8: "Q"}  # of memory, by the size of an element

Read = Callable[[Span, memoryview], None]  # reads the bytes of a range into memory


def side_by_side(tensor: TensorMeta) -> bool:
    """Whether a tensor lies in pieces whose ranges are short on average.

    >>> halves = (Piece(Span("a", 0, 8, "0"), (0, 0), (2, 1), (1, 1)), Piece(Span("a", 8, 8, "1"), (0, 1), (2, 1), (1, 1)))
    >>> side_by_side(TensorMeta("w", "F32", (2, 2), (2, 1), None, halves))
    True
    """
    pieces = tensor.pieces
    if len(tensor.shape) < 2 or not all(len(piece.offsets) == len(tensor.shape) and piece.as_stored for piece in pieces):
        return False
    ranges = sum(piece_ranges(tensor.shape, piece) for piece in pieces)
    return ranges > len(pieces) and tensor.nbytes < ranges * SHORT


def piece_ranges(shape: tuple[int, ...], piece: Piece) -> int:
    """The number of stretches of adjacent elements of the whole tensor that a piece has."""
    together, dim = 1, len(shape)
    while dim:
        dim -= 1
        together *= piece.sizes[dim]
        if piece.sizes[dim] != shape[dim]:
            break
    return prod(piece.sizes) // max(together, 1)


def bands(tensor: TensorMeta, read: Read) -> Iterator[memoryview]:
    """The elements of a tensor that lies `side_by_side`, dense in row-major order, in bands of whole rows, each valid until the next."""
    shape, size = tensor.shape, BY_CODE[tensor.dtype].size
    inner = next(dim for dim in range(1, len(shape)) if any(piece.sizes[dim] != shape[dim] for piece in tensor.pieces))
    outer = prod(shape[1:inner])  # rows of a band to each index of the first dimension
    parts = [_Part(piece, shape, inner, outer, size) for piece in tensor.pieces]
    rows, width = shape[0] * outer, prod(shape[inner:]) * size
    step = max(1, BUFFER // width)
    band = memoryview(bytearray(min(step, rows) * width))
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        for part in parts:
            part.put(band, start, stop, width, read)
        yield band[: (stop - start) * width]


class _Part:
    """A piece as rows: where they are in the whole, and where in a row its elements go."""

    def __init__(self, piece: Piece, shape: tuple[int, ...], inner: int, outer: int, size: int) -> None:
        self.span = piece.span
        self.first, self.last = piece.offsets[0] * outer, (piece.offsets[0] + piece.sizes[0]) * outer
        self.width = prod(piece.sizes[inner:]) * size
        within = stretches(contiguous_stride(shape[inner:]), piece.block[inner:])
        self.places = [(start * size, count * size) for start, count in within]
        self.size = size

    def put(self, band: memoryview, start: int, stop: int, width: int, read: Read) -> None:
        """Put this piece's part of the rows from `start` to `stop` into a band of them, each `width` bytes."""
        first, last = max(start, self.first), min(stop, self.last)
        if first >= last:
            return
        part = memoryview(bytearray((last - first) * self.width))
        span = self.span
        offset = span.offset + (first - self.first) * self.width
        read(Span(span.file, offset, len(part), span.storage, span.packed, span.record, span.lazy), part)
        begin = (first - start) * width
        if len(self.places) == 1 and self.places[0][1] <= _STRIDED and self.size in _FORMATS:
            self._columns(band[begin : begin + (last - first) * width], part, width)
            return
        done = 0
        for row in range(begin, begin + (last - first) * width, width):
            for place, nbytes in self.places:
                band[row + place : row + place + nbytes] = part[done : done + nbytes]
                done += nbytes

    def _columns(self, band: memoryview, part: memoryview, width: int) -> None:
        """The same for short rows: one element of every row at a time."""
        form = _FORMATS[self.size]
        to, source = band.cast(form), part.cast(form)
        place, nbytes = self.places[0]
        for column in range(nbytes // self.size):
            to[place // self.size + column :: width // self.size] = source[column :: nbytes // self.size]
