"""What one side counts: the gate and the up projection as two matrices (`w1` and `w2`, `fc11` and `fc12`), or a list, up or down.

Rule: implementations take either as the gate, so that the two are in doubt together, and nothing else about them is. With a `w3` beside
`w1` the names say which is which. A list whose members are all alike may count from the finest stage or from the coarsest: it is turned
round as a whole, or not at all.
"""

from __future__ import annotations

from collections.abc import Sequence

from ckptsurgeon.matching.doubts import COUNTED
from ckptsurgeon.matching.evidence.distinguish import are_two_counted
from ckptsurgeon.matching.layouts.sides import Side, Sides, own_concepts, parent_of, unit_of, word
from ckptsurgeon.planning.links import Layout, Link

GATES, DIRECTION = "gate or up", "counted up or down"
_PARTS = {"gate", "up"}


def gate_or_up(link: Link, sides: Sides) -> Sequence[Layout]:
    """The two layouts of a link between a gate (or an up projection) and the first or the second of two that are counted."""
    key, name = link.sources[0], link.targets[0]
    is_said = [bool(own_concepts(one) & _PARTS) for one in (key, name)]
    if is_said[0] == is_said[1]:
        return ()
    other_key, other_name = _other(key, sides.source), _other(name, sides.target)
    rivals = {f"{unit_of(one)} -> {unit_of(other)}" for one, other in ((key, other_name), (other_key, name))}
    if not other_key or not other_name or link.runner_up not in rivals:
        return ()
    counted, other_counted, named = (name, other_name, key) if is_said[0] else (key, other_key, name)
    kind = "gate" if "gate" in own_concepts(named) else "up"
    return tuple(
        Layout(GATES, f"{word(number)} is the {kind}", (source,), (name,), link.op)
        for source, number in ((key, counted), (other_key, other_counted))
    )


def _other(key: str, side: Side) -> str:
    """The matrix (or bias) that a gate is exchanged for, an up projection, or one counted with it; nothing where it is none, or stands
    without it."""
    shape = side.tensors[key].shape
    if len(shape) not in (1, 2):
        return ""
    beside = [one for one in side.under(parent_of(key)) if side.tensors[one].shape == shape and word(one) != word(key)]
    if own_concepts(key) & _PARTS:
        others = [one for one in beside if len(own_concepts(one) & _PARTS) == len(own_concepts(key) & _PARTS) == 1]
    else:
        others = [one for one in beside if are_two_counted({word(one), word(key)})]
    return others[0] if len(others) == 1 else ""


def up_or_down(link: Link, sides: Sides) -> Sequence[Layout]:
    """The two layouts of a link of such a list: its own, and that of the member as far from the list's other end."""
    source, _, target = link.runner_up.partition(" -> ")
    if COUNTED not in link.evidence or (target,) != link.targets or source not in sides.source.tensors:
        return ()
    return (
        Layout(DIRECTION, "counted alike", link.sources, link.targets, link.op),
        Layout(DIRECTION, "one counts up and the other down", (source,), link.targets, link.op),
    )
