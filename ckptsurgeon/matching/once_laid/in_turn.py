"""Layers and blocks of one kind that one side counts through, and the other counts by stages or has in several lists.

Rule: where all blocks of one kind go to all of another, and their sizes are the same in turn in one order alone, they go together in that
order, each part to the part that most others of its kind go to. A number may count down where the other side counts up. What is alike all
along, or reads the same from behind, tells no order.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import pairwise, permutations, product, takewhile
from typing import NamedTuple, TypeVar

from ckptsurgeon.matching.evidence.score import AGAINST_IT
from ckptsurgeon.matching.module_tree import COUNT, MEMBER, around, module_of, squeezed
from ckptsurgeon.planning.links import Link
from ckptsurgeon.tensors import TensorMeta

Tensors = Mapping[str, TensorMeta]
Cut = Callable[[str], str]  # the block that a key is looked at in
IN_TURN = "of the same sizes in turn"
_AS_IT_LIES = ("", "reshape")  # ops that move no element
_LEAST = 3  # blocks of a kind
_MOST = 3  # kinds on one side
_DOT = re.compile(r"\.")
Item = TypeVar("Item")


class Kind(NamedTuple):
    """Blocks of one name but for numbers, that have parts in common: the name, and one of the parts."""

    name: str
    part: str


@dataclass(frozen=True)
class Blocks:
    """The blocks of one side, and what they hold: tensors by their names in the block."""

    of: Mapping[str, str]  # by key
    held: Mapping[str, Mapping[str, TensorMeta]]
    kinds: Mapping[str, Kind]  # by block
    of_kind: Mapping[Kind, Sequence[str]]

    def part(self, key: str) -> str:
        """What a key is called in its block."""
        return key[len(self.of[key]) :]


def in_turn(links: Sequence[Link], source: Tensors, target: Tensors, named: Callable[[Link], bool]) -> list[Link]:
    """The links, where layers or blocks stand in turn that were linked across the order or in doubt; equal names (`named`) stay."""
    for cut in (lambda key: around(key, MEMBER), module_of):
        sides = _blocks(source, cut), _blocks(target, cut)
        before, links = links, _in_turn(links, *sides, named)
    return list(_in_turn(links, *sides, named) if links != before else links)  # what the first layers show tells others their order


def _blocks(side: Tensors, cut: Cut) -> Blocks:
    of = {key: cut(key) for key in side}
    held: dict[str, dict[str, TensorMeta]] = {}
    for key, block in of.items():
        held.setdefault(block, {})[key[len(block) :]] = side[key]
    names = {block: COUNT.sub("{}", block) for block in held}
    first = {block: next(iter(parts)) for block, parts in held.items()}
    leads = _together(((names[block], first[block]), (names[block], part)) for block, parts in held.items() for part in parts)
    kinds = {block: Kind(*leads[names[block], first[block]]) for block in held}
    of_kind: dict[Kind, list[str]] = {}
    for block, kind in kinds.items():
        of_kind.setdefault(kind, []).append(block)
    return Blocks(of, held, kinds, of_kind)


def _together(pairs: Iterable[tuple[Item, Item]]) -> dict[Item, Item]:
    """Each item with one that stands for all that it goes together with, by pairs of them."""
    leads: dict[Item, Item] = {}

    def lead(item: Item) -> Item:
        while leads.setdefault(item, item) != item:
            leads[item] = item = leads[leads[item]]
        return item

    for one, other in pairs:
        leads[lead(other)] = lead(one)
    return {item: lead(item) for item in leads}


def _in_turn(links: Sequence[Link], source: Blocks, target: Blocks, named: Callable[[Link], bool]) -> list[Link]:
    alone = [link for link in links if len(link.sources) == len(link.targets) == 1 and link.op in _AS_IT_LIES]
    stays = (
        {key: link.targets[0] for link in alone if named(link) for key in link.sources},
        {link.targets[0]: link.sources[0] for link in alone if named(link)},
    )
    moved: dict[str, Link] = {}
    seen: Counter[tuple[str, str]] = Counter()
    for group in _groups(alone, source, target):
        parts = _parts(group, source, target)
        kinds = {source.kinds[source.of[link.sources[0]]] for link in group}
        others = {target.kinds[target.of[link.targets[0]]] for link in group}
        orders = _fitting(kinds, others, source, target, parts)
        if len(orders) > 1:
            seen = seen or _seen(alone)
            orders = _agreeing(orders, seen, _seen(group))
        if len(orders) == 1:
            moved |= _moved(orders[0], parts, group, source, target, stays)
    if not moved:
        return list(links)
    taken = {key for link in moved.values() for key in link.sources}
    rest = [link for link in links if moved.keys().isdisjoint(link.targets) and taken.isdisjoint(link.sources)]
    return [*rest, *moved.values()]


def _groups(links: Sequence[Link], source: Blocks, target: Blocks) -> Iterator[list[Link]]:
    """Links, those together whose kinds of blocks go together, where not all of them are clear and of whole blocks in their order."""
    by_kinds: dict[tuple[Kind, Kind], list[Link]] = {}
    for link in links:
        kinds = source.kinds[source.of[link.sources[0]]], target.kinds[target.of[link.targets[0]]]
        by_kinds.setdefault(kinds, []).append(link)
    often = [Counter(pair[side] for pair, found in by_kinds.items() for _ in found) for side in (0, 1)]
    by_kinds = {  # what most of one kind go to, and no stray
        pair: found
        for pair, found in by_kinds.items()
        if 2 * len(found) >= min(counts[kind] for counts, kind in zip(often, pair, strict=True))
    }
    lead = _together(((0, here), (1, there)) for here, there in by_kinds)
    groups: dict[tuple[int, Kind], list[tuple[Kind, Kind]]] = {}
    for kinds in by_kinds:
        groups.setdefault(lead[0, kinds[0]], []).append(kinds)
    for group in groups.values():
        found = [link for kinds in group for link in by_kinds[kinds]]
        rows = [
            sorted({(source.of[link.sources[0]], target.of[link.targets[0]]) for link in by_kinds[kinds]}, key=_counts) for kinds in group
        ]
        whole = all(len({pair[side] for row in rows for pair in row}) == sum(map(len, rows)) for side in (0, 1))
        rising = all(_counts(one[1:]) <= _counts(other[1:]) for row in rows for one, other in pairwise(row))
        if len(found) >= _LEAST and not (whole and rising and all(link.clear for link in found)):
            yield found


def _counts(blocks: Sequence[str]) -> list[int]:
    return [int(number) for number in COUNT.findall(blocks[0])]


def _parts(links: Sequence[Link], source: Blocks, target: Blocks) -> dict[str, str]:
    """The target's part for each of the source's, where more than half of the clear links of both agree."""
    pairs = Counter((source.part(link.sources[0]), target.part(link.targets[0])) for link in links if link.clear)
    often = [Counter[str](), Counter[str]()]
    for pair, count in pairs.items():
        for side, part in enumerate(pair):
            often[side][part] += count
    return {here: there for (here, there), count in pairs.items() if 2 * count > max(often[0][here], often[1][there])}


def _fitting(kinds: set[Kind], others: set[Kind], source: Blocks, target: Blocks, parts: Mapping[str, str]) -> list[dict[str, str]]:
    """The orders in which sizes are the same in turn, each as the source's block of each of the target's."""
    if min(len(kinds), len(others)) > 1 or max(len(kinds), len(others)) > _MOST or not all("{}" in kind.name for kind in kinds | others):
        return []  # the first norm of a model is not the first of its blocks
    forms = [
        {
            block: {name(part): squeezed(tensor.shape) for part, tensor in side.held[block].items() if name(part)}
            for kind in some
            for block in side.of_kind[kind]
        }
        for side, some, name in ((source, kinds, parts.get), (target, others, {part: part for part in parts.values()}.get))
    ]
    if len(forms[0]) != len(forms[1]) or {} in forms[0].values() or len({str(sorted(form.items())) for form in forms[0].values()}) < 2:
        return []

    def fitting(turned: Set[str] = frozenset()) -> list[dict[str, str]]:
        return [
            dict(zip(there, here, strict=True))
            for here in _orders(forms[0], kinds, source, turned)
            for there in _orders(forms[1], others, target)
            if all(forms[0][block] == forms[1][other] for block, other in zip(here, there, strict=True))
        ]

    def turned_at(at: int) -> list[dict[str, str]]:
        """With the numbers at a place counting the other way: those of one list of blocks alone, or else of all."""
        heads = {head[at] for head in map(_heads, forms[0])}
        return [order for head in sorted(heads) for order in fitting({head})] or fitting(heads)

    counts = list(map(_counts, ([block] for block in forms[0])))
    numbers = range(min(map(len, counts)))
    first = next((at for at in numbers if len({count[at] for count in counts}) > 1), None)
    rising = fitting()
    orders = [*rising, *(turned_at(first) if first is not None else ())] if rising else [order for at in numbers for order in turned_at(at)]
    found = [order for at, order in enumerate(orders) if order not in orders[:at]]
    return [] if len(found) > 1 and (_parallel(kinds, source) or _parallel(others, target)) else found


def _heads(block: str) -> list[str]:
    """The list that each number of a block counts in."""
    return [COUNT.sub("{}", block[: found.start()]) for found in COUNT.finditer(block)]


def _parallel(kinds: set[Kind], side: Blocks) -> bool:
    """Whether several kinds of blocks count the same: they are a list of each, or one list of several."""
    rows = [sorted(map(_counts, ([block] for block in side.of_kind[kind]))) for kind in kinds]
    return len(rows) > 1 and all(row == rows[0] for row in rows)


def _seen(links: Iterable[Link]) -> Counter[tuple[str, str]]:
    """How often a member of the source's lists and a module of the target's have a clear link in common."""
    return Counter(pair for link in links if link.clear for pair in product(*_places(link.sources[0], link.targets[0])))


def _agreeing(orders: Sequence[dict[str, str]], seen: Counter[tuple[str, str]], own: Counter[tuple[str, str]]) -> list[dict[str, str]]:
    """The one order in which blocks go most often where the rest of what they stand in goes (`own` are theirs); none where that is not
    one."""
    votes = [sum(seen[pair] > own[pair] for there, here in order.items() for pair in product(*_places(here, there))) for order in orders]
    return [order for order, many in zip(orders, votes, strict=True) if many == max(votes) and votes.count(many) == 1]


def _places(here: str, there: str) -> tuple[list[str], list[str]]:
    """The members of lists that a source's path leads through, and the modules that a target's does."""
    return [here[: found.end()] for found in MEMBER.finditer(here)], [there[: found.start()] for found in _DOT.finditer(there)]


def _orders(blocks: Iterable[str], kinds: set[Kind], side: Blocks, turned: Set[str] = frozenset()) -> Iterator[list[str]]:
    """Blocks as their numbers count them, those of a kind together where the names of kinds part; of lists that count the same, also in
    turn. Numbers of the lists in `turned` count the other way."""
    counts = {
        block: [-number if head in turned else number for head, number in zip(_heads(block), _counts([block]), strict=True)]
        for block in blocks
    }
    alike = takewhile(lambda letters: len({*letters}) == 1, zip(*(kind.name for kind in kinds), strict=False))
    place = sum(letters[0] == "}" for letters in alike)
    for at in (place, place + 1) if _parallel(kinds, side) else (place,):
        for order in permutations(sorted(kinds)):
            rank = {kind: number for number, kind in enumerate(order)}
            yield sorted(counts, key=lambda block: [*counts[block][:at], rank[side.kinds[block]], *counts[block][at:]])


def _moved(
    laid: Mapping[str, str],
    parts: Mapping[str, str],
    links: Sequence[Link],
    source: Blocks,
    target: Blocks,
    stays: tuple[Mapping[str, str], Mapping[str, str]],
) -> dict[str, Link]:
    """New links by their targets, for those that stand elsewhere, are in doubt or are missing; none where one that `stays`, by its source
    or by its target, says otherwise."""
    by_target = {link.targets[0]: link for link in links}
    margin = min(link.margin for link in links if link.clear)
    moved = {}
    for there, here in laid.items():
        for part, other in parts.items():
            key, name = f"{here}{part}", f"{there}{other}"
            if other in target.held[there]:
                link = by_target.get(name, Link((key,), (name,)))
                told = stays[0].get(key, name) != name or stays[1].get(name, key) != key
                if told or any(AGAINST_IT in words for words in link.evidence):
                    return {}
                if key != link.sources[0] or not link.clear:
                    op = "" if source.held[here][part].shape == target.held[there][other].shape else "reshape"
                    moved[name] = replace(link, sources=(key,), op=op, margin=margin, evidence=(*link.evidence, IN_TURN), runner_up="")
    return moved
