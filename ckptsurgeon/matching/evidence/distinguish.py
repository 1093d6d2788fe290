"""What tells look-alikes apart: the words, the numbers and the company that not all of them have. Looks at names, and adds nothing up."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from ckptsurgeon.matching.evidence.vocabulary import concepts, gated, said_by_place
from ckptsurgeon.matching.module_tree import Node, fold

_ENDS = (-100, -90, 10, 11, 50, 90, 100)
_ORDINALS = {
    "expand": 0, "depthwise": 3, "gate": 0, "up": 1, "first": -100, "preattn": -90, "attn": 10, "self": 11, "postattn": 20, "precross": 25,
    "cross": 30, "premlp": 40, "mlp": 50,
    "second": 60, "hr": 70, "postmlp": 90, "final": 100,
}  # fmt: skip
_MOST_INITIALS = 4
_LEAST_BEGINNING = 3  # letters with which two names begin that are no chance
_CROSS = [_ORDINALS["cross"]]
_ATTENTION = ("q", "k", "v", "out")  # in the order in which an attention uses them, and in which a list of them is numbered


def telling(nodes: Sequence[Node]) -> list[frozenset[str]]:
    """For each node the concepts in its path that not all of them have."""
    all_words = [frozenset(_counted(concepts(node.path))) | (said_by_place(node.path) if node.leaf else frozenset()) for node in nodes]
    common = frozenset.intersection(*all_words) if len(all_words) > 1 else frozenset()
    last = [_last_word(node) for node in nodes]
    gates = gated(last)
    return [words - common | {gates[name] for _ in "." if name in gates} for words, name in zip(all_words, last, strict=True)]


def streams(words: list[frozenset[str]], others: list[frozenset[str]]) -> tuple[list[frozenset[str]], list[frozenset[str]]]:
    """The words of two sides, where a stream that one side calls `added` is what the other says: the text, or else the image."""
    every = [frozenset().union(*side) for side in (words, others)]
    said = [next((word for word in ("text", "image") if word in rest), "added") for rest in every[::-1]]
    sides = [
        [own - {"added"} | {name} if "added" in own and "added" not in rest else own for own in side]
        for side, name, rest in zip((words, others), said, every[::-1], strict=True)
    ]
    return sides[0], sides[1]


def _counted(words: Sequence[str]) -> Iterator[str]:
    """Words, where one that is said again is another: `decode_head.classifier` says twice that it is a head."""
    seen: set[str] = set()
    for word in words:
        yield f"{word} again" if word in seen and word[0] != "#" else word
        seen.add(word)


def either_gate(named: Sequence[Node], numbered: Sequence[Node]) -> bool:
    """Whether one side says gate and up, and the other counts two (`w1` and `w2`): which of these is the gate is not agreed on."""
    words = frozenset().union(*(concepts(node.name) for node in named))
    names = {_last_word(node) for node in numbered}
    return {"gate", "up"} <= words and are_two_counted(names) and not any({"gate", "up"} & set(concepts(node.name)) for node in numbered)


def are_two_counted(names: Collection[str]) -> bool:
    """Whether names are two that differ by their number alone, and this does not say what they are.

    >>> are_two_counted({"w1", "w2"}), are_two_counted({"fc11", "fc2"}), are_two_counted({"w1", "w3"})
    (True, True, False)
    """
    words = {name.rstrip("0123456789") for name in names}
    return len({*names}) == 2 and len(words) == 1 and words.isdisjoint(names) and not gated([*names])


def unsaid_attention(named: Sequence[Node], numbered: Sequence[Node]) -> bool:
    """Whether one side says query, key and value, and the other has numbers in a module that is not said to be an attention."""
    return bool(_in_attention(named, telling(named))) and not all({"attn", "q", "k", "v"} & set(concepts(node.path)) for node in numbered)


def _last_word(node: Node) -> str:
    return node.name.rpartition(".")[2].rpartition("_")[2]


def abbreviated(first: frozenset[str], second: frozenset[str]) -> bool:
    """Whether a word of one name is the beginning of one of the other's."""
    return any(
        len(short) >= 3 and long.startswith(short) and long != short
        for a in first
        for b in second
        for short, long in ((a, b) if len(a) < len(b) else (b, a),)
    )


def written(name: str) -> frozenset[str]:
    """The words of a name as they are written, short ones and numbers aside."""
    return frozenset(word for word in re.findall("[a-z]+", name.lower()) if len(word) > 2)


