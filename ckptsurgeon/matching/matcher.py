"""The mapping between two implementations, found from what their headers say: passes over both trees, then others that use order too.

Rule: the first passes use names, numbers and shapes alone. What they are certain of tells which names stand for which, and how far the
order of keys can be trusted; later passes use that too. No name of a model is known here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from math import sqrt
from typing import TypeVar

from ckptsurgeon.limit_table import allowed
from ckptsurgeon.matching.align import lay
from ckptsurgeon.matching.counted_anew import counted_anew
from ckptsurgeon.matching.doubts import doubted
from ckptsurgeon.matching.evidence.company import behind, companions, lists_of, parts_within
from ckptsurgeon.matching.evidence.crossed import exchanged
from ckptsurgeon.matching.evidence.facts import Facts
from ckptsurgeon.matching.evidence.score import Clues, count_pairs
from ckptsurgeon.matching.evidence.vocabulary import concepts
from ckptsurgeon.matching.factors import Side, as_stored, sides
from ckptsurgeon.matching.key_links import links
from ckptsurgeon.matching.layouts.doubts import with_doubts
from ckptsurgeon.matching.module_tree import both, fold, list_lengths
from ckptsurgeon.matching.once_laid.in_turn import in_turn
from ckptsurgeon.matching.once_laid.neighbours import between, counted, strayed
from ckptsurgeon.matching.once_laid.orphans import cut_biases, orphans, uncrossed
from ckptsurgeon.matching.once_laid.shared import one_embedding, shared, spread
from ckptsurgeon.matching.pairing import Laid, Record
from ckptsurgeon.matching.result import Matching, result
from ckptsurgeon.matching.same_names import prefer_equal_names
from ckptsurgeon.matching.spelling import paths_back, renamed, same_but_for_separators, spelled_both, unwrapped
from ckptsurgeon.matching.stems import parted
from ckptsurgeon.matching.towers import gathered, led, towered
from ckptsurgeon.matching.turning import TURN, Turned, seen, squares_turned, turned
from ckptsurgeon.planning.links import ENOUGH, Layout, Link
from ckptsurgeon.planning.prefixes.find import Change, find_change, find_exchange, rename_all
from ckptsurgeon.tensors import TensorMeta
from ckptsurgeon.wrappers import WRAPPERS, unwrap

PASSES = 2  # without the order of keys, and as many with it
EXCHANGED = 0.7  # of the smaller side's names, from which on a prefix that is exchanged for another is one naming
Z = 2.58  # 99 of 100 samples lie so many standard deviations around the truth
_MOMENTS = ("adam_m", "adam_v", "Adam", "Adam_1", "exp_avg", "exp_avg_sq", "Momentum", "momentum_buffer")
Tensors = Mapping[str, TensorMeta]
Named = TypeVar("Named", Link, Layout)


def match(
    source: Tensors,
    target: Tensors,
    ties: Iterable[Sequence[str]] = (),
    *,
    dequantize: bool = False,
    around: tuple[Tensors, Tensors] | None = None,
) -> Matching:
    """Find the mapping of a source's tensors to a target's by their names, shapes and order.

    Keys of equal name and shape go together; see `same_names` for what they yield to. Where the source's matrices fit only transposed, they
    are looked at so. `ties` are groups of the target's keys that are one tensor: all of a group get what its first one gets. `dequantize`
    says that values are made of codes. `around` are both sides with what is not to be matched: they tell which layouts are in doubt.
    """
    around = (source, target) if around is None else around
    names = spelled_both(*around)
    source_side, target_side = sides(renamed(source, names[0]), renamed(target, names[1]))
    ordered = has_order(looked_at(source)) and has_order(looked_at(target))  # other names may undo the alphabet's order
    plain = _match_plain(
        source_side.tensors, target_side.tensors, target_side.ties([[names[1][key] for key in tied] for tied in ties]), ordered
    )
    if source_side.low_rank:  # of factors, which have the rows of a weight or its columns
        links = with_doubts(as_stored(plain.links, source_side, target_side), *map(renamed, around, names))
    else:
        whole = sides(*map(renamed, around, names))
        links = with_doubts(plain.links, *map(_around, (source_side, target_side), whole))
        links = as_stored(links, source_side, target_side, dequantize=dequantize)
    return result(_named_back(links, *names), source, target, plain.order)


def _around(side: Side, whole: Side) -> Tensors:
    """What is matched of a side, as it is matched, and the rest of the side around it."""
    matched = {key for name in side.tensors for key in side.stored(name)}
    return {**{name: tensor for name, tensor in whole.tensors.items() if matched.isdisjoint(whole.stored(name))}, **side.tensors}


def _named_back(links: Sequence[Link], here: Mapping[str, str], there: Mapping[str, str]) -> list[Link]:
    """Links of tensors under other names, under their own."""
    return _named(links, *({name: key for key, name in names.items()} for names in (here, there)))


def _named(links: Sequence[Link], here: Mapping[str, str], there: Mapping[str, str]) -> list[Link]:
    """Links of tensors under the names that both maps give them."""
    if all(key == name for names in (here, there) for key, name in names.items()):
        return list(links)

    def named(item: Named) -> Named:
        sources, targets = tuple(here[key] for key in item.sources), tuple(there[key] for key in item.targets)
        same = sources == item.sources and targets == item.targets
        return item if same else replace(item, sources=sources, targets=targets)

    paths = paths_back(here), paths_back(there)
    rows = []
    for link in map(named, links):
        more = link.choices or link.runner_up
        rows.append(replace(link, choices=tuple(map(named, link.choices)), runner_up=_paths(link.runner_up, paths)) if more else link)
    return rows


def _paths(rival: str, paths: Iterable[Callable[[str], str]]) -> str:
    """A rival, as `source -> target`, with the paths of both sides in their own spelling."""
    return " -> ".join(back(path) for path, back in zip(rival.split(" -> "), paths, strict=True)) if rival.count(" -> ") == 1 else rival


def _match_plain(all_source: Tensors, all_target: Tensors, ties: Iterable[Sequence[str]], ordered: bool) -> Matching:
    """The mapping of what plain models have: a weight as one tensor, whatever holds it."""
    seen = looked_at(all_source), looked_at(all_target)
    towers = gathered(*seen), gathered(*seen[::-1])
    parts = parted(*map(renamed, seen, towers))
    names = [{key: part[name] for key, name in tower.items()} for tower, part in zip(towers, parts, strict=True)]
    whole, target = map(renamed, seen, names)
    leaning = led(whole, target)
    source = {key: tensor for key, tensor in whole.items() if key not in leaning}
    ties = [[names[1].get(key, key) for key in tied] for tied in ties]
    same, bare = _names(source, target)
    same, anew = counted_anew(source, target, same, bare)
    same, bare = {**same, **anew}, {**bare, **anew}
    ordered = ordered and has_order(source) and has_order(target)
    facts = Facts((), source, target, same, bare, ordered)
    links, trust = ([], 0.0) if len(same) == min(len(source), len(target)) else _look(source, target, ordered)

    def judge(links: list[Link]) -> list[Link]:
        return doubted(replace(facts, links=links))

    def again(source_rest: Tensors, target_rest: Tensors) -> list[Link]:
        return _look(source_rest, target_rest, ordered, rest=True)[0]

    links, same, bare = prefer_equal_names(links, same, bare, anew, source, target, again, judge)
    links = squares_turned([*links, *cut_biases(links, source, target)], source, target)
    facts = replace(facts, same=same, bare=bare)
    links = in_turn(exchanged(_tied(links, ties), source, target, facts.named), source, target, facts.named)
    links = _towered(counted(links, source), source, target, same)
    links = _named_back(doubted(replace(facts, links=links)), *names)
    return result(links, all_source, all_target, trust)


def _towered(links: list[Link], source: Tensors, target: Tensors, same: Mapping[str, str]) -> list[Link]:
    """The links, those of twin towers doubted; the segments of wrappers are looked past."""
    here, there = unwrapped(source), unwrapped(target)
    named = {here[key]: there[name] for key, name in same.items()}
    return _named_back(towered(_named(links, here, there), renamed(source, here), renamed(target, there), named), here, there)


def _names(source: Tensors, target: Tensors) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """Target keys by the source keys that are called the same in the same shape, and every source key as the target would call it.

    Names are the same after the prefix that is stripped or added unasked; also after one prefix is exchanged for another, where that
    is so of most, or but for separators.
    """
    change = find_change(source, target).applied
    bare = rename_all(source, target, change.prefix)
    least = min(len(source), len(target))
    if 2 * len(change.mapping) < least:
        exchanges = find_exchange(source, target)
        if len(exchanges) == 1 and len(exchanges[0].mapping) >= EXCHANGED * least:
            return _exchanged(exchanges[0], change.mapping, source, bare)
    if len(change.mapping) < least:
        flat = same_but_for_separators(source, target)
        if len(flat) > max(len(change.mapping), least / 2) and change.mapping.items() <= flat.items():
            return flat, {**bare, **flat}
    return change.mapping, bare


def _exchanged(
    exchange: Change, same: Mapping[str, str], source: Tensors, bare: Mapping[str, str]
) -> tuple[Mapping[str, str], Mapping[str, str]]:
    """The same names where one prefix is exchanged for another; what does not have it keeps its name."""
    prefix = exchange.prefix
    names = {key: unwrap(key, WRAPPERS) for key in source}
    mapped = {key: exchange.mapping[name] for key, name in names.items() if name in exchange.mapping}
    taken = {*mapped.values()}
    kept = {key: name for key, name in same.items() if key not in mapped and name not in taken}
    return {**mapped, **kept}, {
        key: prefix.added + prefix.bare(name) if name.startswith(prefix.stripped) else bare[key] for key, name in names.items()
    }


def _look(source: Tensors, target: Tensors, ordered: bool, rest: bool = False) -> tuple[list[Link], float]:
    """Links by structure, order and words, turned where more fits so, and how far the order of keys was trusted.

    Of a `rest` that equal names left over, no source is shared by several targets: who else has it is not known there.
    """
    names = unwrapped(source), unwrapped(target)
    links, trust = _turned_or_not(renamed(source, names[0]), renamed(target, names[1]), ordered, rest)
    return _named_back(links, *names), trust


def _turned_or_not(source: Tensors, target: Tensors, ordered: bool, rest: bool) -> tuple[list[Link], float]:
    as_is = _match(source, target, Turned(source, target), ordered, rest)
    about = turned(source, target)
    if about.looks or about.target_looks:
        as_turned = _match(source, target, about, ordered, rest)
        worth, other = _worth(as_turned[0], target), _worth(as_is[0], target)
        if worth > other or (about.told and worth[0] == other[0]):
            return as_turned
    return as_is


def _worth(links: Iterable[Link], target: Tensors) -> tuple[int, int]:
    """The elements of a target that certain links give, and the words that these have on both sides."""
    certain = [link for link in links if link.certain]
    shared = sum(len(set(concepts(link.sources[0])) & set(concepts(link.targets[0]))) for link in certain)
    return sum(target[key].numel for link in certain for key in link.targets), shared


def _match(source: Tensors, target: Tensors, about: Turned, ordered: bool, rest: bool) -> tuple[list[Link], float]:
    source, target = seen(source, about.looks), seen(target, about.target_looks)
    source_tree, target_tree = both(source.values(), target.values())
    ordered = ordered and has_order(source) and has_order(target)
    rows = list_lengths(source_tree) | list_lengths(target_tree)
    known = Clues(
        ordered=ordered,
        rows=rows,
        behind=behind(source_tree) | behind(target_tree),
        together=companions(source_tree) | companions(target_tree),
    )
    clues = known
    for _ in range(PASSES):
        record = lay(source_tree, target_tree, clues)
        clues = _learned(record, known)
    trust = _trust(_certain(record)) if ordered else 0.0
    for _ in range(PASSES if trust else 0):
        record = lay(source_tree, target_tree, replace(clues, trust=trust))
        clues = _learned(record, known)
    units = strayed(between(record.units, source_tree, target_tree, trust), known.behind)
    matched = [link for laid in units for link in links(laid) if not (link.op.startswith(TURN) and link.sources[0] in about.looks)]
    matched = uncrossed(matched, source, target)
    matched += orphans(matched, record, source, target)
    if not rest:
        matched = one_embedding(matched, source, target)
        matched += shared(matched, record, source, target)
        matched = spread(matched, source, target)
    return [replace(link, op=about.chain(link.sources[0], link.op, link.targets[0])) for link in matched], trust


def looked_at(tensors: Tensors) -> Tensors:
    """Without an optimizer's tensors, and without keys that no model has, on which a stranger's file could make all spend itself."""
    longest, deepest = allowed("match-characters"), allowed("match-segments")
    return {
        key: tensor for key, tensor in tensors.items() if len(key) <= longest and key.count(".") < deepest and not _moments(key, tensors)
    }


def _moments(key: str, tensors: Tensors) -> bool:
    """Whether a tensor is an optimizer's, kept beside the weight it is for."""
    stem = next((key[: -len(end) - 1] for end in _MOMENTS if key.endswith(end)), "")
    return bool(stem) and stem in tensors


