"""What values say of links: statistics of both sides' tensors that tell a norm's weight from a bias, and a table of positions from noise.

Rule: they never tell q from k from v, nor one layer from another, so only what is alone of its kind among all that is open is decided by
them. A certain link that they speak against stays, with a warning. Pure: who measures is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import inf

from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.surgery.matching.result import Link, Matching
from ckptsurgeon.surgery.matching.ties import ENOUGH
from ckptsurgeon.tensors import TensorMeta

NEAR_ONE, NEAR_ZERO, SMOOTH, NOISE = "around one", "around zero", "smooth", "noise"
_LEAST = 0.1  # a mean from which on a vector is a scale, if its spread is half of it at most
_TINY = 0.02  # a mean up to which a vector without spread is a shift
_SMOOTH, _NOISE = 10.0, 3.0  # times the greatest share of one direction that noise would have


@dataclass(frozen=True)
class Stats:
    """A tensor's mean and spread (standard deviation), and of a matrix how many times the energy that noise would have in its first
    direction a sample has there, its mean taken away (Marchenko and Pastur 1967); 0 where that was not measured."""

    mean: float
    spread: float
    top: float = 0.0

    @property
    def kind(self) -> str:
        """What it looks like, or empty where nothing can be said."""
        if self.top:
            return SMOOTH if self.top >= _SMOOTH else NOISE if self.top <= _NOISE else ""
        if self.mean >= _LEAST and 2 * self.spread <= self.mean:
            return NEAR_ONE
        return NEAR_ZERO if abs(self.mean) <= max(self.spread, _TINY) and self.mean < _LEAST else ""


Measure = Callable[[Iterable[str]], Mapping[str, Stats]]
Tensors = Mapping[str, TensorMeta]


def judged(found: Matching, source: Tensors, target: Tensors, of_source: Measure, of_target: Measure) -> tuple[Matching, tuple[str, ...]]:
    """The matching with its links judged by values, and a warning for each certain link that they speak against."""
    certain = [link for link in found.certain if _plain(link) and _flat(source[link.sources[0]])]
    doubtful = [link for link in found.uncertain if _plain(link)]
    loose = [*found.unused, *(link.sources[0] for link in doubtful)], [*found.unmatched, *(link.targets[0] for link in doubtful)]
    open_ = [[key for key in dict.fromkeys(keys) if _measured(side[key])] for keys, side in zip(loose, (source, target), strict=True)]
    one = of_source(dict.fromkeys([*open_[0], *(link.sources[0] for link in certain)]))
    other = of_target(dict.fromkeys([*open_[1], *(link.targets[0] for link in certain)]))
    warnings = [
        f"values disagree: {link.sources[0]} is {one[link.sources[0]].kind}, {link.targets[0]} {other[link.targets[0]].kind}"
        for link in certain
        if _against(one.get(link.sources[0]), other.get(link.targets[0]))
    ]
    alone = _alone(_kinds(open_[0], source, one), _kinds(open_[1], target, other))
    links = [_judged(link, one, other, alone) if _plain(link) and not link.certain else link for link in found.links]
    return replace(found, links=tuple(links)), tuple(warnings)


def _plain(link: Link) -> bool:
    return len(link.sources) == len(link.targets) == 1


def _flat(tensor: TensorMeta) -> bool:
    return sum(size > 1 for size in tensor.shape) == 1


def _measured(tensor: TensorMeta) -> bool:
    return BY_CODE[tensor.dtype].kind == "float" and tensor.numel > 1


def _against(one: Stats | None, other: Stats | None) -> bool:
    return one is not None and other is not None and {one.kind, other.kind} == {NEAR_ONE, NEAR_ZERO}


def _kinds(keys: Iterable[str], side: Tensors, stats: Mapping[str, Stats]) -> dict[tuple[tuple[int, ...], str], list[str]]:
    """What is open on a side, by shape (without ones) and kind."""
    kinds: dict[tuple[tuple[int, ...], str], list[str]] = {}
    for key in keys:
        kinds.setdefault((tuple(size for size in side[key].shape if size > 1), stats[key].kind if key in stats else ""), []).append(key)
    return kinds


def _alone(one: Mapping[tuple[tuple[int, ...], str], list[str]], other: Mapping[tuple[tuple[int, ...], str], list[str]]) -> dict[str, str]:
    """By target key the source key, where both are the only open ones of their shape and kind, and no kind of that shape is unclear."""
    return {
        targets[0]: one[form][0]
        for form, targets in other.items()
        if form[1] and len(targets) == 1 == len(one.get(form, ())) and not one.get((form[0], "")) and not other.get((form[0], ""))
    }


def _judged(link: Link, one: Mapping[str, Stats], other: Mapping[str, Stats], alone: Mapping[str, str]) -> Link:
    given, wanted = one.get(link.sources[0]), other.get(link.targets[0])
    if alone.get(link.targets[0]) == link.sources[0]:
        assert given is not None
        return replace(link, margin=ENOUGH, evidence=(*link.evidence, f"values: the only one here that is {given.kind}"))
    if _against(given, wanted):
        return replace(link, margin=min(link.margin, -1.0), evidence=(*link.evidence, "values disagree"))
    return link


def noise_share(rows: int, columns: int) -> float:
    """The share of its energy that a matrix of noise has in its first direction, for large ones (Marchenko and Pastur 1967).

    >>> round(noise_share(64, 64), 4)
    0.0625
    """
    return (rows**0.5 + columns**0.5) ** 2 / (rows * columns) if rows and columns else inf
