"""Parts of one tensor in another order: what both names say, and the gates of a recurrent cell.

Rule: names with the same words, or letters, in another order (`kqv` and `qkv`, `up_gate` and `gate_up`) say which part is first, unless the
words are for a kind of layer. torch's own names say the order of gates; other implementations lay them in one of a few.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from math import gcd

from ckptsurgeon.matching.evidence.vocabulary import KIND_WORDS, SAYS_NOTHING, concepts
from ckptsurgeon.matching.layouts.sides import Sides, layouts, own_concepts, parent_of, unit_of, word
from ckptsurgeon.planning.links import Layout, Link

GATES = "gates of a cell"
# Words that are no part.
_LAYERS = (SAYS_NOTHING | KIND_WORDS | {"conv", "attn", "mlp", "first", "second", "final", "expert"}) - {*"qkv", "gate", "up", "scale"}
_CELLS = {4: ("ifgo", "ifog", "igfo", "iofg"), 3: ("rzn", "zrn")}  # torch's first; char-rnn's, TensorFlow's, ONNX's; Keras's
_TORCHS = re.compile(r"(?:^|\.)(?:weight|bias)_(?:ih|hh)(?:_l\d+)?(?:_reverse)?$")
_HIDDEN = {"hh", "recurrent"}


@cache
def said(key: str, name: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The parts that two names say, in the order of each; none where they say them in one order.

    >>> said("attn.to_kqv.weight", "attn.in_proj_weight"), said("norm_attn.weight", "attn_norm.weight")
    ((('k', 'q', 'v'), ('q', 'k', 'v')), ((), ()))
    >>> said("attn.add_q_proj.weight", "attn.q_add_proj.weight")
    ((), ())
    """
    both = _words(key), _words(name)
    one, other = (
        [part for own in words for part in (own if {*own} <= {*"qkv"} or sorted(own) in map(sorted, {*others} - {own}) else (own,))]
        for words, others in (both, both[::-1])
    )
    common = {part for part in one if part in other and part[0] != "#"} - _LAYERS
    first, second = (tuple(part for part in words if part in common) for words in (one, other))
    of_one_kind = common <= {*"qkv"} or common.isdisjoint("qkv")  # `add_q` and `q_add` name one projection
    return (first, second) if of_one_kind and first != second and len(first) == len(second) == len(common) else ((), ())


def _words(key: str) -> tuple[str, ...]:
    """What the last segment of a module's name says that says more than a layer's kind."""
    segments = map(concepts, unit_of(key).split(".")[::-1])
    return next((words for words in segments if not all(word[0] == "#" or word in SAYS_NOTHING for word in words)), ())


def become(first: Sequence[str], second: Sequence[str]) -> str:
    """That parts in one order come into another, in words."""
    return f"{', '.join(first)} become {', '.join(second)}"


def reorder(shape: Sequence[int], dim: int, first: Sequence[str], second: Sequence[str], sizes: Mapping[str, int] | None = None) -> str:
    """The adapters that bring the parts of a dim from one order into another; `sizes` where they are not equal."""
    sizes = sizes or dict.fromkeys(first, 1)
    least = gcd(*sizes.values())
    places = [part for part in first for _ in range(sizes[part] // least)]
    if len(places) == 2:
        return f"roll(dim={dim}, by={shape[dim] // 2})"
    index = [at for part in second for at, own in enumerate(places) if own == part]
    return f"reshape(shape={[*shape[:dim], len(places), -1, *shape[dim + 1 :]]}) | rows(index={index}, dim={dim}) | reshape"


def named(link: Link, sides: Sides) -> Sequence[Layout]:
    """The layouts of a link whose names say its parts in two orders: along each dim that may have them."""
    first, second = said(link.sources[0], link.targets[0])
    shape = sides.target.tensors[link.targets[0]].shape
    dims = [dim for dim, size in enumerate(shape) if first and size and size % len(first) == 0 and (dim < 2 or len(shape) < 4)]
    ways = {reorder(shape, dim, first, second): f"{become(first, second)} along dim {dim}" for dim in dims}
    return layouts(f"order of {', '.join(sorted(first))}", link, ways) if ways else ()


def gates(link: Link, sides: Sides) -> Sequence[Layout]:
    """The layouts of the fused gates of a cell that two implementations name; its hidden width tells how many gates they are."""
    key, name = link.sources[0], link.targets[0]
    torchs = [bool(_TORCHS.search(one)) for one in (key, name)]
    named = any(torchs) or (own_concepts(key) | own_concepts(name)) & {"ih", *_HIDDEN}
    if all(torchs) or word(key) == word(name) or not named:
        return ()
    shapes = (
        sorted(side.tensors[other].shape)
        for one, side in ((key, sides.source), (name, sides.target))
        for other in side.under(parent_of(one)) or side.tensors  # all, at the top of a model
        if own_concepts(other) & _HIDDEN
    )
    rows, small = next((shape[::-1] for shape in shapes if len(shape) == 2 and shape[1] in (3 * shape[0], 4 * shape[0])), (0, 0))
    shape = sides.target.tensors[name].shape
    if not small or rows not in shape:
        return ()
    here, there = (_CELLS[rows // small][: 1 if own else None] for own in torchs)
    ways = {reorder(shape, shape.index(rows), one, other): become(one, other) for one in here for other in there if one != other}
    return layouts(GATES, link, ways)
