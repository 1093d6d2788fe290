"""Which links are in doubt about the order of their elements: one kind of layout after another is asked, in one table.

Rule: between two files of one naming there is no doubt about a whole tensor, nor for a key that has the same name on both sides; there the
same implementation speaks, unless one of them holds a layer's weight as a bare parameter, has its own recurrent cell, a linear layer for a
convolution over patches, or says the parts in another order. What is cut or joined lies otherwise in one of them, whatever they are called
(OPT's `qkv_proj` is k, v, q). A doubt takes nothing from a link's keys, and adds none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from ckptsurgeon.matching.layouts import either, fused, halves, orders, patches, rotary, squares
from ckptsurgeon.matching.layouts.sides import Side, Sides
from ckptsurgeon.matching.same_names import SAME
from ckptsurgeon.planning.links import ENOUGH, LAYOUT, Layout, Link
from ckptsurgeon.tensors import TensorMeta

_KINDS: tuple[Callable[[Link, Sides], Sequence[Layout]], ...] = (
    rotary.find,
    fused.find,
    halves.gate_and_up,
    either.gate_or_up,
    halves.shift_and_scale,
    orders.named,
    orders.gates,
    patches.merged,
    patches.pixels,
    squares.find,
    either.up_or_down,
)
_OF_PARTS = (fused.find, halves.gate_and_up, squares.find)  # also of what is cut or joined
_ANEW = (squares.KIND, orders.GATES, patches.PIXELS)  # what is written anew between files of one naming
Tensors = Mapping[str, TensorMeta]


def with_doubts(links: Iterable[Link], source: Tensors, target: Tensors) -> list[Link]:
    """The links, those whose layout shapes can't show with the layouts that it may be.

    Args:
        links: what matching found.
        source: all tensors of the source, also those that were not to be matched.
        target: all tensors of the target.
    """
    links = list(links)
    sides = Sides(Side(source), Side(target))
    same = sum(SAME in link.evidence for link in links)
    one_naming = sides.one_naming or 2 * same > min(len(source), len(target))
    return [_with_doubt(link, sides, one_naming) for link in links]


def _with_doubt(link: Link, sides: Sides, one_naming: bool) -> Link:
    whole = len(link.sources) == len(link.targets) == 1
    same = SAME in link.evidence and not squares.written_anew(link, sides)
    named = same or sides.names.get(link.sources[0]) == link.targets[0]
    stays = whole and named and len(sides.source.tensors[link.sources[0]].shape) == len(sides.target.tensors[link.targets[0]].shape)
    choices = next((layouts for kind in (_KINDS if whole else _OF_PARTS) if not stays and (layouts := kind(link, sides))), ())
    anew = whole and choices and (choices[0].kind in _ANEW or orders.said(link.sources[0], link.targets[0])[0])
    if not choices or (whole and one_naming and not anew):
        return link
    exchanged = whole and any(layout.sources != link.sources for layout in choices)  # its rival is one of the choices
    return replace(link, doubt=LAYOUT, choices=tuple(choices), margin=max(link.margin, ENOUGH) if exchanged else link.margin)
