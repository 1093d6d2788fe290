"""Which of several look-alikes goes with which: by names, by numbers, by order where order can be trusted, by what was decided elsewhere.

Rule: evidence is added up in points; a choice that beats its runner-up by fewer than `ENOUGH` is uncertain. Sizes and shapes decide nothing
here: whoever calls has seen that they agree. The best assignment is found by shortest augmenting paths (Jonker and Volgenant, Computing 38,
1987), O(n³) for n rows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from math import inf

from ckptsurgeon.matching.evidence.distinguish import telling
from ckptsurgeon.matching.evidence.score import AGAINST_IT, NUMBERS, ORDER, Anchors, Clues, Table
from ckptsurgeon.matching.evidence.support import ALONE
from ckptsurgeon.matching.evidence.vocabulary import conflict, said
from ckptsurgeon.matching.module_tree import Node
from ckptsurgeon.planning.links import ENOUGH

Scores = Sequence[Sequence[float]]
MANY = 48  # nodes on a side, above which not each is compared with each


@dataclass(frozen=True)
class Choice:
    """One pair: its margin over the runner-up in points, what spoke for it, and the runner-up."""

    source: Node
    target: Node
    margin: float
    evidence: tuple[str, ...]
    runner_up: tuple[Node, Node] | None = None


def choose(sources: Sequence[Node], targets: Sequence[Node], clues: Clues, anchors: Anchors = ()) -> list[Choice]:
    """Pair as many as the shorter side has; `anchors` are pairs in the same surroundings that are certain."""
    if len(sources) == len(targets) == 1:
        against = conflict(*(_says(node) for node in (sources[0], targets[0])))
        return [Choice(sources[0], targets[0], 0.5 if against and sources[0].leaf else inf, (ALONE,))]
    if len(sources) == len(targets) and _in_step(sources, targets, clues.trust):
        margin = 0.5 if _counted_otherwise(sources, targets) else 2 * (NUMBERS + ORDER * clues.trust)
        return [
            Choice(source, target, margin, ("numbers in the same order",))
            for source, target in zip(*(sorted(nodes, key=lambda node: node.numbers) for nodes in (sources, targets)), strict=True)
        ]
    in_rows = _in_rows(sources, targets, clues, anchors)
    if in_rows:
        return in_rows
    if min(len(sources), len(targets)) > MANY:
        return _many(sources, targets, clues, anchors)
    table = Table(sources, targets, clues, anchors)
    scores = [[table.score(row, column) for column in range(len(targets))] for row in range(len(sources))]
    pairs = assign(scores)
    choices = []
    for (row, column), (margin, rival) in zip(pairs, margins(scores, pairs), strict=True):
        runner_up = (sources[rival[0]], targets[rival[1]]) if rival else None
        if any(words.endswith(AGAINST_IT) for words in table.parts(row, column)):
            margin = min(margin, 0.5)  # the best of bad ones
        choices.append(Choice(sources[row], targets[column], margin, table.evidence(row, column), runner_up))
    return _without_the_clear(choices, sources, targets, clues, anchors)


def _says(node: Node) -> frozenset[str]:
    """What a node's path says; a unit that keeps running statistics is a norm, whatever it is called."""
    return said(node.path) | {"norm" for _ in "." if "running_var" in node.tensors}


def _in_step(sources: Sequence[Node], targets: Sequence[Node], trust: float) -> bool:
    """Whether both sides differ by numbers alone, and keys stand in the order of the numbers (or in none)."""
    if len({node.folded for node in sources}) > 1 or len({node.folded for node in targets}) > 1:
        return False
    return not trust or all(
        before.at < after.at for nodes in (sources, targets) for before, after in pairwise(sorted(nodes, key=lambda node: node.numbers))
    )


def _counted_otherwise(sources: Sequence[Node], targets: Sequence[Node]) -> bool:
    """Whether one side has the same in each member of a list (`3.residual.6`), and the other several in each: `0.conv1` and `0.conv2`."""
    (one, alike), (other, _) = sorted((_varying(sources), _varying(targets)), key=lambda side: len(side[0]))
    return len(one) == 1 < len(other) and alike and any(other) and not other[-1]


