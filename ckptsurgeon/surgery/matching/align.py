"""Two trees laid on each other from the top down, the largest modules first.

Rule: of all modules that are not placed yet, the largest is looked at. Where the other side has one of the same contents they are a pair,
and what is in the one is looked for in the other only; where it has one that is much alike, so are they; otherwise the module is opened and
its children stand in its place. What is left over in a pair is tried again one level higher.
Nothing here knows what an adapter is: leaves that are left over go to `fusing`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from math import inf

from ckptsurgeon.surgery.matching.forest import Node
from ckptsurgeon.surgery.matching.frontier import Frontier
from ckptsurgeon.surgery.matching.fusing import Fused, fuse
from ckptsurgeon.surgery.matching.ties import ENOUGH, Anchors, Choice, Clues, choose
from ckptsurgeon.surgery.matching.words import concepts, conflict

ALIKE = 0.7  # how much of the contents two modules share before one may stand for the other
UNSAID = "names do not say so"
_DEPTH = 60
_TABLE = 1_000_000  # pairs of two rows that are compared each with each
_ANCHORS = 12


@dataclass(frozen=True)
class Laid:
    """One decision: units (or modules, for the record) of both sides that go together."""

    sources: tuple[Node, ...]
    targets: tuple[Node, ...]
    margin: float
    evidence: tuple[str, ...]
    runner_up: tuple[Node, Node] | None = None


@dataclass
class Record:
    """What a pass decides: pairs of units, and pairs of modules, with their margins, and modules that lost against a look-alike."""

    units: list[Laid] = field(default_factory=list)
    modules: list[Laid] = field(default_factory=list)
    lost: list[Node] = field(default_factory=list)


@dataclass(frozen=True)
class Left:
    """What found no partner, and may be tried higher up."""

    sources: tuple[Node, ...] = ()
    targets: tuple[Node, ...] = ()


@dataclass(frozen=True)
class _Done:
    """What was decided below two modules, to be repeated for two that are equal to them."""

    source: Node
    target: Node
    units: Sequence[Laid]
    modules: Sequence[Laid]
    lost: Sequence[Node]
    left: Left

    def repeat(self, source: Node, target: Node, record: Record) -> Left:
        """Write the same decisions down for these."""
        twins = {
            id(old): new
            for before, now in ((self.source, source), (self.target, target))
            for old, new in zip(before.nodes, now.nodes, strict=True)
        }

        def same(nodes: Sequence[Node]) -> tuple[Node, ...]:
            return tuple(twins[id(node)] for node in nodes)

        for rows, laids in ((record.units, self.units), (record.modules, self.modules)):
            for laid in laids:
                rival = (twins[id(laid.runner_up[0])], twins[id(laid.runner_up[1])]) if laid.runner_up else None
                rows.append(replace(laid, sources=same(laid.sources), targets=same(laid.targets), runner_up=rival))
        record.lost += same(self.lost)
        return Left(same(self.left.sources), same(self.left.targets))


def lay(source: Node, target: Node, clues: Clues) -> Record:
    """Lay one tree on the other."""
    record = Record()
    pass_ = _Pass(clues, record, (_counted(source), _counted(target)))
    pass_.pair(Choice(source, target, inf, ("the whole",)), inf, 0)
    return record


def alike(one: Node, other: Node) -> float:
    """The share of contents that two modules have in common, 0 to 1; parts that are fused or turned count a little less."""
    if one.form == other.form:
        return 1.0
    a, b = one.weighed, other.weighed
    total = sum(a.values()) + sum(b.values())
    if not total:
        return 0.0
    shared = sum(min(weight, b[shape]) for shape, weight in a.items() if shape in b)
    exact = 2 * shared / total
    if one.leaf and other.leaf:
        return exact
    same = sum(min(elements, other.spread.get(inputs, 0)) for inputs, elements in one.spread.items())
    fused = 2 * same / (one.size + other.size)
    return max(exact, 0.95 * fused if fused > 0.9 else 0.0)


def _counted(node: Node) -> Counter[int]:
    return Counter(unit.form for unit in node.units())


class _Pass:
    """One pass over both trees with the same clues; what was decided for two modules holds for all that are equal to them."""

    def __init__(self, clues: Clues, record: Record, counts: tuple[Counter[int], Counter[int]]) -> None:
        self.clues, self.record, self.counts = clues, record, counts
        self.likenesses: dict[tuple[int, int], float] = {}
        self.done: dict[tuple[int, int, float], _Done] = {}

    def alike(self, one: Node, other: Node) -> float:
        key = (one.form, other.form)
        found = self.likenesses.get(key) if not (one.leaf or other.leaf) else None
        if found is None:
            found = self.likenesses[key] = alike(one, other)
        return found

    def pair(self, choice: Choice, above: float, depth: int) -> Left:
        """Two nodes go together: write it down, and place what is in them."""
        one, other = choice.source, choice.target
        margin = min(above, choice.margin)
        if one.leaf and other.leaf:
            self.record.units.append(Laid((one,), (other,), margin, choice.evidence, choice.runner_up))
            return Left()
        self.record.modules.append(Laid((one,), (other,), margin, choice.evidence, choice.runner_up))
        key = (one.inner, other.inner, margin)
        if key not in self.done:
            starts = len(self.record.units), len(self.record.modules), len(self.record.lost)
            left = self.place(one.children or (one,), other.children or (other,), margin, depth + 1, exact=one.form == other.form)
            units, modules, lost = self.record.units[starts[0] :], self.record.modules[starts[1] :], self.record.lost[starts[2] :]
            self.done[key] = _Done(one, other, units, modules, lost, left)
            return left
        return self.done[key].repeat(one, other, self.record)

    def place(self, sources: Sequence[Node], targets: Sequence[Node], above: float, depth: int, exact: bool) -> Left:
        """Place the nodes of one side on those of the other; what is left over is tried together once more at the end."""
        here, there = Frontier(sources), Frontier(targets)
        left = _Collected()
        anchors = self.anchors(sources, targets)
        while here and there:
            largest = max(here.largest, there.largest)
            group = self._same(here, there, largest, anchors) or self._much_alike(here, there, largest)
            if group is None:
                _open(here, left.sources, largest)
                _open(there, left.targets, largest)
                continue
            if group.units and not (exact and group.even):  # others of that shape may come back from below
                _move(here, group.sources, left.sources)
                _move(there, group.targets, left.targets)
                continue
            for choice in group.choices:
                left.add(self.pair(choice, above, depth) if depth < _DEPTH else Left())
                here.remove(choice.source)
                there.remove(choice.target)
            for frontier, lost, units in ((here, group.lost(0), left.sources), (there, group.lost(1), left.targets)):
                self.record.lost += lost
                for node in lost:
                    frontier.open(node)
                    units += [node] if node.leaf else []
        left.sources += here.nodes.values()
        left.targets += there.nodes.values()
        return self._again(left, above, exact, depth)

    def anchors(self, sources: Sequence[Node], targets: Sequence[Node]) -> list[tuple[Node, Node]]:
        """A few pairs of an earlier pass among nodes and their children."""
        there = {id(node) for target in targets for node in (target, *target.children)}
        pairs = (
            (node, self.clues.partners[id(node)])
            for source in sources
            for node in (source, *source.children)
            if id(node) in self.clues.partners
        )
        return list(islice(((one, other) for one, other in pairs if id(other) in there), _ANCHORS))

    def _same(self, here: Frontier, there: Frontier, size: int, anchors: Anchors) -> _Group | None:
        """Nodes of the greatest size with equal contents on both sides; modules may be equal in size alone (parts fused or turned)."""
        ones, others = here.of_size(size), there.of_size(size)
        forms = {node.form for node in others}
        form = next((node.form for node in ones if node.form in forms), None)
        if form is not None:
            ones, others = [node for node in ones if node.form == form], [node for node in others if node.form == form]
            return self._group(ones, others, here, there, anchors)
        modules, other_modules = [node for node in ones if not node.leaf], [node for node in others if not node.leaf]
        spreads = [dict(node.spread) for node in others]
        if not any(dict(node.spread) in spreads for node in ones):
            return None
        if modules and others and (other_modules or len(modules) == len(others)):
            return self._group(modules, other_modules or others, here, there, anchors)
        if other_modules and len(other_modules) == len(ones):
            return self._group(ones, other_modules, here, there, anchors)
        return None

    def _group(self, ones: Sequence[Node], others: Sequence[Node], here: Frontier, there: Frontier, anchors: Anchors) -> _Group:
        if len(ones) != len(others):
            if ones[0].leaf and others[0].leaf:
                return _Group([], ones, others)
            if len({node.folded for node in ones}) == len({node.folded for node in others}) == 1:
                rows = here.in_row(ones[0]), there.in_row(others[0])
                if len(rows[0]) > 1 or len(rows[1]) > 1:
                    return self._sequence(*rows)
        group = {id(node) for node in (*ones, *others)}
        apart = [(one, other) for one, other in anchors if id(one) not in group and id(other) not in group]
        return _Group(choose(ones, others, self.clues, apart), ones, others)

    def _much_alike(self, here: Frontier, there: Frontier, size: int) -> _Group | None:
        """The largest module and the one on the other side that is most like it, each with those that differ from it by numbers alone."""
        for mine, theirs in ((here, there), (there, here)):
            for one in mine.of_size(size):
                candidates = [] if one.leaf else theirs.like(one)
                best = max(candidates, key=lambda node: self.alike(one, node), default=None)
                if best is None or not self._nearest(one, best, mine):
                    continue
                ones = [node for node in mine.in_row(one) if not node.leaf]
                others = [node for node in theirs.in_row(best) if node.leaf == best.leaf]
                return self._sequence(others, ones) if mine is there else self._sequence(ones, others)
        return None

    def _nearest(self, one: Node, best: Node, mine: Frontier) -> bool:
        """Whether a module is much like another, and nothing beside or inside of them is more so."""
        value = self.alike(one, best)
        if value < (0.9 if best.leaf else ALIKE) or any(
            self.alike(node, best) > value + 1e-9 for node in mine.like(best) if node.folded != one.folded
        ):
            return False
        return not any(self.alike(node, best) > value for node in one.children) and not any(
            self.alike(one, node) > value for node in best.children
        )

    def _sequence(self, ones: Sequence[Node], others: Sequence[Node]) -> _Group:
        """Pair two rows of modules that are alike but not equal, in the order of their numbers."""
        pairs, unique = self._in_step(ones, others)
        same_names = all(ones[row].numbers == others[column].numbers for row, column in pairs)
        margin = inf if unique else 1.0 if same_names else 0.5
        told = ("much alike",) if len(pairs) == 1 else ("much alike, in the order of their numbers",)
        choices = [Choice(ones[row], others[column], margin, told) for row, column in pairs]
        return _Group(choices, [choice.source for choice in choices], [choice.target for choice in choices])

    def _in_step(self, ones: Sequence[Node], others: Sequence[Node]) -> tuple[list[tuple[int, int]], bool]:
        """Which of two rows go together, and whether in this way only."""
        if len(ones) == len(others) and all(self.alike(one, other) >= ALIKE for one, other in zip(ones, others, strict=True)):
            return [(place, place) for place in range(len(ones))], True
        if len(ones) * len(others) > _TABLE:
            there = {other.numbers: place for place, other in enumerate(others)}
            return [(place, there[one.numbers]) for place, one in enumerate(ones) if one.numbers in there], False
        table = [[self.alike(one, other) for other in others] for one in ones]
        pairs = _in_order(table)
        return pairs, len(ones) == len(others) or _only_way(table, pairs)

    def _again(self, left: _Collected, above: float, exact: bool, depth: int) -> Left:
        """What is left over in one context: equal forms that are alone, then parts that are fused, split or turned."""
        sources = [unit for node in left.sources for unit in node.units()]
        targets = [unit for node in left.targets for unit in node.units()]
        placed: list[Laid] = []
        by_form: dict[int, tuple[list[Node], list[Node]]] = {}
        for side, nodes in enumerate((sources, targets)):
            for node in nodes:
                by_form.setdefault(node.form, ([], []))[side].append(node)
        for form, (a, b) in by_form.items():
            if not a or not b or not a[0].size:
                continue
            choices = choose(a, b, self.clues)
            balanced = self.counts[0][form] == self.counts[1][form]
            if len(a) != len(b) and depth > 1 and (balanced or any(choice.margin < ENOUGH for choice in choices)):
                continue  # higher up there are, or may be, more of them
            for choice in choices:
                if len(a) == len(b) == 1 and not exact:
                    choice = _doubted(choice)
                placed.append(Laid((choice.source,), (choice.target,), min(above, choice.margin), choice.evidence, choice.runner_up))
        sources, targets = _without(sources, targets, placed)
        for fused in fuse(sources, targets, self.clues):
            placed.append(_fused(fused, above))
        sources, targets = _without(sources, targets, placed)
        doubted = [place for place, laid in enumerate(placed) if UNSAID in laid.evidence]
        if len(doubted) == 1 and not any(node.size for node in (*sources, *targets)):
            placed[doubted[0]] = replace(placed[doubted[0]], margin=min(above, ENOUGH), evidence=("all that is left on both sides",))
        self.record.units += placed
        return Left(tuple(sources), tuple(targets))


def _fused(fused: Fused, above: float) -> Laid:
    return Laid(fused.sources, fused.targets, min(above, fused.margin), fused.evidence)


def _doubted(choice: Choice) -> Choice:
    """The only one left of its shape, from modules that are not equal: names must speak for it."""
    told, wanted = frozenset(concepts(choice.source.path)), frozenset(concepts(choice.target.path))
    if conflict(told, wanted):
        return replace(choice, margin=-1.0, evidence=(*choice.evidence, "names against it"))
    if len(choice.source.main) > 1 or _last_word(choice.source) & _last_word(choice.target):
        return choice
    return replace(choice, margin=0.5, evidence=(*choice.evidence, UNSAID))


def _last_word(node: Node) -> frozenset[str]:
    """What the last part of a path says that is not a number alone."""
    parts = [part for part in node.path.split(".") if not part.isdigit()]
    return frozenset(word for word in concepts(parts[-1]) if word[0] != "#") if parts else frozenset()


def _without(sources: Sequence[Node], targets: Sequence[Node], placed: Iterable[Laid]) -> tuple[list[Node], list[Node]]:
    done = {id(node) for laid in placed for node in (*laid.sources, *laid.targets)}
    return [node for node in sources if id(node) not in done], [node for node in targets if id(node) not in done]


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


class _Collected:
    """What is left over while a context is worked on."""

    def __init__(self) -> None:
        self.sources: list[Node] = []
        self.targets: list[Node] = []

    def add(self, left: Left) -> None:
        """What a pair below could not place."""
        self.sources += left.sources
        self.targets += left.targets


def _move(frontier: Frontier, some: Iterable[Node], to: list[Node]) -> None:
    for node in some:
        frontier.remove(node)
        to.append(node)


def _open(frontier: Frontier, left: list[Node], size: int) -> None:
    """Put the children of the largest nodes in their place; units of that size are left over."""
    for node in frontier.of_size(size):
        frontier.open(node)
        left += [node] if node.leaf else []


def _in_order(table: Sequence[Sequence[float]]) -> list[tuple[int, int]]:
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


def _only_way(table: Sequence[Sequence[float]], pairs: Sequence[tuple[int, int]]) -> bool:
    """Whether the latest pairs of equal sum are the same as the earliest."""
    turned = [list(reversed(row)) for row in reversed(table)]
    rows, columns = len(table), len(table[0]) if table else 0
    return sorted((rows - 1 - row, columns - 1 - column) for row, column in _in_order(turned)) == list(pairs)
