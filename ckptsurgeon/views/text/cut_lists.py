"""Numbered lists of layers of which one side has fewer, in a sentence each, so that nobody overlooks a cut. Names only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ckptsurgeon.planning.diff import Diff


def cut_lists(found: Diff) -> Iterator[str]:
    """A sentence for each list of which one side has only the first ones.

    Args:
        found: a diff.

    Yields:
        The sentences: `the first 6 of 12 layers are kept`, with the list's name.
    """
    shared = _numbers(found.matched)
    extra = _numbers(found.prefix.added + found.prefix.bare(key) for key in found.extra)
    missing = _numbers(found.missing)
    for name, beyond in extra.items():
        if name not in missing and (kept := _first(shared.get(name), beyond)):
            yield f"{name}: the first {kept} of {kept + len(beyond)} are kept"
    for name, beyond in missing.items():
        if name not in extra and (given := _first(shared.get(name), beyond)):
            yield f"{name}: the first {given} of {given + len(beyond)} come from the source"


def _first(some: set[int] | None, beyond: set[int]) -> int:
    """How many the first ones are that `some` counts, where `beyond` goes on from there; else 0."""
    count = len(some) if some else 0
    return count if some == set(range(count)) and beyond == set(range(count, count + len(beyond))) else 0


def _numbers(keys: Iterable[str]) -> dict[str, set[int]]:
    """By the name of a list, which numbers keys have in it; the first number of a key counts.

    >>> _numbers(["h.0.w", "h.1.w", "ln.w"])
    {'h': {0, 1}}
    """
    found: dict[str, set[int]] = {}
    for key in keys:
        segments = key.split(".")
        at = next((at for at, segment in enumerate(segments) if at and segment.isascii() and segment.isdigit()), None)
        if at is not None and len(segments[at]) < 7:
            found.setdefault(".".join(segments[:at]), set()).add(int(segments[at]))
    return found
