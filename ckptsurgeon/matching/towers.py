"""Two towers of one form on one side, of which the other side has one: nothing but a name can tell which it is.

Rule: parts of a side that stand beside each other, have the same shapes and were linked by these alone can be exchanged: their links are in
doubt unless names tell them apart. Where of two large parts of a side with the same keys and shapes, look-alikes, each key is taken from
one alone, the links of both are doubted, save those of the one whose name the other side has, while it has not the look-alike's. Two towers
may also stand within each other, each layer of a list twice (`q_proj.A`, `q_proj.B`).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice, permutations, product, takewhile
from math import inf
from typing import NamedTuple

from ckptsurgeon.matching.evidence.distinguish import Spelt, spelt
from ckptsurgeon.matching.evidence.support import ALONE
from ckptsurgeon.matching.evidence.vocabulary import concepts
from ckptsurgeon.matching.module_tree import fold
from ckptsurgeon.matching.spelling import unique
from ckptsurgeon.planning.links import ENOUGH, Link
from ckptsurgeon.tensors import TensorMeta

_FOLLOWERS = {"k", "momentum", "student", "m", "slow", "target"}
_LED = 0.6  # of the tensors that a word is in the names of, that stand without it too, from which on the word is of a tower
_WORDS_OF_A_TOWER = 3  # the first of a name, of which one may be the tower's
_FIRST_WORDS = re.compile(r"[^._\d][^._]*")
_LEAST_KEYS, _LEAST_SHARE, _ALL, _MOST = (
    8,
    0.2,
    0.9,
    0.8,
)  # keys and elements from which on a part is a tower; how much of it its look-alike must have
_MOST_WRAPPED = 2  # parts of a name that one of two towers has more
_LEAST_PLACES = 4  # layers of a block that stand twice, from which on they are two towers
Tensors = Mapping[str, TensorMeta]


def gathered(side: Tensors, other_side: Tensors) -> dict[str, str]:
    """Every key's name, in which two towers that stand within each other stand beside each other: `q_proj.A` of a list is in its `A`.

    So it is where all of a list has one of two parts in its names, the other side has neither of them, and is too small for both towers.

    >>> from ckptsurgeon.tensors import TensorMeta
    >>> keys = [f"net.layers.0.{name}.{tower}.weight" for name in ("fc", "mid", "out", "norm") for tower in "AB"]
    >>> gathered({key: TensorMeta(key, "F32", (8,), (1,)) for key in keys}, {})["net.layers.0.fc.B.weight"]
    'net.B.layers.0.fc.weight'
    """
    total, other_total = (sum(tensor.numel for tensor in tensors.values()) for tensors in (side, other_side))
    names = {key: key for key in side}
    if other_total > (1 - _LEAST_SHARE) * total:
        return names
    in_list = Counter(map(_before_number, side))
    for pair, places in _twice(side, {part for key in other_side for part in key.split(".")}).items():
        size = sum(side[_joined(head, pair[0], tail)].numel for head, tail in places)
        around = _list_around([head for head, _ in places])
        if around and in_list[around] == 2 * len(places) and size >= _LEAST_SHARE * total and size + other_total <= total:
            above, _, last = around.rpartition(".")
            for (head, tail), part in product(places, pair):
                names[_joined(head, part, tail)] = _joined(above, part, last, head[len(around) + 1 :], tail)
    return unique(names)


def _twice(side: Tensors, other_parts: Collection[str]) -> dict[tuple[str, str], list[tuple[str, str]]]:
    """By two parts of names, what stands before and behind them where keys of one shape differ in these alone: in several layers."""
    ways: dict[tuple[str, str], list[str]] = {}
    for key in side:
        parts = key.split(".")
        for at, part in enumerate(parts[:-1]):
            if part not in other_parts and not part.isdecimal():
                ways.setdefault((".".join(parts[:at]), ".".join(parts[at + 1 :])), []).append(part)
    pairs: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for (head, tail), found in ways.items():
        if len(found) == 2 and len({side[_joined(head, part, tail)].shape for part in found}) == 1:
            pairs.setdefault((min(found), max(found)), []).append((head, tail))
    return {pair: places for pair, places in pairs.items() if len({fold(head) for head, _ in places}) >= _LEAST_PLACES}


def _list_around(heads: Sequence[str]) -> str:
    """The one numbered list that all paths lead into, if there is one."""
    lists = {*map(_before_number, heads)}
    around = lists.pop()
    return "" if lists or around in heads else around


def _before_number(path: str) -> str:
    return ".".join(takewhile(lambda part: not part.isdecimal(), path.split(".")))


def _joined(*parts: str) -> str:
    return ".".join(filter(None, parts))


def led(side: Tensors, other_side: Tensors) -> set[str]:
    """The keys of towers that lean on another: `decoder_blocks` beside `blocks`, `encoder_k` beside `encoder_q`.

    So it is where a word is among the first of names, most of these are names of the side without it too, or it says that the tower follows
    another (`_FOLLOWERS`), and most of it is elsewhere too; and the other side has neither that word nor the room for both towers.

    >>> from ckptsurgeon.tensors import TensorMeta
    >>> keys = [f"{mark}blocks.{i}.{name}.weight" for mark in ("", "decoder_") for i in range(2) for name in ("fc", "mid", "out", "norm")]
    >>> sorted(led({key: TensorMeta(key, "F32", (8,), (1,)) for key in keys}, {}))[:2]
    ['decoder_blocks.0.fc.weight', 'decoder_blocks.0.mid.weight']
    """
    by_word: dict[str, dict[str, str]] = {}  # the names without a word, by the keys with it
    for key in side:
        words = list(islice(_FIRST_WORDS.finditer(key), _WORDS_OF_A_TOWER))
        for at, found in enumerate(words):
            begin, end = (0, words[1].start()) if at == 0 < len(words) - 1 else (max(found.start() - 1, 0), found.end())
            by_word.setdefault(found[0], {})[key] = key[:begin] + key[end:]
    repeated = {word: {key for key, name in names.items() if name in side} for word, names in by_word.items()}
    repeated = {word: twins for word, twins in repeated.items() if len(twins) >= max(_LEAST_KEYS, _LED * len(by_word[word]))}
    others = {word for key in other_side for word in concepts(key)} if repeated else set()
    room = 1.1 * sum(tensor.numel for tensor in other_side.values())
    leaning: set[str] = set()
    for word, twins in repeated.items():
        if others.isdisjoint(concepts(word)):
            names = by_word[word]
            rest = sum(tensor.numel for key, tensor in side.items() if key not in names)
            leaning |= {*names} if rest + sum(side[key].numel for key in twins) > room else set()
    total = sum(tensor.numel for key, tensor in side.items() if key not in leaning)
    for head, keys in _following(side, leaning):
        said = {word for key in other_side for word in concepts(key)}.intersection(*map(concepts, [head.rpartition(".")[2]]))
        leaning |= {*keys} if not said & _FOLLOWERS and total > room else set()
    return leaning


def _following(side: Tensors, leaning: Collection[str]) -> Iterator[tuple[str, list[str]]]:
    """Each tower whose name says that it follows one of the same form, wherever that stands: its path and its keys."""
    towers: dict[str, list[str]] = {}
    for key in side:
        if key not in leaning and (head := next((key[:end] for end in _dots(key) if _follows(key[:end])), "")):
            towers.setdefault(head, []).append(key)
    for head, keys in towers.items():
        if len(keys) >= _LEAST_KEYS and any(_holds(side, lead, head + cut, keys) for lead, cut in _leads(side, head, keys)):
            yield head, keys


def _leads(side: Tensors, head: str, keys: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Paths under which keys of a tower stand elsewhere too, each with what these have before it in the tower."""
    for key in (keys[0], keys[len(keys) // 2], keys[-1]):
        within = key[len(head) :]
        for end in islice(_dots(within), _MOST_WRAPPED + 1):
            tail = within[end + 1 :]
            yield from (
                (other[: -len(tail)], within[: end + 1]) for other in side if other.endswith(tail) and not other.startswith(f"{head}.")
            )


def _holds(side: Tensors, lead: str, tower: str, keys: Sequence[str]) -> bool:
    """Whether most of a tower's keys stand under another path."""
    return sum(_alike(side, key, lead + key.removeprefix(tower)) for key in keys if key.startswith(tower)) >= _MOST * len(keys)


def towered(links: list[Link], source: Tensors, target: Tensors, same: Mapping[str, str]) -> list[Link]:
    """The links; those of a tower whose look-alike nothing is taken from have no margin. Links of equal names (`same`) keep theirs."""
    taken = {key: link.targets for link in links for key in link.sources}, {key: link.sources for link in links for key in link.targets}
    lookalikes = _lookalikes(taken[0], source, target), _lookalikes(taken[1], target, source)
    if not any(lookalikes):
        return links
    return [link if _named(link, same) else _doubted(link, *lookalikes) for link in links]


class _Held(NamedTuple):
    """A tensor of a part, by the link that it has: its own key, its counterpart's, and both shapes."""

    link: Link
    key: str
    counterpart: str
    shapes: tuple[object, ...]


def exchangeable_parts(links: Iterable[Link], source: Tensors, target: Tensors) -> Iterator[tuple[Link, str]]:
    """Links by shape alone of a part that could be exchanged for another beside it, each with a link of that one in words.

    Parts that differ by numbers alone stand in the order of these, which is a reason.
    """
    held = [
        (link, source_key, target_key, (link.op, source[source_key].shape, target[target_key].shape))
        for link in links
        for source_key, target_key in product(link.sources, link.targets)
    ]
    sides = [_Held(*item) for item in held], [_Held(link, target_key, source_key, shapes) for link, source_key, target_key, shapes in held]
    for tensors in sides:
        parts: dict[str, list[_Held]] = {}
        for item in tensors:
            for end in _dots(item.key):
                parts.setdefault(item.key[:end], []).append(item)
        beside: dict[tuple[str, tuple[object, ...]], list[str]] = {}
        for head, items in parts.items():
            if all(item.link.evidence[:1] == (ALONE,) and not ENOUGH <= item.link.margin < inf for item in items):
                beside.setdefault((head.rpartition(".")[0], tuple(sorted(map(repr, (item.shapes for item in items))))), []).append(head)
        for heads in beside.values():
            for head in heads if len({fold(head) for head in heads}) > 1 else ():
                rival = next(other for other in heads if fold(other) != fold(head))
                if not _told_apart((head, parts[head]), (rival, parts[rival])):
                    first = parts[rival][0].link
                    yield from ((item.link, f"{first.sources[0]} -> {item.link.targets[0]}") for item in parts[head])


def _told_apart(part: tuple[str, Sequence[_Held]], rival: tuple[str, Sequence[_Held]]) -> bool:
    """Whether the names of two parts have more in common with those of their counterparts than with those of each other's."""
    heads = _Said.of_both(*({head.rpartition(".")[2]} for head, _ in (part, rival)))
    counterparts = _Said.of_both(*({name for item in items for name in item.counterpart.split(".")} for _, items in (part, rival)))
    straight, crossed = (
        sum(head.in_common(counterpart) for head, counterpart in zip(heads, order, strict=True))
        for order in (counterparts, counterparts[::-1])
    )
    return straight > crossed


class _Said(NamedTuple):
    """What one of two names says, and the other does not."""

    words: frozenset[str]
    spelt: Spelt

    @classmethod
    def of_both(cls, *names: Collection[str]) -> list[_Said]:
        """What each of two names, in parts, says beyond the other."""
        words = [frozenset(word for part in parts for word in concepts(part) if word[0] != "#") for parts in names]
        return [cls(words[at] - words[1 - at], spelt(part for part in names[at] if part not in names[1 - at])) for at in (0, 1)]

    def in_common(self, counterpart: _Said) -> int:
        """How many words two names have in common, one that is cut short to its initials among them."""
        return len(self.words & counterpart.words) + self.spelt.cuts_short(counterpart.spelt)


def _named(link: Link, same: Mapping[str, str]) -> bool:
    return len(link.sources) == len(link.targets) == 1 and same.get(link.sources[0]) == link.targets[0]


def _follows(head: str) -> bool:
    """Whether a tower's name is one of those that training leaves behind: MoCo's `encoder_k`, DINO's student, BYOL's target network."""
    return bool(set(concepts(head.rpartition(".")[2])) & _FOLLOWERS)


def _doubted(link: Link, here: Mapping[str, str], there: Mapping[str, str]) -> Link:
    source_twin, target_twin = _in_lookalike(link.sources, here), _in_lookalike(link.targets, there)
    if source_twin is None and target_twin is None:
        return link
    rival = f"{source_twin or link.sources[0]} -> {target_twin or link.targets[0]}"
    return replace(link, margin=min(link.margin, 0.0), evidence=(*link.evidence, "an idle twin is just the same"), runner_up=rival)


def _in_lookalike(keys: Iterable[str], lookalikes: Mapping[str, str]) -> str | None:
    """The first key under the name that it has in the look-alike."""
    for key in keys:
        for end in _dots(key):
            if key[:end] in lookalikes:
                return lookalikes[key[:end]] + key[end:]
    return None


def _lookalikes(taken: Mapping[str, tuple[str, ...]], side: Tensors, other_side: Tensors) -> dict[str, str]:
    """Each tower with its look-alike, where of each key only one of the two towers' is taken, or both by the same. `taken` has by whom."""
    if len(taken) < _LEAST_KEYS:
        return {}
    below = Counter(key[:end] for key in side for end in _dots(key))
    total, lookalikes = sum(tensor.numel for tensor in side.values()), {}
    elements: Counter[str] = Counter()
    for key, tensor in side.items():
        elements.update(dict.fromkeys((key[:end] for end in _dots(key)), tensor.numel))
    large = [  # a handful, however many modules there are
        head
        for head, count in below.items()
        if count >= _LEAST_KEYS and elements[head] >= max(_LEAST_SHARE * total, 1) and not head.rpartition(".")[2].isdecimal()
    ]
    words = frozenset(word for key in other_side for part in key.split(".")[:-1] for word in concepts(part))
    by_parent: dict[str, list[str]] = {}
    for head in large:
        by_parent.setdefault(head.rpartition(".")[0], []).append(head)
    for heads in by_parent.values():
        for tower, lookalike in permutations(heads, 2):
            if not _name_tells(tower, lookalike, words):
                keys = [key for key in side if key.startswith(f"{tower}.")]
                same = [key for key in keys if _alike(side, key, lookalike + key[len(tower) :])]
                once = [key for key in same if _once(taken.get(key), taken.get(lookalike + key[len(tower) :]))]
                alike = _MOST * max(below[tower], below[lookalike]) <= len(same) <= len(once) / _ALL
                if alike and sum(side[key].numel for key in once) >= _LEAST_SHARE * total:
                    lookalikes[tower] = lookalike
    return lookalikes


def _alike(side: Tensors, key: str, lookalike: str) -> bool:
    return lookalike in side and side[lookalike].shape == side[key].shape


def _once(takers: tuple[str, ...] | None, lookalike_takers: tuple[str, ...] | None) -> bool:
    """Whether there is one partner for both."""
    return (takers is None) != (lookalike_takers is None) or (takers is not None and takers == lookalike_takers)


def _name_tells(tower: str, lookalike: str, words: frozenset[str]) -> bool:
    """Whether the other side has what the name of a tower says, or that says less, and not what its look-alike's does."""
    own, rival = (frozenset(concepts(path.rpartition(".")[2])) for path in (tower, lookalike))
    more = bool((own - rival) & words) or (own < rival and not rival & _FOLLOWERS)
    return more and not (rival - own) & words


def _dots(key: str) -> Iterator[int]:
    return (at for at, letter in enumerate(key) if letter == ".")
