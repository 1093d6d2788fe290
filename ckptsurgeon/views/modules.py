"""Modules with the sums of their tensors' numbers: a tree of keys by their dots, in which equal numbered modules are one row. Pure."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field

from ckptsurgeon.rules.patterns import literal
from ckptsurgeon.views.folding import Folded, fold

Numbers = tuple[int, ...]
Order = Callable[[str, Numbers], tuple[int, str]]
DEEPEST = 64  # segments of a key; what is beyond them is one name


@dataclass(frozen=True, slots=True)
class Module:
    """A row of the tree.

    Attributes:
        path: the module, or a pattern of equal ones (`layer.{0..11}`).
        name: the part of the path below its parent's row.
        level: its depth, from 0.
        numbers: the sums over all its tensors, those of equal modules added up.
        ends: whether its submodules are not shown.
    """

    path: str
    name: str
    level: int
    numbers: Numbers
    ends: bool


@dataclass(slots=True)
class _Node:
    numbers: Numbers
    children: dict[str, _Node] = field(default_factory=dict)
    is_key: bool = False  # a tensor has this name too
    alike: int = 0  # equal for nodes with equal names and numbers below


def modules(
    rows: Iterable[tuple[str, Numbers]],
    depth: int,
    order: Order | None = None,
    whole: Callable[[Numbers], bool] | None = None,
) -> list[Module]:
    """The modules of keys down to `depth` levels.

    Args:
        rows: keys with the numbers that are summed.
        depth: how many levels are shown.
        order: sorts the modules of one parent; by default they stay in order.
        whole: whether a module with such sums is shown as a whole, without its parts.

    Returns:
        The rows, each parent before its parts.

    >>> [(row.path, row.numbers) for row in modules([(f"h.{i}.{leaf}", (1,)) for i in range(3) for leaf in "wb"], 2)]
    [('h.{0..2}', (6,))]
    """
    root = _tree(rows)
    _name_alike(root, {})
    return list(_rows(root, "", 0, depth, 1, order, whole))


def _tree(rows: Iterable[tuple[str, Numbers]]) -> _Node:
    root = _Node(())
    for key, numbers in rows:
        node = root
        for segment in key.split(".", DEEPEST):
            node.numbers = _sum(node.numbers, numbers)
            below = node.children.get(segment)
            if below is None:
                below = node.children[segment] = _Node(())
            node = below
        node.numbers = _sum(node.numbers, numbers)
        node.is_key = True
    return root


def _sum(some: Numbers, other: Numbers) -> Numbers:
    return tuple(a + b for a, b in zip(some, other, strict=True)) if some else other


def _name_alike(node: _Node, known: dict[object, int]) -> int:
    """Number nodes so that equal ones have equal numbers."""
    below = tuple((name, _name_alike(child, known)) for name, child in node.children.items())
    node.alike = known.setdefault((below, node.numbers), len(known))
    return node.alike


def _rows(
    node: _Node,
    path: str,
    level: int,
    depth: int,
    times: int,
    order: Order | None,
    whole: Callable[[Numbers], bool] | None,
) -> Iterator[Module]:
    first: dict[Hashable, _Node] = {child.alike: child for child in reversed(node.children.values())}
    parts = [(row.key if row.count > 1 else literal(row.key), row.count, first[row.common]) for row in _folded(node)]
    if order is not None:
        parts.sort(key=lambda part: order(part[0], tuple(number * part[1] for number in part[2].numbers)))
    for name, count, child in parts:
        if not child.children and level:  # a tensor; those without a module are rows of their own
            continue
        while not child.is_key and len(child.children) == 1 and next(iter(child.children.values())).children:
            ((below, child),) = child.children.items()
            name = f"{name}.{literal(below)}"
        if not child.is_key and len(child.children) > 1 and len(rows := _folded(child)) == 1 and _first_child(child).children:
            # `layer` holds nothing but equal numbered modules
            name, count, child = f"{name}.{rows[0].key}", count * rows[0].count, _first_child(child)
        numbers = tuple(number * times * count for number in child.numbers)
        ends = level + 1 >= depth or not any(each.children for each in child.children.values()) or (whole is not None and whole(numbers))
        at = f"{path}.{name}" if path else name
        yield Module(at, name, level, numbers, ends)
        if not ends:
            yield from _rows(child, at, level + 1, depth, times * count, order, whole)


def _first_child(node: _Node) -> _Node:
    """The first submodule or tensor of a module that has any."""
    return next(iter(node.children.values()))


def _folded(node: _Node) -> list[Folded]:
    """A module's submodules and tensors by name, with equal numbered ones folded."""
    return fold((name, child.alike) for name, child in node.children.items())
