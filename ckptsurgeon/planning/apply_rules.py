"""Applies rules to the sources' keys: first the wrapper prefix is taken off, then, in each stage, the first rule that matches a key is
applied.

`diff` and `plan` both build on this module. All problems with rules are raised together, as one error.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from heapq import merge
from typing import TYPE_CHECKING

from ckptsurgeon.errors import RuleError
from ckptsurgeon.hints import shortened
from ckptsurgeon.planning import rule_problems
from ckptsurgeon.planning.keys import Claim, Item, SourceKey
from ckptsurgeon.planning.legacy_names import renamed_by_loading_code, repaired
from ckptsurgeon.planning.own_loading import conversions
from ckptsurgeon.planning.own_loading.conversions import Applied
from ckptsurgeon.planning.prefixes.find import Change, Choice, Prefix, find_change, rename_all
from ckptsurgeon.rules.loading_code import is_below
from ckptsurgeon.rules.patterns import Pattern
from ckptsurgeon.rules.rules import CompiledRule, Match, Outside, Rule, compile_rules
from ckptsurgeon.rules.templates import expand
from ckptsurgeon.tensors import Checkpoint, Refused, TensorMeta
from ckptsurgeon.wrappers import WRAPPERS, unwrap

if TYPE_CHECKING:
    from ckptsurgeon.planning import linking
    from ckptsurgeon.planning.averaging import Weights

__all__ = ["Claim", "Names", "SourceKey", "name_sources", "shortened"]
NO_OUTSIDE = Outside()
NO_CHANGE = Choice(Change(Prefix(), {}))
NO_KEYS: frozenset[str] = frozenset()
# The index of a rule, the index of one of its patterns, the only source that it is for, if any, its test, and the pattern.
_Entry = tuple[int, int, int | None, Callable[[str], object], Pattern]


@dataclass(frozen=True)
class Names:
    """What every key of every source becomes.

    Attributes:
        prefixes: for each source, the change between its names and the target's.
        claims: by name, the source tensors that it gets. Of several for a name that is not in the target, only the first.
        entries: by name, the source value that is not a tensor.
        names_of: for each source key, the names that it gets, including names that are not in the target.
        dropped: for each dropped source key, the rule that drops it.
        names_of_dropped: the names that dropped keys had when they were dropped.
        inits, keeps, adapts: the rules whose patterns are matched against the target's names.
        outside: token lists, own adapters and loading code, as the caller gave them.
        choices: for each source, the prefix that is applied and its rivals. Where there are rivals, no rival is applied.
        handed: by source and name, the items that torch's load gets unchanged, because the target's own loading code computes values from
            them.
        applied: what the conversions of the target's library did.
    """

    prefixes: tuple[Prefix, ...]
    claims: Mapping[str, Claim]
    entries: Mapping[str, SourceKey]
    names_of: Mapping[SourceKey, tuple[str, ...]]
    dropped: Mapping[SourceKey, Rule]
    names_of_dropped: frozenset[str]
    inits: tuple[CompiledRule, ...]
    keeps: tuple[CompiledRule, ...]
    adapts: tuple[CompiledRule, ...]
    outside: Outside = NO_OUTSIDE
    choices: tuple[Choice, ...] = ()
    handed: Mapping[tuple[int, str], Sequence[Item]] = field(default_factory=dict)
    applied: Applied = field(default_factory=Applied)


@dataclass
class _Stage:
    """One stage while it is applied. By a rule's index, `produced` has the names that the rule gave, `failed` its first problem."""

    rules: Sequence[CompiledRule]
    sources: Sequence[Checkpoint]
    outside: Outside
    produced: dict[int, list[str]] = field(default_factory=dict)
    failed: dict[int, str] = field(default_factory=dict)
    dropped: dict[SourceKey, Rule] = field(default_factory=dict)
    names_of_dropped: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._first = FirstMatch(self.rules)

    def run(self, items: Sequence[Item]) -> list[Item]:
        for rule in self.rules:
            rule.learn(name for item in items for name in item.readings)
        out: list[Item | linking.Group] = []
        groups: dict[object, linking.Group] = {}
        for item in items:
            first = next((hit for name in item.readings if (hit := self._first.find(name, item.source)) is not None), None)
            if first is None:
                out.append(item)
                continue
            index, match = first
            compiled = self.rules[index]
            produced = self.produced.setdefault(index, [])
            try:
                if compiled.rule.kind == "drop":
                    self.dropped.update(dict.fromkeys(item.source_keys, compiled.rule))
                    self.names_of_dropped.add(item.name)
                elif compiled.rule.kind == "rename":
                    names = [expand(result, dict(match.parts)) for result in compiled.results]
                    out += [item.moved(name, compiled.rule, which) for which, name in enumerate(names)]
                    produced += names
                else:
                    from ckptsurgeon.planning import linking

                    group = linking.group_of(index, compiled, match, item)
                    if group.key not in groups:
                        groups[group.key] = group
                        out.append(group)
                    groups[group.key].members.append(linking.Member(match, item))
            except RuleError as error:
                self.failed.setdefault(index, f"{compiled.rule}: {error.reason}, in {item.seen!r}")
        by_rule: dict[int, list[linking.Group]] = {}
        for group in groups.values():
            by_rule.setdefault(group.index, []).append(group)
        for index, groups_of_rule in by_rule.items():
            from ckptsurgeon.planning import linking

            try:
                linking.check_even(groups_of_rule)
            except RuleError as error:
                self.failed.setdefault(index, f"{self.rules[index].rule}: {error.reason}")
        return [item for entry in out for item in ([entry] if isinstance(entry, Item) else self._linked(entry))]

    def _linked(self, group: linking.Group) -> list[Item]:
        from ckptsurgeon.planning import linking

        try:
            joined = linking.join(group, self.sources, self.outside)
        except RuleError as error:
            self.failed.setdefault(group.index, f"{group.compiled.rule}: {error.reason}")
            return []
        self.produced[group.index] += [item.name for item in joined]
        return joined


