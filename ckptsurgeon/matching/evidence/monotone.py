"""Layers of one module that are counted on both sides, and were linked across that order.

Rule: where links of layers of one kind cross, numbers tell nothing in their module, and equal layers stay sure only where words tell them.
Numbers are compared of layers that stand in one module, or that are called alike but for them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations, permutations

from ckptsurgeon.matching.evidence.vocabulary import SAYS_NOTHING, concepts
from ckptsurgeon.planning.links import Link
from ckptsurgeon.tensors import TensorMeta

_NUMBER = re.compile(r"\d{1,9}")
_MOST = 32  # layers of one module that are compared with each other
_KINDS = SAYS_NOTHING | {"conv", "norm", "linear", "block"}  # words that several layers of one module may have
Sides = tuple[str, str]


def across(links: Iterable[Link], source: Mapping[str, TensorMeta], target: Mapping[str, TensorMeta]) -> Iterator[tuple[Link, str]]:
    """Each link of a module in which numbers tell nothing, with a rival as `source -> target`."""
    by_layers: dict[Sides, list[Link]] = {}
    for link in links:
        if len(link.sources) == len(link.targets) == 1:
            by_layers.setdefault((_above(link.sources[0]), _above(link.targets[0])), []).append(link)
    often = Counter(here for here, _ in by_layers)
    by_layers = {
        layers: found for layers, found in by_layers.items() if often[layers[0]] == 1
    }  # what several share has no place of its own
    for side in (0, 1):
        modules: dict[tuple[str, ...], dict[tuple[object, ...], list[Sides]]] = {}
        for layers, found in by_layers.items():
            held = sorted(
                (link.sources[0][len(layers[0]) :], source[link.sources[0]].shape, target[link.targets[0]].shape) for link in found
            )
            kind = _above(layers[side]), *(name for name, _, _ in held)
            modules.setdefault(kind, {}).setdefault(tuple(held), []).append(layers)
        for alike in modules.values():
            if _crossed(list(alike.values())):
                for layers, other in (way for row in alike.values() for way in permutations(row[:_MOST], 2)):
                    if not _told(layers, other):
                        yield from ((link, f"{other[0]} -> {layers[1]}") for link in by_layers[layers])


def _crossed(rows: list[list[Sides]]) -> bool:
    """Whether two layers of one row cross; or any two, where one side counts all layers of the rows in one module by one count."""
    every = [layers for row in rows for layers in row]
    one_count = any(
        len({_above(path) for path in paths}) == 1
        and len({_counts(path.rpartition(".")[2]) for path in paths} - {()}) == len(paths) == len({*paths})
        for paths in zip(*every, strict=True)
    )
    return any(_cross(*pair) for way in ([every] if one_count else rows) for pair in combinations(way[:_MOST], 2))


def _above(path: str) -> str:
    """What a tensor or a layer stands in."""
    return path.rpartition(".")[0]


def _cross(layers: Sides, other: Sides) -> bool:
    """Whether the order in which one side counts two layers is not that of the other."""
    rises = [_rises(*paths) for paths in zip(layers, other, strict=True)]
    return None not in rises and rises[0] != rises[1]


def _rises(first: str, second: str) -> bool | None:
    """Whether the second of two layers has the higher number; None where their numbers can't be compared."""
    if _above(first) == _above(second):
        first, second = (path.rpartition(".")[2] for path in (first, second))
    elif _NUMBER.sub("#", first) != _NUMBER.sub("#", second):
        return None
    counts = [_counts(path) for path in (first, second)]
    return None if counts[0] == counts[1] or not all(counts) else counts[0] < counts[1]


def _counts(path: str) -> tuple[int, ...]:
    return tuple(int(number) for number in _NUMBER.findall(path))


def _told(layers: Sides, other: Sides) -> bool:
    """Whether a word that is on both sides of a link is not on both sides of an exchange."""
    words = _words(layers[0]) & _words(layers[1])
    return bool(words - _words(other[0])) or bool(words - _words(other[1]))


def _words(path: str) -> frozenset[str]:
    return frozenset(word for word in concepts(path) if word[0] != "#") - _KINDS
