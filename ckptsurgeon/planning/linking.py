"""Applies adapt rules with `->` (links): which source keys are joined, and which target keys they make.

Several patterns (`q + k -> qk`) are joined in the order in which they are written. Keys that differ in a part that no result names are
gathered in numerical order (`experts.{e}.w1 -> experts.w1`), as are keys whose part the results only use in arithmetic (`{i//2}`). A part
that only the results name numbers what `unstack` gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from math import prod

from ckptsurgeon.adapters.chain import RuleOp, counted_at, fill_chain
from ckptsurgeon.adapters.table import adapter_of
from ckptsurgeon.errors import RuleError
from ckptsurgeon.planning.keys import Item
from ckptsurgeon.rules.rules import CompiledRule, Match, Outside, counts_with
from ckptsurgeon.rules.templates import expand
from ckptsurgeon.tensors import Checkpoint

MOST = 100_000  # results of one `unstack` at most


@dataclass(frozen=True)
class Member:
    """An item of a group, and how it matched."""

    match: Match
    item: Item


@dataclass(frozen=True)
class Group:
    """The items that one application of a link joins; `index` is the rule's index within its stage."""

    key: object
    index: int
    compiled: CompiledRule
    names: tuple[str, ...]
    members: list[Member] = field(default_factory=list)


def group_of(index: int, compiled: CompiledRule, match: Match, item: Item) -> Group:
    """The group, still empty, that a matched item belongs to. Raises RuleError where a result can't be computed, or the key has no
    tensor."""
    if item.entry:
        raise RuleError("is for tensors, and this is none")
    parts = dict(match.parts) | ({compiled.counted: "0"} if compiled.counted else {})
    names = tuple(expand(result, parts) for result in compiled.results)
    across = any(number is not None for number, _ in compiled.patterns)  # only numbered patterns join keys of several sources
    return Group((index, names, None if across else item.source), index, compiled, names)


def join(group: Group, sources: Sequence[Checkpoint], outside: Outside) -> list[Item]:
    """The items that a group makes. Raises RuleError where a key that it needs is missing."""
    compiled = group.compiled
    members = sorted(group.members, key=lambda member: (_order(compiled, member), member.match.which))
    _check_whole(group, members)
    first = members[0].item
    if len(members) > 1 and not all(_same_ops(member.item, first) for member in members):
        raise RuleError(f"joins keys for {group.names[0]!r} that earlier stages adapted, each in its own way")
    source_keys = tuple(source_key for member in members for source_key in member.item.source_keys)
    before = tuple(dict.fromkeys(step for member in members for step in member.item.steps))
    results = []
    for number in _numbers(group, members, sources, outside):
        parts = dict(members[0].match.parts) | ({compiled.counted: str(number)} if compiled.counted else {})
        names = tuple(expand(result, parts) for result in compiled.results)
        for index, name in enumerate(names):
            ops = (*first.ops, *(RuleOp(op, index, names, number) for op in compiled.ops))
            steps = (*before, (compiled.rule, index))
            results.append(Item(name, name, source_keys, ops, steps, is_first_part=number == 0))
    return results


def _same_ops(item: Item, first: Item) -> bool:
    """Whether earlier stages apply the same chain of ops to both items, one that works tensor by tensor."""
    chains = [[(op.op, op.index, op.number) for op in member.ops] for member in (item, first)]
    joins = any(adapter_of(op.op).joins for op in item.ops)
    return chains[0] == chains[1] and len(item.source_keys) == 1 and not joins


def _order(compiled: CompiledRule, member: Member) -> tuple[tuple[int, str], ...]:
    """The sort key of a gathered key: numbers by their value, words after all numbers."""
    values = (member.match.parts[part] for part in compiled.gathered)
    return tuple((int(value), "") if value.isascii() and value.isdecimal() and len(value) < 19 else (1 << 62, value) for value in values)


def _check_whole(group: Group, members: Sequence[Member]) -> None:
    compiled = group.compiled
    rows = dict.fromkeys(_order(compiled, member) for member in members)
    have = {(_order(compiled, member), member.match.which) for member in members}
    if len(have) != len(members):
        raise RuleError(f"gives {group.names[0]!r} two keys by one pattern", hint="name the part in which they differ on both sides")
    for row in rows:
        for which, (_, pattern) in enumerate(compiled.patterns):
            if (row, which) not in have:
                words = ", ".join(f"{part}={value[1] or value[0]}" for part, value in zip(compiled.gathered, row, strict=True))
                raise RuleError(f"{group.names[0]!r} lacks what {pattern.text!r} names{f' for {words}' if words else ''}")
    if len(compiled.gathered) > 1:
        grid = prod(len({row[column] for row in rows}) for column in range(len(compiled.gathered)))
        if grid != len(rows):
            raise RuleError(f"{group.names[0]!r} gathers {len(rows)} keys by {' and '.join(compiled.gathered)}, and a full grid has {grid}")
    if len(compiled.gathered) == 1 and not counts_with(compiled.results[0], compiled.gathered[0]):
        numbers = [row[0][0] for row in rows if not row[0][1]]
        gap = next((expected for expected, number in enumerate(numbers, numbers[0]) if number != expected), None) if numbers else None
        if gap is not None:
            raise RuleError(f"{group.names[0]!r} lacks {compiled.gathered[0]}={gap}, between {numbers[0]} and {numbers[-1]}")


def check_even(groups: Sequence[Group]) -> None:
    """Raises RuleError where a rule averages different numbers of keys: some are missing, and no shape would show it."""
    sizes = {len(group.members): group for group in groups}
    adapters = [adapter_of(op) for op in groups[0].compiled.ops] if len(sizes) > 1 else []
    if any(adapter.joins and adapter.elementwise for adapter in adapters):
        least, most = sizes[min(sizes)], sizes[max(sizes)]
        raise RuleError(
            f"averages {len(least.members)} keys for {least.names[0]!r}, and {len(most.members)} for {most.names[0]!r}: some are not there"
        )


def _numbers(group: Group, members: Sequence[Member], sources: Sequence[Checkpoint], outside: Outside) -> Sequence[int | None]:
    """The values of the counted part, in order; `(None,)` where the rule has no counted part."""
    ops = group.compiled.ops
    index = counted_at(ops)
    if group.compiled.counted is None or index is None:
        return (None,)
    before = (*members[0].item.ops, *(RuleOp(op) for op in ops[:index]))
    shapes = [sources[number][key].shape for member in members for number, key in member.item.source_keys]
    _, (shape, *_) = fill_chain(before, shapes, None, {}, outside.shapes)
    dim = ops[index].get("dim", 0)
    if not shape or not -len(shape) <= dim < len(shape):
        raise RuleError(f"unstacks dim {dim} of shape {shape}")
    if shape[dim] > MOST:
        raise RuleError(f"unstacks {shape[dim]} tensors; at most {MOST} are")
    return range(shape[dim])
