"""What values say of links: statistics of both sides' tensors that tell a norm's weight from a bias, and a table of positions from noise.

Rule: they never tell q from k from v, nor one layer from another, so only what is alone of its kind among all that is open is decided by
them. A certain link that they speak against stays, with a warning. Pure: who measures is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from math import inf

from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.matching.result import Matching
from ckptsurgeon.planning.links import ENOUGH, Link
from ckptsurgeon.tensors import TensorMeta

NEAR_ONE, NEAR_ZERO, SMOOTH, NOISE = "around one", "around zero", "of few directions", "like noise"
_LEAST = 0.1  # a mean from which on a vector is a scale, if its spread is half of it at most
_TINY = 0.02  # a mean up to which a vector without spread is a shift
_SMOOTH, _NOISE = 6.0, 3.0  # times the energy in one direction that noise would have: from, and up to


@dataclass(frozen=True)
class Stats:
    """A tensor's mean and spread (standard deviation), and of a matrix how many times the energy that noise would have in its first
    direction a sample has there, its mean taken away (Marchenko and Pastur 1967); 0 where that was not measured."""

    mean: float
    spread: float
    top: float = 0.0

    @property
    def kind(self) -> str:
        """What a vector looks like, or empty where nothing can be said."""
        if self.mean >= _LEAST and 2 * self.spread <= self.mean:
            return NEAR_ONE
        return NEAR_ZERO if abs(self.mean) <= max(self.spread, _TINY) and self.mean < _LEAST else ""

    @property
    def pattern(self) -> str:
        """What a matrix looks like, or empty where nothing can be said."""
        return "" if not self.top else SMOOTH if self.top >= _SMOOTH else NOISE if self.top <= _NOISE else ""


Measure = Callable[[Iterable[str]], Mapping[str, Stats]]
Tensors = Mapping[str, TensorMeta]
Form = tuple[tuple[int, ...], str]


def judged(
    matching: Matching, source: Tensors, target: Tensors, of_source: Measure, of_target: Measure, *, fresh: bool = False
) -> tuple[Matching, tuple[str, ...]]:
    """The matching with its links judged by values, and a warning for each certain link that they speak against.

    `fresh`: the target has a constructor's values, whose matrices are noise, or zeros, whatever they are for.
    """
    certain = [link for link in matching.certain if _plain(link) and _flat(source[link.sources[0]])]
    doubtful = [link for link in matching.uncertain if _plain(link)]
    loose = [*matching.unused, *(link.sources[0] for link in doubtful)], [*matching.unmatched, *(link.targets[0] for link in doubtful)]
    open_ = [
        [key for key in dict.fromkeys(keys) if _measured(side[key]) and not (fresh and not _flat(side[key]))]
        for keys, side in zip(loose, (source, target), strict=True)
    ]
    source_kinds = _kinds(source, of_source(dict.fromkeys([*open_[0], *(link.sources[0] for link in certain)])))
    target_kinds = _kinds(target, of_target(dict.fromkeys([*open_[1], *(link.targets[0] for link in certain)])))
    warnings = [
        f"values disagree: {link.sources[0]} is {source_kinds[link.sources[0]]}, {link.targets[0]} {target_kinds[link.targets[0]]}"
        for link in certain
        if _against(link, source_kinds, target_kinds)
    ]
    alone = _alone(_grouped(open_[0], source, source_kinds), _grouped(open_[1], target, target_kinds))
    links = [_judged(link, source_kinds, target_kinds, alone) if _plain(link) and not link.certain else link for link in matching.links]
    return replace(matching, links=tuple(links)), tuple(warnings)


def _plain(link: Link) -> bool:
    return len(link.sources) == len(link.targets) == 1


def _flat(tensor: TensorMeta) -> bool:
    return sum(size > 1 for size in tensor.shape) == 1


def _measured(tensor: TensorMeta) -> bool:
    return BY_CODE[tensor.dtype].kind == "float" and tensor.numel > 1


def _kinds(side: Tensors, stats: Mapping[str, Stats]) -> dict[str, str]:
    """What each tensor that was measured looks like."""
    return {key: measured.kind if _flat(side[key]) else measured.pattern for key, measured in stats.items()}


def _against(link: Link, source_kinds: Mapping[str, str], target_kinds: Mapping[str, str]) -> bool:
    return {source_kinds.get(link.sources[0]), target_kinds.get(link.targets[0])} == {NEAR_ONE, NEAR_ZERO}


def _grouped(keys: Iterable[str], side: Tensors, kinds: Mapping[str, str]) -> dict[Form, list[str]]:
    """What is open on a side, by shape (without ones) and kind."""
    groups: dict[Form, list[str]] = {}
    for key in keys:
        groups.setdefault((tuple(size for size in side[key].shape if size > 1), kinds.get(key, "")), []).append(key)
    return groups


def _alone(source_groups: Mapping[Form, list[str]], target_groups: Mapping[Form, list[str]]) -> dict[str, str]:
    """By target key the source key, where both are the only open ones of their shape and kind, and no kind of that shape is unclear."""
    return {
        targets[0]: source_groups[form][0]
        for form, targets in target_groups.items()
        if form[1]
        and len(targets) == 1 == len(source_groups.get(form, ()))
        and not source_groups.get((form[0], ""))
        and not target_groups.get((form[0], ""))
    }


def _judged(link: Link, source_kinds: Mapping[str, str], target_kinds: Mapping[str, str], alone: Mapping[str, str]) -> Link:
    if alone.get(link.targets[0]) == link.sources[0]:
        words = f"values: the only one here that is {source_kinds[link.sources[0]]}"
        return replace(link, margin=ENOUGH, evidence=(*link.evidence, words))
    if _against(link, source_kinds, target_kinds):
        return replace(link, margin=min(link.margin, -1.0), evidence=(*link.evidence, "values disagree"))
    return link


def noise_share(rows: int, columns: int) -> float:
    """The share of its energy that a matrix of noise has in its first direction, for large ones (Marchenko and Pastur 1967).

    >>> round(noise_share(64, 64), 4)
    0.0625
    """
    return (rows**0.5 + columns**0.5) ** 2 / (rows * columns) if rows and columns else inf