def _tied(links: list[Link], ties: Iterable[Sequence[str]]) -> list[Link]:
    """The links, where all keys of one tensor get what the first of them that has a link gets."""
    for tied in ties:
        first = next((link for key in tied for link in links if link.targets == (key,)), None)
        if first is not None:
            others = {key for key in tied if key != first.targets[0]}
            links = [link for link in links if not others & set(link.targets)]
            links += [replace(first, targets=(key,), evidence=(f"the same tensor as {first.targets[0]}",)) for key in sorted(others)]
    return links


def _certain(record: Record) -> list[Laid]:
    """What a pass is certain of, one to one."""
    return [laid for laid in (*record.units, *record.modules) if laid.margin >= ENOUGH and len(laid.sources) == len(laid.targets) == 1]


def _learned(record: Record, known: Clues) -> Clues:
    """What a pass is certain of, as clues for the next, beside what the trees themselves tell."""
    certain = [(laid.sources[0], laid.targets[0]) for laid in _certain(record)]
    pairs, sources, targets = count_pairs(certain, known.rows)
    partners = {id(node): partner for node, partner in certain}
    within = cache(partial(parts_within, certain))
    return replace(known, pairs=pairs, sources=sources, targets=targets, partners=partners, lists=lists_of(certain), within=within)


