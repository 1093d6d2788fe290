"""How much of two sides links explain, and whether that is a mapping of one model or what unlike models have in common.

Rule: half of one side is enough where both have one naming, if that does not tear the blocks of a list in half. Between two namings the
layers of any two transformers of one width fit, so nearly all of one side must have a partner, an uncertain one at least, and what reads
the input must have one; of another size it may be only where both are equally deep. A deeper target is another model. So is one that norms
its output, where the other norms its input.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from math import inf

from ckptsurgeon.matching.evidence.roles import PLACES, STEM, role_of
from ckptsurgeon.matching.evidence.vocabulary import SAYS_NOTHING, concepts, implied
from ckptsurgeon.matching.layouts.sides import Side, Sides
from ckptsurgeon.matching.module_tree import around, fold, is_float, module_of, squeezed
from ckptsurgeon.report import Coverage
from ckptsurgeon.sizes import percent
from ckptsurgeon.tensors import TensorMeta

LEAST = 0.5  # of the target's tensors and elements, or of the source's, that links must explain
_LEVELS = 4  # of numbered lists around a tensor that are looked at
_BLOCKS = 4  # of a numbered list, from which on it tells that a model is another
_PART = 0.2  # of a side's elements, from which on a list of it tells
_BARE = 0.25  # of a block's tensors, below which it has no partner
_ENDS = {"input": {"embed", "first"}, "output": {"final", "f"}}  # words of the norms there
_APART = {frozenset({end}) for end in _ENDS}
_KINDS = {"conv", "norm", "relpos", "pos"}  # words of a block that say little, or of tables that have the size of the input
_BUFFERS = {"running", "mask", "index", "ids", "inv", "freq", "freqs", "coords", "buffer", "tracked"}  # words of what is computed
_MEMBER = re.compile(r"\d{1,9}(?=\.)")  # a number at the end of a part of a name
NEARLY_ALL = 0.8  # the same between two namings, uncertain links included
Tensors = Mapping[str, TensorMeta]
_Left = Mapping[frozenset[str], Mapping[tuple[int, ...], str]]


def share_of(done: Collection[str], side: Tensors) -> float:
    """The least share of a side's tensors, elements and matrices that these keys have.

    A few large tensors that fit by chance are no mapping, nor are many small ones, and norms of one width are in all models. None of an
    empty side is explained.
    """
    if not side:
        return 0.0
    matrices = {key: tensor for key, tensor in side.items() if len(tensor.shape) > 1}
    return min(
        share
        for tensors in (side, matrices)
        for whole in (Coverage.of({key: tensor for key, tensor in tensors.items() if key in done}, tensors),)
        for share in (whole.tensors, whole.elements)
    )


def unlike(taken: Set[str], reached: Set[str], source: Tensors, target: Tensors) -> str:
    """Why two sides are no two implementations of one model; empty where they may be.

    Args:
        taken: the source's keys that any link has, an uncertain one too.
        reached: the target's.
    """
    whole = Sides(Side(source), Side(target))
    if whole.one_naming and (torn := _torn(whole.names, source, target, taken, reached)):
        return torn
    sides = [
        (done, {key: tensor for key, tensor in side.items() if is_float(tensor)}) for done, side in ((taken, source), (reached, target))
    ]
    placed = [_learned_places(done, side) for done, side in sides]
    for where, other in zip(placed, (whole.target, whole.source), strict=True):
        if where and not other.positions and not whole.one_naming:
            return f"{where} is learned, and the other side has no positions"
    open_roles = [{role for key in side.keys() - done if (role := sized_role(key, side))} for done, side in sides]
    resized = open_roles[0] & open_roles[1]
    inputs = [[key for key in side if _reads_input(key, side)] for _, side in sides]
    stems = [[key for key in keys if role_of(key, side) == STEM] for keys, (_, side) in zip(inputs, sides, strict=True)]
    inputs = stems if all(stems) else inputs
    met = any(key in done or sized_role(key, side) in resized for (done, side), keys in zip(sides, inputs, strict=True) for key in keys)
    lost = not whole.equal_names or _left_in_every_block(*sides[0])  # of one naming, a new stem alone is no other model
    if all(inputs) and not met and lost:
        return f"what reads the input has no partner: {inputs[0][0]} and {inputs[1][0]}"
    if whole.one_naming:
        return ""
    ends = [_norms_at_one_end(side) for _, side in sides]
    if {*map(frozenset, ends)} == _APART:
        return f"{' and '.join(key for found in ends for key in found.values())} are norms at other ends of their models"
    heads = _new_heads(sides)
    shares = [
        share_of(done, {key: side[key] for key in side if key in done or not {module_of(key), sized_role(key, side)} & (heads | resized)})
        for done, side in sides
    ]
    if max(shares) < NEARLY_ALL:
        threshold = f"whose names differ, and {percent(NEARLY_ALL)} is asked for"
        return f"even uncertain links explain only {percent(max(shares))} of either side, {threshold}"
    fits = any(key in done for (done, _), keys in zip(sides, inputs, strict=True) for key in keys)
    deeper = "" if fits or not all(inputs) else _deeper(taken, source, ", and what reads the input is of another size")
    return (
        deeper
        or _deeper(reached, target, ": the target is deeper")
        or _other_sizes(*(_left_in_blocks(done, side) for done, side in sides))
        or _other_parts(_left_in_every_block(*sides[0]), _left_in_every_block(*sides[1]), *sides)
    )


def _norms_at_one_end(side: Tensors) -> dict[str, str]:
    """A norm by the end of a model that all norms outside of lists are at, as each of their names says."""
    words = {key: {*concepts(module_of(key))} for key, tensor in side.items() if len(tensor.shape) == 1 and not _MEMBER.search(key)}
    norms = {key: own for key, own in words.items() if "norm" in own and not own & {"head", "lm", "pool"}}
    return {end: key for end, said in _ENDS.items() for key in norms if all(own & said for own in norms.values())}


def _new_heads(sides: Sequence[tuple[Collection[str], Tensors]]) -> Set[str]:
    """The one layer of each side that has no partner, where both differ in their rows alone: a head of other classes."""
    left = [[key for key, tensor in side.items() if key not in done and len(tensor.shape) > 1] for done, side in sides]
    widths = [squeezed(side[key].shape[1:]) for keys, (_, side) in zip(left, sides, strict=True) for key in keys]
    alone = all(len(keys) == 1 for keys in left) and widths[0] == widths[1]
    return {module_of(key) for keys in left for key in keys} if alone else frozenset()


def _learned_places(done: Collection[str], side: Tensors) -> str:
    """A table of positions that is looked up in, and has no partner, in a part of a side of which other tensors have one."""
    parts = {key.partition(".")[0] for key in done}
    return next(
        (
            key
            for key, tensor in side.items()
            if len(tensor.shape) == 2 and key not in done and role_of(key, side) == PLACES and key.partition(".")[0] in parts
        ),
        "",
    )


def _deeper(done: Collection[str], side: Tensors, why: str) -> str:
    """The list that holds most of a side and of which some blocks have a partner, and others that are equal to them have none; in words.

    A deeper target lacks layers, and is another model; a deeper source is one only where what reads the input is of another size too: a
    shallower model of the same kind reads the same.
    """
    lists: dict[str, dict[str, list[str]]] = {}
    for key in side:
        for found in _MEMBER.finditer(key):
            lists.setdefault(key[: found.start()], {}).setdefault(found[0], []).append(key)
    whole = sum(tensor.numel for tensor in side.values())
    for head, members in lists.items():
        part = sum(side[key].numel for keys in members.values() for key in keys) / max(whole, 1)
        equal: dict[object, list[str]] = {}
        called: dict[object, list[str]] = {}
        for number, keys in members.items() if part > _PART else ():
            equal.setdefault(frozenset((key[len(head) + len(number) :], side[key].shape) for key in keys), []).append(number)
            called.setdefault(frozenset(key[len(head) + len(number) :] for key in keys), []).append(number)
        for alike, least in ((equal, 1 if part > 0.5 else inf), (called, _BLOCKS)):
            for numbers in alike.values():
                shares = [sum(key in done for key in members[number]) / len(members[number]) for number in numbers]
                alone = sum(share < _BARE for share in shares)
                if alone >= least and max(shares) == 1.0:
                    return f"of {len(numbers)} equal blocks such as {head}{numbers[0]}, {alone} have no partner{why}"
    return ""


def _left_in_blocks(done: Collection[str], side: Tensors) -> _Left:
    """The matrices without a partner that stand in blocks of which other tensors have one, by what they are called there and their
    shapes."""
    torn = {key[:end] for key in done for end in [found.end() for found in _MEMBER.finditer(key)][-_LEVELS:]}
    left: dict[frozenset[str], dict[tuple[int, ...], str]] = {}
    for key in (key for key in side if key not in done):
        block = around(key, _MEMBER)
        if block in torn and len(side[key].shape) > 1 and sized_role(key, side) is None:
            words = frozenset(word for word in concepts(key[len(block) :]) if word[0] != "#") - SAYS_NOTHING - _KINDS
            if words:
                left.setdefault(words, {}).setdefault(side[key].shape, key)
    return left


def _other_sizes(left: _Left, other_left: _Left) -> str:
    """Two matrices that are called alike in blocks that go together for the rest, and are of other sizes: so the models are."""
    words = next((words for words, shapes in left.items() if words in other_left and shapes.keys().isdisjoint(other_left[words])), None)
    if words is None:
        return ""
    first, second = (next(iter(some[words].values())) for some in (left, other_left))
    return f"{first} and {second} are of other sizes, in blocks of which the rest goes together"


def _left_in_every_block(done: Set[str], side: Tensors) -> dict[str, TensorMeta]:
    """The tensors without a partner that no block has one for, in blocks of which other tensors have one; a buffer may be made anew."""
    torn = {around(key, _MEMBER) for key in done}
    every: dict[str, list[str]] = {}
    for key in side:
        if around(key, _MEMBER) in torn and not _BUFFERS & {*concepts(key.rpartition(".")[2])}:
            every.setdefault(fold(key), []).append(key)
    return {key: side[key] for keys in every.values() if len(keys) > 1 and done.isdisjoint(keys) for key in keys}


def _other_parts(left: Tensors, other_left: Tensors, *sides: tuple[Set[str], Tensors]) -> str:
    """Tensors that each block of one side has and none of the other, and the reverse, called after other things than the rest of their
    block and than each other; parts that are cut otherwise have as many elements."""
    words = [_inside(some) - _inside(done) - SAYS_NOTHING for some, (done, _) in zip((left, other_left), sides, strict=True)]
    sizes = [sum(tensor.numel for tensor in some.values()) for some in (left, other_left)]
    if not all(words) or words[0] & words[1] or sizes[0] == sizes[1]:
        return ""
    return f"{next(iter(left))} and {next(iter(other_left))} are parts that each block of one side has, and none of the other"


def _inside(keys: Iterable[str]) -> set[str]:
    """The words of names behind the blocks that they are in."""
    return {word for tail in {key[len(around(key, _MEMBER)) :] for key in keys} for word in implied(concepts(tail)) if word[0] != "#"}


def _torn(names: Mapping[str, str], source: Tensors, target: Tensors, taken: Collection[str], reached: Collection[str]) -> str:
    """The list of which most blocks have, under equal names, half of their tensors in other sizes and others in the same, or of which
    layers without a partner are of other kinds; in words."""
    others: dict[str, dict[str, str]] = {}
    counts: dict[str, dict[str, Counter[bool]]] = {}
    for key, name in names.items():
        if name in target and is_float(source[key]):
            for number in _MEMBER.finditer(name):
                members = counts.setdefault(name[: number.start()], {})
                members.setdefault(number[0], Counter())[source[key].numel == target[name].numel] += 1
                if not (key in taken and name in reached) and len(source[key].shape) != len(target[name].shape):
                    others.setdefault(name[: number.start()], {}).setdefault(number[0], key)
    for head, keys in others.items():
        if len(keys) > 1:
            return f"of {len(keys)} layers such as {head}{next(iter(keys))} another kind has the same name"
    for head, members in counts.items():
        torn = [member for member, count in members.items() if 0 < count[True] <= count[False]]
        if len(torn) >= _BLOCKS and 2 * len(torn) > len(members):
            return f"of {len(torn)} blocks such as {head}{torn[0]} half or more is of another size under the same names"
    return ""


def sized_role(key: str, side: Tensors) -> tuple[str, tuple[int, ...]] | None:
    """The role of a tensor that models have in sizes of their own (a vocabulary, positions, classes, channels), and the size that stays."""
    shape = side[key].shape
    if len(shape) == 3 and shape[0] == 1 and "pos" in concepts(key):
        return "positions", shape[2:]
    role = role_of(key, side)
    return None if role is None else (role, (shape[0], *shape[2:]) if len(shape) > 2 else shape[1:])


def _reads_input(key: str, side: Tensors) -> bool:
    """Whether a tensor may be what a model looks its input up in, or a convolution with a window."""
    shape, words = side[key].shape, set(concepts(key))
    if {"pos", "relpos", "tokentype", "cls", "mask", "head", "lm"} & words:
        return False
    return bool({"tok", "embed"} & words) if len(shape) == 2 else len(shape) > 2 and shape[0] > 1 and any(size > 1 for size in shape[2:])
