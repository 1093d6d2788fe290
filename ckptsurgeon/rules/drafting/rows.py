"""Turns many links into few patterns: links whose keys differ only in numbers become one row.

A row stands for exactly its links. Where the targets' numbers don't follow from a source's number for all links, that number becomes a
choice of the values for which they do (`{i=0..90..3}`), or it stays a constant, in a row of its own.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod

from ckptsurgeon.rules.drafting.numbers import NAMES, Cut, Form, cut, fit, fit_two
from ckptsurgeon.rules.patterns import listed

_DEEPEST = 4  # numbers by which rows are split, one after the other


@dataclass(frozen=True)
class Line:
    """One application of a rule: its source keys and target keys in the rule's order, as patterns (gathered and counted numbers are already
    in braces)."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    op: str = ""

    @cached_property
    def cuts(self) -> tuple[tuple[Cut, ...], tuple[Cut, ...]]:
        """Its keys, cut at their numbers."""
        return tuple(map(cut, self.sources)), tuple(map(cut, self.targets))


@dataclass(frozen=True)
class Row:
    """A future rule, and the lines that it stands for.

    Attributes:
        sources: the patterns for the source keys.
        targets: the results for the target keys.
        op: the adapters.
        lines: the lines.
        open: the pattern for the first source key, without choices of numbers.
        chosen: the slots of the first source key whose numbers are choices.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    op: str
    lines: tuple[Line, ...]
    open: str = ""
    chosen: tuple[int, ...] = ()


Box = dict[int, frozenset[int]]  # by slot, the numbers that it may have
Shared = Mapping[tuple[tuple[str, ...], tuple[str, ...]], Form]


def rows(lines: Iterable[Line], stays: Callable[[Row], bool] = lambda row: False) -> list[Row]:
    """Few rows for many lines. A row for which `stays` is true gets no rule, so other rows with its pattern must not match its lines."""
    groups: dict[object, list[Line]] = {}
    for line in lines:
        sources, targets = line.cuts
        groups.setdefault((line.op, tuple(source.texts for source in sources), tuple(target.texts for target in targets)), []).append(line)
    shared = _shared(line for group in groups.values() for line in group)
    return _kept_apart([row for group in groups.values() for row in _fold(group, shared, frozenset(), _DEEPEST)], stays)


def literal(line: Line) -> Row:
    """A row for a single line, in which all numbers are constant."""
    return Row(line.sources, line.targets, line.op, (line,), line.sources[0])


def _shared(lines: Iterable[Line]) -> Shared:
    """By the texts before a source number and before a target number, the form by which the second follows from the first in all lines. So
    a layer that lacks some parts is numbered as in the lines of other parts."""
    lines = list(lines)
    numbers: dict[tuple[str, ...], set[int]] = {}
    for line in lines:
        first = line.cuts[0][0]
        for slot, number in enumerate(first.numbers):
            numbers.setdefault(first.until(slot), set()).add(number)
    pairs_of: dict[tuple[tuple[str, ...], tuple[str, ...]], set[tuple[int, int]]] = {}
    for line in lines:
        sources, targets = line.cuts
        slots = [
            (slot, source_texts) for slot in range(len(sources[0].numbers)) if len(numbers[source_texts := sources[0].until(slot)]) > 1
        ]
        for target in targets:
            for index, number in enumerate(target.numbers):
                target_texts = target.until(index)
                for slot, source_texts in slots:
                    pairs_of.setdefault((source_texts, target_texts), set()).add((sources[0].numbers[slot], number))
    forms = {texts: fit(pairs, len(texts[0]) - 1) for texts, pairs in pairs_of.items() if len({number for number, _ in pairs}) > 1}
    return {texts: form for texts, form in forms.items() if form is not None}


def _fold(lines: Sequence[Line], shared: Shared, fixed: frozenset[int], depth: int) -> list[Row]:
    """Rows for lines with the same texts; the numbers in the slots `fixed` are constant in each row."""
    first = lines[0].cuts[0][0]
    varying = [slot for slot in range(len(first.numbers)) if len({line.cuts[0][0].numbers[slot] for line in lines}) > 1]
    row = _row(lines, shared, fixed)
    if row is not None:
        return [row]
    choices = [slot for slot in varying if slot not in fixed] if depth else []
    if not choices:
        return [literal(line) for line in lines]
    splits = []
    for slot in choices:
        by_value: dict[int, list[Line]] = {}
        for line in lines:
            by_value.setdefault(line.cuts[0][0].numbers[slot], []).append(line)
        parts: list[Row] = []
        for values in _grouped(by_value):
            together = [line for value in values for line in by_value[value]]
            row_of_all = _row(together, shared, fixed, {slot: frozenset(values)}) if len(values) > 1 else None
            parts += (
                [row_of_all]
                if row_of_all
                else [row for value in values for row in _fold(by_value[value], shared, fixed | {slot}, depth - 1)]
            )
        splits.append(parts)
    return min(splits, key=len)


def _grouped(by_value: Mapping[int, Sequence[Line]]) -> list[list[int]]:
    """The values of a number, grouped by how the targets' numbers follow from it: by a constant difference, or as a constant."""
    constants = {}
    for value, lines in by_value.items():
        columns = zip(*([number for target in line.cuts[1] for number in target.numbers] for line in lines), strict=True)
        constants[value] = [column[0] if len(set(column)) == 1 else None for column in columns]
    same = Counter((index, number) for column in constants.values() for index, number in enumerate(column))
    shifted = Counter(
        (index, number - value) for value, column in constants.items() for index, number in enumerate(column) if number is not None
    )
    groups: dict[object, list[int]] = {}
    for value, column in constants.items():
        relations = [
            None if number is None else (0, number) if same[index, number] > shifted[index, number - value] else (1, number - value)
            for index, number in enumerate(column)
        ]
        groups.setdefault(tuple(relations), []).append(value)
    return list(groups.values())


