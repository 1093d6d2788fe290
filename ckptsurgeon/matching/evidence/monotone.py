"""Layers of one module that are counted on both sides, and were linked across that order.

Rule: where links of layers of one kind cross, numbers tell nothing in their module, and equal layers stay sure only where words tell them.
Numbers are compared of layers that stand in one module, or that are called alike but for them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import combinations

from ckptsurgeon.matching.evidence.vocabulary import SAYS_NOTHING, concepts
from ckptsurgeon.matching.module_tree import COUNT, module_of
from ckptsurgeon.planning.links import Link
from ckptsurgeon.tensors import TensorMeta

_MOST = 32  # layers of one module that others are compared with
_KINDS = SAYS_NOTHING | {"conv", "norm", "linear", "block"}  # words that several layers of one module may have
Layers = tuple[str, str]  # of a link: the source's, and the target's


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
