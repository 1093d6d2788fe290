"""A square matrix that is a parameter by itself on one side, and a layer's weight on the other: as it stands, or turned.

Rule: a bare parameter `p` is multiplied as `x @ p` or as `linear(x, p)`, and a layer's weight as `linear`; where a matrix is not square its
shape tells. This is so between files of one naming too, since one of them was written anew just there.
"""

from __future__ import annotations

from collections.abc import Sequence

from ckptsurgeon.matching.layouts.sides import Sides
from ckptsurgeon.matching.turning import AS_IT_IS
from ckptsurgeon.planning.links import Layout, Link

KIND = "rows or columns"


def find(link: Link, sides: Sides) -> Sequence[Layout]:
    """The layouts of the link of a bare square parameter and a layer's weight, where no other of its name told it."""
    if len(link.sources) != 1 or len(link.targets) != 1 or link.op or AS_IT_IS in link.evidence:
        return ()
    key, name = link.sources[0], link.targets[0]
    shape = sides.source.tensors[key].shape
    if len(shape) != 2 or shape[0] != shape[1] or shape[0] == 1 or key.endswith("weight") == name.endswith("weight"):
        return ()
    return (
        Layout(KIND, "multiplied alike", link.sources, link.targets),
        Layout(KIND, "turned, as x @ p is", link.sources, link.targets, "transpose"),
    )