def _row(lines: Sequence[Line], shared: Shared, fixed: frozenset[int], chosen: Box | None = None) -> Row | None:
    """One row for lines with the same texts, or None where there is none; `chosen` has the choices for the numbers of a slot."""
    sources, targets = lines[0].cuts
    first = sources[0]
    numbers = [line.cuts[0][0].numbers for line in lines]
    constant = {slot for slot in range(len(first.numbers)) if len({row[slot] for row in numbers}) == 1}
    free = [slot for slot in range(len(first.numbers)) if slot not in fixed]
    forms_of: list[list[Form | None]] = []  # by target and number; None for a constant
    for position, target in enumerate(targets):
        forms_of.append([])
        for index in range(len(target.numbers)):
            results = [line.cuts[1][position].numbers[index] for line in lines]
            form = _form(numbers, results, [shared.get((first.until(slot), target.until(index))) for slot in free], free)
            if form is None and len(set(results)) > 1:
                return None
            forms_of[-1].append(form)
    used = [{slot for form in forms if form is not None for slot in (form.slot, form.other) if slot >= 0} for forms in forms_of]
    all_used = set().union(*used)
    idle = {slot for slot in range(len(first.numbers)) if slot not in constant} - all_used
    if any(all(len({row[used_slot] - row[slot] for row in numbers}) > 1 for used_slot in all_used) for slot in idle):
        return None  # an unused number that varies independently: another row may be for its other values
    open_slots = all_used | idle
    if open_slots & fixed or ((len(sources) > 1 or lines[0].op) and any(slots != open_slots for slots in used)):
        return None
    other_slots = [_same(lines, position, open_slots) for position in range(1, len(sources))]
    if any(slots is None for slots in other_slots):
        return None
    names = _names(len(first.numbers), open_slots)
    first_slots = [slot if slot in open_slots else None for slot in range(len(first.numbers))]
    listing = {slot: listed(sorted(values)) for slot, values in (chosen or {}).items() if slot in open_slots}
    patterns = [_pattern(source, slots or [], names, listing) for source, slots in zip(sources, [first_slots, *other_slots], strict=True)]
    texts = [
        target.written([str(number) if form is None else form.written(names) for form, number in zip(forms, target.numbers, strict=True)])
        for target, forms in zip(targets, forms_of, strict=True)
    ]
    return Row(tuple(patterns), tuple(texts), lines[0].op, tuple(lines), _pattern(first, first_slots, names, {}), tuple(listing))


