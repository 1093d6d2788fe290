"""Finds the first of many rules that matches a name. Pure text.

The result is the same as that of trying each rule in turn, but the time hardly grows with their number: a rule is only tried on names that
begin as its pattern does.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from heapq import merge

from ckptsurgeon.rules.patterns import Pattern
from ckptsurgeon.rules.rules import CompiledRule, Match

# The index of a rule, the index of one of its patterns, the only source that it is for, if any, its test, and the pattern.
_Entry = tuple[int, int, int | None, Callable[[str], object], Pattern]


class FirstMatch:
    """Rules indexed by the beginnings of their patterns."""

    def __init__(self, rules: Sequence[CompiledRule]) -> None:
        self._by_head: dict[str, list[_Entry]] = {}
        for index, rule in enumerate(rules):
            for which, (number, pattern) in enumerate(rule.patterns):
                for head in pattern.heads:
                    self._by_head.setdefault(head, []).append((index, which, number, pattern.test, pattern))
        self._sizes = sorted({len(head) for head in self._by_head})

    def find(self, name: str, source: int | None = None) -> tuple[int, Match] | None:
        """The index of the first rule that matches a name (of a key of source number `source`), and the match; None if none does.

        >>> from ckptsurgeon.rules.rules import Rule, compile_rules
        >>> FirstMatch(compile_rules([Rule("drop", "a.**"), Rule("drop", "b.w")])).find("b.w")
        (1, Match(which=0, parts={}))
        """
        size = len(name)
        buckets = [bucket for length in self._sizes if length <= size and (bucket := self._by_head.get(name[:length]))]
        for index, which, number, fits, pattern in buckets[0] if len(buckets) == 1 else merge(*buckets, key=_order):
            if (number is None or number == source) and fits(name):
                return index, Match(which, pattern.match(name) or {})
        return None


def _order(entry: _Entry) -> tuple[int, int]:
    return entry[:2]
