"""The ranges of bytes in files where a block of a tensor lies; and the check that a tensor's pieces make up the whole tensor.

Rule: no other module knows how a tensor is divided into pieces. Everything that reads, copies, compares or hashes bytes calls `runs`. No
file is opened here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice, pairwise, product
from math import prod

from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.errors import FormatError
from ckptsurgeon.hints import shortened
from ckptsurgeon.tensors import Piece, Span, TensorMeta, contiguous_stride

Block = tuple[tuple[int, int], ...]  # start and stop, for each dimension
_SHOWN = 5


def runs(tensor: TensorMeta, block: Block | None = None) -> Iterable[Span]:
    """The ranges of bytes of a block of a tensor (by default the whole tensor), in row-major order of the elements.

    Adjacent ranges of a file are merged, and none is empty. Lazily conjugated or negated elements are returned as they are stored.

    >>> rows = TensorMeta("w", "F32", (4, 2), (2, 1), Span("a", 100, 32, "0"))
    >>> [(run.offset, run.nbytes) for run in runs(rows, ((1, 3), (0, 2)))]
    [(108, 16)]
    >>> [(run.offset, run.nbytes) for run in runs(rows, ((1, 3), (0, 1)))]
    [(108, 4), (116, 4)]
    """
    span = tensor.span
    if block is None and span is not None and tensor.contiguous:  # nearly every tensor, whole
        return (span,) if span.nbytes else ()
    return merged(_ranges(tensor, tuple((0, size) for size in tensor.shape) if block is None else block))


def meeting(tensor: TensorMeta, block: Block) -> tuple[Piece, ...]:
    """The pieces of a tensor that have elements of a block; all pieces where they are runs of elements."""
    flat = any(len(piece.offsets) != len(tensor.shape) for piece in tensor.pieces)
    return tensor.pieces if flat else tuple(_meeting(tensor.pieces, block))


def merged(ranges: Iterable[Span]) -> Iterator[Span]:
    """The same ranges, with adjacent ranges of one file merged."""
    last: Span | None = None
    for span in ranges:
        if last is not None and (last.file, last.packed, last.offset + last.nbytes) == (span.file, span.packed, span.offset):
            last = replace(last, nbytes=last.nbytes + span.nbytes)
        elif span.nbytes:
            if last is not None:
                yield last
            last = span
    if last is not None:
        yield last


def stretches(stride: Sequence[int], block: Block) -> Iterator[tuple[int, int]]:
    """The runs of adjacent elements of a block, in row-major order: the index of the first element in the storage, and the number of
    elements.

    >>> list(stretches((4, 1), ((0, 2), (1, 3))))
    [(1, 2), (5, 2)]
    """
    if any(start >= stop for start, stop in block):
        return
    count, dim = 1, len(block)
    while dim and (stride[dim - 1] == count or block[dim - 1][1] - block[dim - 1][0] == 1):
        dim -= 1
        count *= block[dim][1] - block[dim][0]
    first = sum(start * step for (start, _), step in zip(block, stride, strict=True))
    steps = []
    for (start, stop), step in zip(block[:dim], stride, strict=False):
        steps.append(range(0, (stop - start) * step, step) if step else (0,) * (stop - start))
    for outer in product(*steps):
        yield first + sum(outer), count


def scatter(part: bytearray, whole: bytearray, tensor: TensorMeta, piece: Piece) -> None:
    """Copy the dense bytes of a piece to their positions in the bytes of the whole tensor."""
    size = BY_CODE[tensor.dtype].size
    shape = tensor.shape if len(piece.offsets) == len(tensor.shape) else (tensor.numel,)
    done = 0
    for start, count in stretches(contiguous_stride(shape), piece.block):
        whole[start * size : (start + count) * size] = part[done : done + count * size]
        done += count * size


def tiled(name: str, dtype: str, shape: tuple[int, ...], pieces: Sequence[Piece], sizes: Mapping[str, int]) -> TensorMeta:
    """A tensor made of pieces; of one span where a single piece is the whole. `sizes` has the size in bytes of each file that exists.

    Raises:
        FormatError: a piece exceeds the tensor or its file, the pieces lack elements or have some twice, or a file is missing; it names
            the files and the rows.
    """
    filled = tuple(piece for piece in pieces if all(piece.sizes))
    whole = shape if all(len(piece.offsets) == len(shape) for piece in filled) else (prod(shape),)
    faults = [fault for piece in filled if (fault := _fault(piece, BY_CODE[dtype].size, whole, shape, sizes))]
    if not faults:
        parts = _tiles(filled, tuple((0, size) for size in whole), in_order=False)
        wrong = ((block, within) for block, within in parts if len(within) != 1)
        faults = [f"{_words(block, whole, shape)} lie in {_several(within)}" for block, within in islice(wrong, _SHOWN)]
    if faults:
        absent = next((piece.span.file for piece in filled if piece.span.file not in sizes), None)
        hint = "copy or download all of its files again" if absent is None else f"copy {absent} there too"
        raise FormatError("has pieces that are not the whole tensor", path=absent, key=name, problems=shortened(faults), hint=hint)
    kept = filled or tuple(pieces)
    if kept and kept[0].sizes == shape:
        return TensorMeta(name, dtype, shape, kept[0].stride, kept[0].span)
    return TensorMeta(name, dtype, shape, contiguous_stride(shape), None, kept)


def _fault(piece: Piece, size: int, whole: tuple[int, ...], shape: tuple[int, ...], sizes: Mapping[str, int]) -> str | None:
    """What is wrong with a single piece; None where nothing is."""
    span = piece.span
    if not len(piece.offsets) == len(piece.sizes) == len(piece.stride) == len(whole):
        return f"a piece in {span.file} has {len(piece.offsets)} dimensions, where the others have {len(whole)}"
    block = piece.block
    if any(start < 0 or stop > bound for (start, stop), bound in zip(block, whole, strict=True)):
        return f"a piece in {span.file} reaches out of the tensor: {_words(block, whole, shape)}"
    if span.file not in sizes:
        return f"{_words(block, whole, shape)} lie in {span.file}, which is not there"
    reach = 1 + sum((count - 1) * step for count, step in zip(piece.sizes, piece.stride, strict=True))
    bound = sizes[span.file] if span.packed is None else span.packed.size
    if min(piece.stride, default=0) < 0 or span.offset < 0 or reach * size > span.nbytes or span.offset + span.nbytes > bound:
        return f"{_words(block, whole, shape)} reach out of {span.file}, which has {bound:,} bytes"
    return None


def _ranges(tensor: TensorMeta, block: Block) -> Iterator[Span]:
    """The ranges of a block, one for each run of adjacent elements of a piece."""
    size = BY_CODE[tensor.dtype].size
    pieces = tensor.pieces
    if tensor.span is not None:
        pieces = (Piece(tensor.span, (0,) * len(tensor.shape), tensor.shape, tensor.stride),)
    flat = any(len(piece.offsets) != len(tensor.shape) for piece in pieces)  # pieces are runs of the whole's elements
    for run in _flat(tensor.shape, block) if flat else (block,):
        for part, within in _tiles(_meeting(pieces, run), run):
            (piece,) = within
            span, inside = (
                piece.span,
                tuple((start - offset, stop - offset) for (start, stop), offset in zip(part, piece.offsets, strict=True)),
            )
            for start, count in stretches(piece.stride, inside):
                yield Span(span.file, span.offset + start * size, count * size, span.storage, span.packed, span.record, span.lazy)


def _flat(shape: tuple[int, ...], block: Block) -> Iterator[Block]:
    """A block as runs of elements of the whole."""
    return (((start, start + count),) for start, count in stretches(contiguous_stride(shape), block))


def _meeting(pieces: Iterable[Piece], block: Block) -> list[Piece]:
    return [
        piece
        for piece in pieces
        if all(
            offset < stop and start < offset + size for offset, size, (start, stop) in zip(piece.offsets, piece.sizes, block, strict=True)
        )
    ]


def _tiles(pieces: Sequence[Piece], block: Block, dim: int = 0, *, in_order: bool = True) -> Iterator[tuple[Block, Sequence[Piece]]]:
    """A block cut into parts, each wholly inside or outside every piece, with the pieces that contain it.

    `in_order`: the parts come in row-major order of the block's elements, where each part lies in one piece.
    """
    if any(start >= stop for start, stop in block):
        return
    if not pieces or dim == len(block) or (len(pieces) == 1 and _covers(pieces[0], block)):
        yield block, pieces
        return
    for start, stop, within in _slabs(pieces, *block[dim], dim):
        rows = [(start, stop)]
        if in_order and not (len(within) == 1 and _covers(within[0], (*block[:dim], (start, stop), *block[dim + 1 :]))):
            rows = [(row, row + 1) for row in range(start, stop)]  # the pieces share these rows: each has a part of every row
        for row in rows:
            yield from _tiles(within, (*block[:dim], row, *block[dim + 1 :]), dim + 1, in_order=in_order)


def _covers(piece: Piece, block: Block) -> bool:
    return all(
        offset <= start and stop <= offset + size for offset, size, (start, stop) in zip(piece.offsets, piece.sizes, block, strict=True)
    )


def _slabs(pieces: Sequence[Piece], start: int, stop: int, dim: int) -> Iterator[tuple[int, int, list[Piece]]]:
    """A range of a dimension, cut where pieces begin and end; each part with the pieces that contain it."""
    edges = {edge for piece in pieces for edge in piece.block[dim] if start < edge < stop}
    waiting = sorted(pieces, key=lambda piece: piece.offsets[dim], reverse=True)
    current: list[Piece] = []
    for first, last in pairwise(sorted({start, stop} | edges)):
        while waiting and waiting[-1].offsets[dim] <= first:
            current.append(waiting.pop())
        current = [piece for piece in current if piece.block[dim][1] >= last]
        yield first, last, current


def _words(block: Block, whole: tuple[int, ...], shape: tuple[int, ...]) -> str:
    """A block in words: its rows where it consists of whole rows, else its elements."""
    if len(whole) != len(shape):
        return f"elements {block[0][0]} to {block[0][1] - 1}"
    if all(part == (0, size) for part, size in zip(block[1:], whole[1:], strict=True)) and block:
        return f"rows {block[0][0]} to {block[0][1] - 1}"
    return f"elements [{', '.join(f'{start}:{stop}' for start, stop in block)}]"


def _several(pieces: Sequence[Piece]) -> str:
    return f"{len(pieces)} pieces, in {' and '.join(sorted({piece.span.file for piece in pieces}))}" if pieces else "no piece"
