"""Links that stand in for what the source lacks: a layer took the place of another, since its own has no partner.

Rule: fresh is always possible. Sure is no link between names of two parts of an attention or of two towers, none that leaves what the rest
of its module goes to, and none whose target is not told from one that is left beside it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence

from ckptsurgeon.matching.evidence.vocabulary import SAYS_NOTHING, concepts, conflict, said_by_place
from ckptsurgeon.matching.module_tree import ROLES, around, fold, is_float, module_of
from ckptsurgeon.planning.links import Link
from ckptsurgeon.tensors import TensorMeta

Tensors = Mapping[str, TensorMeta]
_MEMBER = re.compile(r"(?:^|(?<=\.))\d{1,9}(?=\.)")  # a number that is a whole part, be it the first
_LEVELS = 4  # of modules around a layer that are looked at
_MOST = 32  # targets without a source that a link is compared with
_PARTS = frozenset({"q", "k", "v", "out"})  # of one attention
_TOWERS = (frozenset({"text", "image", "audio"}), frozenset({"encoder", "decoder"}))


def stand_ins(links: Sequence[Link], source: Tensors, target: Tensors) -> Iterator[tuple[Link, str, str]]:
    """Each link that may stand in for another, why, and its rival as `source -> target`."""
    single = [link for link in links if len(link.sources) == len(link.targets) == 1]
    sides = _words_of(source), _words_of(target)
    reached = {key for link in links if link.clear for key in link.targets}
    fresh: dict[tuple[tuple[int, ...], str], list[str]] = {}
    for key, tensor in target.items():
        if key not in reached and is_float(tensor) and around(key, _MEMBER):
            fresh.setdefault((tensor.shape, _role(key)), []).append(key)
    ways = [_Homes(_modules_at_equal_depth, single), _Homes(_blocks, single)]
    usual = Counter((fold(link.sources[0]), fold(link.targets[0])) for link in single if link.clear)
    for link in single:
        if not link.clear:
            continue
        (key,), (name,) = link.sources, link.targets
        home = next((home for way in ways if (home := way.elsewhere(key, name))), "")
        if _exclude(key, name, sides):
            yield link, "names exclude each other", ""
        elif home:
            yield link, f"the rest of its module goes to {home}", ""
        else:
            others = fresh.get((target[name].shape, _role(name)), ())[:_MOST]
            rival = next((other for other in others if _beside(name, other) and not _told(key, name, other, usual)), "")
            if rival:
                yield link, f"{rival} is left, and as good", f"{key} -> {rival}"


def _words_of(side: Tensors) -> frozenset[str]:
    return frozenset(word for part in {part for key in side for part in key.split(".")[:-1]} for word in concepts(part))


def _role(key: str) -> str:
    last = key.rpartition(".")[2]
    return ROLES.get(last, last)


def _own_words(key: str) -> frozenset[str]:
    """What a tensor's module is called, and what its name stands for by its place."""
    module = module_of(key)
    return frozenset(concepts(module.rpartition(".")[2])) | said_by_place(module)


def _exclude(key: str, name: str, sides: tuple[frozenset[str], frozenset[str]]) -> bool:
    """Whether two names are of other parts of an attention, or of other towers, where a side has both of these."""
    words, other_words = frozenset(concepts(module_of(key))), frozenset(concepts(module_of(name)))
    both = [kind for kind in _TOWERS if other_words & kind <= sides[0] or words & kind <= sides[1]]
    return conflict(_own_words(key), _own_words(name), kinds=[_PARTS]) or conflict(words, other_words, kinds=both)


_Pairs = Callable[[str, str], Iterator[tuple[str, str]]]  # of what two layers stand in, by their paths


def _modules_at_equal_depth(here: str, there: str) -> Iterator[tuple[str, str]]:
    """The modules around two layers, as many parts above them."""
    for _ in range(_LEVELS):
        here, there = module_of(here), module_of(there)
        if not here or not there:
            break
        yield here, there


def _blocks(here: str, there: str) -> Iterator[tuple[str, str]]:
    """The members of the innermost lists around two layers."""
    pair = around(f"{here}.", _MEMBER), around(f"{there}.", _MEMBER)
    if all(pair):
        yield pair


class _Homes:
    """Where most layers of each part of the source go to."""

    def __init__(self, parts_around: _Pairs, links: Sequence[Link]) -> None:
        counts: dict[str, Counter[str]] = {}
        for layers in {(module_of(link.sources[0]), module_of(link.targets[0])): None for link in links if link.clear}:
            for here, there in parts_around(*layers):
                counts.setdefault(here, Counter())[there] += 1
        self.parts_around, self.homes = parts_around, {}
        self.guests: dict[str, set[str]] = {}
        for part, count in counts.items():
            (best, many), *_ = count.most_common(1)
            alike = sum(number for other, number in count.items() if fold(other) == fold(best))
            if many > 2 and 2 * many > alike:
                self.homes[part] = best
                self.guests.setdefault(best, set()).add(fold(part))

    def elsewhere(self, key: str, name: str) -> str:
        """Where the rest of the part goes that a tensor stands in, if its own target is in what another such part goes to."""
        here, there = next(self.parts_around(module_of(key), module_of(name)), ("", ""))
        home = self.homes.get(here, there)
        apart = not f"{home}.".startswith(f"{there}.") and not f"{there}.".startswith(f"{home}.")
        return home if apart and fold(here) in self.guests.get(there, ()) else ""


def _beside(name: str, other: str) -> bool:
    """Whether two targets stand in one member of a list, at any depth."""
    first, second = (f"{around(key, _MEMBER)}." for key in (name, other))
    return "." not in (first, second) and (first.startswith(second) or second.startswith(first))


def _told(key: str, name: str, other: str, usual: Mapping[tuple[str, str], int]) -> bool:
    """Whether what a source is called has more in common with one target than with another, or goes to such a one elsewhere."""
    words, chosen, rival = (_telling(text) for text in (key, name, other))
    return len(words & chosen) > len(words & rival) or usual[fold(key), fold(name)] > usual[fold(key), fold(other)]


def _telling(key: str) -> frozenset[str]:
    return (frozenset(concepts(module_of(key))) | _own_words(key)) - SAYS_NOTHING