def name_sources(
    sources: Sequence[Checkpoint],
    target: Checkpoint | None,
    rules: Iterable[Rule],
    outside: Outside = NO_OUTSIDE,
    *,
    average: Weights | None = None,
    auto: str | None = None,
) -> Names:
    """Give every source key its name in the target.

    Without a target no prefix is stripped, except in an average, where the other sources are compared with the first one.

    Raises:
        RuleError: all problems together: a rule that matches nothing, a rename without a result in the target, two source keys that get
            the same target name, or a link whose keys are missing.
    """
    compiled = compile_rules(rules, outside)
    mean = None
    if average not in (None, False):
        from ckptsurgeon.planning.averaging import weights_of

        mean = weights_of(average, sources)
    reference = sources[0] if mean is not None and target is None else target
    active = [rule for rule in compiled if not rule.of_target]
    choices = [_choice(source, number, reference, active) if reference is not None else NO_CHANGE for number, source in enumerate(sources)]
    prefixes = tuple(choice.applied.prefix for choice in choices)
    known: Collection[str] | None = None if target is None else {*target, *target.entries}
    for rule in compiled:
        if rule.of_target:
            rule.learn(known or ())
    items = [
        Item(bare, name, ((number, key),), entry=key not in source, other_keys=_other_keys(source, key, bare) if active else NO_KEYS)
        for number, source in enumerate(sources)
        for key, name in rename_all((*source, *source.entries), known or reference or (), prefixes[number]).items()
        for bare in (prefixes[number].bare(key),)
    ]
    problems: list[str] = []
    dropped: dict[SourceKey, Rule] = {}
    names_of_dropped: set[str] = set()
    tried: list[tuple[_Stage, list[Item]]] = []
    for number in range(max((rule.stage for rule in active), default=-1) + 1):
        stage = _Stage([rule for rule in active if rule.stage == number], sources, outside)
        tried.append((stage, items))
        items = stage.run(items)
        dropped.update(stage.dropped)
        names_of_dropped |= stage.names_of_dropped
        problems += stage.failed.values()
    for stage, before in tried:
        problems += rule_problems.rules_without_a_turn(stage.rules, stage.produced, before, sources, prefixes)
    if auto == "safe" and known is not None:
        items = repaired(items, known, mean is not None)
    items, applied = conversions.converted(items, sources, target, dropped)
    handed: dict[tuple[int, str], list[Item]] = {}
    items = renamed_by_loading_code(items, outside.taken, dropped, handed)
    landed = [(source_key, item.name) for item in items for source_key in item.source_keys]
    if mean is not None:
        from ckptsurgeon.planning.averaging import average_items

        items = average_items(items, sources, mean, problems)
    if known is not None and target is not None:
        read = {name for taken in outside.taken.values() for name in taken.read}
        if not outside.taken:  # the loading code was not tried yet
            read = {item.name for item in items if any(is_below(item.name, path) for path in target.loaders)}
        problems += rule_problems.rules_without_effect(active, items, {*known, *read})
    kept = [rule for rule in compiled if rule.rule.kind == "keep"]
    collisions = rule_problems.two_sources_on_one_name(items, known, kept, sources, prefixes, target is None or target.kind == "file")
    problems += collisions
    if problems:
        from ckptsurgeon.planning.plan_types import viewing_command

        first = sources[0]
        look = viewing_command(first.path, first.root, first.kind == "model", None if target is None else target.path)
        hint = next(iter(collisions.values()), f"see the names: {look}")
        raise RuleError("rules that can't be followed", problems=shortened(problems), hint=hint)
    names = _names(items, landed, prefixes, dropped, names_of_dropped, compiled, sources, outside)
    return replace(names, choices=tuple(choices), handed=handed, applied=applied)