def _trust(certain: list[Laid]) -> float:
    """How far to trust that keys stand in the same order: the lower end of what the share of rising neighbours may be (Wilson 1927).

    For a pass that used no order: what order has decided would only bear itself out.
    """
    pairs = [(laid.sources[0], laid.targets[0]) for laid in certain if laid.sources[0].leaf]
    rising: dict[tuple[str, ...], bool] = {}  # one pair of neighbours speaks for all that are called so
    for (source, target), (next_source, next_target) in itertools.pairwise(sorted(pairs, key=lambda pair: (pair[0].at, pair[1].at))):
        names = (*_parted(source.path, next_source.path), *_parted(target.path, next_target.path))
        if names[0] != names[1] or names[2] != names[3]:  # numbers alone rise in any order of modules
            rising.setdefault(names, target.at < next_target.at)
    total = len(rising)
    if not total:
        return 0.0
    share = sum(rising.values()) / total
    low = (share + Z * Z / (2 * total) - Z * sqrt(share * (1 - share) / total + Z * Z / (4 * total * total))) / (1 + Z * Z / total)
    return min(1.0, max(0.0, (low - 0.5) / 0.2))


def _parted(first: str, second: str) -> tuple[str, str]:
    """The two modules of one module that two paths lead through, without numbers."""
    a, b = first.split("."), second.split(".")
    same = next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)) - 1)
    return fold(".".join(a[: same + 1])), fold(".".join(b[: same + 1]))


def has_order(tensors: Tensors) -> bool:
    """Whether the order of keys can be a model's own: each module's stand together, and it is not the alphabet's.

    >>> from ckptsurgeon.tensors import TensorMeta
    >>> has_order({key: TensorMeta(key, "F32", (), ()) for key in ("b.w", "a.w", "b.b")})
    False
    """
    by_dtype: dict[str, list[str]] = {}
    for key, tensor in tensors.items():
        by_dtype.setdefault(tensor.dtype, []).append(key)
    if all(keys == sorted(keys) for keys in by_dtype.values()):
        return False
    seen: set[str] = set()
    before: list[str] = []
    for key in tensors:
        parts = key.split(".")[:-1]
        same = next((at for at, (x, y) in enumerate(zip(parts, before, strict=False)) if x != y), min(len(parts), len(before)))
        for depth in range(same + 1, len(parts) + 1):
            path = ".".join(parts[:depth])
            if path in seen:
                return False
            seen.add(path)
        before = parts
    return True
