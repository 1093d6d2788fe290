"""Keys that both sides call the same, in the same shape, go together; what was found without names yields to that.

Rule: equal name and equal shape win, with two exceptions, each told as evidence. A whole numbered list may be counted otherwise, where that
leaves fewer of its tensors without a partner; and a square matrix is turned where the matrices of its kind that are not square are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import chain, product
from math import inf

from ckptsurgeon.matching.module_tree import MEMBER, fold
from ckptsurgeon.matching.turning import TURNED, TURNS
from ckptsurgeon.planning.links import Link
from ckptsurgeon.tensors import TensorMeta

Tensors = Mapping[str, TensorMeta]
Again = Callable[[Tensors, Tensors], list[Link]]  # matches what is left over
Judge = Callable[[list[Link]], list[Link]]  # takes their margins from links that are less sure than they look
SAME, SHIFTED = "same name and shape", "its whole list is shifted"
_NUMBER = re.compile(r"\d+")


def prefer_equal_names(
    matched: Sequence[Link],
    same: Mapping[str, str],
    bare: Mapping[str, str],
    anew: Collection[str],
    source: Tensors,
    target: Tensors,
    again: Again,
    judge: Judge,
) -> tuple[list[Link], dict[str, str], Mapping[str, str]]:
    """The links, where keys of equal name and shape (`same`, from source to target) go together; what that leaves over is matched again.

    `bare` are the source's keys as the target's names would call them, `anew` those of lists that are counted anew. Given back beside the
    links: the equal names that were followed, and `bare` by them.
    """
    named = {key: Link((key,), (same[key],), "", inf, (SHIFTED,)) for key in anew}
    links = _joined(matched, same, bare, named | _turned(matched, same, source), source, target, again)
    shifts = list(_shifts(matched, same, bare, target))
    if not shifts:
        return links, dict(same), bare
    judged = judge(links)
    for shift, counts in shifts:
        kept = {key: name for key, name in same.items() if not shift.holds(key, name)}
        counted = shift.counted(counts, bare)
        moved = {key: name for key, name in counted.items() if name in target and source[key].shape == target[name].shape}
        shifted = [_shifted(link) if shift.holds(link.sources[0], link.targets[0]) else link for link in matched]
        more = named | {key: Link((key,), (name,), "", inf, (SHIFTED,)) for key, name in moved.items()}
        rejoined = _joined(shifted, kept | moved, {**bare, **counted}, more | _turned(shifted, kept | moved, source), source, target, again)
        if _explained(judge(rejoined), shift) > _explained(judged, shift):
            same, bare, named, matched, links = kept | moved, {**bare, **counted}, more, shifted, rejoined
            judged = judge(links)
    return links, dict(same), bare


def _shifted(link: Link) -> Link:
    return replace(link, evidence=(*link.evidence, SHIFTED))


def _joined(
    matched: Sequence[Link],
    same: Mapping[str, str],
    bare: Mapping[str, str],
    turned: Mapping[str, Link],
    source: Tensors,
    target: Tensors,
    again: Again,
) -> list[Link]:
    """Links of equal names, those that were found and touch none of their keys, and what can be found in the rest."""
    names = {*same.values()}
    members = frozenset(_members(names))
    links = [turned.get(key) or Link((key,), (name,), "", inf, (SAME,)) for key, name in same.items()]
    stays = [link for link in matched if not (any(key in same for key in link.sources) or names.intersection(link.targets))]
    often = Counter(key for link in matched for key in link.sources)
    taken = {*names, *bare.values()}  # what the source has in another size is no tie
    stays += [link for link in matched if _shares(link, often, same, taken)]
    freed = len(stays) + sum(same.get(link.sources[0]) == link.targets[0] for link in matched if len(link.sources) == 1) < len(matched)
    if not freed:
        return links + _at_home(stays, bare, members)
    sure = [link for link in stays if link.certain]
    used, reached = _keys(chain(links, sure))
    source_rest = {key: tensor for key, tensor in source.items() if key not in used}
    target_rest = {key: tensor for key, tensor in target.items() if key not in reached}
    more = again(source_rest, target_rest) if source_rest and target_rest else []
    used, reached = _keys(more)
    doubtful = [link for link in stays if not link.certain and reached.isdisjoint(link.targets) and used.isdisjoint(link.sources)]
    return [*links, *sure, *_at_home([*more, *doubtful], bare, members)]


def _members(names: Iterable[str]) -> Iterator[str]:
    """The members of numbered lists that names stand in, by their paths."""
    return (name[: found.end()] for name in names for found in MEMBER.finditer(name))


def _at_home(links: Iterable[Link], bare: Mapping[str, str], members: Set[str]) -> list[Link]:
    """The links without doubtful ones that leave their member of a list."""
    return [link for link in links if link.certain or not _strays(link, bare, members)]


def _strays(link: Link, bare: Mapping[str, str], members: Set[str]) -> bool:
    """Whether a link goes from one member of a list to another of that list, though each of them goes to the one of its own number."""
    for key, name in product((bare[key] for key in link.sources), link.targets):
        for found, other in zip(MEMBER.finditer(key), MEMBER.finditer(name), strict=False):
            if found[0] != other[0]:
                heads = key[: found.end()], name[: other.end()]
                if heads[0][: found.start()] == heads[1][: other.start()] and members >= {*heads}:
                    return True
                break
    return False


def _shares(link: Link, often: Mapping[str, int], same: Mapping[str, str], taken: set[str]) -> bool:
    """Whether a target without a source of its own takes one that another target has too (a tied output layer)."""
    return len(link.sources) == 1 and link.sources[0] in same and often[link.sources[0]] > 1 and taken.isdisjoint(link.targets)


def _keys(links: Iterable[Link]) -> tuple[set[str], set[str]]:
    links = list(links)
    return {key for link in links for key in link.sources}, {key for link in links for key in link.targets}


@dataclass(frozen=True)
class _Shift:
    """A numbered list in which found links move every number by one amount: its path on both sides, up to the number."""

    here: str
    there: str

    def holds(self, key: str, name: str) -> bool:
        """Whether a link's source is of the list, or its target is."""
        return key.startswith(self.here) or name.startswith(self.there)

    def counted(self, counts: Mapping[int, int], bare: Mapping[str, str]) -> dict[str, str]:
        """The names of the list's keys after their numbers are counted so."""
        found = {}
        for key, name in bare.items():
            if name.startswith(self.there) and (number := _NUMBER.match(name, len(self.there))) and int(number[0]) in counts:
                found[key] = f"{self.there}{counts[int(number[0])]}{name[number.end() :]}"
        return found