def _other_keys(source: Checkpoint, key: str, bare: str) -> frozenset[str]:
    """Those names under which a pattern could match a key that are themselves other keys of the source."""
    names = {bare, unwrap(key, WRAPPERS)} - {key}
    return frozenset(name for name in names if name in source or name in source.entries)


def _choice(source: Checkpoint, number: int, reference: Checkpoint, rules: Sequence[CompiledRule]) -> Choice:
    """The prefix between a source and the target (or the first source), and its rivals.

    A wrapper's prefix is always stripped. Any other prefix is looked for only among the keys that no rule names: where rules name most
    keys as they are in the file, the few others may be equal by chance.
    """
    choice = find_change(source, reference)
    by_library = conversions.choose(source, reference, choice)
    if by_library is not choice:
        return replace(by_library, among=source)
    choice = replace(choice, among=source)
    applied = choice.applied.prefix
    if not rules or (applied and applied.of_wrappers and not choice.rivals):
        return choice
    bare = {key: key if (name := unwrap(key, WRAPPERS)) in source else name for key in source}
    seen = {*bare, *bare.values()}
    for rule in rules:
        rule.learn(seen)
    unnamed: dict[str, TensorMeta] = {}
    first = FirstMatch(rules)
    explained: set[str] = set()  # target names that rules give, which no prefix has to explain
    for key, name in bare.items():
        hits = [hit for hit in (first.find(name, number), None if key == name else first.find(key, number)) if hit is not None]
        if not hits:
            unnamed[key] = source[key]
            continue
        index, match = min(hits, key=lambda hit: hit[0])
        if rules[index].counted is None:
            with suppress(RuleError):  # reported where the rule is applied
                explained.update(expand(result, dict(match.parts)) for result in rules[index].results)
    if len(unnamed) == len(source):
        return choice
    return replace(find_change(unnamed, {key: tensor for key, tensor in reference.items() if key not in explained}), among=unnamed)


def _names(
    items: Sequence[Item],
    landed: Iterable[tuple[SourceKey, str]],
    prefixes: tuple[Prefix, ...],
    dropped: Mapping[SourceKey, Rule],
    names_of_dropped: Iterable[str],
    compiled: Sequence[CompiledRule],
    sources: Sequence[Checkpoint],
    outside: Outside,
) -> Names:
    claims: dict[str, Claim] = {}
    entries: dict[str, SourceKey] = {}
    names_of: dict[SourceKey, list[str]] = {}
    for item in items:
        if item.entry:
            number, key = item.source_keys[0]
            if isinstance(sources[number].entries[key], Refused) and item.name in entries:
                continue
            entries.setdefault(item.name, item.source_keys[0])
        else:
            claims.setdefault(item.name, item.claim)
    for source_key, name in landed:
        names_of.setdefault(source_key, []).append(name)
    by_kind = {kind: tuple(rule for rule in compiled if rule.rule.kind == kind and rule.of_target) for kind in ("init", "keep", "adapt")}
    return Names(
        prefixes,
        claims,
        entries,
        {source_key: tuple(names) for source_key, names in names_of.items()},
        {source_key: rule for source_key, rule in dropped.items() if source_key not in names_of},
        frozenset(names_of_dropped),
        by_kind["init"],
        by_kind["keep"],
        by_kind["adapt"],
        outside,
    )


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
