"""Turns many links into few patterns: links whose keys differ only in numbers become one row. Only the links are known here, no target.

A row stands for exactly its links. Where the numbers of the targets don't follow from a number for all links, the number becomes a choice
of values for which they do (`{i=0..90..3}`), or it stays as it is, in a row of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

from ckptsurgeon.rules.drafting.boxes import Box, boxes
from ckptsurgeon.rules.drafting.numbers import NAMES, Cut, Form, cut, fit, fit_two
from ckptsurgeon.rules.patterns import listed

_DEEPEST = 4  # numbers by which rows are taken apart, one after the other


@dataclass(frozen=True)
class Line:
    """One application of a rule: its source keys and target keys in the rule's order, as patterns (gathered and counted numbers already in
    braces)."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    op: str = ""

    @cached_property
    def cuts(self) -> tuple[tuple[Cut, ...], tuple[Cut, ...]]:
        """Its keys, cut at their numbers."""
        return tuple(map(cut, self.sources)), tuple(map(cut, self.targets))


@dataclass(frozen=True)
class Row:
    """One rule to be, and the lines that it stands for.

    Attributes:
        sources: the patterns of the sources.
        targets: the results for the targets.
        op: the adapters.
        lines: the lines.
        open: the pattern of the first source without choices of numbers.
        chosen: the slots of the first source's numbers that are choices.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    op: str
    lines: tuple[Line, ...]
    open: str = ""
    chosen: tuple[int, ...] = ()


Shared = Mapping[tuple[tuple[str, ...], tuple[str, ...]], Form]


def rows(lines: Iterable[Line], stays: Callable[[Row], bool] = lambda row: False) -> list[Row]:
    """Few rows for many lines. A row for which `stays` is true needs no rule, so other rows with its pattern must not match its lines."""
    groups: dict[object, list[Line]] = {}
    for line in lines:
        sources, targets = line.cuts
        groups.setdefault((line.op, tuple(one.texts for one in sources), tuple(one.texts for one in targets)), []).append(line)
    shared = _shared(line for group in groups.values() for line in group)
    return _told_apart([row for group in groups.values() for row in _fold(group, shared, frozenset(), _DEEPEST)], stays)


def literal(line: Line) -> Row:
    """A line as a row of its own, with all numbers as they are."""
    return Row(line.sources, line.targets, line.op, (line,), line.sources[0])


def _shared(lines: Iterable[Line]) -> Shared:
    """By the texts that lead to a source number and to a target number, how the second follows from the first in all lines. So a layer that
    lacks some parts is numbered as in the lines of other parts."""
    lines = list(lines)
    given: dict[tuple[str, ...], set[int]] = {}
    for line in lines:
        first = line.cuts[0][0]
        for slot, number in enumerate(first.numbers):
            given.setdefault(first.until(slot), set()).add(number)
    found: dict[tuple[tuple[str, ...], tuple[str, ...]], set[tuple[int, int]]] = {}
    for line in lines:
        sources, targets = line.cuts
        slots = [(slot, place) for slot in range(len(sources[0].numbers)) if len(given[place := sources[0].until(slot)]) > 1]
        for one in targets:
            for at, number in enumerate(one.numbers):
                until = one.until(at)
                for slot, place in slots:
                    found.setdefault((place, until), set()).add((sources[0].numbers[slot], number))
    forms = {place: fit(pairs, len(place[0]) - 1) for place, pairs in found.items() if len({given for given, _ in pairs}) > 1}
    return {place: form for place, form in forms.items() if form is not None}


def _fold(lines: Sequence[Line], shared: Shared, fixed: frozenset[int], depth: int) -> list[Row]:
    """Lines with the same texts as rows; the numbers in the slots `fixed` stay as they are."""
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
        parts: list[Row] = []
        for values in _alike(apart):
            together = [line for value in values for line in apart[value]]
            one = _row(together, shared, fixed, {slot: frozenset(values)}) if len(values) > 1 else None
            parts += [one] if one else [row for value in values for row in _fold(apart[value], shared, fixed | {slot}, depth - 1)]
        found.append(parts)
    return min(found, key=len)


def _alike(apart: Mapping[int, Sequence[Line]]) -> list[list[int]]:
    """The values of a number, grouped by how the targets' numbers follow from it: by a constant difference, or as a constant."""
    told = {}
    for value, lines in apart.items():
        columns = zip(*([number for one in line.cuts[1] for number in one.numbers] for line in lines), strict=True)
        told[value] = [column[0] if len(set(column)) == 1 else None for column in columns]
    same = Counter((at, number) for column in told.values() for at, number in enumerate(column))
    shifted = Counter((at, number - value) for value, column in told.items() for at, number in enumerate(column) if number is not None)
    groups: dict[object, list[int]] = {}
    for value, column in told.items():
        ways = [
            None if number is None else (0, number) if same[at, number] > shifted[at, number - value] else (1, number - value)
            for at, number in enumerate(column)
        ]
        groups.setdefault(tuple(ways), []).append(value)
    return list(groups.values())


