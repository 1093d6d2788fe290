"""Links that were found, and are less sure than they look: nothing is certain by shape alone, and fresh is always possible.

Rule: each kind of doubt is one function of this module, in the table at its end; a doubt takes a link's margin, never the link. Links of
equal names are not doubted, save a bias whose weight goes elsewhere.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from ckptsurgeon.matching.counted_anew import torn_biases
from ckptsurgeon.matching.evidence.crossed import exchangeable
from ckptsurgeon.matching.evidence.facts import Facts, Tensors
from ckptsurgeon.matching.evidence.lacking import stand_ins
from ckptsurgeon.matching.evidence.lists import (
    across,
    by_lists,
    in_each_longest_rise,
    members_of,
    mirrored,
    move_of,
    moves_of,
    nothing_tells,
    rises,
    skips,
)
from ckptsurgeon.matching.evidence.support import Support
from ckptsurgeon.matching.evidence.vocabulary import concepts
from ckptsurgeon.matching.module_tree import MEMBER, fold, module_of, squeezed
from ckptsurgeon.matching.same_names import SHIFTED
from ckptsurgeon.matching.towers import exchangeable_parts
from ckptsurgeon.matching.turning import TURN
from ckptsurgeon.planning.links import Link
from ckptsurgeon.progress import beat

_NUMBER = re.compile(r"\d+")
_OUTER = re.compile(r"(?<=_)\d+_")  # a number within a part, of a list around: `up_blocks_1_attentions`
_MOST = 32  # idle keys that a link is compared with
COUNTED = "such lists are counted up or down, and these are all alike"
# Words of lists that one library counts up and another down: they are built from the coarsest stage, or from the finest.
_EITHER_WAY = {"up", "refine", "refinenet", "fuse", "fpn", "lateral", "pyramid", "upsample", "deconv", "topdown"}


class Doubt(NamedTuple):
    """Why a link is less sure than it looks: in words, its rival, and the sources that are shown instead of its own."""

    link: Link
    words: str
    rival: str = ""
    sources: tuple[str, ...] = ()

    def cast(self) -> Link:
        """The link without its margin."""
        link = self.link
        sources, rival = self.sources or link.sources, self.rival or link.runner_up
        return replace(link, sources=sources, margin=min(link.margin, 0.0), evidence=(*link.evidence, self.words), runner_up=rival)


def doubted(facts: Facts) -> list[Link]:
    """The links; those that a doubt is about have lost their margin, and say why."""
    for kind in _DOUBTS:
        surer = True
        while surer:  # what was sure speaks for other links
            beat()
            doubts = {id(doubt.link): doubt for doubt in kind(facts)}
            surer = any(doubt.link.clear for doubt in doubts.values())
            facts = replace(facts, links=[doubts[id(link)].cast() if id(link) in doubts else link for link in facts.links])
    return list(facts.links)


_Doubts = Iterator[Doubt]


def _another_size(facts: Facts) -> _Doubts:
    """A stranger for a tensor that the source has under that very name, in another shape, idle or in exchange for the stranger."""
    target_of = {key: link.targets[0] for link in facts.links if len(link.sources) == len(link.targets) == 1 for key in link.sources}
    for link in _open(facts):
        for name in link.targets:
            key = facts.namesakes.get(name)
            if key is None or key in link.sources or facts.source[key].shape == facts.target[name].shape:
                continue
            if key not in facts.used or (key in target_of and facts.namesakes.get(target_of[key]) in link.sources):
                yield Doubt(link, f"{key} has that name, in another size", f"{key} -> {name}")
                break


def _turned_alone(facts: Facts) -> _Doubts:
    """The one matrix that is turned, where others that are not square are not, or all are square: it may be of another size.

    A layer that has as many outputs on both sides, as its bias says, is turned.
    """
    turned = [link for link in _open(facts) if link.op == TURN and link.sources[0] in facts.namesakes.values()]
    for link in turned if len(turned) == 1 else ():
        biased = f"{module_of(link.targets[0])}.bias" in facts.target
        others = sum(len(tensor.shape) == 2 for tensor in facts.target.values()) > 1
        if others and not biased:
            yield Doubt(link, "no other matrix is turned: it may be of another size")


def _shape_alone(facts: Facts) -> _Doubts:
    """What nothing but a shape speaks for."""
    moved = {key for link in facts.links if SHIFTED in link.evidence for key in link.sources}
    same = {key: name for key, name in facts.same.items() if key not in moved}  # what is counted otherwise is not one naming
    support = Support(facts.links, facts.source, facts.target, same, facts.bare, facts.ordered)
    often = Counter(key for link in facts.links if link.certain for key in link.sources)
    for link in _open(facts):
        if all(often[key] == 1 for key in link.sources) and not support.speaks_for(link):
            yield Doubt(link, "nothing but its shape speaks for it" if support.strangers else "all else goes by its name: it may be fresh")


def _idle_equals(facts: Facts) -> _Doubts:
    """A module that is one of several which differ by number alone, where others are idle, and the target has not that number."""
    idle: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for key, tensor in facts.source.items():
        if key not in facts.used:
            idle.setdefault((fold(key), squeezed(tensor.shape)), []).append(key)
    positions = {key: at for at, key in enumerate(facts.source)}
    modules: dict[tuple[str, str], list[Doubt | None]] = {}
    for link in facts.links:
        if len(link.sources) == 1 and not facts.named(link):
            pair = link.sources[0].rpartition(".")[0], link.targets[0].rpartition(".")[0]
            modules.setdefault(pair, []).append(_idle(link, facts, idle, positions))
    for doubts in modules.values():
        if None not in doubts:
            yield from (doubt for doubt in doubts if doubt)


def _idle(link: Link, facts: Facts, idle: Mapping[tuple[str, tuple[int, ...]], list[str]], positions: Mapping[str, int]) -> Doubt | None:
    """The doubt of one link, if an idle key is as good as its own; the first of them is shown."""
    (key,) = link.sources
    others = idle.get((fold(key), squeezed(facts.source[key].shape)), ())
    numbers, own = _numbers(link.targets[0]), _numbers(facts.bare.get(key, key))
    if not others or own == numbers or _counted_alike(key, link.targets[0], others):
        return None
    rivals = (_numbers(facts.bare.get(name, name)) for name in others)
    if own and _in_turn(own, numbers) and len(others) <= _MOST and not any(_in_turn(rival, numbers) for rival in rivals):
        return None
    first, rival = sorted((key, others[0]), key=lambda candidate: positions[candidate])
    return Doubt(link, f"{rival} is as good", f"{rival} -> {link.targets[0]}", (first,))


def _counted_alike(key: str, name: str, others: Iterable[str]) -> bool:
    """Whether both names count their lists alike, and idle keys differ from the link's own by such a number alone."""
    return MEMBER.findall(key) == MEMBER.findall(name) and all(
        MEMBER.sub("{}", idle_key) == MEMBER.sub("{}", key) and MEMBER.findall(idle_key) != MEMBER.findall(name) for idle_key in others
    )


