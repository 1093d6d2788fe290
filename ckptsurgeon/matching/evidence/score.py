"""Evidence for a pair of look-alikes, in points: what names say, how numbers and keys are ordered, what was decided elsewhere.

Rule: each kind of evidence has one weight, in one line of this module; kinds are added up and none rules another out.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product

from ckptsurgeon.matching.evidence.company import PARTS, Inside, nearest
from ckptsurgeon.matching.evidence.distinguish import (
    abbreviated,
    begun,
    either_gate,
    in_family,
    near,
    nearness,
    ordinals,
    other_roles,
    places_by_number,
    ranks,
    slots,
    spelt,
    streams,
    telling,
    telling_segments,
    telling_words,
    unsaid_attention,
)
from ckptsurgeon.matching.evidence.gates import same_gate
from ckptsurgeon.matching.evidence.vocabulary import CONFUSED, concepts, conflict
from ckptsurgeon.matching.module_tree import Node
from ckptsurgeon.progress import beat

AGAINST_IT, PAIRED_ELSEWHERE = "against it", "paired so elsewhere"
WORD = 3.0  # a word that tells look-alikes apart is on both sides
NO_MORE = 1.0  # neither name says more than the other
WRITTEN = 1.0  # the same word as it is written, where what the words mean tells nothing on one side
ABBREVIATED = 1.8  # one side's word begins the other's
AGAINST = -2.0  # names exclude each other; twice that for roles
SAME = 1.0  # the same name
SAME_KIND = 0.5  # which says no more than that both are norms
EXACT = 1.0  # the same shapes, dimensions of one included
NUMBERS = 2.0  # numbers are in the same order
UNEVEN = 1.0  # the same, where one side has more: which of them is left out is not told
ORDER = 1.5  # keys are in the same order, as far as that can be trusted
ELSEWHERE = 2.5  # the same two names were paired elsewhere, always
LENGTH = 1.0  # numbered lists are as long
COMPANY = 2.0  # as near as the other to what is paired already
BEHIND = 3.0  # norms of convolutions that are paired already
SLOT = 1.0  # between the same layers, where keys stand in an order of their own
NAMED_AFTER = 3.0  # one is named after the part of a layer that the other stands in
_LAYER = re.compile(r"_l\d+$")  # of torch's LSTM and GRU
Anchors = Sequence[tuple[Node, Node]]  # pairs in the same surroundings that are certain


@dataclass(frozen=True)
class Clues:
    """What is known before a choice: how far the order of keys can be trusted (0 to 1), and whether it may be a model's own at all; how
    often which names were paired elsewhere, which node of the target each node of the source (by its id) was paired with, and how many
    differ from a node by its last number.

    `behind` has the convolutions that norms stand behind, `together` the one unit that is with another, `lists` by numbered list of either
    side the other's, `within` the parts of layers that modules of either side hold (see `company`).
    """

    trust: float = 0.0
    ordered: bool = False
    pairs: Mapping[tuple[str, str], int] = field(default_factory=dict)
    sources: Mapping[str, int] = field(default_factory=dict)
    targets: Mapping[str, int] = field(default_factory=dict)
    partners: Mapping[int, Node] = field(default_factory=dict)
    rows: Mapping[int, int] = field(default_factory=dict)
    behind: Mapping[int, Node] = field(default_factory=dict)
    together: Mapping[int, Node] = field(default_factory=dict)
    lists: tuple[Mapping[str, str], Mapping[str, str]] = ({}, {})
    within: Callable[[], tuple[Mapping[str, Inside], Mapping[str, Inside]]] = lambda: ({}, {})

    def behind_the_same(self, source: Node, target: Node) -> bool:
        """Whether the convolutions that two norms stand behind were paired."""
        return self._paired(self.behind, source, target)

    def with_the_same(self, source: Node, target: Node) -> bool:
        """Whether the units were paired that two of the same roles are together with."""
        return source.tensors.keys() == target.tensors.keys() and self._paired(self.together, source, target)

    def _paired(self, near: Mapping[int, Node], source: Node, target: Node) -> bool:
        here, there = near.get(id(source)), near.get(id(target))
        return here is not None and there is not None and self.partners.get(id(here)) is there


class Table:
    """The points of every pair of a group, and why."""

    def __init__(self, sources: Sequence[Node], targets: Sequence[Node], clues: Clues, anchors: Anchors) -> None:
        self.sources, self.targets, self.clues = sources, targets, clues
        self.words = streams(telling(sources), telling(targets))
        self.segments = tuple(telling_segments(nodes) for nodes in (sources, targets))
        self.spelt = tuple([spelt(parts) for parts in side] for side in self.segments)
        self.written = tuple(telling_words(nodes) for nodes in (sources, targets))
        self.ordinals = tuple(ordinals(nodes, words, clues.rows) for nodes, words in zip((sources, targets), self.words, strict=True))
        if any(either_gate(*sides) or unsaid_attention(*sides) for sides in ((sources, targets), (targets, sources))):
            self.ordinals = (None, None)
        self.places = tuple(ranks([node.at for node in nodes]) for nodes in (sources, targets))
        self.even = len(sources) == len(targets)
        if skipping := places_by_number(sources, targets):
            self.ordinals = self.places = skipping
        self.families = tuple(in_family(nodes) for nodes in (sources, targets))
        self.slots = slots(sources, targets, anchors) if clues.ordered else None
        self.nearness = [(nearness(sources, source), nearness(targets, target)) for source, target in anchors]

    def parts(self, row: int, column: int) -> dict[str, float]:
        """The points of a pair by kind of evidence."""
        source, target = self.sources[row], self.targets[column]
        source_words, target_words = self.words[0][row], self.words[1][column]
        shared = {word for word in source_words & target_words if not word.startswith("#")}
        parts = {"names: " + ", ".join(sorted(shared)): WORD * len(shared)} if shared else {}
        if shared and source_words == target_words:
            parts["neither name says more"] = NO_MORE
        if abbreviated(source_words - shared, target_words - shared) or (
            not shared and (begun(self.segments[0][row], self.segments[1][column]) or self.spelt[0][row].cuts_short(self.spelt[1][column]))
        ):
            parts["a name cut short"] = ABBREVIATED
        silent = any(all(word[0] == "#" for word in words) for words in (source_words, target_words))
        if silent and self.written[0][row] & self.written[1][column]:
            parts["the same word"] = WRITTEN
        if conflict(source_words, target_words):
            parts[f"names {AGAINST_IT}"] = AGAINST
        gate = same_gate(source, target) if source.leaf and target.leaf else None
        if gate is not None:
            parts["the same gate" if gate else f"gates {AGAINST_IT}"] = WORD if gate else 2 * AGAINST
        if ("aux" in source_words) != ("aux" in target_words):
            parts["one is auxiliary"] = AGAINST
        if source.path == target.path:
            parts["same name"] = SAME
        elif source.name == target.name and not self._counted_otherwise(source, target):
            parts["same name"] = SAME_KIND if {word for word in concepts(source.name) if word[0] != "#"} == {"norm"} else SAME
        if source.exact == target.exact:
            parts["same shape"] = EXACT
        if self.ordinals[0] and self.ordinals[1]:
            points = NUMBERS if self.even else UNEVEN
            parts["numbers in the same order"] = points * near(self.ordinals[0][row], self.ordinals[1][column], self.even)
        elif self.families[0][row] == self.families[1][column] != (0, 1):
            parts["numbers in the same order"] = NUMBERS
        if self.clues.rows.get(id(source), 1) == self.clues.rows.get(id(target), 1) > 1:
            parts["in a list as long"] = LENGTH
        if other_roles(source, target):
            parts[f"roles {AGAINST_IT}"] = 2 * AGAINST
        trust = self.clues.trust * (0.3 if self._confused(row) or self._confused(column, 1) else 1.0)
        if trust and (self.even or "numbers in the same order" not in parts):  # that the last are left out is believed once
            parts["same order"] = ORDER * trust * near(self.places[0][row], self.places[1][column], self.even)
        if self.nearness:
            apart = sum(abs(here[row] - there[column]) for here, there in self.nearness) / len(self.nearness)
            parts["in the same company"] = COMPANY * max(self.clues.trust, 0.6) * (1.0 - min(apart, 1.0))
        if self.slots and self.slots[0][row] == self.slots[1][column]:
            parts["between the same layers"] = SLOT
        if self.clues.behind_the_same(source, target):
            parts["behind the same convolution"] = BEHIND
        if self._named_after(row, column):
            parts["named after the part that it is of"] = NAMED_AFTER
        if self._named_after_list(row, column):
            parts["named after the list that it stands in"] = NAMED_AFTER
        elsewhere = 0.0 if self._unrivalled(row, column) else self._elsewhere(source, target)
        if elsewhere:
            parts[PAIRED_ELSEWHERE] = ELSEWHERE * elsewhere
        return parts

    def score(self, row: int, column: int) -> float:
        """The sum of a pair's points."""
        return sum(self.parts(row, column).values())

    def evidence(self, row: int, column: int) -> tuple[str, ...]:
        """What spoke for a pair, and what against it."""
        return tuple(words for words, points in self.parts(row, column).items() if points) or ("the others fit less",)

    def _counted_otherwise(self, source: Node, target: Node) -> bool:
        """Whether one stands among more of its name than the other: the first of two is not the first of three, save a recurrent layer."""
        counted = source.name[-1:].isdigit() and not source.name.isdigit() and not _LAYER.search(source.name)
        return counted and self.clues.rows.get(id(source), 1) != self.clues.rows.get(id(target), 1)

    def _named_after(self, row: int, column: int) -> bool:
        """Whether one of two norms is named after an attention or an MLP, and the other stands in the module of that part."""
        if not self.sources[row].leaf or len(self.sources[row].main) != 1:
            return False
        source_parts, target_parts = self.words[0][row] & PARTS, self.words[1][column] & PARTS
        if bool(source_parts) == bool(target_parts):
            return False
        named, unnamed, side = (
            (self.sources[row], self.targets[column], 1) if source_parts else (self.targets[column], self.sources[row], 0)
        )
        inside = nearest(unnamed.path, self.clues.within()[side])
        return inside is not None and inside.is_part_of(named)

    def _named_after_list(self, row: int, column: int) -> bool:
        """Whether one stands in a numbered list, and the other beside that list on its own side, and is named after it."""
        nodes, written = (self.sources[row], self.targets[column]), (self.written[0][row], self.written[1][column])
        for node, other, words, lists in zip(nodes, nodes[::-1], written[::-1], self.clues.lists, strict=True):
            name = lists.get(node.parent, "")
            if name and other.parent != name and name.rpartition(".")[2].lower() in words:
                return True
        return False

    def _confused(self, index: int, side: int = 0) -> bool:
        return any(self.words[side][index] & names for names in CONFUSED)

    def _unrivalled(self, row: int, column: int) -> bool:
        """Whether both have rivals here, of the words that they share, and none of these was seen elsewhere: all that was told there is
        that the two share these words."""
        _, sources, targets = self.inside
        words, other_words = self.words
        shared = words[row] & other_words[column]
        rivals = [at for at, own in enumerate(words) if at != row and own & other_words[column] == shared]
        other_rivals = [at for at, own in enumerate(other_words) if at != column and own & words[row] == shared]
        sides = (self.sources, rivals, self.clues.sources, sources), (self.targets, other_rivals, self.clues.targets, targets)
        return bool(shared) and all(
            chosen and not any(every.get(tail, 0) > within.get(tail, 0) for at in chosen for tail in tails(nodes[at], self.clues.rows))
            for nodes, chosen, every, within in sides
        )

    def _elsewhere(self, source: Node, target: Node) -> float:
        best = 0.0
        pairs, sources, targets = self.inside
        for source_tail, target_tail in product(tails(source, self.clues.rows), tails(target, self.clues.rows)):
            count = self.clues.pairs.get((source_tail, target_tail), 0) - pairs.get((source_tail, target_tail), 0)
            if count > 0:
                seen = max(
                    self.clues.sources[source_tail] - sources.get(source_tail, 0),
                    self.clues.targets[target_tail] - targets.get(target_tail, 0),
                )
                best = max(best, count / seen)
        return best

    @cached_property
    def inside(self) -> tuple[Mapping[tuple[str, str], int], Mapping[str, int], Mapping[str, int]]:
        """What an earlier pass paired within the group: what was decided of these is no evidence for them."""
        there = {id(target) for target in self.targets}
        partners = ((source, self.clues.partners.get(id(source))) for source in self.sources)
        return count_pairs([(node, partner) for node, partner in partners if partner is not None and id(partner) in there], self.clues.rows)


def tails(node: Node, rows: Mapping[int, int]) -> tuple[str, ...]:
    """How a node may be called elsewhere: its name alone and within its modules; a numbered name with how many are numbered so there.

    The first of two norms does another thing than the first of three.
    """
    many = rows.get(id(node), 1) if node.path[-1:].isdigit() else 1
    kind = "" if node.leaf else " as a module"  # a module's own tensors have its path
    return tuple(f"{tail} of {many}{kind}" if many > 1 else f"{tail}{kind}" for tail in node.tails)


def count_pairs(
    choices: Sequence[tuple[Node, Node]], rows: Mapping[int, int]
) -> tuple[dict[tuple[str, str], int], dict[str, int], dict[str, int]]:
    """How often names of nodes were paired, and how often each was seen."""
    pairs: Counter[tuple[str, str]] = Counter()
    sources: Counter[str] = Counter()
    targets: Counter[str] = Counter()
    for source, target in choices:
        beat()
        source_tails, target_tails = tails(source, rows), tails(target, rows)
        sources.update(source_tails)
        targets.update(target_tails)
        pairs.update(product(source_tails, target_tails))
    return pairs, sources, targets
