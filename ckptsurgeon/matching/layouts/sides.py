"""Both sides of a matching as the kinds of layout look at them: what parts are called, what keys say of positions and heads.

Rule: names and shapes only, of the whole of both sides, whichever keys are matched. No model's name is known; conventions of the field are.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property

from ckptsurgeon.matching.evidence.vocabulary import concepts
from ckptsurgeon.matching.module_tree import module_of
from ckptsurgeon.planning.links import Layout, Link
from ckptsurgeon.planning.prefixes.find import find_change, find_exchange, rename_all
from ckptsurgeon.tensors import TensorMeta

Tensors = Mapping[str, TensorMeta]
_OF_A_HEAD = re.compile(r"rel_pos_[hwt]$")  # a table that is multiplied with one head's queries, and not one with a column for each head
_LEAVES = {"weight", "bias", "param", "qweight", "scales"}
_ROTARY = re.compile(r"(?:^|[._])(?:rope|rotary|inv_freq|freqs)(?=[._]|$)")
_PAIRS = re.compile(r"(?:^|\.)(?:w[qk]|sa_norm|attn\.output_proj|freqs_cis|rope\.freqs)(?=\.|$)|^blk\.\d+\.attn_[qk]\.")
_OF_POSITIONS = re.compile(r"pos|rel|wpe|attn_?bias|attention_bias", re.IGNORECASE)  # one of these is in each name of positions
_OF_TOKENS = re.compile(r"tok|word|vocab|wte", re.IGNORECASE)
# With the name of its adapter, as peft has it.
_ROW_FACTOR = re.compile(r"(?<=[^.])[._]lora\d*[._](?:up|b)(?:\.[a-z_]+)?(?=\.weight$|$)", re.IGNORECASE)
_NUMBER = re.compile(r"(?:^|[._])\d+(?=[._]|$)")


@cache
def unit_of(key: str) -> str:
    """A tensor's module, or a bare parameter's own name. A low-rank factor that has a weight's rows is that weight's module's own.

    >>> unit_of("attn.q_proj.weight"), unit_of("attn.in_proj_weight"), unit_of("experts.gate_up_proj"), unit_of("attn.q_proj.lora_B.weight")
    ('attn.q_proj', 'attn.in_proj', 'experts.gate_up_proj', 'attn.q_proj')
    """
    key = _ROW_FACTOR.sub("", key)
    head, _, leaf = key.rpartition(".")
    if leaf in _LEAVES:
        return head
    return key.removesuffix("_weight").removesuffix("_bias")


@cache
def own_concepts(key: str) -> frozenset[str]:
    """The concepts of the last word of a tensor's module."""
    return frozenset(concepts(unit_of(key).rpartition(".")[2]))


def word(key: str) -> str:
    """The last word of a tensor's module."""
    return unit_of(key).rpartition(".")[2]


def parent_of(key: str) -> str:
    """The module that a tensor's module stands in."""
    return module_of(unit_of(key))


def layouts(kind: str, link: Link, ways: Mapping[str, str]) -> Sequence[Layout]:
    """A link as it stands, and with each of some chains of adapters after its own."""
    chains = {"": "both lie alike", **ways}
    return tuple(Layout(kind, words, link.sources, link.targets, " | ".join(filter(None, (link.op, op)))) for op, words in chains.items())


@dataclass(frozen=True, eq=False)
class Side:
    """One side's tensors, and what they say of the model."""

    tensors: Tensors

    @cached_property
    def width(self) -> int:
        """The number of features that most matrices take; 0 without any."""
        counts = Counter(tensor.shape[1] for tensor in self.tensors.values() if len(tensor.shape) == 2)
        return counts.most_common(1)[0][0] if counts else 0

    @cached_property
    def positions(self) -> tuple[str, ...]:
        """Tables of positions, absolute or relative."""
        near = (key for key in self.tensors if _OF_POSITIONS.search(key) and not _ROTARY.search(key))
        return tuple(key for key in near if {"pos", "relpos"} & set(concepts(key)))

    @cached_property
    def tokens(self) -> tuple[str, ...]:
        """Tables of tokens."""
        near = (key for key, tensor in self.tensors.items() if len(tensor.shape) == 2 and _OF_TOKENS.search(key))
        named = ((key, set(concepts(key))) for key in near)
        return tuple(key for key, words in named if "tok" in words and not words & {"pos", "head", "tokentype", "cls", "mask"})

    @cached_property
    def rotary(self) -> tuple[str, ...]:
        """Keys by which the model rotates queries and keys: its frequencies, or names that only such models have."""
        return tuple(key for key in self.tensors if _ROTARY.search(key) or _PAIRS.search(key))

    @cached_property
    def in_pairs(self) -> bool:
        """Whether names speak for rotated pairs side by side."""
        return any(_PAIRS.search(key) for key in self.tensors)

    @cached_property
    def is_plain_vision(self) -> bool:
        """Whether it is a plain vision transformer: patches or convolutions, absolute positions and no relative ones, and no tokens."""
        patches = any(len(tensor.shape) > 3 or (len(tensor.shape) > 1 and "patch" in key.lower()) for key, tensor in self.tensors.items())
        words = [set(concepts(key)) for key in self.positions]
        absolute = any("pos" in table_words for table_words in words) and not any("relpos" in table_words for table_words in words)
        return patches and absolute and not self.tokens

    @cached_property
    def frequencies(self) -> tuple[str, ...]:
        """The frequencies of rotations: one for each pair of a head's rows."""
        return tuple(key for key in self.rotary if _ROTARY.search(key) and len(self.tensors[key].shape) == 1)

    @cached_property
    def _by_parent(self) -> Mapping[str, tuple[str, ...]]:
        by_module: dict[str, list[str]] = {}
        for key in self.tensors:
            head = unit_of(key)
            for _ in range(3):  # a module's own tensors, and those of modules in it
                by_module.setdefault(head, []).append(key)
                if not (head := head.rpartition(".")[0]):
                    break
        return {head: tuple(keys) for head, keys in by_module.items()}

    def under(self, module: str) -> tuple[str, ...]:
        """The tensors of a module and of those just below it."""
        return self._by_parent.get(module, ())

    def matrix(self, key: str) -> str:
        """The weight of a tensor's own layer: of a bias, what it is added to the product of."""
        own = (other for other in self.under(unit_of(key)) if unit_of(other) == unit_of(key))
        return max(own, key=lambda other: len(self.tensors[other].shape), default=key)

    def has_own_positions(self, key: str) -> bool:
        """Whether the tower of a key has a table of positions of its own, so that it does not rotate where the model elsewhere does."""
        return _nearest(key, self.positions) > max(_nearest(key, self.rotary), _nearest(key, self.tokens), 0)


