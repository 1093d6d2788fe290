"""Puts rules in the order in which the first that matches is the right one, and finds the names that must be dropped first.

Rule: a rule for a name stands before every rule that would take the name elsewhere. Where two rules want to stand before one another, the
names in dispute get rules of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from heapq import heappop, heappush

from ckptsurgeon.errors import RuleError
from ckptsurgeon.rules.drafting.drafts import Draft, Known
from ckptsurgeon.rules.drafting.numbers import is_open
from ckptsurgeon.rules.drafting.rows import Line, literal

Destinations = Mapping[str, tuple[str, ...] | None]
Astray = Callable[[str, Sequence[str] | None], bool]
_ROUNDS = 40


def in_order(drafts: Sequence[Draft], known: Known, destinations: Destinations, astray: Astray) -> tuple[list[Draft], list[str]]:
    """The drafts in order, with exceptions where they need some, and the names to drop before them."""
    parts = list(drafts)
    for _ in range(_ROUNDS):
        order, disputed = _order(parts, known, destinations)
        if not disputed:
            return order, _stray(order, known, destinations, astray)
        parts = [part for at, draft in enumerate(parts) for part in _apart(draft, disputed.get(at, set()))]
        parts += [Draft.of(literal(Line((name,), destinations[name] or ()))) for name in disputed.get(-1, ())]
    raise RuleError("rules that can stand in no order")


def _servers(drafts: Sequence[Draft], known: Known) -> dict[str, int]:
    """The draft that is for each name."""
    served: dict[str, int] = {}
    for at, draft in enumerate(drafts):
        if len(draft.lines) > 1 or any(map(is_open, draft.patterns)):
            own = {name for line in draft.lines for name in line.sources if not is_open(name)}
            if any(is_open(name) for line in draft.lines for name in line.sources):
                own |= set(known.matched(draft.compiled))
            served.update(dict.fromkeys(own, at))
        else:
            served.update(dict.fromkeys(draft.patterns, at))
    return served


def _order(drafts: Sequence[Draft], known: Known, destinations: Destinations) -> tuple[list[Draft], dict[int, set[str]]]:
    """The drafts in an order in which every name meets its own rule first; or the names in dispute by draft (-1 for names without)."""
    served = _servers(drafts, known)
    before: list[set[int]] = [set() for _ in drafts]
    for at, draft in enumerate(drafts):
        for name in known.matched(draft.compiled):
            server = served.get(name, -1)
            if server == at or name not in destinations or _gives(draft, name) == (destinations[name] or ()):
                continue
            before[at].add(server)
    bare = {
        name
        for at, draft in enumerate(drafts)
        if -1 in before[at]
        for name in known.matched(draft.compiled)
        if name in destinations and name not in served
    }
    if bare:
        return [], {-1: bare}
    after: list[list[int]] = [[] for _ in drafts]
    for at, others in enumerate(before):
        for other_draft in others:
            after[other_draft].append(at)
    waits = list(map(len, before))
    ready = [at for at, count in enumerate(waits) if not count]  # sorted, so a heap
    order: list[Draft] = []
    while ready:
        at = heappop(ready)
        order.append(drafts[at])
        for other_draft in after[at]:
            waits[other_draft] -= 1
            if not waits[other_draft]:
                heappush(ready, other_draft)
    if len(order) < len(drafts):
        return [], _disputed(drafts, known, destinations, served, [at for at, count in enumerate(waits) if count])
    return order, {}


def _disputed(
    drafts: Sequence[Draft], known: Known, destinations: Destinations, served: Mapping[str, int], left: Sequence[int]
) -> dict[int, set[str]]:
    """Of drafts that stand in each other's way: the one with the fewest names that others would take, and these names."""
    among = set(left)
    names: dict[int, set[str]] = {}
    for at in left:
        for name in known.matched(drafts[at].compiled):
            server = served.get(name, -1)
            if server in among and server != at and name in destinations and _gives(drafts[at], name) != (destinations[name] or ()):
                names.setdefault(server, set()).add(name)
    fewest = min(names, key=lambda at: (len(names[at]), at))
    return {fewest: names[fewest]}


def _gives(draft: Draft, name: str) -> tuple[str, ...] | None:
    """What a draft makes of a name; None where it takes it otherwise, or fails."""
    try:
        return draft.gives(name)
    except RuleError:
        return None


def _apart(draft: Draft, names: set[str]) -> list[Draft]:
    """A draft, and before it the lines of these names as they stand."""
    out = [line for line in draft.lines if set(line.sources) & names]
    rest = tuple(line for line in draft.lines if line not in out)
    if not out:
        return [draft]
    return [*(Draft.of(literal(line)) for line in out), *([Draft(draft.patterns, draft.results, draft.op, rest)] if rest else [])]


def _stray(order: Sequence[Draft], known: Known, destinations: Destinations, astray: Astray) -> list[str]:
    """The names without a link that would do harm under the first rule that matches them, or under none."""
    first: dict[str, Draft] = {}
    for draft in order:
        for name in known.matched(draft.compiled):
            if name not in destinations:
                first.setdefault(name, draft)
    stray = []
    for name in known.names:
        if name in destinations:
            continue
        taken = first.get(name)
        gives = None if taken is None else _gives(taken, name)
        if (taken is not None and gives is None) or astray(name, gives):
            stray.append(name)
    return stray
