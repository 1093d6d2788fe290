"""Where each source key wants to go: first the wrapper prefix, then the first rule that matches.

The one place where rules meet keys; `compare` and `plan` both build on it. All problems with rules are raised together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field

from ckptsurgeon.errors import RuleError
from ckptsurgeon.surgery.patterns import expand
from ckptsurgeon.surgery.prefixes import Prefix, find_prefix, rename_all
from ckptsurgeon.surgery.rules import CompiledRule, Rule, close_names, compile_rules
from ckptsurgeon.tensors import Checkpoint, Refused

SourceKey = tuple[int, str]  # which source, and its key as it stands under the root


@dataclass(frozen=True)
class Names:
    """For every key of every source, exactly one of: the name it lands on (`landed` for tensors, `entries` for other values), or the
    rule that drops it. `spared` are the names that dropped keys would have landed on."""

    prefixes: tuple[Prefix, ...]
    inits: tuple[CompiledRule, ...]
    landed: dict[SourceKey, str] = field(default_factory=dict)
    entries: dict[SourceKey, str] = field(default_factory=dict)
    dropped: dict[SourceKey, Rule] = field(default_factory=dict)
    spared: set[str] = field(default_factory=set)
    by_rule: dict[SourceKey, Rule] = field(default_factory=dict)


def name_sources(sources: Sequence[Checkpoint], target: Checkpoint | None, rules: Iterable[Rule]) -> Names:
    """Name every source key. Without a target no prefix is stripped.

    Raises RuleError, once for all problems: a rename or drop that matches nothing, a rename none of whose results is in the target, two
    sources that land on one of the target's names.
    """
    compiled = compile_rules(rules)
    active = [rule for rule in compiled if rule.rule.kind != "init"]
    prefixes = tuple(find_prefix(source, target) if target is not None else Prefix() for source in sources)
    names = Names(prefixes, tuple(rule for rule in compiled if rule.rule.kind == "init"))
    known: Collection[str] | None = None if target is None else {*target, *target.entries}
    results: dict[int, list[str]] = {}  # by a rule's place among `active`, what it gave
    failed: dict[int, str] = {}  # by a rule's place, the first of its results that can't be told
    for number, (source, prefix) in enumerate(zip(sources, prefixes, strict=True)):
        for key, name in rename_all((*source, *source.entries), known or (), prefix).items():
            place, bare = (number, key), prefix.bare(key)
            index, parts = _first(active, bare, number)
            if parts is not None:
                rule = active[index].rule
                given = results.setdefault(index, [])
                if rule.kind == "drop":
                    names.dropped[place] = rule
                    names.spared.add(name)
                    continue
                try:
                    name = expand(rule.result, parts)
                except RuleError as error:
                    failed.setdefault(index, f"{rule}: {error.reason}, in {bare!r}")
                    continue
                names.by_rule[place] = rule
                given.append(name)
            (names.landed if key in source else names.entries)[place] = name
    lost = () if known is None else _lost(active, results, known)
    crossed = _crossed(names, known, sources)
    problems = [*failed.values(), *_idle(active, results, sources, prefixes), *lost, *crossed]
    if problems:
        hint = (
            f"drop one of the two: --drop {next(iter(crossed.values()))!r}" if crossed else "see the names with: ckptsurgeon inspect CKPT"
        )
        raise RuleError("rules that can't be followed", problems=shortened(problems), hint=hint)
    return names


def shortened(problems: Iterable[str], most: int = 20) -> tuple[str, ...]:
    """Problems as an error lists them: the first `most`, and how many more there are."""
    rows = tuple(problems)
    return rows[:most] + ((f"and {len(rows) - most} more",) if len(rows) > most else ())


def _first(rules: Sequence[CompiledRule], name: str, source: int) -> tuple[int, dict[str, str] | None]:
    for index, rule in enumerate(rules):
        parts = rule.match(name, source)
        if parts is not None:
            return index, parts
    return -1, None


def _idle(
    rules: Sequence[CompiledRule], results: dict[int, list[str]], sources: Sequence[Checkpoint], prefixes: Sequence[Prefix]
) -> Iterable[str]:
    idle = [rule for index, rule in enumerate(rules) if index not in results]
    if not idle:
        return
    keys = [(number, key) for number, source in enumerate(sources) for key in (*source, *source.entries)]
    bare = [(number, prefixes[number].bare(key)) for number, key in keys]
    for rule in idle:
        if any(rule.match(name, number) is not None for number, name in bare):
            yield f"{rule.rule} never gets a turn: earlier rules match all of its keys"
        elif any(rule.match(key, number) is not None for number, key in keys):
            prefix = next(prefixes[number] for number, key in keys if rule.match(key, number) is not None)
            yield f"{rule.rule} matches nothing: patterns see the names after the change ({prefix}), such as {bare[0][1]!r}"
        else:
            where = "" if rule.source is None or rule.source < len(sources) else f": there is no source {rule.source}, the first is 0"
            yield f"{rule.rule} matches nothing{where or close_names(rule.pattern.text, (name for _, name in bare))}"


def _lost(rules: Sequence[CompiledRule], results: dict[int, list[str]], known: Collection[str]) -> Iterable[str]:
    for index, given in results.items():
        if given and not any(name in known for name in given):
            yield (
                f"{rules[index].rule} gives {given[0]!r}, and none of its results is in the target{close_names(given[0], sorted(known))}"
            )


def _crossed(names: Names, known: Collection[str] | None, sources: Sequence[Checkpoint]) -> dict[str, str]:
    """Two sources on one name of the target (without a target: on any), and a pattern that drops the second."""
    first: dict[str, SourceKey] = {}
    problems = {}

    def words(place: SourceKey) -> str:
        where = f" of {sources[place[0]].path}" if len(sources) > 1 else ""
        return f"{place[1]!r}{where}" + (f" (by {names.by_rule[place]})" if place in names.by_rule else "")

    for place, name in (*names.landed.items(), *names.entries.items()):
        if (known is not None and name not in known) or isinstance(sources[place[0]].entries.get(place[1]), Refused):
            continue
        other = first.setdefault(name, place)
        if other != place:
            bare = names.prefixes[place[0]].bare(place[1])
            problems[f"two sources land on {name!r}: {words(other)} and {words(place)}"] = (
                f"{place[0]}:{bare}" if len(sources) > 1 else bare
            )
    return problems