def telling_words(nodes: Sequence[Node]) -> list[frozenset[str]]:
    """For each node the words of its own name as they are written that not all of them have."""
    words = [written(node.name) for node in nodes]
    common = frozenset.intersection(*words) if len(words) > 1 else frozenset()
    return [own - common for own in words]


def telling_segments(nodes: Sequence[Node]) -> list[frozenset[str]]:
    """For each node the parts of its path, as they are written, that not all of them have."""
    segments = [frozenset(node.path.lower().split(".")) for node in nodes]
    common = frozenset.intersection(*segments) if len(segments) > 1 else frozenset()
    return [parts - common for parts in segments]


def begun(first: frozenset[str], second: frozenset[str]) -> bool:
    """Whether a part of one name that ends in a number is how a part of the other begins (`branch1` and `branch1x1`)."""
    return any(
        len(short) >= 3 and short[-1].isdigit() and long.startswith(short) and not long[len(short)].isdigit()
        for a in first
        for b in second
        if a != b
        for short, long in ((a, b) if len(a) < len(b) else (b, a),)
        if len(short) < len(long)
    )


class Spelt(NamedTuple):
    """The words of a name that say nothing to the field, and what the initials of its words in a row spell."""

    words: frozenset[str]
    initials: frozenset[str]

    def cuts_short(self, other: Spelt) -> bool:
        """Whether a word of one is the initials of the other's."""
        return bool(self.words & other.initials or other.words & self.initials)


def spelt(parts: Iterable[str]) -> Spelt:
    """How the parts of a path, as they are written, may be cut short.

    >>> spelt(["ar_embedder"]).cuts_short(spelt(["aspect_ratio_embedder"])), spelt(["fc_norm"]).cuts_short(spelt(["final_conv"]))
    (True, False)
    """
    rows = [re.findall("[a-z]+", part.lower()) for part in parts]
    words = {word for row in rows for word in row if 1 < len(word) <= _MOST_INITIALS and concepts(word) == (word,)}
    initials = {
        "".join(word[0] for word in row[at : at + many])
        for row in rows
        for many in range(2, _MOST_INITIALS + 1)
        for at in range(len(row) - many + 1)
    }
    return Spelt(frozenset(words), frozenset(initials))


def nearness(nodes: Sequence[Node], anchor: Node) -> list[int]:
    """How many fewer parts of its path each node shares with another than the nearest does; equal but for numbers is one more.

    Where all share as many, that one is nearer whose name begins as the other's does for longest (`convPa` of `convPb`).
    """
    near = [_shared_parts(node.path, anchor.path) + (node.folded == anchor.folded) for node in nodes]
    if len({*near}) == 1:
        begun_alike = [_same_beginning(node.path, anchor.path, near[0]) for node in nodes]
        longest = max(begun_alike)
        if longest >= _LEAST_BEGINNING and begun_alike.count(longest) == 1:
            near = [int(length == longest) for length in begun_alike]
    return [max(near) - value for value in near]