def _shifts(
    matched: Sequence[Link], same: Mapping[str, str], bare: Mapping[str, str], target: Tensors
) -> Iterator[tuple[_Shift, Mapping[int, int]]]:
    """Lists with equal names of which found links move all that they move by one and the same difference of numbers, or each to the one
    that is as far from the first; with the number that each goes to."""
    moves: dict[_Shift, set[tuple[int, int]]] = {}
    for link in matched:
        if link.certain and len(link.sources) == len(link.targets) == 1:
            key, name = link.sources[0], link.targets[0]
            if moved := _moved(bare[key], name):
                there, numbers = moved
                moves.setdefault(_Shift(_head(key, bare[key], there), there), set()).add(numbers)
    for shift, pairs in moves.items():
        if any(shift.holds(*pair) for pair in same.items()):
            ours, theirs = (_members_at(side, shift.there) for side in (bare.values(), target))
            anew = dict(zip(ours, theirs, strict=True)) if len(ours) == len(theirs) else {}
            differences = {new - old for old, new in pairs}
            if len(differences) == 1:
                yield shift, {number: number + min(differences) for number in ours}
            elif pairs <= anew.items():
                yield shift, anew


def _members_at(names: Iterable[str], head: str) -> list[int]:
    """The numbers of a list's members."""
    return sorted({int(found[0]) for name in names if name.startswith(head) and (found := _NUMBER.match(name, len(head)))})


def _moved(first: str, second: str) -> tuple[str, tuple[int, int]] | None:
    """The path up to the first number in which two names differ, and both numbers; None where they differ otherwise up to there."""
    for a, b in zip(_NUMBER.finditer(first), _NUMBER.finditer(second), strict=False):
        if first[: a.start()] != second[: b.start()]:
            break
        if a[0] != b[0]:
            return second[: b.start()], (int(a[0]), int(b[0]))
    return None


def _head(key: str, name: str, there: str) -> str:
    """The head of a source's key that stands for the head of its name."""
    tail = name[len(there) :]
    return key.removesuffix(tail)


def _explained(links: Iterable[Link], shift: _Shift) -> int:
    """How many of a list's tensors, on both sides, have a partner for certain that stands in the list or beside it."""
    beside = tuple(f"{head.rstrip('.').rpartition('.')[0]}." for head in (shift.here, shift.there))
    pairs = [
        (key, name)
        for link in links
        if link.certain
        for key in link.sources
        for name in link.targets
        if all(part == "." or text.startswith(part) for text, part in zip((key, name), beside, strict=True))
    ]
    here = {key for key, _ in pairs if key.startswith(shift.here)}
    return len(here) + len({name for _, name in pairs if name.startswith(shift.there)})


def _turned(matched: Sequence[Link], same: Mapping[str, str], source: Tensors) -> dict[str, Link]:
    """Links of equal names whose square matrices are turned, since those of their kind that are not square are."""
    matrices = [link for link in matched if _matrix(link, source)]
    kinds: dict[str, set[str]] = {}
    for link in matrices:
        if not _square(source[link.sources[0]]):
            for kind in _kinds(link.sources[0]):
                kinds.setdefault(kind, set()).add(link.op)
    turned = {}
    for link in matrices:
        matrix = source[link.sources[0]]
        if _square(matrix) and same.get(link.sources[0]) == link.targets[0]:
            turn = TURNS[len(matrix.shape)]
            if next((kinds[kind] for kind in _kinds(link.sources[0]) if kind in kinds), {link.op}) == {turn}:
                turned[link.sources[0]] = replace(link, op=turn, margin=inf, evidence=(SAME, TURNED))
    turned |= {
        link.sources[0]: replace(link, margin=inf, evidence=(SAME, TURNED))
        for link in matched
        if link.op.startswith("permute")
        and same.get(link.sources[0]) == link.targets[0]
        and len(source[link.sources[0]].shape) not in TURNS
    }
    return turned


def _matrix(link: Link, source: Tensors) -> bool:
    """Whether a link is of one matrix, or of one stack of them."""
    many = len(source[link.sources[0]].shape)
    return len(link.sources) == len(link.targets) == 1 and many in TURNS and link.op in ("", TURNS[many])


def _square(matrix: TensorMeta) -> bool:
    return matrix.shape[-1] == matrix.shape[-2]


def _kinds(key: str) -> Iterator[str]:
    """What a matrix is a kind of, the nearest first: by its module's own name, then by the module that it stands in, save the whole."""
    parts = fold(key).split(".")
    yield ".".join(parts[-2:])
    if parts[:-2]:
        yield ".".join(parts[:-2])
