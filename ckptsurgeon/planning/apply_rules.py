"""Where each source key wants to go: first the wrapper prefix, then, stage by stage, the first rule that matches.

The one place where rules meet the sources' keys; `diff` and `plan` both build on it. All problems with rules are raised together.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from ckptsurgeon.errors import RuleError
from ckptsurgeon.hints import shortened
from ckptsurgeon.planning import rule_problems
from ckptsurgeon.planning.keys import Claim, Item, SourceKey
from ckptsurgeon.planning.legacy_names import renamed_by_loading_code, repaired
from ckptsurgeon.planning.own_loading import conversions
from ckptsurgeon.planning.own_loading.conversions import Applied
from ckptsurgeon.planning.prefixes.find import Change, Choice, Prefix, find_change, rename_all
from ckptsurgeon.rules.first_match import FirstMatch
from ckptsurgeon.rules.rules import CompiledRule, Outside, Rule, compile_rules
from ckptsurgeon.rules.templates import expand
from ckptsurgeon.tensors import Checkpoint, Refused, TensorMeta
from ckptsurgeon.wrappers import WRAPPERS, unwrap

if TYPE_CHECKING:
    from ckptsurgeon.planning import linking
    from ckptsurgeon.planning.averaging import Weights

__all__ = ["Claim", "Names", "SourceKey", "name_sources", "shortened"]
NO_OUTSIDE = Outside()
NO_CHANGE = Choice(Change(Prefix(), {}))


@dataclass(frozen=True)
class Names:
    """What every key of every source becomes.

    Attributes:
        prefixes: by source.
        claims: by name, which tensors of the sources want to be there. With a target, the first of several for a name that it has not.
        entries: by name, the source's value that is no tensor.
        names_of: the names that a source key went to, also those that the target has not.
        dropped: the rule that drops a key; `names_of_dropped` are the names that dropped keys would have landed on.
        inits, keeps, adapts: the rules that are held against the target's names.
        choices: by source, the prefix that is applied, and the rivals between which nothing decides; none of these is applied.
        handed: by source and name, what torch's load needs as it is, since the target's own loading code computes with it.
        applied: what the conversions of the target's library have come to.
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
    """One stage as it runs. `given` has, by a rule's place, the names it gave; `failed` the first result that couldn't be told."""

    rules: Sequence[CompiledRule]
    sources: Sequence[Checkpoint]
    outside: Outside
    given: dict[int, list[str]] = field(default_factory=dict)
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
            taken = next((one for name in item.readings if (one := self._first.find(name, item.source)) is not None), None)
            if taken is None:
                out.append(item)
                continue
            index, match = taken
            compiled = self.rules[index]
            given = self.given.setdefault(index, [])
            try:
                if compiled.rule.kind == "drop":
                    self.dropped.update(dict.fromkeys(item.places, compiled.rule))
                    self.names_of_dropped.add(item.name)
                elif compiled.rule.kind == "rename":
                    names = [expand(result, dict(match.parts)) for result in compiled.results]
                    out += [item.moved(name, compiled.rule, which) for which, name in enumerate(names)]
                    given += names
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
        for index, found in by_rule.items():
            from ckptsurgeon.planning import linking

            try:
                linking.check_even(found)
            except RuleError as error:
                self.failed.setdefault(index, f"{self.rules[index].rule}: {error.reason}")
        return [one for row in out for one in ([row] if isinstance(row, Item) else self._linked(row))]

    def _linked(self, group: linking.Group) -> list[Item]:
        from ckptsurgeon.planning import linking

        try:
            found = linking.join(group, self.sources, self.outside)
        except RuleError as error:
            self.failed.setdefault(group.index, f"{group.compiled.rule}: {error.reason}")
            return []
        self.given[group.index] += [item.name for item in found]
        return found