def _same_beginning(first: str, second: str, at: int) -> int:
    """How many letters two paths have in common in the first part in which they differ, numbers aside."""
    a, b = (fold(".".join(path.split(".")[at : at + 1])).replace("{}", "") for path in (first, second))
    return next((place for place, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _shared_parts(first: str, second: str) -> int:
    a, b = first.split("."), second.split(".")
    return next((at for at, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def slots(sources: Sequence[Node], targets: Sequence[Node], anchors: Sequence[tuple[Node, Node]]) -> tuple[list[int], list[int]] | None:
    """How many layers that are paired stand before each node on either side, where both sides have the same such places, one node in each.

    Two norms before an attention and an MLP are in the same places as two others there; norms behind them are in others.
    """
    pairs = sorted(
        {(source.at, target.at) for source, target in anchors if not (_holds_any(source, sources) or _holds_any(target, targets))}
    )
    places = [sorted(pair[side] for pair in pairs) for side in (0, 1)]
    if len(pairs) < 2 or [target for _, target in pairs] != places[1]:
        return None
    here, there = ([bisect_left(at, node.at) for node in nodes] for at, nodes in zip(places, (sources, targets), strict=True))
    return (here, there) if sorted(here) == sorted(there) and len({*here}) == len(here) else None


def _holds_any(module: Node, nodes: Sequence[Node]) -> bool:
    return any(node.path.startswith(f"{module.path}.") for node in nodes)


def ordinals(nodes: Sequence[Node], words: Sequence[frozenset[str]], rows: Mapping[int, int]) -> list[int] | None:
    """The places of nodes in the order that their names give, where they do: by numbers alone, or by `first`, `after` and the like.

    `rows` says how many differ from a node (by its id) by its last number: members of several lists are compared only where those of
    each list but the first are all there.
    """
    if len({node.folded for node in nodes}) == 1:
        return ranks([node.numbers for node in nodes])
    if _of_parted_lists(nodes, rows):
        return None
    differ = _first_difference(nodes) or _in_attention(nodes, words) or _counted_on(nodes)
    if differ:
        return ranks(differ)
    positions = [_combined_position([position for word, position in _ORDINALS.items() if word in own_words]) for own_words in words]
    numbers = _own_numbers(nodes)
    silent = [index for index in range(len(nodes)) if not positions[index] and not numbers[index]]
    if len(nodes) == 2 and len(silent) == 1 and positions[1 - silent[0]] == _CROSS and all("attn" in concepts(node.path) for node in nodes):
        return [int(index != silent[0]) for index in range(2)]  # `attn` beside `cross_attn` is the self-attention
    counted = len({len(number) for number in numbers}) == 1 and all(numbers)
    one_list = counted and len({node.parent for node in nodes}) == 1
    if any(positions) and not (one_list and not all(positions)):  # where all of one module are counted, a word that some have says no more
        mixed = (
            [position[0] for position, number in zip(positions, numbers, strict=True) if position and not number] if any(numbers) else []
        )
        if any(number and not position for position, number in zip(positions, numbers, strict=True)) and not set(mixed) <= {-100, 100}:
            return None
        unsaid = _unsaid_norm(nodes, [at for at in range(len(nodes)) if at not in silent]) if silent else 0
        if unsaid is None:
            if not (len(nodes) == 2 and positions[1 - silent[0]][0] in _ENDS):
                return None  # of two, the one that is not said to be first is the second
            unsaid = 50
        sort_keys = [((position or [unsaid])[0], *number) for position, number in zip(positions, numbers, strict=True)]
    elif not counted:
        return None
    else:
        sort_keys = [tuple(number) for number in numbers]
    return ranks(sort_keys) if len(set(sort_keys)) == len(sort_keys) else None


def _unsaid_norm(nodes: Sequence[Node], said: Sequence[int]) -> int | None:
    """The place of the one norm of a layer that is not said to be the attention's or the MLP's: it is that of the other of these two.

    None where nodes are no norms of one module, or where not one alone is unsaid.
    """
    words = [frozenset(concepts(node.name)) for node in nodes]
    if len(said) != len(nodes) - 1 or len({node.parent for node in nodes}) > 1 or not all("norm" in own for own in words):
        return None
    if any("mlp" in words[at] for at in said):
        return _ORDINALS["attn"] if len(nodes) == 2 else None
    return _ORDINALS["mlp"] if len(nodes) > 2 and all("attn" in words[at] for at in said) else None


def _own_numbers(nodes: Sequence[Node]) -> list[list[int]]:
    """The numbers of each node's path behind the modules that all stand in, but for those that are the same in all."""
    paths = [node.path.split(".") for node in nodes]
    same = next((at for at, parts in enumerate(zip(*paths, strict=False)) if len({*parts}) > 1), 0)
    rows = [[int(word[1:]) for word in concepts(".".join(parts[same:])) if word[0] == "#"] for parts in paths]
    if len({*map(len, rows)}) > 1:
        common = set.intersection(*map(set, rows))
        return [[number for number in row if number not in common] for row in rows]
    return [list(row) for row in zip(*(column for column in zip(*rows, strict=True) if len({*column}) > 1), strict=True)] or [
        [] for _ in rows
    ]


def _first_difference(nodes: Sequence[Node]) -> list[int]:
    """The numbers that the first parts hold in which all paths differ, where these parts differ by number alone; else nothing."""
    for parts in zip(*(node.path.split(".") for node in nodes), strict=False):
        if len(set(parts)) > 1:
            numbers = [part[len(part.rstrip("0123456789")) :] for part in parts]
            same = len({part.rstrip("0123456789") for part in parts}) == 1 and all(numbers)
            return [int(number) for number in numbers] if same and len(set(numbers)) == len(nodes) else []
    return []


def _counted_on(nodes: Sequence[Node]) -> list[int]:
    """The numbers of lists that one module holds, where each begins after the one before it ends (`outer.0` to `outer.2`, `more.p3`);
    else nothing."""
    paths = [node.path.split(".") for node in nodes]
    at = next((at for at, parts in enumerate(zip(*paths, strict=False)) if len({*map(fold, parts)}) > 1), None)
    if at is None:
        return []
    lists: dict[str, list[int]] = {}
    places: list[int] = []
    for node, parts in zip(nodes, paths, strict=True):
        rest = [part for part in parts[at:] if part[-1:].isdigit()]
        number = int(rest[0][len(rest[0].rstrip("0123456789")) :]) if rest else -1
        lists.setdefault(node.folded, []).append(number)
        places.append(number)
    rows = sorted((min(numbers), max(numbers)) for numbers in lists.values())
    apart = all(before[1] < after[0] for before, after in pairwise(rows))
    return places if apart and len({*places}) == len(nodes) > len(rows) and min(places) >= 0 else []


def places_by_number(sources: Sequence[Node], targets: Sequence[Node]) -> tuple[list[int], list[int]] | None:
    """The numbers of two rows, where the shorter one skips some of the longer one's: what it skips is what it lacks; else None."""
    rows = _single_numbers(sources), _single_numbers(targets)
    if not all(rows) or len(sources) == len(targets):
        return None
    short, long = sorted(map(set, rows), key=len)
    return rows if short < long and len(short) <= max(short) - min(short) else None


def _single_numbers(nodes: Sequence[Node]) -> list[int]:
    """The one number by which nodes differ that differ by one number alone; else nothing."""
    if len({node.folded for node in nodes}) > 1:
        return []
    differ = [column for column in zip(*(node.numbers for node in nodes), strict=True) if len({*column}) > 1]
    return list(differ[0]) if len(differ) == 1 and len({*differ[0]}) == len(nodes) else []


def _of_parted_lists(nodes: Sequence[Node], rows: Mapping[int, int]) -> bool:
    """Whether nodes are members of lists beside each other, and of one that is not the first of them some stand elsewhere."""
    lists: dict[str, list[Node]] = {}
    for node in nodes:
        head, _, number = node.path.rpartition(".")
        lists.setdefault(head if number.isdigit() else "", []).append(node)
    if "" in lists or len(lists) == 1:
        return False
    _, *behind = sorted(lists.values(), key=lambda members: min(member.numbers[-1] for member in members))
    return any(len(members) < rows.get(id(members[0]), 1) for members in behind)


def _in_attention(nodes: Sequence[Node], words: Sequence[frozenset[str]]) -> list[int]:
    """The places of queries, keys and values, and of the output after them, where nodes are these and nothing else; else nothing."""
    if len(nodes) not in (3, 4) or len({node.parent for node in nodes}) > 2:
        return []
    positions = [[_ATTENTION.index(word) for word in own_words if word in _ATTENTION] for own_words in words]
    if any(len(position) > 1 for position in positions):
        return []
    order = [position[0] if position else len(_ATTENTION) - 1 for position in positions]
    return order if sorted(order) == list(range(len(nodes))) else []


def _combined_position(positions: list[int]) -> list[int]:
    """The place that several words give together: being first counts most, then what comes latest."""
    return [min(positions) if min(positions) < 0 else max(positions)] if positions else []


def in_family(nodes: Sequence[Node]) -> list[tuple[int, int]]:
    """Each node's place among those that differ from it by numbers alone, and how many they are."""
    rows: dict[str, list[Node]] = {}
    for node in nodes:
        rows.setdefault(node.folded, []).append(node)
    for row in rows.values():
        row.sort(key=lambda node: node.numbers)
    return [(rows[node.folded].index(node), len(rows[node.folded])) for node in nodes]


def other_roles(source: Node, target: Node) -> bool:
    """Whether two units hold tensors of different roles only."""
    return (
        source.leaf and target.leaf and not set(source.tensors) & set(target.tensors) and "param" not in (*source.tensors, *target.tensors)
    )


def ranks(values: Sequence[object]) -> list[int]:
    order = sorted(range(len(values)), key=lambda index: values[index])  # type: ignore[arg-type,return-value]
    ranks = [0] * len(values)
    for rank, index in enumerate(order):
        ranks[index] = rank
    return ranks


def near(rank: int, other_rank: int, even: bool) -> float:
    """1 for the same place; less the further apart."""
    away = abs(rank - other_rank)
    return max(0.0, 1.0 - away) if even and away else 1.0 / (1 + away)