def _out_of_order(facts: Facts) -> _Doubts:
    """Members of a numbered list that stand across the order of the others, where their shapes would let them stand elsewhere.

    Where one member goes to several, as where a layer between two stages is of the one before it or behind it, each part of the members is
    looked at by itself.
    """
    for (here, there), links in by_lists(facts.links).items():
        if _each_once(moves_of(links, here, there)):
            yield from _across_the_others(facts, links, here, there)
            continue
        parts: dict[tuple[str, str], list[Link]] = {}
        for link in links:
            parts.setdefault((fold(link.sources[0][len(here) :]), fold(link.targets[0][len(there) :])), []).append(link)
        for part in parts.values():
            if _each_once(moves_of(part, here, there)):
                yield from _across_the_others(facts, part, here, there)


def _each_once(moves: Collection[tuple[int, int]]) -> bool:
    return len({number for number, _ in moves}) == len(moves)


def _across_the_others(facts: Facts, links: Sequence[Link], here: str, there: str) -> _Doubts:
    moves = sorted(moves_of(links, here, there))
    order = [target_number for _, target_number in moves]
    if len(moves) < 3 or order in (sorted(order), sorted(order, reverse=True)):
        return
    kept = {moves[at] for at in in_each_longest_rise(order)}
    alike = Counter((fold(link.sources[0][len(here) :]), facts.source[link.sources[0]].shape) for link in links)
    for link in links:
        has_peers = alike[fold(link.sources[0][len(here) :]), facts.source[link.sources[0]].shape] > 1
        if link.clear and has_peers and move_of(link, here, there) not in kept and not facts.named(link):
            yield Doubt(link, "it stands across the order of its list")


