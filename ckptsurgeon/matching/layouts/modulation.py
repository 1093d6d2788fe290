"""The two halves of a modulation, the shift and the scale that a condition gives a norm: which is first.

Rule: original implementations of diffusion transformers lay the shift first, diffusers' `norm_out` the scale. Modulations of more parts are
published in one order, and are in no doubt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ckptsurgeon.matching.layouts.sides import Sides, unit_of
from ckptsurgeon.planning.links import Layout, Link

KIND = "shift and scale"
_WORDS = re.compile(
    r"(?:^|[._])(?:ada_?ln\w*|modulation|mod\w?|norm\w*\.linear|norm_out|ada_?norm\w*|ada_?layer_?norm\w*)(?=[._]|$)", re.IGNORECASE
)


def find(link: Link, sides: Sides) -> Sequence[Layout]:
    """The layouts of the link of a modulation of two parts."""
    if len(link.sources) != 1 or len(link.targets) != 1 or link.op:
        return ()
    source_unit, target_unit = unit_of(link.sources[0]), unit_of(link.targets[0])
    if not (_WORDS.search(source_unit) or _WORDS.search(target_unit)) or _ends(source_unit) == _ends(target_unit):
        return ()
    shape = sides.target.tensors[link.targets[0]].shape
    width = sides.target.width
    if not width or len(shape) not in (1, 2) or shape[0] != 2 * width or f"{target_unit}.weight" not in sides.target.tensors:
        return ()
    swap = f"roll(dim=0, by={width})"
    return (
        Layout(KIND, "both have the same half first", link.sources, link.targets),
        Layout(KIND, "the halves change places", link.sources, link.targets, swap),
    )


def _ends(unit: str) -> list[str]:
    """The words of a module's name that say what it is."""
    return [part for part in unit.split(".") if not part.isdigit()][-2:]