def name_sources(
    sources: Sequence[Checkpoint],
    target: Checkpoint | None,
    rules: Iterable[Rule],
    outside: Outside = NO_OUTSIDE,
    *,
    average: Weights | None = None,
    auto: str | None = None,
) -> Names:
    """Name every source key. Without a target no prefix is stripped, save for an average, whose first source is the measure of the others.

    Raises RuleError, once for all problems: a rule that matches nothing, a rename none of whose results is in the target, two sources
    that land on one of the target's names, keys that a link needs and that are not there.
    """
    compiled = compile_rules(rules, outside)
    mean = None
    if average not in (None, False):
        from ckptsurgeon.planning.averaging import weights_of

        mean = weights_of(average, sources)
    measure = sources[0] if mean is not None and target is None else target
    active = [rule for rule in compiled if not rule.of_target]
    choices = [_choice(source, number, measure, active) if measure is not None else NO_CHANGE for number, source in enumerate(sources)]
    prefixes = tuple(choice.applied.prefix for choice in choices)
    known: Collection[str] | None = None if target is None else {*target, *target.entries}
    for rule in compiled:
        if rule.of_target:
            rule.learn(known or ())
    items = [
        Item(bare, name, ((number, key),), entry=key not in source, others=_others(source, key, bare))
        for number, source in enumerate(sources)
        for key, name in rename_all((*source, *source.entries), known or measure or (), prefixes[number]).items()
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
        problems += rule_problems.rules_without_a_turn(stage.rules, stage.given, before, sources, prefixes)
    if auto == "safe" and known is not None:
        items = repaired(items, known, mean is not None)
    items, applied = conversions.converted(items, sources, target, dropped)
    handed: dict[tuple[int, str], list[Item]] = {}
    items = renamed_by_loading_code(items, outside.taken, dropped, handed)
    landed = [(place, item.name) for item in items for place in item.places]
    if mean is not None:
        from ckptsurgeon.planning.averaging import average_items

        items = average_items(items, sources, mean, problems)
    lost = () if known is None else rule_problems.rules_without_effect(active, items, known)
    kept = [rule for rule in compiled if rule.rule.kind == "keep"]
    problems += lost
    crossed = rule_problems.two_sources_on_one_name(items, known, kept, sources, prefixes, target is None or target.kind == "file")
    problems += crossed
    if problems:
        first = sources[0]
        look = f"ckptsurgeon inspect -v {shlex.quote(first.path)}"
        if target is not None or first.kind == "model":
            from ckptsurgeon.planning.plan_types import way_to_look

            look = way_to_look(first.path, first.root, first.kind == "model", None if target is None else target.path)
        hint = f"see the names: {look}"
        if crossed:
            hint = next(iter(crossed.values()))
        raise RuleError("rules that can't be followed", problems=shortened(problems), hint=hint)
    found = _names(items, landed, prefixes, dropped, names_of_dropped, compiled, sources, outside)
    return replace(found, choices=tuple(choices), handed=handed, applied=applied)


def _others(source: Checkpoint, key: str, bare: str) -> frozenset[str]:
    """Of the names by which patterns read a key, those that are other keys of the source."""
    names = {bare, unwrap(key, WRAPPERS)} - {key}
    return frozenset(name for name in names if name in source or name in source.entries)


def _choice(source: Checkpoint, number: int, measure: Checkpoint, rules: Sequence[CompiledRule]) -> Choice:
    """The prefix between a source and the target (or the first source), and its rivals.

    A wrapper's prefix is stripped whatever the rules say. Any other must not come from the few keys that chance makes equal while
    rules name the rest as they stand in the file.
    """
    found = find_change(source, measure)
    by_library = conversions.choose(source, measure, found)
    if by_library is not found:
        return replace(by_library, among=source)
    found = replace(found, among=source)
    applied = found.applied.prefix
    if not rules or (applied and applied.of_wrappers and not found.rivals):
        return found
    bare = {key: key if (name := unwrap(key, WRAPPERS)) in source else name for key in source}
    seen = {*bare, *bare.values()}
    for rule in rules:
        rule.learn(seen)
    unnamed: dict[str, TensorMeta] = {}
    first = FirstMatch(rules)
    given: set[str] = set()  # what rules give, no prefix need explain
    for key, name in bare.items():
        both = [found for found in (first.find(name, number), None if key == name else first.find(key, number)) if found is not None]
        if not both:
            unnamed[key] = source[key]
            continue
        place, match = min(both, key=lambda found: found[0])
        if rules[place].counted is None:
            with suppress(RuleError):  # told where the rule is followed
                given.update(expand(result, dict(match.parts)) for result in rules[place].results)
    if len(unnamed) == len(source):
        return found
    return replace(find_change(unnamed, {key: tensor for key, tensor in measure.items() if key not in given}), among=unnamed)


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
            number, key = item.places[0]
            if isinstance(sources[number].entries[key], Refused) and item.name in entries:
                continue
            entries.setdefault(item.name, item.places[0])
        else:
            claims.setdefault(item.name, item.claim)
    for place, name in landed:
        names_of.setdefault(place, []).append(name)
    by_kind = {kind: tuple(rule for rule in compiled if rule.rule.kind == kind and rule.of_target) for kind in ("init", "keep", "adapt")}
    return Names(
        prefixes,
        claims,
        entries,
        {place: tuple(names) for place, names in names_of.items()},
        {place: rule for place, rule in dropped.items() if place not in names_of},
        frozenset(names_of_dropped),
        by_kind["init"],
        by_kind["keep"],
        by_kind["adapt"],
        outside,
    )
