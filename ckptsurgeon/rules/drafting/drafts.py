"""Drafts of rules: patterns, results and the lines that they stand for; the names that they match; and how similar drafts are merged.

A merged draft matches only names that the drafts before merging match.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from ckptsurgeon.rules.drafting.numbers import segments
from ckptsurgeon.rules.drafting.rows import Line, Row
from ckptsurgeon.rules.patterns import Pattern, literal, unescaped
from ckptsurgeon.rules.rules import CompiledRule, Rule, compile_rule
from ckptsurgeon.rules.templates import expand

# The variants of a draft with a part in place of a word: what equal variants have in common, the word, and the variant.
Forms = Callable[["Draft"], Iterator[tuple[object, str, "Draft"]]]
_PARTS = ("part", "side", "kind")  # names for parts in place of words that differ
_WORD = re.compile(r"[A-Za-z0-9_-]+")


class Known:
    """Names, as literal patterns, in sorted order: a rule is only tried on names that begin as its pattern does."""

    def __init__(self, names: Collection[str]) -> None:
        self._keys = sorted(names)
        self.names = [literal(name) for name in self._keys]
        self._matched: dict[tuple[str, ...], list[str]] = {}

    def matched(self, compiled: CompiledRule) -> list[str]:
        """The names that a rule matches, in the order of their keys."""
        texts = tuple(pattern.text for _, pattern in compiled.patterns)
        if texts not in self._matched:
            indices = {index for _, pattern in compiled.patterns for head in pattern.heads for index in self._indices(pattern, head)}
            self._matched[texts] = [self.names[index] for index in sorted(indices)]
        return self._matched[texts]

    def _indices(self, pattern: Pattern, head: str) -> Iterator[int]:
        start = bisect_left(self._keys, head)
        if not pattern.tokens and pattern.expression is None:
            yield from (start,) if self._keys[start : start + 1] == [head] else ()
            return
        stop = bisect_left(self._keys, f"{head}\U0010ffff") if head else len(self._keys)
        fits = pattern.test
        yield from (index for index in range(start, stop) if fits(self._keys[index]))


@dataclass(frozen=True)
class Draft:
    """A draft of a rule: a rename, with an op a link, without results a drop."""

    patterns: tuple[str, ...]
    results: tuple[str, ...]
    op: str
    lines: tuple[Line, ...]

    @classmethod
    def of(cls, row: Row) -> Draft:
        """The draft of one row."""
        return cls(row.sources, row.targets, row.op, row.lines)

    @property
    def rule(self) -> Rule:
        """The rule as a value."""
        if not self.results:
            return Rule("drop", self.patterns[0])
        if not self.op:
            return Rule("rename", self.patterns[0], " + ".join(self.results))
        return Rule("adapt", f"{' + '.join(self.patterns)} -> {' + '.join(self.results)}", self.op)

    @cached_property
    def compiled(self) -> CompiledRule:
        """The rule, ready to match. RuleError where it is not well formed."""
        return compile_rule(self.rule)

    def gives(self, name: str) -> tuple[str, ...] | None:
        """The names that a rename gives to a name, each as a literal pattern; None where it doesn't match, and for a link, which may take
        several names.

        RuleError where its arithmetic fails.
        """
        match = None if self.op else self.compiled.match(unescaped(name))
        return None if match is None else tuple(literal(expand(result, dict(match.parts))) for result in self.results)


def merge(drafts: Sequence[Draft], known: Known) -> list[Draft]:
    """Merge drafts that differ only in one word that their results keep, such as encoder and decoder, or weight and bias."""
    merged = list(drafts)
    for forms in (_ends, _words, _words):
        merged = _merged(merged, known, forms)
    return merged


def _merged(drafts: Sequence[Draft], known: Known, forms: Forms) -> list[Draft]:
    buckets: dict[object, list[tuple[int, str, Draft]]] = {}
    for index, draft in enumerate(drafts):
        for form, word, variant in forms(draft):
            buckets.setdefault(form, []).append((index, word, variant))
    replaced: set[int] = set()
    merged: dict[int, Draft] = {}
    for bucket in sorted(buckets.values(), key=len, reverse=True):
        indices = [index for index, _, _ in bucket]
        if len(bucket) < 2 or replaced & set(indices) or len({word for _, word, _ in bucket}) < len(bucket):
            continue
        lines = tuple(line for index in indices for line in drafts[index].lines)
        candidate = Draft(bucket[0][2].patterns, bucket[0][2].results, bucket[0][2].op, lines)
        if set(known.matched(candidate.compiled)) <= {name for index in indices for name in known.matched(drafts[index].compiled)}:
            replaced.update(indices)
            merged[indices[0]] = candidate
    return [merged.get(index, draft) for index, draft in enumerate(drafts) if index in merged or index not in replaced]


def _ends(draft: Draft) -> Iterator[tuple[object, str, Draft]]:
    """The variant with `{p}` for the last word, where all keys of a rule end in it."""
    word = segments(draft.patterns[0])[-1]
    keys = (*draft.patterns, *draft.results)
    if _WORD.fullmatch(word) and all(key.endswith(word) for key in keys):
        yield _form(draft, "{p}", [key.removesuffix(word) + "{p}" for key in keys], word)


def _words(draft: Draft) -> Iterator[tuple[object, str, Draft]]:
    """The variants with a named part for one segment that is a word and that all keys of a rule have."""
    keys = [segments(key) for key in (*draft.patterns, *draft.results)]
    name = next((name for name in _PARTS if not any(f"{{{name}}}" in key for key in keys)), None)
    if name is None:
        return
    for index, word in enumerate(keys[0]):
        if _WORD.fullmatch(word) and not word.isdecimal() and all(word in key for key in keys) and keys[0].count(word) == 1:
            changed = [".".join(f"{{{name}}}" if segment == word else segment for segment in key) for key in keys]
            yield _form(draft, index, changed, word)


def _form(draft: Draft, where: object, keys: Sequence[str], word: str) -> tuple[object, str, Draft]:
    count = len(draft.patterns)
    return (where, *keys, draft.op), word, Draft(tuple(keys[:count]), tuple(keys[count:]), draft.op, ())