def _nearest(key: str, others: tuple[str, ...]) -> int:
    """How many segments a key has in common at most with others, up to its first number; -1 without others."""
    number = _NUMBER.search(key)
    head = key[: number.start()].split(".") if number else key.split(".")[:-1]
    most = -1
    for candidate in others:
        parts = candidate.split(".")
        same = next((at for at, (x, y) in enumerate(zip(head, parts, strict=False)) if x != y), min(len(head), len(parts)))
        most = max(most, same)
    return most


@dataclass(frozen=True, eq=False)
class Sides:
    """Both sides whole."""

    source: Side
    target: Side

    @cached_property
    def names(self) -> Mapping[str, str]:
        """By source key its name among the target's, by the prefix that is found."""
        change = find_change(self.source.tensors, self.target.tensors).best
        return rename_all(self.source.tensors, self.target.tensors, change.prefix)

    @cached_property
    def equal_names(self) -> bool:
        """Whether more than half of the smaller side's keys are equal after the prefix."""
        target = self.target.tensors
        return sum(name in target for name in self.names.values()) > min(len(self.source.tensors), len(target)) / 2

    @cached_property
    def one_naming(self) -> bool:
        """The same, of a prefix that is exchanged for another (`actor.` for `critic.`) too, not that of a single layer."""
        if self.equal_names:
            return True
        source, target = self.source.tensors, self.target.tensors
        half = min(len(source), len(target)) / 2
        exchanges = find_exchange(source, target)
        return any(
            len(exchange.mapping) > half and not _NUMBER.search(exchange.prefix.stripped + exchange.prefix.added) for exchange in exchanges
        )

    @cached_property
    def rotate(self) -> bool:
        """Whether a name on either side says that queries and keys are rotated."""
        return bool(self.source.rotary or self.target.rotary)


def heads_text(sides: Sides, keys: tuple[str, str], rows: int, all_rows: int) -> str:
    """The number of heads that have `rows` rows in all, as text: a variable where nothing tells it, `kv_heads` for fewer keys and values.

    Args:
        sides: both sides.
        keys: a key of the source and one of the target, of the same attention.
        rows: rows of what is looked at: queries, or keys.
        all_rows: rows of the queries.
    """
    both = zip((sides.source, sides.target), keys, strict=True)
    size = next((size for side, key in both for size in _head_sizes(side, key, all_rows) if rows % size == 0), 0)
    return str(rows // size) if size else "heads" if rows == all_rows else "kv_heads"


def _head_sizes(side: Side, key: str, rows: int) -> Iterator[int]:
    """What tells the size of a head in the attention of a key: a norm of one head's queries, a table with a column for each head, or the
    frequencies of a rotation."""
    parent = parent_of(key)
    beside = side.under(parent)
    for name in beside:
        shape, words = side.tensors[name].shape, set(concepts(name[len(parent) :]))
        if len(shape) == 1 and "norm" in words and {"q", "k"} & words and shape[0] < rows and rows % shape[0] == 0:
            yield shape[0]
        if len(shape) == 2 and "relpos" in words and rows % shape[1] == 0 and shape[1] < rows and not own_concepts(name) & {"q", "k", "v"}:
            yield shape[1] if _OF_A_HEAD.search(name) else rows // shape[1]
    for name in side.frequencies:
        size = 2 * side.tensors[name].shape[0]
        if rows % size == 0:
            yield size
