"""The halves of a matrix: the gate and the up projection, by itself or stacked over experts, and the shift and the scale of a modulation.

Rule: implementations lay either first (Phi-3's gate, diffusers' GEGLU's other half), and some row by row (gpt-oss). Where both sides have
the fused matrix, it is taken as it stands if both call it the same, and is in doubt too if they do not. Original implementations of
diffusion transformers lay the shift first, diffusers' `norm_out` the scale; modulations of more parts are published in one order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ckptsurgeon.matching.evidence.distinguish import are_two_counted
from ckptsurgeon.matching.evidence.vocabulary import concepts
from ckptsurgeon.matching.layouts.sides import Side, Sides, layouts, own_concepts, parent_of, unit_of, word
from ckptsurgeon.planning.links import Layout, Link

GATE_AND_UP, SHIFT_AND_SCALE = "gate and up", "shift and scale"
_MODULATES = re.compile(
    r"(?:^|[._])(?:ada_?ln\w*|modulation|mod\w?|norm\w*\.linear|norm_out|ada_?norm\w*|ada_?layer_?norm\w*)(?=[._]|$)", re.IGNORECASE
)
_STACKED = re.compile(r"(?:un)?stack\(")
_PAIR = re.compile(r"(?P<how>chunk|concat)\(dim=(?P<dim>\d)(?:, of=2)?\)")


def gate_and_up(link: Link, sides: Sides) -> Sequence[Layout]:
    """The layouts of a link between a fused gate and up and its two parts, or all experts' parts."""
    cuts = len(link.sources) == 1
    if cuts and len(link.targets) == 1:
        return _whole(link, sides)
    parts = link.targets if cuts else link.sources
    pair_op = _PAIR.search(link.op)
    if pair_op is None or len(parts) < 2 or len(parts) % 2 or len(link.sources) > 1 < len(link.targets):
        return ()
    whole = link.sources[0] if cuts else link.targets[0]
    all_words = own_concepts(whole) | frozenset(word for part in parts[:2] for word in concepts(part))
    tensors = sides.target.tensors if cuts else sides.source.tensors
    counted = len(parts) == 2 and are_two_counted([word(part) for part in parts])
    if (
        not (all_words & {"gate", "up"} or counted)
        or own_concepts(parts[0]) & {"q", "k", "v"}
        or len({tensors[part].shape for part in parts}) > 1
    ):
        return ()
    if len(parts) > 2 and not _STACKED.search(link.op):
        return ()
    swapped = tuple(part for pair in zip(parts[1::2], parts[::2], strict=True) for part in pair)
    mixed = f"deinterleave(dim={pair_op['dim']}, parts=2)" if cuts else f"interleave(dim={pair_op['dim']}, parts=2)"
    ops = (mixed, pair_op[0]) if cuts else (pair_op[0], mixed)
    chain = link.op.replace(pair_op[0], " | ".join(ops))
    first, second = (_name(part) for part in parts[:2])
    return (
        Layout(GATE_AND_UP, f"{first} before {second}", link.sources, link.targets, link.op),
        Layout(GATE_AND_UP, f"{second} before {first}", *((link.sources, swapped) if cuts else (swapped, link.targets)), link.op),
        Layout(GATE_AND_UP, "row by row in turn", link.sources, link.targets, chain),
    )


def _whole(link: Link, sides: Sides) -> Sequence[Layout]:
    """The layouts of a fused matrix, also one of all experts, or of its bias, that both sides have under names of their own."""
    key, name = sides.source.matrix(link.sources[0]), sides.target.matrix(link.targets[0])
    dims = {len(sides.source.tensors[key].shape), len(sides.target.tensors[name].shape)}
    if word(key) == word(name) or dims not in ({2}, {3}):
        return ()
    said = any({"gate", "up"} <= own_concepts(one) for one in (key, name))
    dim = _doubled(name, sides.target)
    if dim is None or not (said or (_is_gated(key, sides.source) and _is_gated(name, sides.target))):
        return ()
    size, shape = sides.target.tensors[name].shape[dim], sides.target.tensors[link.targets[0]].shape
    if name != link.targets[0] and shape[-1:] != (size,):
        return ()
    dim = dim if name == link.targets[0] else len(shape) - 1
    ways = {
        f"roll(dim={dim}, by={size // 2})": "the halves change places",
        f"deinterleave(dim={dim}, parts=2)": "what lies row by row in turn becomes halves",
        f"interleave(dim={dim}, parts=2)": "halves become rows in turn",
    }
    return layouts(GATE_AND_UP, link, ways)


def _doubled(key: str, side: Side) -> int | None:
    """The dimension of a matrix that is twice one of a tensor beside it."""
    shape = side.tensors[key].shape
    beside = {size for other in _beside(key, side) for size in side.tensors[other].shape}
    return next((at for at in range(len(shape) - 2, len(shape)) if shape[at] % 2 == 0 and shape[at] // 2 in beside), None)


def _beside(key: str, side: Side) -> list[str]:
    """The other tensors of the module that a matrix stands in; of a list, those of its other members too."""
    parent = parent_of(key)
    head, _, last = parent.rpartition(".")
    return [other for other in side.under(head if head and last.isdigit() else parent) if unit_of(other) != unit_of(key)]


def _is_gated(key: str, side: Side) -> bool:
    """Whether a layer beside a matrix takes half of what that gives, and gives what that takes: one half is multiplied with the other."""
    shape, words = side.tensors[key].shape, {*own_concepts(key), *own_concepts(parent_of(key))}
    if len(shape) != 2 or shape[0] % 2 or words & {"q", "k", "v", "kv", "qkv", "attn", "self", "cross"}:
        return False
    back = {side.tensors[other].shape for other in _beside(key, side)}
    return (shape[1], shape[0] // 2) in back and shape[::-1] not in back


def _name(part: str) -> str:
    """The last word of a part's module."""
    words = [segment for segment in unit_of(part).split(".") if not segment.isdigit()]
    return words[-1] if words else part


def shift_and_scale(link: Link, sides: Sides) -> Sequence[Layout]:
    """The layouts of the link of a modulation of two parts."""
    if link.op:
        return ()
    source_unit, target_unit = unit_of(link.sources[0]), unit_of(link.targets[0])
    if not (_MODULATES.search(source_unit) or _MODULATES.search(target_unit)) or _ends(source_unit) == _ends(target_unit):
        return ()
    shape = sides.target.tensors[link.targets[0]].shape
    width = sides.target.width
    if not width or len(shape) not in (1, 2) or shape[0] != 2 * width or f"{target_unit}.weight" not in sides.target.tensors:
        return ()
    return layouts(SHIFT_AND_SCALE, link, {f"roll(dim=0, by={width})": "the halves change places"})


def _ends(unit: str) -> list[str]:
    """The words of a module's name that say what it is."""
    return [part for part in unit.split(".") if not part.isdigit()][-2:]
