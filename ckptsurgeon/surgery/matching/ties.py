"""Which of several look-alikes goes with which: by names, by numbers, by order where order can be trusted, by what was decided elsewhere.

Rule: evidence is added up in points; a choice that beats its runner-up by fewer than `ENOUGH` is uncertain. Sizes and shapes decide nothing
here: whoever calls has seen that they agree.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from math import inf

from ckptsurgeon.surgery.matching.assignment import assign, margins
from ckptsurgeon.surgery.matching.forest import Node
from ckptsurgeon.surgery.matching.words import CONFUSED, concepts, conflict, gated

ENOUGH = 1.0
MANY = 48
AGAINST_IT = "against it"
# Points. A word that tells look-alikes apart and is on both sides; names that exclude each other; the same name; numbers in the same
# order; keys in the same order; the same two names paired elsewhere; as near as the other to what is paired already.
WORD, ABBREVIATED, AGAINST, SAME, NUMBERS, ORDER, ELSEWHERE, COMPANY = 2.0, 1.2, -2.0, 1.0, 2.0, 1.5, 2.5, 2.0
_ENDS = (-100, -90, 10, 50, 90, 100)
_ORDINALS = {
    "gate": 0, "up": 1, "first": -100, "preattn": -90, "attn": 10, "self": 11, "postattn": 20, "cross": 30, "premlp": 40, "mlp": 50,
    "second": 60, "postmlp": 90, "final": 100,
}  # fmt: skip


@dataclass(frozen=True)
class Clues:
    """What is known before a choice: how far the order of keys can be trusted (0 to 1), how often which names were paired elsewhere,
    and which node of the target each node of the source (by its id) was paired with."""

    trust: float = 0.0
    pairs: Mapping[tuple[str, str], int] = field(default_factory=dict)
    sources: Mapping[str, int] = field(default_factory=dict)
    targets: Mapping[str, int] = field(default_factory=dict)
    partners: Mapping[int, Node] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """One pair: its margin over the runner-up in points, what spoke for it, and the runner-up."""

    source: Node
    target: Node
    margin: float
    evidence: tuple[str, ...]
    runner_up: tuple[Node, Node] | None = None


Anchors = Sequence[tuple[Node, Node]]


def choose(sources: Sequence[Node], targets: Sequence[Node], clues: Clues, anchors: Anchors = ()) -> list[Choice]:
    """Pair as many as the shorter side has; `anchors` are pairs in the same surroundings that are certain."""
    if len(sources) == len(targets) == 1:
        return [Choice(sources[0], targets[0], inf, ("only one of its shape here",))]
    if len(sources) == len(targets) and _in_step(sources, targets, clues.trust):
        return [
            Choice(one, other, 2 * (NUMBERS + ORDER * clues.trust), ("numbers in the same order",))
            for one, other in zip(*(sorted(nodes, key=lambda node: node.numbers) for nodes in (sources, targets)), strict=True)
        ]
    in_rows = _in_rows(sources, targets, clues, anchors)
    if in_rows:
        return in_rows
    if min(len(sources), len(targets)) > MANY:
        return _many(sources, targets, clues, anchors)
    table = _Table(sources, targets, clues, anchors)
    scores = [[table.score(row, column) for column in range(len(targets))] for row in range(len(sources))]
    pairs = assign(scores)
    found = []
    for (row, column), (margin, other) in zip(pairs, margins(scores, pairs), strict=True):
        runner_up = (sources[other[0]], targets[other[1]]) if other else None
        if any(words.endswith(AGAINST_IT) for words in table.parts(row, column)):
            margin = min(margin, 0.5)  # the best of bad ones
        found.append(Choice(sources[row], targets[column], margin, table.evidence(row, column), runner_up))
    return _without_the_clear(found, sources, targets, clues, anchors)


def _in_step(sources: Sequence[Node], targets: Sequence[Node], trust: float) -> bool:
    """Whether both sides differ by numbers alone, and keys stand in the order of the numbers (or in none)."""
    if len({node.folded for node in sources}) > 1 or len({node.folded for node in targets}) > 1:
        return False
    return not trust or all(
        before.at < after.at for nodes in (sources, targets) for before, after in pairwise(sorted(nodes, key=lambda node: node.numbers))
    )


def _in_rows(sources: Sequence[Node], targets: Sequence[Node], clues: Clues, anchors: Anchors) -> list[Choice]:
    """Where both sides are rows of numbered ones (two norms of each layer, or a list of each): which row is which, once for all."""
    if len(sources) != len(targets):
        return []
    found: list[list[Choice]] = []
    for rows in _rows(sources):
        for other_rows in _rows(targets):
            if len(rows) == len(other_rows) > 1 and len({len(row) for row in (*rows, *other_rows)}) == 1 < len(rows[0]):
                if len({node.folded for node in sources}) == len({node.folded for node in targets}) == 1:
                    continue  # numbers alone: their order tells
                chosen = choose([row[0] for row in rows], [row[0] for row in other_rows], clues, anchors)
                of = {id(row[0]): row for row in (*rows, *other_rows)}
                found.append(
                    [
                        replace(choice, source=one, target=other)
                        for choice in chosen
                        for one, other in zip(of[id(choice.source)], of[id(choice.target)], strict=True)
                    ]
                )
    if len(found) > 1:  # as many rows as each has: which number counts the rows is not told
        return [replace(choice, margin=min(choice.margin, 0.5)) for choice in found[0]]
    return found[0] if found else []


def _rows(nodes: Sequence[Node]) -> list[list[list[Node]]]:
    """The ways in which nodes are rows: those that differ by numbers alone; or, where all do, those with one number in common."""
    keys: list[Callable[[Node], object]] = [lambda node: node.folded]
    if len({node.folded for node in nodes}) == 1:
        keys = [
            partial(_number_at, at) for at, values in enumerate(zip(*(node.numbers for node in nodes), strict=True)) if len(set(values)) > 1
        ]
    found = []
    for key in keys:
        rows: dict[object, list[Node]] = {}
        for node in sorted(nodes, key=lambda node: node.numbers):
            rows.setdefault(key(node), []).append(node)
        found.append(list(rows.values()))
    return found


def _number_at(at: int, node: Node) -> int:
    return node.numbers[at]


def _many(sources: Sequence[Node], targets: Sequence[Node], clues: Clues, anchors: Anchors) -> list[Choice]:
    """Too many to compare each with each: those that the same words tell apart, among themselves; the others in their order, uncertain."""
    words = [dict(zip(map(id, nodes), _telling(nodes), strict=True)) for nodes in (sources, targets)]
    both = frozenset().union(*words[0].values()) & frozenset().union(*words[1].values())
    rows: dict[frozenset[str], tuple[list[Node], list[Node]]] = {}
    for side, nodes in enumerate((sources, targets)):
        for node in nodes:
            rows.setdefault(frozenset(word for word in words[side][id(node)] & both if word[0] != "#"), ([], []))[side].append(node)
    found: list[Choice] = []
    rest: tuple[list[Node], list[Node]] = ([], [])
    for told, (ones, others) in rows.items():
        if told and ones and others and max(len(ones), len(others)) < max(len(sources), len(targets)):
            found += choose(ones, others, clues, anchors)
        else:
            rest[0].extend(ones)
            rest[1].extend(others)
    return [*found, *(Choice(one, other, 0.0, ("in the order of keys",)) for one, other in zip(*rest, strict=False))]


def _without_the_clear(
    found: list[Choice], sources: Sequence[Node], targets: Sequence[Node], clues: Clues, anchors: Anchors
) -> list[Choice]:
    """Look again at those that are not clear, among themselves: other words may tell them apart."""
    clear = [choice for choice in found if choice.margin >= ENOUGH]
    if not clear or len(clear) == len(found):
        return found
    done = {id(node) for choice in clear for node in (choice.source, choice.target)}
    rest = [[node for node in nodes if id(node) not in done] for nodes in (sources, targets)]
    above = min(choice.margin for choice in clear)
    again = choose(rest[0], rest[1], clues, anchors) if rest[0] and rest[1] else []
    if len(again) == 1 and conflict(*(frozenset(concepts(node.path)) for node in (again[0].source, again[0].target))):
        above = min(above, 0.5)
    return [*clear, *(replace(choice, margin=min(choice.margin, above)) for choice in again)]


class _Table:
    """The points of every pair of a group, and why."""

    def __init__(self, sources: Sequence[Node], targets: Sequence[Node], clues: Clues, anchors: Anchors) -> None:
        self.sources, self.targets, self.clues = sources, targets, clues
        self.words = tuple(_telling(nodes) for nodes in (sources, targets))
        self.ordinals = tuple(_ordinals(nodes, words) for nodes, words in zip((sources, targets), self.words, strict=True))
        if _either_gate(sources, targets) or _either_gate(targets, sources):
            self.ordinals = (None, None)
        self.places = tuple(_ranks([node.at for node in nodes]) for nodes in (sources, targets))
        self.even = len(sources) == len(targets)
        self.families = tuple(_in_family(nodes) for nodes in (sources, targets))
        self.nearness = [(_nearness(sources, one), _nearness(targets, other)) for one, other in anchors]

    def parts(self, row: int, column: int) -> dict[str, float]:
        """The points of a pair by kind of evidence."""
        source, target = self.sources[row], self.targets[column]
        told, wanted = self.words[0][row], self.words[1][column]
        shared = {word for word in told & wanted if not word.startswith("#")}
        found = {"names: " + ", ".join(sorted(shared)): WORD * len(shared)} if shared else {}
        if not shared and _abbreviated(told, wanted):
            found["a name cut short"] = ABBREVIATED
        if conflict(told, wanted):
            found[f"names {AGAINST_IT}"] = AGAINST
        if source.name == target.name:
            found["same name"] = SAME
        if self.ordinals[0] and self.ordinals[1]:
            found["numbers in the same order"] = NUMBERS * _near(self.ordinals[0][row], self.ordinals[1][column], self.even)
        elif self.families[0][row] == self.families[1][column] != (0, 1):
            found["numbers in the same order"] = NUMBERS
        if _other_roles(source, target):
            found[f"roles {AGAINST_IT}"] = 2 * AGAINST
        trust = self.clues.trust * (0.3 if self._confused(row) or self._confused(column, 1) else 1.0)
        if trust:
            found["same order"] = ORDER * trust * _near(self.places[0][row], self.places[1][column], self.even)
        if self.nearness:
            apart = sum(abs(near[row] - other[column]) for near, other in self.nearness) / len(self.nearness)
            found["in the same company"] = COMPANY * (1.0 - min(apart, 1.0))
        elsewhere = self._elsewhere(source, target)
        if elsewhere:
            found["paired so elsewhere"] = ELSEWHERE * elsewhere
        return found

    def score(self, row: int, column: int) -> float:
        """The sum of a pair's points."""
        return sum(self.parts(row, column).values())

    def evidence(self, row: int, column: int) -> tuple[str, ...]:
        """What spoke for a pair, and what against it."""
        return tuple(words for words, points in self.parts(row, column).items() if points)

    def _confused(self, index: int, side: int = 0) -> bool:
        return any(self.words[side][index] & names for names in CONFUSED)

    def _elsewhere(self, source: Node, target: Node) -> float:
        best = 0.0
        own = int(self.clues.partners.get(id(source)) is target)  # what was decided of these two is no evidence for it
        for one in source.tails:
            for other in target.tails:
                count = self.clues.pairs.get((one, other), 0) - own
                if count > 0:
                    best = max(best, count / max(self.clues.sources[one] - own, self.clues.targets[other] - own))
        return best


