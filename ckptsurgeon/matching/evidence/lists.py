"""Numbered lists that links go between: which number of the one goes to which of the other, and what keeps their order.

Where links of layers of one kind cross in a module that both sides count, numbers tell nothing there, and equal layers stay sure only
where words tell them; compared are layers of one module, or that are called alike but for numbers.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import combinations

from ckptsurgeon.matching.evidence.vocabulary import SAYS_NOTHING, concepts
from ckptsurgeon.matching.module_tree import COUNT, module_of
from ckptsurgeon.planning.links import Link
from ckptsurgeon.tensors import TensorMeta

Members = dict[str, set[tuple[str, tuple[int, ...]]]]
_NUMBER = re.compile(r"\d+")
_INDEX = re.compile(r"\d{1,9}(?=\.|$)")  # a number at the end of a part of a name
_MOST = 32  # layers of one module that others are compared with
_KINDS = SAYS_NOTHING | {"conv", "norm", "linear", "block"}  # words that several layers of one module may have
Layers = tuple[str, str]  # of a link: the source's, and the target's


def by_lists(links: Iterable[Link]) -> dict[tuple[str, str], list[Link]]:
    """Links of one tensor each by the lists that they may be of: heads of both names that end where a number begins."""
    found: dict[tuple[str, str], list[Link]] = {}
    for link in links:
        if len(link.sources) == len(link.targets) == 1:
            numbers = _NUMBER.findall(f"{link.sources[0]} {link.targets[0]}")
            if max(map(len, numbers), default=0) < 10:
                for pair in _heads(link.sources[0], link.targets[0]):
                    found.setdefault(pair, []).append(link)
    return found


def _heads(source_key: str, target_key: str) -> Iterator[tuple[str, str]]:
    """Heads of two names that end where a number begins."""
    for a in _INDEX.finditer(source_key):
        for b in _INDEX.finditer(target_key):
            yield source_key[: a.start()], target_key[: b.start()]


def number_at(key: str, head: str) -> str:
    """The number in a key right behind the head of a list."""
    number = _NUMBER.match(key, len(head))
    assert number is not None
    return number[0]


def moves_of(links: Iterable[Link], here: str, there: str) -> set[tuple[int, int]]:
    """Which number of the one list goes to which of the other."""
    return {move_of(link, here, there) for link in links}


def move_of(link: Link, here: str, there: str) -> tuple[int, int]:
    """The numbers of a link's two keys in lists with these heads."""
    return int(number_at(link.sources[0], here)), int(number_at(link.targets[0], there))


def skips(side: Iterable[str], head: str) -> bool:
    """Whether a list holds single layers alone, and has not every number between its first and its last."""
    rests = [key[len(head) :].split(".") for key in side if key.startswith(head)]
    if any(len(rest) != 2 or not rest[0].isdecimal() or len(rest[0]) > 9 for rest in rests):
        return False
    numbers = {int(number) for number, _ in rests}
    return max(numbers) - min(numbers) >= len(numbers)


def in_each_longest_rise(values: Sequence[int]) -> set[int]:
    """The places that every longest part of a sequence has that does not fall (Schensted 1961)."""
    before, behind = _rise_to(values), _rise_to([-value for value in reversed(values)])[::-1]
    longest = max(before, default=0)
    places = Counter(rise for rise, rest in zip(before, behind, strict=True) if rise + rest - 1 == longest)
    rows = enumerate(zip(before, behind, strict=True))
    return {at for at, (rise, rest) in rows if rise + rest - 1 == longest and places[rise] == 1}


def _rise_to(values: Sequence[int]) -> list[int]:
    """How long the longest part is that does not fall and ends at each value."""
    ends: list[int] = []
    lengths = []
    for value in values:
        at = bisect_right(ends, value)
        ends[at : at + 1] = [value]
        lengths.append(at + 1)
    return lengths


def rises(counts: set[tuple[int, int]]) -> bool:
    """Whether of two lists the greater number goes to the greater one, for several numbers."""
    order = [count for _, count in sorted(counts)]
    return len(order) > 1 and order == sorted(order)


def members_of(side: Mapping[str, TensorMeta]) -> dict[str, Members]:
    """What each member of each numbered list of a side holds: by the list's head, the number."""
    found: dict[str, Members] = {}
    for key, tensor in side.items():
        for number in _NUMBER.finditer(key):
            inside = found.setdefault(key[: number.start()], {})
            inside.setdefault(number[0], set()).add((key[number.end() :], tensor.shape))
    return found


