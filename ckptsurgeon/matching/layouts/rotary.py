"""Rotary queries and keys: the rows that are rotated together lie side by side (pairs), or half a head apart (halves).

Rule: a query's or key's projection, its bias and the norm of a head go together. Published implementations of one model differ (Meta's
and torchtune's against Hugging Face's), and no shape shows which it is. Names say that a model rotates: its frequencies, `wq` and `wk`.
"""

from __future__ import annotations

from collections.abc import Sequence

from ckptsurgeon.matching.evidence.vocabulary import concepts
from ckptsurgeon.matching.layouts.sides import Sides, heads_text, layouts, own_concepts, parent_of
from ckptsurgeon.planning.links import Layout, Link

KIND = "rotary"
_WORDS = {"halves": "rotated pairs become halves of each head", "pairs": "halves of each head become rotated pairs"}


def find(link: Link, sides: Sides) -> Sequence[Layout]:
    """The layouts of a query's or key's link; none for other links."""
    if set(link.op) & set("|("):
        return ()
    source_key, target_key = link.sources[0], link.targets[0]
    part = own_concepts(source_key) & own_concepts(target_key) & {"q", "k"}
    if len(part) != 1 or "cross" in {*concepts(source_key), *concepts(target_key)}:
        return ()
    if not sides.rotate or sides.source.has_own_positions(source_key) or sides.target.has_own_positions(target_key):
        return ()
    shape = sides.target.tensors[target_key].shape
    of_norm = bool((own_concepts(source_key) | own_concepts(target_key)) & {"norm"})
    rows, queries = shape[0], _rows(sides, target_key, "q")
    if not queries or not rows or (of_norm and len(shape) != 1):
        return ()
    if of_norm:
        keys = _rows(sides, target_key, next(iter(part)))
        heads = "1" if rows < min(queries, keys or queries) else heads_text(sides, (source_key, target_key), rows, queries)
    else:
        heads = heads_text(sides, (source_key, target_key), rows, queries)
    if heads.isdecimal() and rows // int(heads) % 2:
        return ()
    order = ("pairs", "halves") if sides.target.in_pairs and not sides.source.in_pairs else ("halves", "pairs")
    return layouts(KIND, link, {f"permute_rope(heads={heads}, to='{to}')": _WORDS[to] for to in order})


def _rows(sides: Sides, key: str, part: str) -> int:
    """How many rows the queries (or keys) of the same attention have; 0 where there are none of their own."""
    for name in sides.target.under(parent_of(key)):
        shape, words = sides.target.tensors[name].shape, own_concepts(name)
        if len(shape) == 2 and part in words and "norm" not in words and parent_of(name) == parent_of(key):
            return shape[0]
    return 0
