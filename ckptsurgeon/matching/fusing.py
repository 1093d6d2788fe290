"""Units that are left over and may be one another's parts: fused and split matrices, stacked experts. Also turned (transposed) ones.

Rule: shapes must add up exactly, and the parts must be of one module, or of numbered ones; their order is told by their names (q, k, v;
gate, up), and is uncertain where names do not tell it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from math import inf, prod

from ckptsurgeon.matching.choose import choose
from ckptsurgeon.matching.evidence.gates import recurrent_rows, side_of, torchs_side
from ckptsurgeon.matching.evidence.score import Clues
from ckptsurgeon.matching.evidence.support import GATES
from ckptsurgeon.matching.evidence.vocabulary import SAYS_NOTHING, concepts, gated, implied
from ckptsurgeon.matching.module_tree import Node, fold, is_float
from ckptsurgeon.planning.links import ENOUGH

# Parts that make a whole, in the order in which the field lays them side by side.
_ORDERS = (("q", "k", "v"), ("q", "k", "v", "mlp"), ("k", "v"), ("gate", "up"), ("q", "kv"))
_ACROSS = (("q", "k", "v", "mlp"),)  # the same, where the parts are not of one module, but of one block


@dataclass(frozen=True)
class Fused:
    """Units that together are one of the other side's, in order."""

    sources: tuple[Node, ...]
    targets: tuple[Node, ...]
    margin: float
    evidence: tuple[str, ...]


def fuse(sources: Sequence[Node], targets: Sequence[Node], clues: Clues, top: bool = True) -> list[Fused]:
    """Find them among what is left over of two modules that go together; `top` says that nothing more can come from outside of these."""
    results: list[Fused] = []
    free_sources, free_targets = ([node for node in nodes if is_float(node.largest)] for nodes in (sources, targets))
    for wholes, units, turned in ((free_targets, free_sources, False), (free_sources, free_targets, True)):
        named, waiting = _named(wholes, units, clues, turned, top)
        results += named
        done = {id(node) for fused in named for node in (*fused.sources, *fused.targets)}
        wholes[:], units[:] = ([node for node in nodes if id(node) not in done] for nodes in (wholes, units))
        pieces = _Pieces(units, wholes)
        for whole in [whole for whole in wholes if len(whole.main) > 1 and id(whole) not in waiting]:
            match = pieces.of(whole)
            if match:
                parts, margin, evidence = match
                results.append(Fused((whole,), parts, margin, (evidence,)) if turned else Fused(parts, (whole,), margin, (evidence,)))
                pieces.taken |= {id(part) for part in parts}
                wholes.remove(whole)
        units[:] = [unit for unit in units if id(unit) not in pieces.taken]
    by_shape: dict[tuple[int, ...], tuple[list[Node], list[Node]]] = {}
    for side, nodes in enumerate((free_sources, free_targets)):
        for node in nodes:
            if len(node.main) > 1:
                by_shape.setdefault(_either_way(node.main), ([], []))[side].append(node)
    for source_units, target_units in by_shape.values():
        if (
            source_units
            and target_units
            and all(turns(unit.main, counterpart.main) for unit in source_units for counterpart in target_units)
        ):
            chosen = choose(source_units, target_units, clues)
            results += [Fused((choice.source,), (choice.target,), choice.margin, (*choice.evidence, "turned")) for choice in chosen]
    return results


def _named(wholes: Sequence[Node], units: Sequence[Node], clues: Clues, turned: bool, top: bool) -> tuple[list[Fused], set[int]]:
    """Wholes and the parts that names tell; and the wholes that may find theirs higher up."""
    shapes = {whole.main for whole in wholes if len(whole.main) > 1}
    rows: list[tuple[Node, ...]] = []
    for row in sorted(_named_rows([unit for unit in units if len(unit.main) > 1]), key=len, reverse=True):
        if any(_adds_up(shape, row) for shape in shapes) and not any(set(map(id, row)) & set(map(id, longer)) for longer in rows):
            rows.append(row)
    by_shape: dict[tuple[tuple[int, ...], str], list[Node]] = {}
    for whole in wholes if rows else ():
        if len(whole.main) > 1:
            by_shape.setdefault((whole.main, torchs_side(whole)), []).append(whole)
    results: list[Fused] = []
    waiting: set[int] = set()
    for (shape, side), same_shape in by_shape.items():
        fits = {id(row[0]): row for row in rows if _adds_up(shape, row) and (not side or side_of(row) in ("", side))}
        if not fits:
            continue
        firsts = [row[0] for row in fits.values()]
        chosen = choose(same_shape, firsts, clues) if turned else choose(firsts, same_shape, clues)
        if not top and len(same_shape) != len(firsts) and any(choice.margin < ENOUGH for choice in chosen):
            waiting |= {id(whole) for whole in same_shape}
            continue
        for choice in chosen:
            parts, whole = fits[id(choice.target if turned else choice.source)], choice.source if turned else choice.target
            evidence = (
                GATES if side_of(parts) else "its parts side by side",
                *(choice.evidence if len(same_shape) + len(firsts) > 2 else ()),
            )
            sides = ((whole,), parts) if turned else (parts, (whole,))
            agree = _names_agree(whole, parts) and (len(parts) < 6 or _may_hold(whole, parts))
            margin, words = (choice.margin, ()) if agree else (min(choice.margin, 0.5), ("no word in common",))
            results.append(Fused(sides[0], sides[1], margin, (*evidence, *words)))
    return results, waiting