def all_alike(members: Members) -> bool:
    """Whether the members of a numbered list are several, and hold the same."""
    first = next(iter(members.values()), None)
    return len(members) > 1 and all(contents == first for contents in members.values())


def nothing_tells(first: Members, second: Members) -> bool:
    """Whether the members of one of two lists hold the same, and the other's would, had they all that one of them has."""
    sides = ((first, second), (second, first))
    return any(
        all_alike(one) and (all_alike(other) or len(set.union(*other.values())) == len(next(iter(one.values())))) for one, other in sides
    )


def mirrored(key: str, head: str, numbers: Sequence[int]) -> str:
    """The key of the member of a list of these numbers that is as far from the list's other end."""
    number = number_at(key, head)
    return f"{head}{numbers[-1 - numbers.index(int(number))]}{key[len(head) + len(number) :]}"


def across(links: Iterable[Link], source: Mapping[str, TensorMeta], target: Mapping[str, TensorMeta]) -> Iterator[tuple[Link, str]]:
    """Each link of a module in which numbers tell nothing, with a rival as `source -> target`."""
    by_layers: dict[Layers, list[Link]] = {}
    for link in links:
        if len(link.sources) == len(link.targets) == 1:
            by_layers.setdefault((module_of(link.sources[0]), module_of(link.targets[0])), []).append(link)
    often = Counter(here for here, _ in by_layers)
    # What several share has no place of its own.
    by_layers = {layers: found for layers, found in by_layers.items() if often[layers[0]] == 1}
    for side in (0, 1):
        modules: dict[tuple[str, ...], dict[tuple[object, ...], list[Layers]]] = {}
        for layers, found in by_layers.items():
            held = sorted(
                (link.sources[0][len(layers[0]) :], source[link.sources[0]].shape, target[link.targets[0]].shape) for link in found
            )
            kind = module_of(layers[side]), *(name for name, _, _ in held)
            modules.setdefault(kind, {}).setdefault(tuple(held), []).append(layers)
        for alike in modules.values():
            for row in alike.values() if _crossed(list(alike.values())) else ():
                for layers in row:
                    rival = next((other for other in row[:_MOST] if other != layers and not _told(layers, other)), None)
                    if rival is not None:
                        yield from ((link, f"{rival[0]} -> {layers[1]}") for link in by_layers[layers])


def _crossed(rows: list[list[Layers]]) -> bool:
    """Whether two layers of one row cross; or any two, where one side counts all layers of the rows in one module by one count."""
    every = [layers for row in rows for layers in row]
    one_count = any(
        len({module_of(path) for path in paths}) == 1
        and len({_counts(path.rpartition(".")[2]) for path in paths} - {()}) == len(paths) == len({*paths})
        for paths in zip(*every, strict=True)
    )
    return any(_cross(*pair) for way in ([every] if one_count else rows) for pair in combinations(way[:_MOST], 2))


def _cross(layers: Layers, other: Layers) -> bool:
    """Whether the order in which one side counts two layers is not that of the other."""
    rises = [_rises(*paths) for paths in zip(layers, other, strict=True)]
    return None not in rises and rises[0] != rises[1]


def _rises(first: str, second: str) -> bool | None:
    """Whether the second of two layers has the higher number; None where their numbers can't be compared."""
    if module_of(first) == module_of(second):
        first, second = (path.rpartition(".")[2] for path in (first, second))
    elif COUNT.sub("#", first) != COUNT.sub("#", second):
        return None
    counts = [_counts(path) for path in (first, second)]
    return None if counts[0] == counts[1] or not all(counts) else counts[0] < counts[1]


def _counts(path: str) -> tuple[int, ...]:
    return tuple(int(number) for number in COUNT.findall(path))


def _told(layers: Layers, other: Layers) -> bool:
    """Whether a word that is on both sides of a link is not on both sides of an exchange."""
    words = _words(layers[0]) & _words(layers[1])
    return bool(words - _words(other[0])) or bool(words - _words(other[1]))


def _words(path: str) -> frozenset[str]:
    return frozenset(word for word in concepts(path) if word[0] != "#") - _KINDS