def _pattern(source: Cut, slots: Sequence[int | None], names: Sequence[str], listing: Mapping[int, str]) -> str:
    """A source key as a pattern, with the names of slots for its numbers, and with a slot's choices where its name occurs first."""
    parts = []
    for index, (slot, number) in enumerate(zip(slots, source.numbers, strict=True)):
        choices = f"={listing[slot]}" if slot is not None and slot in listing and slot not in slots[:index] else ""
        parts.append(str(number) if slot is None else f"{{{names[slot]}{choices}}}")
    return source.written(parts)


def _form(numbers: Sequence[tuple[int, ...]], results: Sequence[int], shared: Sequence[Form | None], free: Sequence[int]) -> Form | None:
    """The simplest form that holds for all lines; forms that also hold for the lines of other rows (`shared`) come first."""
    known = [form for form in shared if form is not None and all(form(row) == result for row, result in zip(numbers, results, strict=True))]
    if known:
        return min(known, key=lambda form: (form.effort, -form.slot))
    if len(set(results)) == 1:
        return None
    own = [fit({(row[slot], result) for row, result in zip(numbers, results, strict=True)}, slot) for slot in free]
    own_forms = [form for form in own if form is not None]
    if own_forms:
        return min(own_forms, key=lambda form: (form.effort, -form.slot))
    return fit_two(list(zip(numbers, results, strict=True)), free)


def _same(lines: Sequence[Line], position: int, open_slots: set[int]) -> list[int | None] | None:
    """For each number of another source key the slot of the first key that always has the same number; None for a constant.

    None in place of the list where a number varies and no slot has it, or where a slot is missing: a pattern can't count.
    """
    slots: list[int | None] = []
    for index in range(len(lines[0].cuts[0][position].numbers)):
        values = [line.cuts[0][position].numbers[index] for line in lines]
        equal_slots = [
            slot
            for slot in sorted(open_slots, key=lambda slot: (slot in slots, abs(slot - index)))
            if values == [line.cuts[0][0].numbers[slot] for line in lines]
        ]
        if not equal_slots and len(set(values)) > 1:
            return None
        slots.append(equal_slots[0] if equal_slots else None)
    return slots if open_slots <= {slot for slot in slots if slot is not None} else None


def _names(count: int, open_slots: set[int]) -> list[str]:
    """The names of the open slots, in order; "" for the others."""
    names = iter(NAMES)
    return [next(names, "z") if slot in open_slots else "" for slot in range(count)]


Owners = Mapping[tuple[int, int], Row | None]  # by slot and number, the row that has it; None where several do


def _kept_apart(folded: Sequence[Row], stays: Callable[[Row], bool]) -> list[Row]:
    """Rows of which no pattern matches another row's lines, except the widest row of each pattern: the row that stays, or the row with most
    lines."""
    by_pattern: dict[str, list[Row]] = {}
    for row in folded:
        by_pattern.setdefault(row.open, []).append(row)
    replacements: dict[int, list[Row]] = {}
    for same in by_pattern.values():
        if len(same) == 1:
            continue
        owners: dict[tuple[int, int], Row | None] = {}
        for row in same:
            for line in row.lines:
                for slot_and_number in enumerate(line.cuts[0][0].numbers):
                    owners[slot_and_number] = row if owners.get(slot_and_number, row) is row else None
        widest = max((row for row in same if not row.chosen), key=lambda row: (stays(row), len(row.lines)), default=None)
        for row in same:
            if row is not widest and not any(_owned(row, slot, owners) for slot in row.chosen):
                replacements[id(row)] = _apart(row, owners)
    return [kept for row in folded for kept in replacements.get(id(row), [row])]


