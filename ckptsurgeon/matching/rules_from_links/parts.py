"""Links as lines: parts that are numbered and go together are one pattern with a number in braces. Looks at nothing but the link.

Rule: what only the sources number is gathered (`experts.{e}.w1`), what only the targets number is counted from 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ckptsurgeon.adapters.chain import counted_at
from ckptsurgeon.adapters.table import parse_ops
from ckptsurgeon.planning.links import Link
from ckptsurgeon.rules.drafting.numbers import cut
from ckptsurgeon.rules.drafting.rows import Line
from ckptsurgeon.rules.patterns import literal

_MOST = 4  # patterns that go together for each number
PART = "{e}"


def line_of(link: Link, name: Mapping[str, str]) -> Line:
    """A link as a line, with the patterns of the source's names."""
    sources = tuple(name[key] for key in link.sources)
    targets = tuple(map(literal, link.targets))
    if len(sources) > 2:  # two are as short by name
        sources = numbered(sources) or sources
    elif len(targets) > 1 and counted_at(parse_ops(link.op)) is not None:
        targets = numbered(targets, start=0) or targets
    return Line(sources, targets, link.op)


def numbered(keys: Sequence[str], start: int | None = None) -> tuple[str, ...] | None:
    """Keys that are the same few again and again under rising numbers, as these few with `{e}` for the number; else None.

    >>> numbered(["x.0.a", "x.0.b", "x.1.a", "x.1.b"])
    ('x.{e}.a', 'x.{e}.b')
    """
    for each in range(1, min(_MOST, len(keys) // 2) + 1):
        if len(keys) % each == 0:
            patterns = [_counted(keys[offset::each], start) for offset in range(each)]
            firsts = {pattern[1] for pattern in patterns if pattern is not None}
            if None not in patterns and len(firsts) == 1:
                return tuple(pattern[0] for pattern in patterns if pattern is not None)
    return None


def _counted(keys: Sequence[str], start: int | None) -> tuple[str, int] | None:
    """Keys that differ in one number, which rises by one each, as a pattern, and the first number."""
    cuts = [cut(key) for key in keys]
    if len({key_cut.texts for key_cut in cuts}) > 1:
        return None
    varying = [slot for slot, column in enumerate(zip(*(key_cut.numbers for key_cut in cuts), strict=True)) if len(set(column)) > 1]
    if len(varying) != 1:
        return None
    column = [key_cut.numbers[varying[0]] for key_cut in cuts]
    if column != list(range(column[0], column[0] + len(column))) or start not in (None, column[0]):
        return None
    parts = [PART if slot == varying[0] else str(number) for slot, number in enumerate(cuts[0].numbers)]
    return cuts[0].written(parts), column[0]