def _telling(nodes: Sequence[Node]) -> list[frozenset[str]]:
    """For each node the concepts in its path that not all of them have."""
    found = [frozenset(concepts(node.path)) for node in nodes]
    common = frozenset.intersection(*found) if len(found) > 1 else frozenset()
    last = [node.name.rpartition(".")[2] for node in nodes]
    gates = gated(last)
    return [words - common | {gates[name] for _ in "." if name in gates} for words, name in zip(found, last, strict=True)]


def _either_gate(named: Sequence[Node], numbered: Sequence[Node]) -> bool:
    """Whether one side says gate and up, and the other `w1` and `w2`: which of these is the gate is not agreed on."""
    words = frozenset().union(*(concepts(node.name) for node in named))
    return {"gate", "up"} <= words and {node.name.rpartition(".")[2] for node in numbered} == {"w1", "w2"}


def _abbreviated(one: frozenset[str], other: frozenset[str]) -> bool:
    """Whether a word of one name is the beginning of one of the other's."""
    return any(
        len(short) >= 3 and long.startswith(short) and long != short
        for a in one
        for b in other
        for short, long in ((a, b) if len(a) < len(b) else (b, a),)
    )


def _nearness(nodes: Sequence[Node], anchor: Node) -> list[int]:
    """How many more parts of its path each node shares with another than the farthest does; equal but for numbers is one more."""
    near = [_shared_parts(node.path, anchor.path) + (node.folded == anchor.folded) for node in nodes]
    return [value - min(near) for value in near]