def _row(lines: Sequence[Line], shared: Shared, fixed: frozenset[int], chosen: Box | None = None) -> Row | None:
    """One row for lines with the same texts, or None; `chosen` has the choices of a slot's numbers."""
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
        return None  # an unused number that varies by itself: another row may be for its other values
    open_ = told_of | idle
    if open_ & fixed or ((len(sources) > 1 or lines[0].op) and any(slots != open_ for slots in used)):
        return None
    others = [_same(lines, place, open_) for place in range(1, len(sources))]
    if any(one is None for one in others):
        return None
    names = _names(len(first.numbers), open_)
    own = [slot if slot in open_ else None for slot in range(len(first.numbers))]
    listing = {slot: listed(sorted(values)) for slot, values in (chosen or {}).items() if slot in open_}
    patterns = [_pattern(one, slots or [], names, listing) for one, slots in zip(sources, [own, *others], strict=True)]
    results = [
        one.written([str(number) if form is None else form.written(names) for form, number in zip(forms, one.numbers, strict=True)])
        for one, forms in zip(targets, told, strict=True)
    ]
    return Row(tuple(patterns), tuple(results), lines[0].op, tuple(lines), _pattern(first, own, names, {}), tuple(listing))


def _pattern(one: Cut, slots: Sequence[int | None], names: Sequence[str], listing: Mapping[int, str]) -> str:
    """A source as a pattern, with the names of slots for its numbers; one of several says of which, where it stands first."""
    parts = []
    for at, (slot, number) in enumerate(zip(slots, one.numbers, strict=True)):
        choices = f"={listing[slot]}" if slot is not None and slot in listing and slot not in slots[:at] else ""
        parts.append(str(number) if slot is None else f"{{{names[slot]}{choices}}}")
    return one.written(parts)


def _form(numbers: Sequence[tuple[int, ...]], wanted: Sequence[int], shared: Sequence[Form | None], free: Sequence[int]) -> Form | None:
    """The simplest form that holds for all lines; forms that also hold for other lines come first."""
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


Owners = Mapping[tuple[int, int], Row | None]  # by slot and number, the row that has it; None where several do


def _told_apart(found: Sequence[Row], stays: Callable[[Row], bool]) -> list[Row]:
    """Rows in which no pattern matches another row's lines, except the widest one of each pattern: the one that stays, or has most
    lines."""
    by_pattern: dict[str, list[Row]] = {}
    for row in found:
        by_pattern.setdefault(row.open, []).append(row)
    instead: dict[int, list[Row]] = {}
    for same in by_pattern.values():
        if len(same) == 1:
            continue
        owners: dict[tuple[int, int], Row | None] = {}
        for row in same:
            for line in row.lines:
                for place in enumerate(line.cuts[0][0].numbers):
                    owners[place] = row if owners.get(place, row) is row else None
        widest = max((row for row in same if not row.chosen), key=lambda row: (stays(row), len(row.lines)), default=None)
        for row in same:
            if row is not widest and not any(_owned(row, slot, owners) for slot in row.chosen):
                instead[id(row)] = _apart(row, owners)
    return [one for row in found for one in instead.get(id(row), [row])]


def _owned(row: Row, slot: int, owners: Owners) -> bool:
    """Whether no other row has a number of this row in a slot."""
    return all(owners[slot, line.cuts[0][0].numbers[slot]] is row for line in row.lines)


def _apart(row: Row, owners: Owners) -> list[Row]:
    """A row's lines in rows with numbers that no other row with the same pattern has; else products of numbers."""
    by_numbers: dict[tuple[int, ...], list[Line]] = {}
    for line in row.lines:
        by_numbers.setdefault(line.cuts[0][0].numbers, []).append(line)
    values: Box = {slot: frozenset(column) for slot, column in enumerate(zip(*by_numbers, strict=True))}
    own = [slot for slot in values if _owned(row, slot, owners)]
    for slot in sorted(own, key=lambda slot: (listed(sorted(values[slot])).count(","), len(values[slot]))):
        one = _restricted(row.lines, {slot: values[slot]})
        if one is not None:
            return [one]
    found = []
    every: dict[int, set[int]] = {slot: set() for slot in values}
    for slot, number in owners:
        every[slot].add(number)
    for box in boxes(by_numbers, list(values)):
        lines = [line for numbers in product(*(sorted(box[slot]) for slot in values)) for line in by_numbers[numbers]]
        needed = {slot: numbers for slot, numbers in box.items() if not numbers >= every[slot]}
        one = _restricted(lines, needed)
        found += [one] if one is not None else [literal(line) for line in lines]
    return found


def _restricted(lines: Sequence[Line], chosen: Box) -> Row | None:
    """The one row of lines whose numbers are these; one that has no choice stands as it is."""
    fixed = frozenset(slot for slot, numbers in chosen.items() if len(numbers) == 1)
    return _row(lines, {}, fixed, {slot: numbers for slot, numbers in chosen.items() if slot not in fixed})
