"""Which of several look-alikes goes with which: by names, by numbers, by order where order can be trusted, by what was decided elsewhere.

Rule: evidence is added up in points; a choice that beats its runner-up by fewer than `ENOUGH` is uncertain. Sizes and shapes decide nothing
here: whoever calls has seen that they agree.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf

from ckptsurgeon.surgery.matching.assignment import assign, margins
from ckptsurgeon.surgery.matching.forest import Node
from ckptsurgeon.surgery.matching.words import CONFUSED, concepts, conflict

ENOUGH = 1.0
# Points. A word that tells look-alikes apart and is on both sides; names that exclude each other; the same name; numbers in the same
# order; keys in the same order; the same two names paired elsewhere.
WORD, AGAINST, SAME, NUMBERS, ORDER, ELSEWHERE = 2.0, -2.0, 1.0, 2.0, 1.5, 2.5
_NUMBER = re.compile(r"\d+")
_ENDS = (-100, -90, 10, 50, 90, 100)
_ORDINALS = {
    "first": -100, "preattn": -90, "attn": 10, "self": 11, "postattn": 20, "cross": 30, "premlp": 40, "mlp": 50, "second": 60,
    "postmlp": 90, "final": 100,
}  # fmt: skip


@dataclass(frozen=True)
class Clues:
    """What is known before a choice: how far the order of keys can be trusted (0 to 1), and how often which names were paired elsewhere."""

    trust: float = 0.0
    pairs: Mapping[tuple[str, str], int] = field(default_factory=dict)
    sources: Mapping[str, int] = field(default_factory=dict)
    targets: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Choice:
    """One pair: its margin over the runner-up in points, what spoke for it, and the runner-up's names."""

    source: Node
    target: Node
    margin: float
    evidence: tuple[str, ...]
    runner_up: str = ""


def tails(node: Node) -> tuple[str, ...]:
    """The last one, two and three parts of a node's path."""
    *above, last = node.path.split(".")
    above = [_NUMBER.sub("{}", part) for part in above]
    counts = [count for count in (0, 1, 2) if len(above) >= count and (count or not last.isdigit())]
    return tuple(".".join([*above[len(above) - count :], last]) for count in counts)


def choose(sources: Sequence[Node], targets: Sequence[Node], clues: Clues) -> list[Choice]:
    """Pair as many as the shorter side has."""
    if len(sources) == len(targets) == 1:
        return [Choice(sources[0], targets[0], inf, ("only one of its shape here",))]
    table = _Table(sources, targets, clues)
    scores = [[table.score(row, column) for column in range(len(targets))] for row in range(len(sources))]
    pairs = assign(scores)
    found = []
    for (row, column), (margin, other) in zip(pairs, margins(scores, pairs), strict=True):
        runner_up = f"{sources[other[0]].path} -> {targets[other[1]].path}" if other else ""
        found.append(Choice(sources[row], targets[column], margin, table.evidence(row, column), runner_up))
    return found


class _Table:
    """The points of every pair of a group, and why."""

    def __init__(self, sources: Sequence[Node], targets: Sequence[Node], clues: Clues) -> None:
        self.sources, self.targets, self.clues = sources, targets, clues
        self.words = tuple(_telling(nodes) for nodes in (sources, targets))
        self.whole = tuple([frozenset(concepts(node.path)) for node in nodes] for nodes in (sources, targets))
        self.ordinals = tuple(_ordinals(nodes, words) for nodes, words in zip((sources, targets), self.words, strict=True))
        self.places = tuple(_ranks([node.at for node in nodes]) for nodes in (sources, targets))
        self.even = len(sources) == len(targets)
        self.families = tuple(_in_family(nodes) for nodes in (sources, targets))

    def parts(self, row: int, column: int) -> dict[str, float]:
        """The points of a pair by kind of evidence."""
        source, target = self.sources[row], self.targets[column]
        told, wanted = self.words[0][row], self.words[1][column]
        shared = {word for word in told & wanted if not word.startswith("#")}
        found = {"names: " + ", ".join(sorted(shared)): WORD * len(shared)} if shared else {}
        if conflict(told, wanted):
            found["names against it"] = AGAINST
        if source.name == target.name:
            found["same name"] = SAME
        if self.ordinals[0] and self.ordinals[1]:
            found["numbers in the same order"] = NUMBERS * _near(self.ordinals[0][row], self.ordinals[1][column], self.even)
        elif self.families[0][row] == self.families[1][column] != (0, 1):
            found["numbers in the same order"] = NUMBERS
        if _other_roles(source, target):
            found["roles against it"] = 2 * AGAINST
        trust = self.clues.trust * (0.3 if self._confused(row) or self._confused(column, 1) else 1.0)
        if trust:
            found["same order"] = ORDER * trust * _near(self.places[0][row], self.places[1][column], self.even)
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
        for one in tails(source):
            for other in tails(target):
                count = self.clues.pairs.get((one, other), 0)
                if count:
                    best = max(best, count / max(self.clues.sources[one], self.clues.targets[other]))
        return best


def _telling(nodes: Sequence[Node]) -> list[frozenset[str]]:
    """For each node the concepts in its path that not all of them have."""
    found = [frozenset(concepts(node.path)) for node in nodes]
    if len(nodes) == 1:
        return found
    common = frozenset.intersection(*found)
    return [words - common for words in found]


def _ordinals(nodes: Sequence[Node], words: Sequence[frozenset[str]]) -> list[int] | None:
    """The places of nodes in the order that their names give, where they do: by numbers alone, or by `first`, `after` and the like."""
    if len({node.folded for node in nodes}) == 1:
        return _ranks([node.numbers for node in nodes])
    said = [[place for word, place in _ORDINALS.items() if word in found] for found in words]
    numbers = [
        [int(word[1:]) for word in concepts(node.path) if word in found and word.startswith("#")]
        for node, found in zip(nodes, words, strict=True)
    ]
    silent = [index for index in range(len(nodes)) if not said[index] and not numbers[index]]
    if any(said):
        if silent and not (len(nodes) == 2 and said[1 - silent[0]][0] in _ENDS):
            return None  # of two, the one that is not said to be first is the second
        told = [tuple(place[:1] or ([50] if silent else [0]) + number) for place, number in zip(said, numbers, strict=True)]
    elif silent or len({len(number) for number in numbers}) != 1:
        return None
    else:
        told = [tuple(number) for number in numbers]
    return _ranks(told) if len(set(told)) == len(told) else None


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
        sources.update(tails(source))
        targets.update(tails(target))
        pairs.update((one, other) for one in tails(source) for other in tails(target))
    return pairs, sources, targets
