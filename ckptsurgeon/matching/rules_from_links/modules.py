"""From rows of renames to fewest rules for whole modules: a tree of the source's patterns, and for each of its nodes its best name.

Rule: a node's rule holds for all below that has none of its own, as a route holds for all addresses below (Draves et al. 1999,
Constructing optimal IP routing tables). What needs no rule, since it keeps its name, is the rule that stands at the root and costs nothing.

Links become lines first: numbered parts that go together are one pattern. What only the sources number is gathered (`experts.{e}.w1`), what
only the targets number is counted from 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from ckptsurgeon.adapters.chain import counted_at
from ckptsurgeon.adapters.table import parse_ops
from ckptsurgeon.planning.links import Link
from ckptsurgeon.rules.drafting.drafts import Draft
from ckptsurgeon.rules.drafting.numbers import cut, plain, segments
from ckptsurgeon.rules.drafting.rows import Line, Row
from ckptsurgeon.rules.patterns import literal

Path = tuple[str, ...]
Called = tuple[Path, ...]  # what a node is called: one path for each of several results
_PART = re.compile(r"\{[^{}]*\}")
_NAME = re.compile(r"[a-z]+")
_MOST = 4  # patterns that go together for each number
PART = "{e}"


@dataclass
class Node:
    """A module of the source, or a key; `own` is the row of a key, and `best` by what the node is called the rules needed below."""

    path: Path = ()
    children: dict[str, Node] = field(default_factory=dict)
    own: Row | None = None
    costs: dict[Called, float] = field(default_factory=dict)
    other: float = inf  # the rules needed where nothing that the node is called is of use
    rule: Called | None = None  # the rule that is then given here


def renamings(rows: Iterable[Row], added: str) -> list[Draft]:
    """The fewest renames that give each row its targets; none for what keeps its name, with `added` before it.

    In no order that matters: a rule for a part may stand after that for the whole.
    """
    root = Node()
    for row in rows:
        node = root
        for segment in segments(row.sources[0]):
            node = node.children.setdefault(segment, Node((*node.path, segment)))
        node.own = row
    _weigh(root)
    rows_by_rule: dict[tuple[Path, Called], list[Row]] = {}
    start: Called = (tuple(added.rstrip(".").split(".")) if added else (),)
    _assign_rows(root, start, ((), start), rows_by_rule)
    needed = [(path, called, own_rows) for (path, called), own_rows in rows_by_rule.items() if (path, called) != ((), start)]
    return [_draft(path, called, own_rows) for path, called, own_rows in needed]


def _needed(row: Row) -> Called:
    return tuple(tuple(segments(target)) for target in row.targets)


def _weigh(node: Node) -> None:
    """Fill in the costs of a node and all below."""
    for child in node.children.values():
        _weigh(child)
    if node.own is not None and not node.children:
        node.costs, node.other, node.rule = {_needed(node.own): 0.0}, 1.0, _needed(node.own)
        return
    without = sum(child.other for child in node.children.values()) + (node.own is not None)
    sums: dict[Called, float] = {}
    for segment, child in node.children.items():
        for called, cost in child.costs.items():
            above = tuple(path[:-1] for path in called)
            if all(path and path[-1] == plain(segment) for path in called) and _numbers_known(above, node.path):
                sums[above] = sums.get(above, without) + cost - child.other
    best = min(sums, key=lambda called: sums[called], default=None)
    if best is not None and sums[best] + 1 < without:
        node.other, node.rule = sums[best] + 1, best
    else:
        node.other = without
    node.costs = {called: cost for called, cost in sums.items() if cost < node.other}


def _numbers_known(called: Called, path: Path) -> bool:
    """Whether all numbers that the names count with stand in the path."""
    known = {name for segment in path for name in _NAME.findall("".join(_PART.findall(plain(segment))))}
    return all(set(_NAME.findall("".join(_PART.findall(segment)))) <= known for result in called for segment in result)


def _assign_rows(node: Node, called: Called, by: tuple[Path, Called], rows_by_rule: dict[tuple[Path, Called], list[Row]]) -> None:
    """Write down, from a node that is called so by a rule, which rule each row falls to."""
    if called not in node.costs and node.rule is not None:
        called, by = node.rule, (node.path, node.rule)
    if node.own is not None:
        if _needed(node.own) == called:
            rows_by_rule.setdefault(by, []).append(node.own)
        else:
            rows_by_rule.setdefault((node.path, _needed(node.own)), []).append(node.own)
    for segment, child in node.children.items():
        _assign_rows(child, tuple((*path, plain(segment)) for path in called), by, rows_by_rule)


def _draft(path: Path, called: Called, rows: Sequence[Row]) -> Draft:
    """A rename of a key, of all keys right in a module (`{p}`), or of all below it (`{**rest}`)."""
    lengths = {len(segments(row.sources[0])) - len(path) for row in rows}
    rest = "" if lengths == {0} else "{p}" if lengths == {1} else "{**rest}"
    results = tuple(_joined((*result, rest.replace("*", ""))) for result in called)
    return Draft((_joined((*path, rest)),), results, "", tuple(line for row in rows for line in row.lines))


def _joined(path: Iterable[str]) -> str:
    return ".".join(segment for segment in path if segment)


def line_of(link: Link, name: Mapping[str, str]) -> Line:
    """A link as a line, with the patterns of the source's names."""
    sources = tuple(name[key] for key in link.sources)
    targets = tuple(map(literal, link.targets))
    if len(sources) > 2:  # two are as short by name
        sources = numbered(sources) or sources
    elif len(targets) > 1 and counted_at(parse_ops(link.op)) is not None:
        targets = numbered(targets, start=0) or targets
    return Line(sources, targets, link.op)


def numbered(keys: Sequence[str], start: int | None = None) -> tuple[str, ...] | None:
    """Keys that are the same few again and again under rising numbers, as these few with `{e}` for the number; else None.

    >>> numbered(["x.0.a", "x.0.b", "x.1.a", "x.1.b"])
    ('x.{e}.a', 'x.{e}.b')
    """
    for each in range(1, min(_MOST, len(keys) // 2) + 1):
        if len(keys) % each == 0:
            patterns = [_counted(keys[offset::each], start) for offset in range(each)]
            firsts = {pattern[1] for pattern in patterns if pattern is not None}
            if None not in patterns and len(firsts) == 1:
                return tuple(pattern[0] for pattern in patterns if pattern is not None)
    return None


def _counted(keys: Sequence[str], start: int | None) -> tuple[str, int] | None:
    """Keys that differ in one number, which rises by one each, as a pattern, and the first number."""
    cuts = [cut(key) for key in keys]
    if len({key_cut.texts for key_cut in cuts}) > 1:
        return None
    varying = [slot for slot, column in enumerate(zip(*(key_cut.numbers for key_cut in cuts), strict=True)) if len(set(column)) > 1]
    if len(varying) != 1:
        return None
    column = [key_cut.numbers[varying[0]] for key_cut in cuts]
    if column != list(range(column[0], column[0] + len(column))) or start not in (None, column[0]):
        return None
    parts = [PART if slot == varying[0] else str(number) for slot, number in enumerate(cuts[0].numbers)]
    return cuts[0].written(parts), column[0]
