"""Two trees laid on each other from the top down, the largest modules first.

Rule: of all modules that are not placed yet, the largest is looked at. Where the other side has one of the same contents they are a pair,
and what is in the one is looked for in the other only; where it has one that is much alike, so are they; otherwise the module is opened and
its children stand in its place. What is left over in a pair is tried again one level higher.
How alike two modules are, shapes and numbers say, and no names.
Nothing here knows what an adapter is: units that are left over go to `leftover`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import inf

from ckptsurgeon.matching.choose import Choice, choose
from ckptsurgeon.matching.evidence.score import Anchors, Clues
from ckptsurgeon.matching.frontier import Frontier
from ckptsurgeon.matching.leftover import Surroundings, pair_leftovers
from ckptsurgeon.matching.module_tree import Node
from ckptsurgeon.matching.pairing import Laid, Left, Record, laid, under
from ckptsurgeon.progress import beat

ALIKE = 0.7  # how much of the contents two modules share before one may stand for the other
_DEPTH = 60
_TABLE = 1_000_000  # pairs of two rows that are compared each with each
_ANCHORS = 12


@dataclass(frozen=True)
class _Done:
    """What was decided below two modules, to be repeated for two that are equal to them."""

    source: Node
    target: Node
    units: Sequence[Laid]
    modules: Sequence[Laid]
    lost: Sequence[Node]
    left: Left

    def repeat(self, choice: Choice, record: Record) -> Left:
        """Write the same decisions down for the two of another choice."""
        other_side = {
            id(old): new
            for before, now in ((self.source, choice.source), (self.target, choice.target))
            for old, new in zip(before.nodes, now.nodes, strict=True)
        }

        def same(nodes: Sequence[Node]) -> tuple[Node, ...]:
            return tuple(other_side[id(node)] for node in nodes)

        for rows, laids in ((record.units, self.units), (record.modules, self.modules)):
            for pair in laids:
                rivals = [other_side.get(id(node)) for node in pair.runner_up or ()]
                rival = (rivals[0], rivals[1]) if rivals and rivals[0] and rivals[1] else choice.runner_up
                rows.append(replace(pair, sources=same(pair.sources), targets=same(pair.targets), runner_up=rival))
        record.lost += same(self.lost)
        return Left(same(self.left.sources), same(self.left.targets))


def lay(source: Node, target: Node, clues: Clues) -> Record:
    """Lay one tree on the other."""
    record = Record()
    here, there = (Counter(unit.form for unit in node.units()) for node in (source, target))
    pass_ = _Pass(clues, record, frozenset(form for form, count in here.items() if there[form] == count))
    pass_.pair(Choice(source, target, inf, ("the whole",)), 0)
    return record


class _Pass:
    """One pass over both trees with the same clues; what was decided for two modules holds for all that are equal to them."""

    def __init__(self, clues: Clues, record: Record, balanced: frozenset[int]) -> None:
        self.clues, self.record, self.balanced = clues, record, balanced
        self.likenesses: dict[tuple[int, int], float] = {}
        self.done: dict[tuple[int, int, float], _Done] = {}

    def alike(self, first: Node, second: Node) -> float:
        key = (first.form, second.form)
        likeness = self.likenesses.get(key) if not (first.leaf or second.leaf) else None
        if likeness is None:
            likeness = self.likenesses[key] = alike(first, second)
        return likeness

    def pair(self, choice: Choice, depth: int) -> Left:
        """Two nodes go together: write it down, and place what is in them."""
        beat()
        source, target = choice.source, choice.target
        if source.leaf and target.leaf:
            self.record.units.append(laid(choice))
            return Left()
        self.record.modules.append(laid(choice))
        key = (source.inner, target.inner, choice.margin)
        if key in self.done:
            return self.done[key].repeat(choice, self.record)
        starts = len(self.record.units), len(self.record.modules), len(self.record.lost)
        left = self.place(choice, depth + 1)
        units, modules, lost = self.record.units[starts[0] :], self.record.modules[starts[1] :], self.record.lost[starts[2] :]
        self.done[key] = _Done(source, target, units, modules, lost, left)
        return left

    def place(self, above: Choice, depth: int) -> Left:
        """Pair what is in one module with what is in the other; what is left over is tried together once more at the end."""
        source, target = above.source, above.target
        sources, targets = source.children or (source,), target.children or (target,)
        exact = source.form == target.form
        here, there = Frontier(sources), Frontier(targets)
        left: tuple[list[Node], list[Node]] = ([], [])
        anchors = self.anchors(sources, targets)
        while here and there:
            largest = max(here.largest, there.largest)
            group = self._same(here, there, largest, anchors) or self._much_alike(here, there, largest, anchors)
            if group is None:
                _open(here, left[0], largest)
                _open(there, left[1], largest)
                continue
            if group.units and not (exact and group.even):  # others of that shape may come back from below
                _move(here, group.sources, left[0])
                _move(there, group.targets, left[1])
                continue
            for choice in group.choices:
                below = self.pair(under(choice, above), depth) if depth < _DEPTH else Left()
                left[0].extend(below.sources)
                left[1].extend(below.targets)
                here.remove(choice.source)
                there.remove(choice.target)
            for frontier, lost, units in ((here, group.lost(0), left[0]), (there, group.lost(1), left[1])):
                self.record.lost += lost
                for node in lost:
                    frontier.open(node)
                    units += [node] if node.leaf else []
        rest = Left((*left[0], *here.nodes.values()), (*left[1], *there.nodes.values()))
        placed, unplaced = pair_leftovers(rest, Surroundings(above, exact, depth == 1, self.balanced), self.clues)
        self.record.units += placed
        return unplaced

    def anchors(self, sources: Sequence[Node], targets: Sequence[Node]) -> list[tuple[Node, Node]]:
        """A few pairs of an earlier pass among nodes and their children."""
        there = {id(node) for target in targets for node in (target, *target.children)}
        pairs = (
            (node, self.clues.partners[id(node)])
            for source in sources
            for node in (source, *source.children)
            if id(node) in self.clues.partners
        )
        return list(islice(((near, partner) for near, partner in pairs if id(partner) in there), _ANCHORS))

    def _same(self, here: Frontier, there: Frontier, size: int, anchors: Anchors) -> _Group | None:
        """Nodes of the greatest size with equal contents on both sides; modules may be equal in size alone (parts fused or turned)."""
        largest_sources, largest_targets = here.of_size(size), there.of_size(size)
        forms = {node.form for node in largest_targets}
        form = next((node.form for node in largest_sources if node.form in forms), None)
        if form is not None:
            largest_sources, largest_targets = (
                [node for node in largest_sources if node.form == form],
                [node for node in largest_targets if node.form == form],
            )
            return self._group(largest_sources, largest_targets, here, there, anchors)
        source_modules, target_modules = (
            [node for node in largest_sources if not node.leaf],
            [node for node in largest_targets if not node.leaf],
        )
        spreads = [dict(node.spread) for node in largest_targets]
        if not any(dict(node.spread) in spreads for node in largest_sources):
            return None
        if source_modules and largest_targets and (target_modules or len(source_modules) == len(largest_targets)):
            return self._group(source_modules, target_modules or largest_targets, here, there, anchors)
        if target_modules and len(target_modules) == len(largest_sources):
            return self._group(largest_sources, target_modules, here, there, anchors)
        return None

    def _group(self, sources: Sequence[Node], targets: Sequence[Node], here: Frontier, there: Frontier, anchors: Anchors) -> _Group:
        if len(sources) != len(targets):
            if sources[0].leaf and targets[0].leaf:
                return _Group([], sources, targets)
            if len({node.folded for node in sources}) == len({node.folded for node in targets}) == 1:
                rows = here.in_row(sources[0]), there.in_row(targets[0])
                if len(rows[0]) > 1 or len(rows[1]) > 1:
                    return self._sequence(*rows)
        group = {id(node) for node in (*sources, *targets)}
        apart = [(source, target) for source, target in anchors if id(source) not in group and id(target) not in group]
        return _Group(choose(sources, targets, self.clues, apart), sources, targets)

    def _much_alike(self, here: Frontier, there: Frontier, size: int, anchors: Anchors) -> _Group | None:
        """The largest module and the one on the other side that is most like it, each with those that differ from it by numbers alone.

        Where others are just as much like one of the two, names and order choose between all of these.
        """
        for mine, theirs in ((here, there), (there, here)):
            for module in mine.of_size(size):
                candidates = [] if module.leaf else theirs.like(module)
                best = max(candidates, key=lambda node: self.alike(module, node), default=None)
                if best is None or not self._nearest(module, best, mine):
                    continue
                rivals = self._rivals(module, best, mine, candidates)
                own, other = rivals or (
                    [node for node in mine.in_row(module) if not node.leaf],
                    [node for node in theirs.in_row(best) if node.leaf == best.leaf],
                )
                sources, targets = (other, own) if mine is there else (own, other)
                return self._group(sources, targets, here, there, anchors) if rivals else self._sequence(sources, targets)
        return None

    def _rivals(self, module: Node, best: Node, mine: Frontier, candidates: Sequence[Node]) -> tuple[list[Node], list[Node]] | None:
        """The modules on both sides that are as good as the two; None where only those are that differ from them by numbers."""
        value = self.alike(module, best) - 1e-9
        other = [
            node for node in candidates if node.leaf == best.leaf and (self.alike(module, node) >= value or _holds_too(module, node, best))
        ]
        own = [node for node in mine.like(best) if not node.leaf and self.alike(node, best) >= value]
        if len({node.folded for node in other}) > 1:  # who loses one of these takes another: all that would are among the rivals
            near = (node for node in mine.like(best) if not node.leaf and self.alike(node, best) >= ALIKE)
            own = [node for node in near if self.alike(node, best) >= max(self.alike(node, rival) for rival in candidates) - 1e-9]
        return (own, other) if len({node.folded for node in own}) > 1 or len({node.folded for node in other}) > 1 else None

    def _nearest(self, module: Node, best: Node, mine: Frontier) -> bool:
        """Whether a module is much like another, and nothing beside or inside of them is more so."""
        value = self.alike(module, best)
        if value < (0.9 if best.leaf else ALIKE) or any(
            self.alike(node, best) > value + 1e-9 for node in mine.like(best) if node.folded != module.folded
        ):
            return False
        return not any(self.alike(node, best) > value for node in module.children) and not any(
            self.alike(module, node) > value for node in best.children
        )

    def _sequence(self, sources: Sequence[Node], targets: Sequence[Node]) -> _Group:
        """Pair two rows of modules that are alike but not equal, in the order of their numbers."""
        pairs, unique = self._in_step(sources, targets)
        same_names = all(sources[row].numbers == targets[column].numbers for row, column in pairs)
        margin = inf if unique else 1.0 if same_names else 0.5
        evidence = ("much alike",) if len(pairs) == 1 else ("much alike, in the order of their numbers",)
        choices = [Choice(sources[row], targets[column], margin, evidence) for row, column in pairs]
        return _Group(choices, [choice.source for choice in choices], [choice.target for choice in choices])

    def _in_step(self, sources: Sequence[Node], targets: Sequence[Node]) -> tuple[list[tuple[int, int]], bool]:
        """Which of two rows go together, and whether in this way only."""
        if len(sources) == len(targets) and all(
            self.alike(source, target) >= ALIKE for source, target in zip(sources, targets, strict=True)
        ):
            return [(position, position) for position in range(len(sources))], True
        if len(sources) * len(targets) > _TABLE:
            there = {target.numbers: position for position, target in enumerate(targets)}
            return [(position, there[source.numbers]) for position, source in enumerate(sources) if source.numbers in there], False
        table = [[self.alike(source, target) for target in targets] for source in sources]
        pairs = in_order(table)
        return pairs, len(sources) == len(targets) or only_way(table, pairs)


@dataclass(frozen=True)
class _Group:
    """Nodes that may be one another's, and which are."""

    choices: Sequence[Choice]
    sources: Sequence[Node]
    targets: Sequence[Node]

    @property
    def units(self) -> bool:
        """Whether all are units."""
        return self.sources[0].leaf and self.targets[0].leaf

    @property
    def even(self) -> bool:
        """Whether both sides have as many."""
        return len(self.sources) == len(self.targets)

    def lost(self, side: int) -> list[Node]:
        """Those of a side that no choice has."""
        taken = {id((choice.source, choice.target)[side]) for choice in self.choices}
        return [node for node in (self.sources, self.targets)[side] if id(node) not in taken]


