"""The gate and the up projection as two matrices, which one side calls so and the other counts: `w1` and `w2`.

Rule: implementations take either as the gate, so that the two are in doubt together, and nothing else about them is. With a `w3` beside
them the names say which is which.
"""

from __future__ import annotations

from collections.abc import Sequence

from ckptsurgeon.matching.layouts.sides import Side, Sides, own_concepts, parent_of, unit_of, word
from ckptsurgeon.planning.links import Layout, Link

KIND = "gate or up"
_COUNTED = ("w1", "w2")


def find(link: Link, sides: Sides) -> Sequence[Layout]:
    """The two layouts of a link between a gate (or an up projection) and the first or the second of two that are counted."""
    if len(link.sources) != 1 or len(link.targets) != 1:
        return ()
    key, name = link.sources[0], link.targets[0]
    other_key, other_name = _other(key, sides.source), _other(name, sides.target)
    if not other_key or not other_name or (word(key) in _COUNTED) == (word(name) in _COUNTED):
        return ()
    rivals = {f"{unit_of(one)} -> {unit_of(other)}" for one, other in ((key, other_name), (other_key, name))}
    if link.runner_up not in rivals:
        return ()
    counted, named = (key, name) if word(key) in _COUNTED else (name, key)
    kind = "gate" if "gate" in own_concepts(named) else "up"
    return tuple(
        Layout(KIND, f"{word(number)} is the {kind}", (source,), (name,), link.op)
        for source, number in ((key, counted), (other_key, next(one for one in _COUNTED if one != word(counted))))
    )


def _other(key: str, side: Side) -> str:
    """The matrix that a gate is exchanged for, an up projection, `w1` or `w2`; nothing where it is none, or stands without it."""
    shape = side.tensors[key].shape
    if len(shape) != 2:
        return ""
    if word(key) in _COUNTED:
        beside = [other for other in side.under(parent_of(key)) if word(other) in _COUNTED]
    elif len(own_concepts(key) & {"gate", "up"}) == 1:
        beside = [other for other in side.under(parent_of(key)) if len(own_concepts(other) & {"gate", "up"}) == 1]
    else:
        return ""
    others = [other for other in beside if word(other) != word(key) and side.tensors[other].shape == shape]
    return others[0] if len(others) == 1 else ""