def _either_direction(facts: Facts) -> _Doubts:
    """Lists of equal members that one library may count up and another down, where nothing but numbers tells which."""
    lists = {
        pair: links
        for pair, links in by_lists(_open(facts)).items()
        if set(concepts(".".join(map(_last_name, pair)))) & _EITHER_WAY
        and len({frozenset(concepts(_last_name(head))) for head in pair}) == 2
    }
    members = (members_of(facts.source), members_of(facts.target)) if lists else ({}, {})
    alike = {pair for pair in lists if nothing_tells(*(inside[head] for inside, head in zip(members, pair, strict=True)))}
    decided = {(tuple(map(_above, pair)), count) for pair in lists.keys() - alike for count in moves_of(lists[pair], *pair)}
    open_pairs = {pair for pair in alike if not {(tuple(map(_above, pair)), count) for count in moves_of(lists[pair], *pair)} <= decided}
    rising = {head for pair in alike - open_pairs if rises(moves_of(lists[pair], *pair)) for head in pair}
    for pair in open_pairs:  # no list beside it, of other shapes, tells
        counts = moves_of(lists[pair], *pair)
        counted_both = all(len({count[side] for count in counts}) > 1 for side in (0, 1))
        if counted_both and not (rises(counts) and (rising.intersection(pair) or _as_they_run(pair, facts.source, facts.target))):
            whole = all(len(inside[head]) == len(counts) for inside, head in zip(members, pair, strict=True))
            numbers = [number for number, _ in sorted(counts)]
            for link in lists[pair]:
                rival = mirrored(link.sources[0], pair[0], numbers) if whole else ""
                if rival != link.sources[0]:  # the middle one stays where it is
                    yield Doubt(link, COUNTED, f"{rival} -> {link.targets[0]}" if rival else "")


def _above(head: str) -> str:
    """The module that a numbered list stands in."""
    return head.rstrip("._0123456789").rpartition(".")[0]


def _as_they_run(pair: tuple[str, str], *sides: Tensors) -> bool:
    """Whether each of two lists that is called so skips numbers: it is a row of layers, with others between them that hold nothing."""
    either = [bool(set(concepts(_last_name(head))) & _EITHER_WAY) for head in pair]
    return all(skips(side, head) for side, head, says in zip(sides, pair, either, strict=True) if says)


def _last_name(head: str) -> str:
    """What a numbered list is called: the words between the number before it and its own."""
    return _OUTER.split(head.rstrip("._0123456789").rpartition(".")[2])[-1]


def _across(facts: Facts) -> _Doubts:
    """A target that its name says to be the first (or the last) of a list, for one in the middle of it."""
    by_list: dict[str, dict[int, Link]] = {}
    for link in facts.links:
        if link.certain and len(link.sources) == len(link.targets) == 1:
            for head, number in _placed(link.sources[0]):
                by_list.setdefault(head, {}).setdefault(number, link)
    for link in _open(facts):
        if len(link.sources) != 1 or len(link.targets) != 1:
            continue
        words = set(concepts(link.targets[0].split(".")[-2])) & {"first", "final"} if link.targets[0].count(".") else set()
        for head, number in _placed(link.sources[0]) if words else ():
            parent = link.targets[0].rpartition(".")[0].rpartition(".")[0]
            beside = [
                index
                for index, rival in by_list[head].items()
                if rival is not link
                and parent
                and rival.targets[0].startswith(f"{parent}.")
                and facts.dims[module_of(rival.sources[0])] == facts.dims[module_of(link.sources[0])]  # a norm is the first of norms
            ]
            if ("first" in words and any(index < number for index in beside)) or (
                "final" in words and any(index > number for index in beside)
            ):
                yield Doubt(link, "by its name it stands elsewhere in its list")
                break