def _move(frontier: Frontier, nodes: Iterable[Node], destination: list[Node]) -> None:
    for node in nodes:
        frontier.remove(node)
        destination.append(node)


def _open(frontier: Frontier, left: list[Node], size: int) -> None:
    """Put the children of the largest nodes in their place; units of that size are left over."""
    for node in frontier.of_size(size):
        frontier.open(node)
        left += [node] if node.leaf else []


def _holds_too(module: Node, first: Node, second: Node) -> bool:
    """Whether two modules hold all that another does: what more they hold does not tell which of them is that one."""
    both = (first.shapes, second.shapes)
    return not (first.leaf or second.leaf) and all(held.get(shape, 0) >= count for shape, count in module.shapes.items() for held in both)


def alike(first: Node, second: Node) -> float:
    """The share of contents that two modules have in common, 0 to 1; parts that are fused or turned count a little less."""
    if first.form == second.form:
        return 1.0
    a, b = first.weighed, second.weighed
    total = sum(a.values()) + sum(b.values())
    if not total:
        return 0.0
    shared = sum(min(weight, b[shape]) for shape, weight in a.items() if shape in b)
    exact = 2 * shared / total
    if first.leaf and second.leaf:
        return exact
    same = sum(min(elements, second.spread.get(inputs, 0)) for inputs, elements in first.spread.items())
    fused = 2 * same / (first.size + second.size)
    return max(exact, 0.95 * fused if fused > 0.9 else 0.0)


