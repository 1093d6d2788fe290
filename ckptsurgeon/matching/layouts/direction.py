"""A numbered list that one library counts from the finest stage and another from the coarsest, where all members are alike.

Rule: names and shapes tell that the two lists go together, and not in which direction; the whole list is turned round, or none of it.
"""

from __future__ import annotations

from collections.abc import Sequence

from ckptsurgeon.matching.doubts import COUNTED
from ckptsurgeon.matching.layouts.sides import Sides
from ckptsurgeon.planning.links import Layout, Link

KIND = "counted up or down"


def find(link: Link, sides: Sides) -> Sequence[Layout]:
    """The two layouts of a link of such a list: its own, and that of the member as far from the list's other end."""
    source, _, target = link.runner_up.partition(" -> ")
    if COUNTED not in link.evidence or (target,) != link.targets or source not in sides.source.tensors:
        return ()
    return (
        Layout(KIND, "counted alike", link.sources, link.targets, link.op),
        Layout(KIND, "one counts up and the other down", (source,), link.targets, link.op),
    )