def _names_agree(whole: Node, parts: Sequence[Node]) -> bool:
    """Whether a whole and its parts have a word in common; the gates of a cell, the side of it, and the whole is torch's own."""
    side = side_of(parts)
    return side == torchs_side(whole) if side else bool(_distinctive_words(whole) & set().union(*map(_distinctive_words, parts)))


def _distinctive_words(node: Node) -> set[str]:
    """What a path says beyond numbers and words for anything."""
    return {word for word in implied(concepts(node.path)) if not word.startswith("#")} - SAYS_NOTHING


def _named_rows(units: Sequence[Node]) -> Iterator[tuple[Node, ...]]:
    """The units of one module that names tell to be parts of a whole, in order; their names differ by that alone."""
    for around, orders in ((_parent, _ORDERS), (_block, _ACROSS)):
        for family in _families(units, around):
            yield from _rows_of(family, around, orders)
    for family in _families(units, _parent):
        yield from recurrent_rows(family)
    for family in _families(units, _heads):
        rows = [[unit for unit in family if concepts(unit.name) == (part,)] for part in "qkv"]
        if len(rows[0]) > 1 and len({*map(len, rows)}) == 1:  # of each head, in a list
            yield tuple(unit for row in rows for unit in sorted(row, key=lambda unit: unit.numbers))


def _parent(unit: Node) -> str:
    return unit.parent


def _heads(unit: Node) -> str:
    """The list whose member holds a unit directly; the unit's own path where none does."""
    around, _, member = unit.parent.rpartition(".")
    return around if member.isdigit() else unit.path


def _block(unit: Node) -> str:
    """The member of the last numbered list in a path, without what stands below it."""
    parts = unit.path.split(".")
    last = max((at for at, part in enumerate(parts[:-1]) if part.isdigit()), default=-1)
    return ".".join(parts[: last + 1])


def _rows_of(family: Sequence[Node], around: Callable[[Node], str], orders: Sequence[tuple[str, ...]]) -> Iterator[tuple[Node, ...]]:
    for order in orders:
        rows: dict[frozenset[str], dict[str, list[Node]]] = {}
        for unit in family:
            words = frozenset(concepts(unit.path[len(around(unit)) :].lstrip(".")))
            part = words & set(order)
            if len(part) == 1:
                rows.setdefault(words - part, {}).setdefault(next(iter(part)), []).append(unit)
        for row in (*rows.values(), *(_merged(rows) if len(rows) > 1 else ())):
            if all(len(row.get(word, ())) == 1 for word in order):
                yield tuple(row[word][0] for word in order)


def _merged(rows: dict[frozenset[str], dict[str, list[Node]]]) -> list[dict[str, list[Node]]]:
    """All rows as one, for parts whose other words differ; only where no row is whole by itself."""
    merged: dict[str, list[Node]] = {}
    for row in rows.values():
        for word, units in row.items():
            merged.setdefault(word, []).extend(units)
    return [merged] if all(len(row) < len(merged) for row in rows.values()) else []


def _adds_up(whole: tuple[int, ...], parts: Sequence[Node]) -> bool:
    return sum(prod(part.main) for part in parts) == prod(whole) and all(_is_part(whole, part.main) for part in parts)


