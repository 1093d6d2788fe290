"""What matching found, as a value: links, with what is left over on both sides and how far the order of keys was trusted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from ckptsurgeon.planning.links import Link
from ckptsurgeon.shown import Shown
from ckptsurgeon.tensors import TensorMeta


@dataclass(frozen=True, repr=False)
class Matching(Shown):
    """A mapping between two implementations.

    Attributes:
        links: in the target's order.
        unmatched: the target's keys that no link has; `unused`: the source's.
        order: how far the order of keys was trusted, 0 to 1.
        share: the part of the target's elements that certain links give, 0 to 1.
    """

    links: tuple[Link, ...]
    unmatched: tuple[str, ...]
    unused: tuple[str, ...]
    order: float
    share: float

    @cached_property
    def certain(self) -> tuple[Link, ...]:
        """The links that are applied."""
        return tuple(link for link in self.links if link.certain)

    @cached_property
    def uncertain(self) -> tuple[Link, ...]:
        """The links that are shown only."""
        return tuple(link for link in self.links if not link.certain)

    @cached_property
    def by_target(self) -> Mapping[str, Link]:
        """The link of each target key that has one."""
        return {key: link for link in self.links for key in link.targets}


def keys_left(matching: Matching, applied: tuple[Link, ...]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The keys of the target and of the source that no applied link has."""
    done = set(applied)
    left = [link for link in matching.links if link not in done]
    targets, sources = ([key for link in left for key in getattr(link, side)] for side in ("targets", "sources"))
    return (*matching.unmatched, *targets), (*matching.unused, *sources)


def result(links: list[Link], source: Mapping[str, TensorMeta], target: Mapping[str, TensorMeta], order: float) -> Matching:
    """A matching of these links, in the target's order."""
    positions = {key: position for position, key in enumerate(target)}
    links = sorted(links, key=lambda link: positions[link.targets[0]])
    reached = {key for link in links for key in link.targets}
    used = {key for link in links for key in link.sources}
    total = sum(tensor.numel for tensor in target.values())
    done = sum(target[key].numel for link in links if link.certain for key in link.targets)
    return Matching(
        tuple(links),
        tuple(key for key in target if key not in reached),
        tuple(key for key in source if key not in used),
        order,
        done / total if total else 0.0,
    )