def in_order(table: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
    """The pairs (row, column), both rising, with the greatest sum of likeness; the earliest of equals."""
    rows, columns = len(table), len(table[0]) if table else 0
    best = [[0.0] * (columns + 1) for _ in range(rows + 1)]
    for row in range(rows - 1, -1, -1):
        for column in range(columns - 1, -1, -1):
            pair = best[row + 1][column + 1] + table[row][column] if table[row][column] >= 0.5 else -1.0
            best[row][column] = max(pair, best[row + 1][column], best[row][column + 1])
    pairs, row, column = [], 0, 0
    while row < rows and column < columns:
        if table[row][column] >= 0.5 and best[row][column] == best[row + 1][column + 1] + table[row][column]:
            pairs.append((row, column))
            row, column = row + 1, column + 1
        elif best[row][column] == best[row + 1][column]:
            row += 1
        else:
            column += 1
    return pairs


def only_way(table: Sequence[Sequence[float]], pairs: Sequence[tuple[int, int]]) -> bool:
    """Whether the latest pairs of equal sum are the same as the earliest."""
    turned = [list(reversed(row)) for row in reversed(table)]
    rows, columns = len(table), len(table[0]) if table else 0
    return sorted((rows - 1 - row, columns - 1 - column) for row, column in in_order(turned)) == list(pairs)