def _counted_and_named(facts: Facts) -> _Doubts:
    """Norms that one side counts and the other names after self- and cross-attention: which attention comes first is not agreed on.

    Where keys stand in an order of their own, a norm that stands right behind an attention is that one's. Where they do not, the order of
    the first transformer (Vaswani and others 2017) is taken for one whose attentions are alike, and for no other.
    """
    units: dict[tuple[int, str], list[tuple[Link, str]]] = {}
    for link in _open(facts):
        if len(link.sources) == len(link.targets) == 1:
            for side, key, counterpart in ((0, link.sources[0], link.targets[0]), (1, link.targets[0], link.sources[0])):
                kind = _attention_of(key)
                name = counterpart.rpartition(".")[0]
                if kind and not _attention_of(counterpart) and name[-1:].isdigit():
                    units.setdefault((side, name.rpartition(".")[0]), []).append((link, kind))
    for (side, _), links in units.items():
        if len({kind for _, kind in links}) < 2:
            continue
        classic = facts.ordered or facts.attentions_alike((links[0][0].sources, links[0][0].targets)[side][0], side)
        for link, kind in links:
            before = facts.before((link.targets, link.sources)[side][0], 1 - side) if facts.ordered else ""
            if not classic or (before and before != kind):
                yield Doubt(link, "norms are counted on one side, and named after attentions on the other")


def _attention_of(key: str) -> str:
    """`self` or `cross` where the name of a norm says one of them."""
    words = set(concepts(key.rpartition(".")[0].rpartition(".")[2]))
    kind = words & {"self", "cross"}
    return kind.pop() if len(kind) == 1 and "norm" in words else ""


def _exchangeable_parts(facts: Facts) -> _Doubts:
    """A part that was linked by its shapes alone, and could be exchanged for another beside it."""
    for link, rival in exchangeable_parts(facts.links, facts.source, facts.target):
        if not facts.named(link):
            yield Doubt(link, "another part has the same shapes", rival)


def _placed(key: str) -> Iterator[tuple[str, int]]:
    """The list of the last number of a key, and the number."""
    numbers = list(MEMBER.finditer(key))
    if numbers:
        yield f"{key[: numbers[-1].start()]}#{key[numbers[-1].end() :]}", int(numbers[-1][0])


def _exchanged(facts: Facts) -> _Doubts:
    """What names would rather see exchanged, or as well."""
    for link, rival in exchangeable(_open(facts), [link for link in facts.links if link.clear], facts.source, facts.target):
        yield Doubt(link, f"its names speak no less for {rival}", rival)


def _counted_across(facts: Facts) -> _Doubts:
    """Layers of a module in which links cross the order that both sides count in."""
    for link, rival in across(facts.links, facts.source, facts.target):
        if link.clear and not facts.named(link):
            yield Doubt(link, "numbers are crossed in its module", rival)


def _stand_ins(facts: Facts) -> _Doubts:
    """What may stand in for a tensor that the source lacks."""
    for link, words, rival in stand_ins(facts.links, facts.source, facts.target):
        if not facts.named(link):
            yield Doubt(link, words, rival)


def _torn(facts: Facts) -> _Doubts:
    """A bias without the weight of its layer, of equal names too."""
    return (Doubt(link, "the weight beside it goes or comes otherwise") for link in torn_biases(facts.links, facts.source))


def _open(facts: Facts) -> Iterator[Link]:
    return (link for link in facts.links if link.clear and not facts.named(link))


def _numbers(key: str) -> list[str]:
    return _NUMBER.findall(key)


def _in_turn(numbers: Iterable[str], others: Iterable[str]) -> bool:
    """Whether numbers stand in this order among others."""
    rest = iter(others)
    return all(number in rest for number in numbers)


_DOUBTS: tuple[Callable[[Facts], _Doubts], ...] = (
    _another_size,
    _turned_alone,
    _across,
    _counted_and_named,
    _out_of_order,
    _idle_equals,
    _either_direction,
    _exchanged,
    _counted_across,
    _exchangeable_parts,
    _stand_ins,
    _shape_alone,
    _torn,
)