def _owned(row: Row, slot: int, owners: Owners) -> bool:
    """Whether no other row has one of this row's numbers in a slot."""
    return all(owners[slot, line.cuts[0][0].numbers[slot]] is row for line in row.lines)


def _apart(row: Row, owners: Owners) -> list[Row]:
    """A row's lines as one row with numbers that no other row with the same pattern has; else as rows for products of numbers."""
    by_numbers: dict[tuple[int, ...], list[Line]] = {}
    for line in row.lines:
        by_numbers.setdefault(line.cuts[0][0].numbers, []).append(line)
    values: Box = {slot: frozenset(column) for slot, column in enumerate(zip(*by_numbers, strict=True))}
    own = [slot for slot in values if _owned(row, slot, owners)]
    for slot in sorted(own, key=lambda slot: (listed(sorted(values[slot])).count(","), len(values[slot]))):
        restricted = _restricted(row.lines, {slot: values[slot]})
        if restricted is not None:
            return [restricted]
    rows_of_boxes = []
    every: dict[int, set[int]] = {slot: set() for slot in values}
    for slot, number in owners:
        every[slot].add(number)
    for box in boxes(by_numbers, list(values)):
        lines = [line for numbers in product(*(sorted(box[slot]) for slot in values)) for line in by_numbers[numbers]]
        needed = {slot: numbers for slot, numbers in box.items() if not numbers >= every[slot]}
        restricted = _restricted(lines, needed)
        rows_of_boxes += [restricted] if restricted is not None else [literal(line) for line in lines]
    return rows_of_boxes


def _restricted(lines: Sequence[Line], chosen: Box) -> Row | None:
    """The row for lines with the numbers `chosen`; a number without a choice is a constant."""
    fixed = frozenset(slot for slot, numbers in chosen.items() if len(numbers) == 1)
    return _row(lines, {}, fixed, {slot: numbers for slot, numbers in chosen.items() if slot not in fixed})


def boxes(rows: Collection[tuple[int, ...]], slots: Sequence[int]) -> list[Box]:
    """Products of sets that together are these rows, each row in exactly one. Slots outside `slots` have the same number in all rows.

    >>> [{slot: sorted(numbers) for slot, numbers in box.items()} for box in boxes({(0, 1), (0, 2), (3, 1), (3, 2), (4, 9)}, [0, 1])]
    [{0: [0, 3], 1: [1, 2]}, {0: [4], 1: [9]}]
    """
    values: Box = {slot: frozenset(row[slot] for row in rows) for slot in slots}
    if prod(map(len, values.values())) == len(rows):
        return [values]
    groups = min((_numbers_of(rows, slot) for slot in slots), key=len)
    slot = groups[0][0]
    rest = [remaining for remaining in slots if remaining != slot]
    return [{slot: numbers, **box} for _, numbers, other_rows in groups for box in boxes(other_rows, rest)]


def _numbers_of(rows: Collection[tuple[int, ...]], slot: int) -> list[tuple[int, frozenset[int], frozenset[tuple[int, ...]]]]:
    """The numbers of one slot, grouped by the rows in which they occur: the slot, the numbers, and the rows with 0 in this slot."""
    by_number: dict[int, set[tuple[int, ...]]] = {}
    for row in rows:
        by_number.setdefault(row[slot], set()).add((*row[:slot], 0, *row[slot + 1 :]))
    groups: dict[frozenset[tuple[int, ...]], list[int]] = {}
    for number, other_rows in sorted(by_number.items()):
        groups.setdefault(frozenset(other_rows), []).append(number)
    return [(slot, frozenset(numbers), other_rows) for other_rows, numbers in groups.items()]
