"""Where each source key wants to go: first the wrapper prefix, then the first rule that matches.

The one place where rules meet keys; `compare` and `plan` both build on it. All problems with rules are raised together.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from ckptsurgeon.errors import RuleError
from ckptsurgeon.surgery.patterns import expand
from ckptsurgeon.surgery.prefixes import Prefix, find_prefix, rename_all
from ckptsurgeon.surgery.rules import CompiledRule, Rule, close_names, compile_rules
from ckptsurgeon.tensors import Checkpoint

SourceKey = tuple[int, str]  # which source, and its key as it stands under the root


@dataclass(frozen=True)
class Names:
    """For every key (tensor or other entry) of every source, exactly one of: the name it lands on, or the rule that drops it."""

    landed: dict[SourceKey, str]
    dropped: dict[SourceKey, Rule]
    by_rule: dict[SourceKey, Rule]
    prefixes: tuple[Prefix, ...]
    inits: tuple[CompiledRule, ...]
    entries: dict[SourceKey, str]


def name_sources(sources: Sequence[Checkpoint], target: Checkpoint | None, rules: Iterable[Rule]) -> Names:
    """Name every source key. Without a target no prefix is stripped.

    Raises RuleError, once for all problems: a rename or drop that matches nothing, a rename none of whose results is in the target, two
    sources that land on one name.
    """
    compiled = compile_rules(rules)
    active = [rule for rule in compiled if rule.rule.kind in ("rename", "drop")]
    prefixes = tuple(find_prefix(source, target) if target is not None else Prefix() for source in sources)
    landed: dict[SourceKey, str] = {}
    entries: dict[SourceKey, str] = {}
    dropped: dict[SourceKey, Rule] = {}
    by_rule: dict[SourceKey, Rule] = {}
    seen: list[str] = []
    for number, (source, prefix) in enumerate(zip(sources, prefixes, strict=True)):
        names = rename_all(source, target, prefix) if target is not None else {key: key for key in source}
        for key in (*source, *source.entries):
            bare = prefix.bare(key)
            seen.append(bare)
            rule, name = _first(active, bare)
            place = (number, key)
            if rule is None:
                name = names.get(key, prefix.added + bare)
            elif rule.kind == "drop":
                dropped[place] = rule
                continue
            else:
                by_rule[place] = rule
            (landed if key in source else entries)[place] = name
    problems = [*_idle(active, by_rule, dropped, seen), *_lost(active, by_rule, landed, target), *_crossed(landed, by_rule, sources)]
    if problems:
        raise RuleError("rules that can't be followed", problems=tuple(problems), hint=_advice(problems))
    inits = tuple(rule for rule in compiled if rule.rule.kind == "init")
    return Names(landed, dropped, by_rule, prefixes, inits, entries)


def _first(rules: Sequence[CompiledRule], name: str) -> tuple[Rule | None, str]:
    for compiled in rules:
        parts = compiled.pattern.match(name)
        if parts is not None:
            rule = compiled.rule
            return rule, expand(rule.result, parts) if rule.kind == "rename" else name
    return None, name


def _idle(rules: Sequence[CompiledRule], by_rule: dict[SourceKey, Rule], dropped: dict[SourceKey, Rule], seen: list[str]) -> list[str]:
    used = {id(rule) for rule in (*by_rule.values(), *dropped.values())}
    problems = []
    for compiled in rules:
        if id(compiled.rule) in used:
            continue
        if any(compiled.pattern.match(name) is not None for name in seen):
            problems.append(f"{compiled.rule} never gets a turn: earlier rules match all of its keys")
        else:
            problems.append(f"{compiled.rule} matches nothing{close_names(compiled.rule.pattern, seen)}")
    return problems


def _lost(
    rules: Sequence[CompiledRule], by_rule: dict[SourceKey, Rule], landed: dict[SourceKey, str], target: Checkpoint | None
) -> list[str]:
    if target is None:
        return []
    problems = []
    for compiled in rules:
        results = [landed[place] for place, rule in by_rule.items() if rule is compiled.rule and place in landed]
        if results and not any(name in target for name in results):
            problems.append(
                f"{compiled.rule} gives {results[0]!r}, and none of its results is in the target{close_names(results[0], target)}"
            )
    return problems


def _crossed(landed: dict[SourceKey, str], by_rule: dict[SourceKey, Rule], sources: Sequence[Checkpoint]) -> list[str]:
    first: dict[str, SourceKey] = {}
    problems = []

    def words(place: SourceKey) -> str:
        where = f" of {sources[place[0]].path}" if len(sources) > 1 else ""
        return f"{place[1]!r}{where}" + (f" (by {by_rule[place]})" if place in by_rule else "")

    for place, name in landed.items():
        other = first.setdefault(name, place)
        if other != place:
            problems.append(f"two sources land on {name!r}: {words(other)} and {words(place)}")
    return problems


def _advice(problems: list[str]) -> str:
    if any("two sources" in problem for problem in problems):
        return "drop one of the two: --drop PATTERN"
    return "see the names with: ckptsurgeon inspect CKPT"