def _shared_parts(one: str, other: str) -> int:
    a, b = one.split("."), other.split(".")
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _ordinals(nodes: Sequence[Node], words: Sequence[frozenset[str]]) -> list[int] | None:
    """The places of nodes in the order that their names give, where they do: by numbers alone, or by `first`, `after` and the like."""
    if len({node.folded for node in nodes}) == 1:
        return _ranks([node.numbers for node in nodes])
    said = [_place([place for word, place in _ORDINALS.items() if word in found]) for found in words]
    numbers = [
        [int(word[1:]) for word in concepts(node.path) if word in found and word.startswith("#")]
        for node, found in zip(nodes, words, strict=True)
    ]
    silent = [index for index in range(len(nodes)) if not said[index] and not numbers[index]]
    if any(said):
        mixed = [place[0] for place, number in zip(said, numbers, strict=True) if place and not number] if any(numbers) else []
        if any(number and not place for place, number in zip(said, numbers, strict=True)) and not set(mixed) <= {-100, 100}:
            return None
        if silent and not (len(nodes) == 2 and said[1 - silent[0]][0] in _ENDS):
            return None  # of two, the one that is not said to be first is the second
        told = [tuple(place[:1] or ([50] if silent else [0]) + number) for place, number in zip(said, numbers, strict=True)]
    elif silent or len({len(number) for number in numbers}) != 1:
        return None
    else:
        told = [tuple(number) for number in numbers]
    return _ranks(told) if len(set(told)) == len(told) else None