def _either_way(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The same for a matrix and its transpose, and for a linear layer and a convolution over the same window."""
    return tuple(sorted((shape[0], prod(shape[1:]))))


def turns(first: tuple[int, ...], second: tuple[int, ...]) -> bool:
    """Whether a matrix is the other transposed, or a linear layer over a flattened window (same rows, same elements)."""
    if len(first) < 2 or len(second) < 2 or first == second:
        return False
    return (len(first) == 2 and first == second[::-1]) or (
        len(first) != len(second) and first[0] == second[0] and prod(first) == prod(second)
    )


_Match = tuple[tuple[Node, ...], float, str]


class _Pieces:
    """Units that may be parts of a whole: those of one module by the dimensions that they may share with it, and rows of numbered ones."""

    def __init__(self, units: Sequence[Node], wholes: Sequence[Node]) -> None:
        self.taken: set[int] = set()
        self.shapes = Counter(whole.main for whole in wholes)
        self.gates = gated([whole.name for whole in wholes]), gated([unit.name for unit in units])
        matrices = [unit for unit in units if len(unit.main) > 1]
        self.by_edge: dict[tuple[int, ...], dict[int, list[Node]]] = {}
        for index, family in enumerate(_families(matrices, lambda unit: unit.parent)):
            if len(family) > 1:
                for unit in family:
                    for edge in (*_edges(unit.main), *_edges(unit.main[::-1])):
                        self.by_edge.setdefault(edge, {})[index] = family
        self.rows: dict[int, list[list[Node]]] = {}
        lists = [sorted(row, key=lambda unit: unit.numbers) for row in _families([unit for unit in units if unit.name.isdigit()], _list_of)]
        lists = [row for row in lists if len(row) > 1 and [int(unit.name) for unit in row] == list(range(len(row)))]
        for row in _families(matrices, _without_numbers):
            self.rows.setdefault(len(row), []).append(sorted(row, key=lambda unit: unit.numbers))
        for row in lists:
            self.rows.setdefault(len(row), []).append(row)
        self.lists = lists
        self.single = lists + [sorted(row, key=lambda unit: unit.numbers) for row in _families(matrices, _row_of)]

    def of(self, whole: Node) -> _Match | None:
        """The units that add up to a whole, in order, with a margin and words."""
        told = None
        if len(whole.main) == 2:
            told = _in_a_row(whole, [row for row in self.lists if not any(id(unit) in self.taken for unit in row)])
            if told and told[1] == inf:
                return told
        families = {index: family for edge in _edges(whole.main) for index, family in self.by_edge.get(edge, {}).items()}
        for _, family in sorted(families.items()):
            group = [unit for unit in family if unit.size < whole.size and id(unit) not in self.taken]
            for parts, margin in _orders(group, whole) if len(group) > 1 else ():
                if _adds_up(whole.main, parts) and _may_hold(whole, parts):
                    return parts, margin, "its parts side by side"
        if len(whole.main) == 2:
            told = _in_a_row(whole, [row for row in self.single if not any(id(unit) in self.taken for unit in row)])
        if told or len(whole.main) not in (2, 3):
            return told
        rows = [row for row in self.rows.get(whole.main[0], []) if len(row[0].main) > 1 or _may_hold(whole, row)]
        words = {*concepts(whole.name), self.gates[0].get(whole.name, whole.name)}
        left = [row for row in rows if not any(id(unit) in self.taken for unit in row)]
        return _stacked(whole, words, self.gates[1], self.shapes[whole.main] == 1, left)


def _edges(shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """A shape without one of its dimensions, for each."""
    return [(*shape[:dim], *shape[dim + 1 :]) for dim in range(len(shape))]


def _families(units: Sequence[Node], key: Callable[[Node], str]) -> list[list[Node]]:
    groups: dict[str, list[Node]] = {}
    for unit in units:
        groups.setdefault(key(unit), []).append(unit)
    return list(groups.values())


def _orders(group: Sequence[Node], whole: Node) -> Iterator[tuple[tuple[Node, ...], float]]:
    """Choices of a family's members in an order, where words do not tell it."""
    if {"gate", "up"} <= set(concepts(whole.name)) and len({unit.folded for unit in group}) == 1 < len(group) < 4:
        yield tuple(sorted(group, key=lambda unit: unit.numbers)[:2]), inf  # the gate is the first, by custom
    if "qkv" in concepts(whole.name) and len({unit.folded for unit in group}) == 1 and len(group) in (3, 4):
        yield tuple(sorted(group, key=lambda unit: unit.numbers)[:3]), inf  # query, key, value, and the output after them, by custom
    if len(group) <= 6:
        for count in range(len(group), 1, -1):
            for parts in combinations(group, count):
                yield parts, 0.5


def _is_part(whole: tuple[int, ...], part: tuple[int, ...]) -> bool:
    """Whether a part can lie beside others in a whole: all of its dimensions but one are the whole's, as they are or turned."""
    return len(whole) == len(part) and any(sum(a != b for a, b in zip(whole, turned, strict=True)) == 1 for turned in (part, part[::-1]))


def _in_a_row(whole: Node, rows: Sequence[Sequence[Node]]) -> _Match | None:
    """Numbered units that are one matrix side by side, in their order; the row whose names say most of what the whole's do."""
    alike = [row for row in rows if len(row) > 1 and len({unit.main for unit in row}) == 1]
    fits = [row for row in alike if _may_hold(whole, row) and _adds_up(whole.main, row)]
    if not fits:
        return None
    whole_words = set(concepts(whole.path))
    shares = [
        len(whole_words & row_words) / len(whole_words | row_words)
        for row in fits
        for row_words in (set(concepts(_row_of(row[0]).replace("{}", ""))),)
    ]
    best = max(shares)
    row = fits[shares.index(best)]
    said = best > 0 or not row[0].name.isdigit()
    return tuple(row), inf if said and shares.count(best) == 1 else 0.5, "one for each number, side by side"


def _may_hold(whole: Node, parts: Sequence[Node]) -> bool:
    """Whether parts are of one member of each list, or in more lists than their whole: a layer does not hold one part of each layer.

    What is looked up in holds no layers.
    """
    if any(_is_table(part) != _is_table(whole) for part in parts):
        return False
    members = [[part for part in unit.path.split(".") if part.isdigit()] for unit in (whole, *parts)]
    return all(parts_of == members[1] for parts_of in members[1:]) or len(members[1]) > len(members[0])


def _is_table(unit: Node) -> bool:
    """Whether a unit, or the list that it is of, is called after what is looked up in it."""
    name = unit.path.rstrip(".0123456789").rpartition(".")[2]
    return bool({"tok", "embed", "pos"} & {*concepts(name)}) and "patch" not in concepts(unit.path)


def _list_of(unit: Node) -> str:
    """What stands before the number that a unit is called by."""
    return unit.path.removesuffix(unit.name)


def _row_of(unit: Node) -> str:
    """A path without the last number that is a whole part of it, the name of the unit aside."""
    parts = unit.path.split(".")
    last = max((at for at, part in enumerate(parts[:-1]) if part.isdigit()), default=None)
    if last is None:
        return _without_numbers(unit)
    return ".".join([*parts[:last], "{}", *parts[last + 1 :]])


def _stacked(whole: Node, whole_words: set[str], gates: Mapping[str, str], alone: bool, rows: Sequence[Sequence[Node]]) -> _Match | None:
    """Numbered units of one shape that are stacked, or pairs of them that are first laid side by side.

    `gates` says what `w1`, `w2` and `w3` stand for, `alone` that no other whole has the shape.
    """
    rest = list(whole.main[1:])
    words = {
        id(row[0]): {*concepts(_list_of(row[0]) if row[0].name.isdigit() else row[0].name), gates.get(row[0].name, "")} for row in rows
    }
    fits = [row for row in rows if list(row[0].main) == rest] or [row for row in rows if sorted(row[0].main) == sorted(rest)]
    if fits:
        shared = [len(whole_words & words[id(row[0])]) for row in fits]
        row = fits[shared.index(max(shared))]
        told = (
            shared.count(max(shared)) == 1 and max(shared) > 0
            if row[0].name.isdigit()
            else (len(fits) == 1 and (alone or max(shared) > 0)) or (len(fits) > 1 and shared.count(max(shared)) == 1)
        )
        return tuple(row), inf if told else 0.5, "one for each number, stacked"
    for first, second in ((first, second) for first in rows for second in rows if first is not second):
        if 2 * prod(first[0].main) == prod(rest) and first[0].main == second[0].main:
            named = "gate" in words[id(first[0])] and "up" in words[id(second[0])]
            if named or len(rows) == 2:
                return tuple(unit for pair in zip(first, second, strict=True) for unit in pair), inf if named else 0.5, "stacked pairs"
    return None


def _without_numbers(unit: Node) -> str:
    return f"{unit.folded.removesuffix(fold(unit.name))}{unit.name}"
