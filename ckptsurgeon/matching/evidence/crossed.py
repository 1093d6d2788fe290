"""Links that their names would rather see exchanged: `ln_1` for `norm2` while `norm1` is there, or the one norm of two that says nothing.

Rule: only modules that hold the same shapes and stand in one module on either side can be exchanged. Names must speak at least as much for
a link as for any other way; lists that are counted in the same order may begin at another number.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from itertools import combinations, islice
from typing import NamedTuple

from ckptsurgeon.matching.evidence.distinguish import written
from ckptsurgeon.matching.evidence.score import PAIRED_ELSEWHERE
from ckptsurgeon.matching.evidence.vocabulary import SAYS_NOTHING, concepts, conflict
from ckptsurgeon.planning.links import Link
from ckptsurgeon.tensors import TensorMeta

_DEPTHS = (2, 3)  # of the segment that is exchanged, from the end of a key: a layer, or the module that holds it
_MOST = 8  # links of one module that are compared with each other
_KINDS = SAYS_NOTHING | {"conv", "norm", "attn", "mlp"}  # words that several parts of one module may have
_HINT = 0.25  # what such a word in common counts
_EARLY, _LATE = (
    frozenset({"first", "preattn", "attn", "#0"}),
    frozenset({"mlp", "postattn", "premlp", "postmlp", "second", "#2"}),
)  # norms of a layer
_CLEARLY = 1.0  # how much better an exchange must be
EXCHANGED = "its names speak against the other way"


class _Beside(NamedTuple):
    """What else stands in a layer: a third of a kind, or a norm behind the MLP, which leaves the one behind the attention the first; or one
    before it, which leaves number 1 the first."""

    third: bool
    behind_mlp: bool
    before_mlp: bool

    @classmethod
    def of(cls, names: Iterable[str]) -> _Beside:
        """What these layers of one module, by their names, tell of each other."""
        words = frozenset().union(*map(concepts, names))
        return cls("#3" in words, "postmlp" in words, "premlp" in words and "#0" not in words)


Signature = frozenset[tuple[str, tuple[int, ...]]]


def exchangeable(
    links: Iterable[Link], every: Sequence[Link], source: Mapping[str, TensorMeta], target: Mapping[str, TensorMeta]
) -> Iterator[tuple[Link, str]]:
    """Each of `links` that names would rather see otherwise, with its rival as `source -> target`; `every` are all clear links."""
    used = {key for link in every for key in link.sources}, {key for link in every for key in link.targets}
    inside = _signatures(source), _signatures(target)
    free = _Free(inside[0], used[0]), _Free(inside[1], used[1])
    for (here, rest, there, tail, _), members in _groups(links, inside[0]).items():
        agree = _agreement(members)
        for pair in _crossed(members, agree):
            yield pair.link, f"{pair.other.sources[0]} -> {pair.link.targets[0]}"
            yield pair.other, f"{pair.link.sources[0]} -> {pair.other.targets[0]}"
        if rest.count("."):
            continue
        for old, new, link in members:
            if PAIRED_ELSEWHERE in link.evidence:  # where both stand beside each other
                continue
            agreed = agree(old, new)
            for name in free[1].beside(f"{there}{new}", tail):
                if agree(old, name.removeprefix(there)) >= agreed:
                    yield link, f"{link.sources[0]} -> {name}.{tail}"
                    break
            for name in free[0].beside(f"{here}{old}", rest):
                if agree(name.removeprefix(here), new) >= agreed:
                    yield link, f"{name}.{rest} -> {link.targets[0]}"
                    break


def exchanged(
    links: Sequence[Link], source: Mapping[str, TensorMeta], target: Mapping[str, TensorMeta], named: Callable[[Link], bool]
) -> list[Link]:
    """The links, where two that their names speak against are exchanged, which names speak for; those of equal names (`named`) stay."""
    rivals: dict[int, list[Link]] = {}
    for members in _groups((link for link in links if link.clear and not named(link)), _signatures(source)).values():
        for pair in _crossed(members, _agreement(members)):
            if pair.straight <= -_CLEARLY and pair.exchanged >= 2 * _CLEARLY:
                rivals.setdefault(id(pair.link), []).append(pair.other)
                rivals.setdefault(id(pair.other), []).append(pair.link)

    def settled(link: Link) -> Link:
        others = {id(other): other for other in rivals.get(id(link), ())}
        if len(others) != 1:
            return link
        (other,) = others.values()
        if len({*map(id, rivals[id(other)])}) > 1 or other.op != link.op:
            return link
        return replace(link, sources=other.sources, evidence=(*link.evidence, EXCHANGED), runner_up="")

    return [settled(link) for link in links]


class _Pair(NamedTuple):
    """Two links, and how much their names agree as they are, and if they were exchanged."""

    link: Link
    other: Link
    straight: float
    exchanged: float


_Members = Sequence[tuple[str, str, Link]]  # links with the segments of both keys that may be exchanged


def _groups(
    links: Iterable[Link], inside: Mapping[str, Signature]
) -> dict[tuple[str, str, str, str, Signature], list[tuple[str, str, Link]]]:
    """Links whose modules stand in one module on either side, and hold the same."""
    groups: dict[tuple[str, str, str, str, Signature], list[tuple[str, str, Link]]] = {}
    for link in links if inside else ():
        for depth in _DEPTHS if len(link.sources) == len(link.targets) == 1 else ():
            (here, old, rest), (there, new, tail) = _cut(link.sources[0], depth), _cut(link.targets[0], depth)
            if old and new and not old.isdigit() and not new.isdigit():
                groups.setdefault((here, rest, there, tail, inside[f"{here}{old}"]), []).append((old, new, link))
    return groups


def _agreement(members: _Members) -> Callable[[str, str], float]:
    return partial(_agree, beside=(_Beside.of(old for old, _, _ in members), _Beside.of(new for _, new, _ in members)))


def _crossed(members: _Members, agree: Callable[[str, str], float]) -> Iterator[_Pair]:
    """Pairs of links that names would rather see exchanged."""
    for (old, new, link), (other_old, other_new, other) in combinations(members[:_MOST], 2):
        straight = agree(old, new) + agree(other_old, other_new)
        crossed = agree(old, other_new) + agree(other_old, new)
        if old != other_old and new != other_new and crossed - straight >= _CLEARLY and not _in_order(old, new, other_old, other_new):
            yield _Pair(link, other, straight, crossed)


def _cut(key: str, depth: int) -> tuple[str, str, str]:
    """What stands before the segment that is `depth` from the end, with its dot, then the segment, then what follows."""
    parts = key.split(".")
    if len(parts) < depth:
        return "", "", ""
    head = ".".join(parts[:-depth])
    return f"{head}." if head else "", parts[-depth], ".".join(parts[1 - depth :])


def _signatures(side: Mapping[str, TensorMeta]) -> dict[str, Signature]:
    """What each module holds, at most two levels deep."""
    rows: dict[str, set[tuple[str, tuple[int, ...]]]] = {}
    for key, tensor in side.items():
        for depth in _DEPTHS:
            head, segment, rest = _cut(key, depth)
            if segment:
                rows.setdefault(f"{head}{segment}", set()).add((rest, tensor.shape))
    return {path: frozenset(row) for path, row in rows.items()}


class _Free:
    """Modules of one side by what stands beside them and holds the same, and of which no link has some tensor."""

    def __init__(self, inside: Mapping[str, Signature], used: Collection[str]) -> None:
        self.inside, self.used = inside, used
        self.alike: dict[tuple[str, Signature], list[str]] = {}
        for path, signature in inside.items():
            if not path.rpartition(".")[2].isdigit():
                self.alike.setdefault((path.rpartition(".")[0], signature), []).append(path)
        self.known: dict[tuple[str, Signature, str], list[str]] = {}

    def beside(self, path: str, leaf: str) -> list[str]:
        """Those beside a module whose tensor `leaf` no link has, at most a few."""
        key = (path.rpartition(".")[0], self.inside[path], leaf)
        if key not in self.known:
            names = (name for name in self.alike.get(key[:2], ()) if f"{name}.{leaf}" not in self.used)
            self.known[key] = list(islice(names, _MOST))
        return self.known[key]


def _in_order(old: str, new: str, other_old: str, other_new: str) -> bool:
    """Whether the four are of two lists that are counted in the same order."""
    numbers = [_numbers(name) for name in (old, new, other_old, other_new)]
    return all(numbers) and (numbers[0] < numbers[2]) == (numbers[1] < numbers[3])


def _numbers(name: str) -> list[int]:
    return [int(word[1:]) for word in concepts(name) if word[0] == "#"]


@cache
def _agree(old: str, new: str, beside: tuple[_Beside, _Beside]) -> float:
    """How much two names agree: in words, in numbers, and a little in words that several names have.

    `beside` is what else stands there, on either side.
    """
    every, others = frozenset(concepts(old)), frozenset(concepts(new))
    shared = frozenset(word for word in every & others if word[0] != "#" and (len(word) > 1 or word in "qkv"))
    points = -2.0 if conflict(every, others) else 0.0
    points += bool(shared - _KINDS) + _HINT * bool(shared & _KINDS)
    points += _HINT * bool(shared - _KINDS and written(old) & written(new))
    if "norm" in shared:
        late, other_late = (_is_late(*pair) for pair in zip((every, others), beside, strict=True))
        points += 0 if late is None or other_late is None else 1 if late == other_late else -2
    numbers, other_numbers = _numbers(old), _numbers(new)
    if numbers and other_numbers:
        points += 1 if numbers == other_numbers else -1
    return points


def _is_late(words: frozenset[str], beside: _Beside) -> bool | None:
    """Whether a norm stands behind the attention of its layer; None where its name does not say, as in a layer with two attentions."""
    first = {word for word, told in (("postattn", beside.behind_mlp), ("#1", beside.before_mlp)) if told}
    early, late = bool(words & (_EARLY | first)), bool(words & (_LATE - first - ({"#2"} if beside.third else set())))
    return None if early == late or "cross" in words else late
