"""Queries, keys and values in one matrix: one after the other (in turn), or those of each head, or of each group of heads, together.

Rule: it is sure only where a convention says so: torch's own `in_proj_weight`, GPT-2's `c_attn`, and `qkv` in plain vision transformers lie
in turn everywhere. Two whole matrices lie alike where both sides call them the same, by a word that is not used for several layouts.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ckptsurgeon.matching.evidence.vocabulary import said_by_place
from ckptsurgeon.matching.layouts.orders import become, reorder, said
from ckptsurgeon.matching.layouts.sides import Sides, heads_text, layouts, own_concepts, parent_of, unit_of, word
from ckptsurgeon.matching.module_tree import squeezed
from ckptsurgeon.planning.links import Layout, Link

KIND = "qkv"
_IN_TURN = re.compile(r"in_proj|c_attn")  # the same layout wherever the word is used
_PLAIN = re.compile(r"(?:to_)?q?kv|in_proj")  # in turn in plain vision transformers
_SEVERAL = re.compile(r"query_key_value|linear_qkv|wqkv|attn|key_value")  # words that published implementations use for several layouts
_FLAT = r"reshape\(shape=\[[\d, ]+\]\)"  # without dims of one
_CUT = re.compile(
    rf"(?P<before>(?:transpose \| )?)(?P<flat>(?:{_FLAT} \| )?)(?P<how>chunk|concat)\(dim=(?P<dim>\d)\)"
    r"(?P<after>(?: \| transpose)?)(?P<last>(?: \| reshape)?)"
)
_SOME = re.compile(r"chunk\((of=3, parts=\[\d, \d\])\)")
_TURN, _GROUP, _HEAD = "in turn", "each group's together", "each head's together"


def find(link: Link, sides: Sides) -> Sequence[Layout]:
    """The layouts of a link between a fused matrix, or its bias, and its parts or another such."""
    if len(link.sources) == len(link.targets) == 1:
        return _whole(link, sides)
    if _SOME.fullmatch(link.op):
        return _some(link, sides)
    wholes, parts = (link.sources, link.targets) if len(link.sources) == 1 else (link.targets, link.sources)
    names = [own_concepts(part) & {"q", "k", "v"} for part in parts]
    cut = _CUT.fullmatch(link.op)
    count = len(parts) // 3  # of heads, where each has its own
    of_heads = count > 1 and names == [{part} for part in "qkv" for _ in range(count)]
    if len(wholes) != 1 or cut is None or not (of_heads or names in ([{"q"}, {"k"}, {"v"}], [{"k"}, {"v"}])):
        return ()
    if _is_in_turn((word(wholes[0]),), sides):
        return ()
    if of_heads:
        by_head = tuple(part for at in range(count) for part in parts[at::count])
        keys = (link.sources, by_head) if parts is link.targets else (by_head, link.targets)
        return Layout(KIND, _TURN, link.sources, link.targets, link.op), Layout(KIND, _HEAD, *keys, link.op)
    ways = _parted(link, sides, wholes[0], cut)
    own, order = said(wholes[0], "qkv"[-len(parts) :])  # the whole's name may say another order
    changed = tuple(parts[order.index(part)] for part in own)
    told = ((", ".join(own), (link.sources, changed) if parts is link.targets else (changed, link.targets)),) if own else ()
    return (*ways, *(Layout(KIND, f"{way.words}, {words}", *keys, way.op) for words, keys in told for way in ways))


def _some(link: Link, sides: Sides) -> Sequence[Layout]:
    """The layouts of a fused bias of which the target has two parts: those of the matrix beside it."""
    whole = any("qkv" in own_concepts(key) for key in _beside(sides, link.targets[0]))
    if whole or _is_in_turn((word(link.sources[0]),), sides):
        return ()
    size = sides.target.tensors[link.targets[0]].shape[0]
    heads = heads_text(sides, (link.sources[0], link.targets[0]), size, size)
    some = _SOME.sub(r"chunk(dim=1, \1)", link.op)
    by_head = Layout(KIND, _HEAD, link.sources, link.targets, f"reshape(shape=[{heads}, 3, -1]) | {some} | reshape")
    return Layout(KIND, _TURN, link.sources, link.targets, link.op), by_head


def _is_in_turn(names: Sequence[str], sides: Sides) -> bool:
    plain = sides.source.is_plain_vision and sides.target.is_plain_vision
    return all(_IN_TURN.fullmatch(name) or (plain and _PLAIN.fullmatch(name)) for name in names)


def _parted(link: Link, sides: Sides, whole: str, cut: re.Match[str]) -> Sequence[Layout]:
    """In turn, or by head (group), for a matrix that is cut or joined along a dim."""
    cuts = cut["how"] == "chunk"
    parts, side = (link.targets, sides.target) if cuts else (link.sources, sides.source)
    dim = int(cut["dim"])
    turned = bool(cut["after"] if cuts else cut["before"])
    shapes = [side.tensors[part].shape[::-1] if turned else side.tensors[part].shape for part in parts]
    if cut["flat"] or cut["last"]:
        shapes = list(map(squeezed, shapes))
    sizes = [shape[dim] for shape in shapes]
    least = min(sizes)
    if not least or any(size % least for size in sizes):
        return ()
    each = [size // least for size in sizes]
    heads = heads_text(sides, (link.sources[0], link.targets[0]), least, max(sizes))
    rest = shapes[0][:dim], shapes[0][dim + 1 :]
    last = "reshape" if not (cuts and turned) else f"reshape(shape={[*rest[0], -1, *rest[1]]})"
    if cuts:
        by_part = f", sizes={each}" if len(set(each)) > 1 else ""
        middle = f"{_reshape(rest, heads, str(sum(each)), '-1')} | chunk(dim={dim + 1}{by_part}) | {last}"
    else:
        middle = f"{_reshape(rest, heads, '-1')} | concat(dim={dim + 1}) | reshape"
    words = _HEAD if len(set(each)) == 1 else _GROUP
    grouped = Layout(KIND, words, link.sources, link.targets, f"{cut['before']}{middle}{cut['after']}")
    return Layout(KIND, _TURN, link.sources, link.targets, link.op), grouped


def _reshape(rest: tuple[Sequence[int], Sequence[int]], *sizes: str) -> str:
    return f"reshape(shape=[{', '.join([*map(str, rest[0]), *sizes, *map(str, rest[1])])}])"


def _whole(link: Link, sides: Sides) -> Sequence[Layout]:
    """The layouts between two fused matrices: alike, in turn or by head, and with the parts in the order that both names say."""
    source_key, target_key = link.sources[0], link.targets[0]
    words, concepts = (word(source_key), word(target_key)), own_concepts(source_key) | own_concepts(target_key)
    first, second = said(source_key, target_key)
    if not {*first} <= {*"qkv"}:
        first = second = ()
    if not (first or concepts & {"qkv", "kv"}) or set(link.op) & set("|("):
        return ()
    if not first and ((words[0] == words[1] and not _SEVERAL.fullmatch(words[0])) or _is_in_turn(words, sides)):
        return ()
    shape = sides.target.tensors[target_key].shape
    if not shape:
        return ()
    outs = (key for key in _beside(sides, target_key) if "out" in own_concepts(key) | said_by_place(unit_of(key)))
    parts = len(first) or (2 if "kv" in concepts else 3)
    widths = (sides.target.tensors[key].shape[1:] for key in outs)
    queries = next((width[0] for width in widths if len(width) == 1), shape[0] // parts)
    rows, order = parts * queries, become(first, second)
    dim = shape.index(rows) if rows in shape else 0
    others = (shape[dim] - queries * ("q" in first)) // max(1, len({*first} - {"q"}))
    sizes = {part: queries if part == "q" else others for part in first}
    ways: dict[str, Sequence[str]] = {}
    if first and others > 0 and sum(sizes.values()) == shape[dim]:
        ways[order] = [reorder(shape, dim, first, second, sizes)]
    if rows in shape:
        heads = heads_text(sides, (source_key, target_key), queries, queries)
        swap = f"permute(dims={[*range(dim), dim + 1, dim, *range(dim + 2, len(shape) + 2)]})"
        by_head, in_turn = (_reshape((shape[:dim], shape[dim + 1 :]), *of, "-1") for of in ([heads, str(parts)], [str(parts), heads]))
        turns = {"each head's together become in turn": by_head, "in turn become each head's together": in_turn}
        ways |= {turn: [cut, swap, "reshape"] for turn, cut in turns.items()}
        if first:
            picks = [f"rows(index={[*map(first.index, second)]}, dim={at})" for at in (dim + 1, dim)]
            ways |= {f"{order} in each head": [by_head, picks[0], "reshape"]}
            ways |= {f"{turn}, {order}": [cut, pick, swap, "reshape"] for (turn, cut), pick in zip(turns.items(), picks, strict=True)}
    return layouts(KIND, link, {" | ".join(ops): told for told, ops in ways.items()})


def _beside(sides: Sides, key: str) -> Sequence[str]:
    return sides.target.under(parent_of(key))