def _varying(nodes: Sequence[Node]) -> tuple[list[bool], bool]:
    """Of the numbers by which nodes differ, whether each is a whole part of their path; and whether one follows that all have."""
    several = [len({*column}) > 1 for column in zip(*(node.numbers for node in nodes), strict=True)]
    return [whole for whole, differs in zip(nodes[0].whole_parts, several, strict=True) if differs], several[-1:] != [True]


def _in_rows(sources: Sequence[Node], targets: Sequence[Node], clues: Clues, anchors: Anchors) -> list[Choice]:
    """Where both sides are rows of numbered ones (two norms of each layer, or a list of each): which row is which, once for all."""
    if len(sources) != len(targets):
        return []
    ways: list[list[Choice]] = []
    for rows in _rows(sources):
        for other_rows in _rows(targets):
            if len(rows) == len(other_rows) > 1 and len({len(row) for row in (*rows, *other_rows)}) == 1 < len(rows[0]):
                if len({node.folded for node in sources}) == len({node.folded for node in targets}) == 1:
                    continue  # numbers alone: their order tells
                chosen = choose([row[0] for row in rows], [row[0] for row in other_rows], clues, anchors)
                of = {id(row[0]): row for row in (*rows, *other_rows)}
                ways.append(
                    [
                        replace(choice, source=source, target=target)
                        for choice in chosen
                        for source, target in zip(of[id(choice.source)], of[id(choice.target)], strict=True)
                    ]
                )
    if len(ways) > 1:  # as many rows as each has: which number counts the rows is not told
        return [replace(choice, margin=min(choice.margin, 0.5)) for choice in ways[0]]
    return ways[0] if ways else []


def _rows(nodes: Sequence[Node]) -> list[list[list[Node]]]:
    """The ways in which nodes are rows: those that differ by numbers alone; or, where all do, those with one number in common."""
    keys: list[Callable[[Node], object]] = [lambda node: node.folded]
    if len({node.folded for node in nodes}) == 1:
        differ = [at for at, values in enumerate(zip(*(node.numbers for node in nodes), strict=True)) if len(set(values)) > 1]
        named = [at for at in differ if not nodes[0].whole_parts[at]]  # `norms_1.0`: the list counts by the number that is a part
        keys = [partial(_number_at, at) for at in (named if len(named) == 1 < len(differ) else differ)]
    ways = []
    for key in keys:
        rows: dict[object, list[Node]] = {}
        for node in sorted(nodes, key=lambda node: node.numbers):
            rows.setdefault(key(node), []).append(node)
        ways.append(list(rows.values()))
    return ways


def _number_at(at: int, node: Node) -> int:
    return node.numbers[at]


def _many(sources: Sequence[Node], targets: Sequence[Node], clues: Clues, anchors: Anchors) -> list[Choice]:
    """Too many to compare each with each: those that the same words tell apart, among themselves; the others in their order, uncertain."""
    words = [dict(zip(map(id, nodes), telling(nodes), strict=True)) for nodes in (sources, targets)]
    both = frozenset().union(*words[0].values()) & frozenset().union(*words[1].values())
    rows: dict[frozenset[str], tuple[list[Node], list[Node]]] = {}
    for side, nodes in enumerate((sources, targets)):
        for node in nodes:
            rows.setdefault(frozenset(word for word in words[side][id(node)] & both if word[0] != "#"), ([], []))[side].append(node)
    choices: list[Choice] = []
    rest: tuple[list[Node], list[Node]] = ([], [])
    for shared_words, (row_sources, row_targets) in rows.items():
        if shared_words and row_sources and row_targets and max(len(row_sources), len(row_targets)) < max(len(sources), len(targets)):
            choices += choose(row_sources, row_targets, clues, anchors)
        else:
            rest[0].extend(row_sources)
            rest[1].extend(row_targets)
    return [*choices, *(Choice(source, target, 0.0, ("in the order of keys",)) for source, target in zip(*rest, strict=False))]


