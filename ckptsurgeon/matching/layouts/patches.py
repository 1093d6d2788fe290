"""A patch embedding that is a linear layer on one side and a convolution on the other: how the pixels of a patch were flattened.

Rule: libraries flatten a patch channel by channel, as a convolution's kernel lies, or pixel by pixel, with a pixel's channels together. One
channel can be flattened in one way only; kernels of more than four channels are no picture's, and are flattened as torch does it.
"""

from __future__ import annotations

from collections.abc import Sequence

from ckptsurgeon.matching.layouts.sides import Sides
from ckptsurgeon.planning.links import Layout, Link

KIND = "patch pixels"
_MOST_CHANNELS = 4


def find(link: Link, sides: Sides) -> Sequence[Layout]:
    """The layouts of the link of a linear layer over flattened patches and a convolution over pictures."""
    if len(link.sources) != 1 or len(link.targets) != 1:
        return ()
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
        Layout(KIND, "each channel's pixels together", link.sources, link.targets, link.op),
        Layout(KIND, "each pixel's channels together", link.sources, link.targets, by_pixel),
    )
