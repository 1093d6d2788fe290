"""A square matrix that is a parameter by itself on one side, and a layer's weight on the other: as it stands, or turned.

Rule: a bare parameter `p` is multiplied as `x @ p` or as `linear(x, p)`, and a layer's weight as `linear`; where a matrix is not square its
shape tells. This is so between files of one naming too, since one of them was written anew just there. A layer whose bias stands in the
module around it was written by hand, and what is its weight and bias in one module elsewhere may be two bare parameters.
"""

from __future__ import annotations

from collections.abc import Sequence

from ckptsurgeon.matching.layouts.sides import Sides, Tensors, parent_of
from ckptsurgeon.matching.module_tree import module_of
from ckptsurgeon.matching.turning import AS_IT_IS, BESIDE, squares
from ckptsurgeon.planning.links import Layout, Link

KIND = "rows or columns"


def find(link: Link, sides: Sides) -> Sequence[Layout]:
    """The layouts of the link of a bare square parameter and a layer's weight, or of the square parts of a matrix that lie along what it
    takes in, and of the matrix beside these, where no other of its name told it."""
    if AS_IT_IS in link.evidence:
        return ()
    turned = BESIDE.get(link.op) if squares(link, sides.source.tensors, sides.target.tensors) else None
    if turned is None and (len(link.sources) != 1 or len(link.targets) != 1 or link.op):
        return ()
    key, name = link.sources[0], link.targets[0]
    shape = sides.source.tensors[key].shape
    if turned is None and (
        len(shape) != 2
        or shape[0] != shape[1]
        or shape[0] == 1
        or (key.endswith("weight") == name.endswith("weight") and not written_anew(link, sides) and not _beside_parts(link, sides))
    ):
        return ()
    return (
        Layout(KIND, "multiplied alike", link.sources, link.targets, link.op),
        Layout(KIND, "turned, as x @ p is", link.sources, link.targets, turned or "transpose"),
    )


def _beside_parts(link: Link, sides: Sides) -> bool:
    """Whether the layers beside a square one are one matrix along what it takes in on one side, and square parts of it on the other."""
    size = sides.source.tensors[link.sources[0]].shape[0]
    beside = [
        {side.tensors[other].shape for other in side.under(parent_of(key)) if other != key and len(side.tensors[other].shape) == 2}
        for key, side in ((link.sources[0], sides.source), (link.targets[0], sides.target))
    ]
    return any({(size, 3 * size)} == one and {(size, size)} == other for one, other in (beside, beside[::-1]))


def written_anew(link: Link, sides: Sides) -> bool:
    """Whether a layer's bias stands beside its weight on one side, and around the layer on the other."""
    places = (_bias_at(key, side.tensors) for key, side in ((link.sources[0], sides.source), (link.targets[0], sides.target)))
    return {*places} == {"beside", "around"}


def _bias_at(key: str, tensors: Tensors) -> str:
    """Where the bias of a weight stands: beside it, or in the module around its layer; empty where nowhere."""
    layer = module_of(key)
    around = module_of(layer)
    return "beside" if f"{layer}.bias" in tensors else "around" if around and f"{around}.bias" in tensors else ""
