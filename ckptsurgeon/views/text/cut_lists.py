"""A sentence for each numbered list of layers of which one side has fewer, so that dropped layers are noticed. Uses names only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from ckptsurgeon.planning.diff import Diff


def cut_lists(result: Diff) -> Iterator[str]:
    """A sentence for each list of which one side has only the first layers.

    Args:
        result: a diff.

    Yields:
        The sentences: `the first 6 of 12 layers are kept`, with the list's name.
    """
    extra = _numbers(result.prefix.added + result.prefix.bare(key) for key in result.extra)
    missing = _numbers(result.missing)
    if extra.keys() == missing.keys():  # the matched keys may be a million
        return
    shared = _numbers(result.matched)
    for name, beyond in extra.items():
        if name not in missing and (kept := _first(shared.get(name), beyond)):
            yield f"{name}: the first {kept} of {kept + len(beyond)} are kept"
    for name, beyond in missing.items():
        if name not in extra and (present := _first(shared.get(name), beyond)):
            yield f"{name}: the first {present} of {present + len(beyond)} come from the source"


def _first(some: set[int] | None, beyond: set[int]) -> int:
    """The length of `some` if it is 0, 1, … and `beyond` continues it; else 0."""
    count = len(some) if some else 0
    return count if some == set(range(count)) and beyond == set(range(count, count + len(beyond))) else 0


def _numbers(keys: Iterable[str]) -> dict[str, set[int]]:
    """For each list's name, the numbers of its keys; only the first number of a key is used.

    >>> _numbers(["h.0.w", "h.1.w", "ln.w"])
    {'h': {0, 1}}
    """
    numbers: dict[str, set[int]] = {}
    for key in keys:
        segments = key.split(".")
        index = next((index for index, segment in enumerate(segments) if index and segment.isascii() and segment.isdigit()), None)
        if index is not None and len(segments[index]) < 7:
            numbers.setdefault(".".join(segments[:index]), set()).add(int(segments[index]))
    return numbers