def _place(places: list[int]) -> list[int]:
    """The place that several words give together: being first counts most, then what comes latest."""
    return [min(places) if min(places) < 0 else max(places)] if places else []


def _in_family(nodes: Sequence[Node]) -> list[tuple[int, int]]:
    """Each node's place among those that differ from it by numbers alone, and how many they are."""
    rows: dict[str, list[Node]] = {}
    for node in nodes:
        rows.setdefault(node.folded, []).append(node)
    for row in rows.values():
        row.sort(key=lambda node: node.numbers)
    return [(rows[node.folded].index(node), len(rows[node.folded])) for node in nodes]


def _other_roles(one: Node, other: Node) -> bool:
    """Whether two units hold tensors of different roles only."""
    return one.leaf and other.leaf and not set(one.tensors) & set(other.tensors) and "param" not in (*one.tensors, *other.tensors)


def _ranks(values: Sequence[object]) -> list[int]:
    order = sorted(range(len(values)), key=lambda index: values[index])  # type: ignore[arg-type,return-value]
    ranks = [0] * len(values)
    for rank, index in enumerate(order):
        ranks[index] = rank
    return ranks


def _near(one: int, other: int, even: bool) -> float:
    """1 for the same place; less the further apart."""
    away = abs(one - other)
    return max(0.0, 1.0 - away) if even and away else 1.0 / (1 + away)


def count_pairs(choices: Sequence[tuple[Node, Node]]) -> tuple[dict[tuple[str, str], int], dict[str, int], dict[str, int]]:
    """How often names of nodes were paired, and how often each was seen."""
    pairs: Counter[tuple[str, str]] = Counter()
    sources: Counter[str] = Counter()
    targets: Counter[str] = Counter()
    for source, target in choices:
        sources.update(source.tails)
        targets.update(target.tails)
        pairs.update((one, other) for one in source.tails for other in target.tails)
    return pairs, sources, targets
