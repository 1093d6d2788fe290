"""From many links to few patterns: links whose keys differ in numbers alone become one row. Knows no target but the links'.

Rule: a row stands for exactly its links. A number that nothing on the other side follows from stands as it is, in a row of its own.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ckptsurgeon.rules.drafting.numbers import NAMES, Cut, Form, cut, fit, fit_two

_DEEPEST = 4  # numbers by which rows are taken apart, one after the other


@dataclass(frozen=True)
class Line:
    """One application of a rule: its source keys and target keys in the rule's order (gathered and counted numbers already in braces)."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    op: str = ""

    @cached_property
    def cuts(self) -> tuple[tuple[Cut, ...], tuple[Cut, ...]]:
        """Its keys, cut at their numbers."""
        return tuple(map(cut, self.sources)), tuple(map(cut, self.targets))


@dataclass(frozen=True)
class Row:
    """Patterns for the sources, results for the targets, and the lines that they stand for."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    op: str
    lines: tuple[Line, ...]


Shared = Mapping[tuple[tuple[str, ...], tuple[str, ...]], Form]


def rows(lines: Iterable[Line]) -> list[Row]:
    """Few rows for many lines."""
    groups: dict[object, list[Line]] = {}
    for line in lines:
        sources, targets = line.cuts
        groups.setdefault((line.op, tuple(one.texts for one in sources), tuple(one.texts for one in targets)), []).append(line)
    shared = _shared(line for group in groups.values() for line in group)
    return _told_apart([row for group in groups.values() for row in _fold(group, shared, frozenset(), _DEEPEST)])


def literal(line: Line) -> Row:
    """A line as it stands."""
    return Row(line.sources, line.targets, line.op, (line,))


def _shared(lines: Iterable[Line]) -> Shared:
    """How a number follows from one of the source's wherever the same texts lead to both: layers that lack a part count like the others."""
    found: dict[tuple[tuple[str, ...], tuple[str, ...]], set[tuple[int, int]]] = {}
    for line in lines:
        sources, targets = line.cuts
        for one in targets:
            for at, number in enumerate(one.numbers):
                for slot, given in enumerate(sources[0].numbers):
                    found.setdefault((sources[0].until(slot), one.until(at)), set()).add((given, number))
    forms = {place: fit(pairs, len(place[0]) - 1) for place, pairs in found.items() if len({given for given, _ in pairs}) > 1}
    return {place: form for place, form in forms.items() if form is not None}


def _fold(lines: Sequence[Line], shared: Shared, fixed: frozenset[int], depth: int) -> list[Row]:
    """Lines with the same texts as rows; the numbers in `fixed` stand as they are."""
    first = lines[0].cuts[0][0]
    varying = [slot for slot in range(len(first.numbers)) if len({line.cuts[0][0].numbers[slot] for line in lines}) > 1]
    row = _row(lines, shared, fixed)
    if row is not None:
        return [row]
    choices = [slot for slot in varying if slot not in fixed] if depth else []
    if not choices:
        return [literal(line) for line in lines]
    found = []
    for slot in choices:
        apart: dict[int, list[Line]] = {}
        for line in lines:
            apart.setdefault(line.cuts[0][0].numbers[slot], []).append(line)
        found.append([row for part in apart.values() for row in _fold(part, shared, fixed | {slot}, depth - 1)])
    return min(found, key=len)


