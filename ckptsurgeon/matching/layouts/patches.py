"""Patches: how the pixels of one were flattened, and in which order the channels of neighbours lie that are merged.

Rule: libraries flatten a patch channel by channel, as a convolution's kernel lies, or pixel by pixel, with a pixel's channels together. One
channel can be flattened in one way only; kernels of more than four channels are no picture's, and are flattened as torch does it.
Implementations of Swin gather columns before rows or rows before columns, and those that unfold (mmdetection) lay the neighbours of each
channel together. The norm before the reduction has the same order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ckptsurgeon.matching.layouts.sides import Sides, layouts, parent_of, word
from ckptsurgeon.planning.links import Layout, Link

PIXELS, MERGING = "patch pixels", "patch merging"
_MOST_CHANNELS = 4
_REDUCTION = re.compile(r"(?:^|[._])(?:reduction|patch_?merg\w*|merging)(?=[._]|$)", re.IGNORECASE)


def pixels(link: Link, sides: Sides) -> Sequence[Layout]:
    """The layouts of the link of a linear layer over flattened patches and a convolution over pictures."""
    here, there = sides.source.tensors[link.sources[0]].shape, sides.target.tensors[link.targets[0]].shape
    flat, kernel = sorted((here, there), key=len)
    if len(flat) != 2 or len(kernel) not in (4, 5) or not 1 < kernel[1] <= _MOST_CHANNELS or max(kernel[2:]) == 1:
        return ()
    last = len(kernel) - 1
    if len(here) == 2:
        sizes, order = [kernel[0], *kernel[2:], kernel[1]], [0, last, *range(1, last)]
        by_pixel = f"reshape(shape={sizes}) | permute(dims={order})"
    else:
        by_pixel = f"permute(dims={[0, *range(2, last + 1), 1]}) | reshape"
    return (
        Layout(PIXELS, "each channel's pixels together", link.sources, link.targets, link.op),
        Layout(PIXELS, "each pixel's channels together", link.sources, link.targets, by_pixel),
    )


def merged(link: Link, sides: Sides) -> Sequence[Layout]:
    """The layouts of the link of a reduction, or of the norm before it."""
    if link.op:
        return ()
    merged = _merged(sides, link.targets[0], link.sources[0])
    shape = sides.target.tensors[link.targets[0]].shape
    if merged is None or shape[-1] != merged or len(shape) > 2:
        return ()
    width, rows, dim = merged // 4, list(shape[:-1]), len(shape) - 1
    kept = list(range(dim))

    def chain(sizes: Sequence[int], order: Sequence[int]) -> str:
        return f"reshape(shape={[*rows, *sizes]}) | permute(dims={[*kept, *(dim + axis for axis in order)]}) | reshape"

    ways = {
        chain((2, 2, width), (1, 0, 2)): "rows before columns become columns before rows",
        chain((2, 2, width), (2, 1, 0)): "all of a neighbour together become all of a channel together",
        chain((width, 2, 2), (2, 1, 0)): "all of a channel together become all of a neighbour together",
    }
    return layouts(MERGING, link, ways)


def _merged(sides: Sides, target_key: str, source_key: str) -> int | None:
    """How many channels are merged by the reduction that is the key's, or that stands beside it; None where there is none."""
    tensors = sides.target.tensors
    for name in sides.target.under(parent_of(target_key)):
        shape = tensors[name].shape
        if len(shape) != 2 or shape[1] != 2 * shape[0] or shape[1] % 4 or parent_of(name) != parent_of(target_key):
            continue
        if _REDUCTION.search(name) or _REDUCTION.search(source_key) or word(name) == "reduction":
            return shape[1]
    return None
