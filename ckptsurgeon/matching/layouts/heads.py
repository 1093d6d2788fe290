"""How many heads an attention has: told by shapes beside it, or not; then a variable stands in the text.

Rule: a number is written only where something says it. `heads` and `kv_heads` are the variables that a person sets.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from ckptsurgeon.matching.evidence.vocabulary import concepts
from ckptsurgeon.matching.layouts.sides import Side, Sides, own_concepts, parent_of

_OF_A_HEAD = re.compile(r"rel_pos_[hwt]$")  # a table that is multiplied with one head's queries, and not one with a column for each head


def heads_text(sides: Sides, keys: tuple[str, str], rows: int, all_rows: int) -> str:
    """The number of heads that have `rows` rows in all, as text: a variable where nothing tells it, `kv_heads` for fewer keys and values.

    Args:
        sides: both sides.
        keys: a key of the source and one of the target, of the same attention.
        rows: rows of what is looked at: queries, or keys.
        all_rows: rows of the queries.
    """
    both = zip((sides.source, sides.target), keys, strict=True)
    size = next((size for side, key in both for size in _head_sizes(side, key, all_rows) if rows % size == 0), 0)
    return str(rows // size) if size else "heads" if rows == all_rows else "kv_heads"


def _head_sizes(side: Side, key: str, rows: int) -> Iterator[int]:
    """What tells the size of a head in the attention of a key: a norm of one head's queries, a table with a column for each head, or the
    frequencies of a rotation."""
    parent = parent_of(key)
    beside = side.under(parent)
    for name in beside:
        shape, words = side.tensors[name].shape, set(concepts(name[len(parent) :]))
        if len(shape) == 1 and "norm" in words and {"q", "k"} & words and shape[0] < rows and rows % shape[0] == 0:
            yield shape[0]
        if len(shape) == 2 and "relpos" in words and rows % shape[1] == 0 and shape[1] < rows and not own_concepts(name) & {"q", "k", "v"}:
            yield shape[1] if _OF_A_HEAD.search(name) else rows // shape[1]
    for name in side.frequencies:
        size = 2 * side.tensors[name].shape[0]
        if rows % size == 0:
            yield size