def _row(lines: Sequence[Line], shared: Shared, fixed: frozenset[int]) -> Row | None:
    """The one row of lines with the same texts, or None."""
    sources, targets = lines[0].cuts
    first = sources[0]
    numbers = [line.cuts[0][0].numbers for line in lines]
    constant = {slot for slot in range(len(first.numbers)) if len({row[slot] for row in numbers}) == 1}
    free = [slot for slot in range(len(first.numbers)) if slot not in fixed]
    told: list[list[Form | None]] = []  # by target and number; None for one that stands as it is
    for place, one in enumerate(targets):
        told.append([])
        for at in range(len(one.numbers)):
            wanted = [line.cuts[1][place].numbers[at] for line in lines]
            form = _form(numbers, wanted, [shared.get((first.until(slot), one.until(at))) for slot in free], free)
            if form is None and len(set(wanted)) > 1:
                return None
            told[-1].append(form)
    used = [{slot for form in forms if form is not None for slot in (form.slot, form.other) if slot >= 0} for forms in told]
    told_of = set().union(*used)
    idle = {slot for slot in range(len(first.numbers)) if slot not in constant} - told_of
    if any(all(len({row[one] - row[slot] for row in numbers}) > 1 for one in told_of) for slot in idle):
        return None  # a number that goes its own way: some other row may be for its other values
    open_ = told_of | idle
    if open_ & fixed or ((len(sources) > 1 or lines[0].op) and any(slots != open_ for slots in used)):
        return None
    others = [_same(lines, place, open_) for place in range(1, len(sources))]
    if any(one is None for one in others):
        return None
    names = _names(len(first.numbers), open_)
    patterns = [first.written([f"{{{names[slot]}}}" if slot in open_ else str(number) for slot, number in enumerate(first.numbers)])]
    for place, slots in enumerate(others, 1):
        parts = zip(slots or (), sources[place].numbers, strict=True)
        patterns.append(sources[place].written([str(number) if slot is None else f"{{{names[slot]}}}" for slot, number in parts]))
    results = [
        one.written([str(number) if form is None else form.written(names) for form, number in zip(forms, one.numbers, strict=True)])
        for one, forms in zip(targets, told, strict=True)
    ]
    return Row(tuple(patterns), tuple(results), lines[0].op, tuple(lines))


def _form(numbers: Sequence[tuple[int, ...]], wanted: Sequence[int], shared: Sequence[Form | None], free: Sequence[int]) -> Form | None:
    """The simplest form that holds for all lines: one that holds elsewhere too before one of these lines alone."""
    known = [form for form in shared if form is not None and all(form(row) == one for row, one in zip(numbers, wanted, strict=True))]
    if known:
        return min(known, key=lambda form: (form.effort, -form.slot))
    if len(set(wanted)) == 1:
        return None
    own = [fit({(row[slot], one) for row, one in zip(numbers, wanted, strict=True)}, slot) for slot in free]
    found = [form for form in own if form is not None]
    if found:
        return min(found, key=lambda form: (form.effort, -form.slot))
    return fit_two(list(zip(numbers, wanted, strict=True)), free)


def _same(lines: Sequence[Line], place: int, open_: set[int]) -> list[int | None] | None:
    """For each number of another source the slot of the first that it always equals; None where it stands as it is.

    None for all where a number differs from line to line and is no slot's, or a slot is not named: a pattern can't count.
    """
    slots: list[int | None] = []
    for at in range(len(lines[0].cuts[0][place].numbers)):
        values = [line.cuts[0][place].numbers[at] for line in lines]
        fitting = [
            slot
            for slot in sorted(open_, key=lambda slot: (slot in slots, abs(slot - at)))
            if values == [line.cuts[0][0].numbers[slot] for line in lines]
        ]
        if not fitting and len(set(values)) > 1:
            return None
        slots.append(fitting[0] if fitting else None)
    return slots if open_ <= {slot for slot in slots if slot is not None} else None


def _names(count: int, open_: set[int]) -> list[str]:
    """The names of the slots that are open, in order."""
    left = iter(NAMES)
    return [next(left, "z") if slot in open_ else "" for slot in range(count)]


def _told_apart(found: Sequence[Row]) -> list[Row]:
    """Rows in which no two have the same patterns: of those that have, the one with the most lines keeps them, the others are literal."""
    by_pattern: dict[tuple[str, ...], list[Row]] = {}
    for row in found:
        by_pattern.setdefault(row.sources[:1], []).append(row)
    kept: list[Row] = []
    for row in found:
        same = by_pattern[row.sources[:1]]
        if len(same) == 1 or row is max(same, key=lambda one: len(one.lines)):
            kept.append(row)
        else:
            kept += _apart(row, same)
    return kept


def _apart(row: Row, same: Sequence[Row]) -> list[Row]:
    """A row's lines, with the numbers written out by which they differ from those of rows with the same pattern."""
    others = [line.cuts[0][0].numbers for other in same if other is not row for line in other.lines]
    own = [line.cuts[0][0].numbers for line in row.lines]
    slots = [slot for slot in range(len(own[0])) if not {one[slot] for one in own} & {one[slot] for one in others}]
    if not slots:
        return [literal(line) for line in row.lines]
    slot = min(slots, key=lambda slot: len({one[slot] for one in own}))
    apart: dict[int, list[Line]] = {}
    for line, numbers in zip(row.lines, own, strict=True):
        apart.setdefault(numbers[slot], []).append(line)
    return [one for part in apart.values() for one in _fold(part, {}, frozenset({slot}), _DEEPEST)]