def _without_the_clear(
    choices: list[Choice], sources: Sequence[Node], targets: Sequence[Node], clues: Clues, anchors: Anchors
) -> list[Choice]:
    """Look again at those that are not clear, among themselves: other words may tell them apart."""
    clear = [choice for choice in choices if choice.margin >= ENOUGH]
    if not clear or len(clear) == len(choices):
        return choices
    done = {id(node) for choice in clear for node in (choice.source, choice.target)}
    rest = [[node for node in nodes if id(node) not in done] for nodes in (sources, targets)]
    above = min(choice.margin for choice in clear)
    again = choose(rest[0], rest[1], clues, anchors) if rest[0] and rest[1] else []
    if len(again) == 1 and conflict(*(said(node.path) for node in (again[0].source, again[0].target))):
        above = min(above, 0.5)
    return [*clear, *(replace(choice, margin=min(choice.margin, above)) for choice in again)]


def assign(scores: Scores) -> list[tuple[int, int]]:
    """Pairs (row, column), as many as the shorter side has, whose scores have the greatest sum.

    >>> assign([[1.0, 2.0], [0.0, 3.0]])
    [(0, 0), (1, 1)]
    """
    rows, columns = len(scores), len(scores[0]) if scores else 0
    if rows > columns:
        turned = assign([[scores[row][column] for row in range(rows)] for column in range(columns)])
        return sorted((row, column) for column, row in turned)
    potential_row, potential = [0.0] * (rows + 1), [0.0] * (columns + 1)
    owner, before = [0] * (columns + 1), [0] * (columns + 1)
    for row in range(1, rows + 1):
        owner[0], column = row, 0
        least, done = [inf] * (columns + 1), [False] * (columns + 1)
        while True:
            done[column] = True
            here, step, following = owner[column], inf, 0
            for other_column in range(1, columns + 1):
                if not done[other_column]:
                    cost = -scores[here - 1][other_column - 1] - potential_row[here] - potential[other_column]
                    if cost < least[other_column]:
                        least[other_column], before[other_column] = cost, column
                    if least[other_column] < step:
                        step, following = least[other_column], other_column
            for other_column in range(columns + 1):
                if done[other_column]:
                    potential_row[owner[other_column]] += step
                    potential[other_column] -= step
                else:
                    least[other_column] -= step
            column = following
            if not owner[column]:
                break
        while column:
            owner[column] = owner[before[column]]
            column = before[column]
    return sorted((owner[column] - 1, column - 1) for column in range(1, columns + 1) if owner[column])


def margins(scores: Scores, pairs: Sequence[tuple[int, int]]) -> list[tuple[float, tuple[int, int] | None]]:
    """For each pair, what the sum would lose in the nearest assignment without it, and the pair that the row would then be in.

    Looked at are exchanges of two pairs, and a row or a column that no pair has.
    """
    rows, columns = len(scores), len(scores[0]) if scores else 0
    free_rows, free_columns = set(range(rows)) - {row for row, _ in pairs}, set(range(columns)) - {column for _, column in pairs}
    losses: list[tuple[float, tuple[int, int] | None]] = []
    for row, column in pairs:
        best: tuple[float, tuple[int, int] | None] = (inf, None)
        for other_row, other_column in pairs:
            if other_row != row:
                lost = scores[row][column] + scores[other_row][other_column] - scores[row][other_column] - scores[other_row][column]
                best = min(best, (lost, (row, other_column)), key=lambda item: item[0])
        for free in free_columns:
            best = min(best, (scores[row][column] - scores[row][free], (row, free)), key=lambda item: item[0])
        for free in free_rows:
            best = min(best, (scores[row][column] - scores[free][column], (free, column)), key=lambda item: item[0])
        losses.append(best)
    return losses
