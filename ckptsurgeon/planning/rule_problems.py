"""Rules that can't be followed, in words: rules that match nothing, rules without effect, and two sources that land on one name."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence

from ckptsurgeon.command import as_words
from ckptsurgeon.hints import SHOWN, close_words
from ckptsurgeon.planning.keys import Item
from ckptsurgeon.planning.prefixes.find import Prefix
from ckptsurgeon.rules.rules import CompiledRule, Rule, rule_options
from ckptsurgeon.tensors import Checkpoint, Refused

FEW = 3  # how many collisions of one kind are listed one by one


def rules_without_a_turn(
    rules: Sequence[CompiledRule],
    turns: Mapping[int, Sequence[str]],
    items: Sequence[Item],
    sources: Sequence[Checkpoint],
    prefixes: Sequence[Prefix],
) -> Iterable[str]:
    """A problem for each rule of a stage that was applied to no key. `turns` has, by rule index, what the rule produced; `items` are the
    names at the start of the stage."""
    unmatched = 0
    for index, rule in enumerate(rules):
        if index in turns:
            continue
        numbers = [number for number, _ in rule.patterns if number is not None and number >= len(sources)]
        raw = [source_key for item in items for source_key in item.source_keys if rule.match(source_key[1], source_key[0]) is not None]
        if any(rule.match(name, item.source) is not None for item in items for name in item.readings):
            if not (rule.rule.file and any(not earlier.rule.file for earlier in rules[:index])):  # a command line overrides files
                yield f"{rule.rule} never gets a turn: earlier rules match all of its keys"
        elif raw and prefixes[raw[0][0]]:
            seen = next((item.seen for item in items), "")
            yield f"{rule.rule} matches nothing: patterns see the names after the change ({prefixes[raw[0][0]]}), such as {seen!r}"
        elif raw:
            yield f"{rule.rule} matches nothing: an earlier stage gives other names"
        elif numbers:
            yield f"{rule.rule} matches nothing: there is no source {numbers[0]}, the first is 0"
        else:
            unmatched += 1  # close names are only looked for where they are shown
            from ckptsurgeon.rules.meant import meant_words

            close = meant_words(rule.patterns[0][1].text, (item.seen for item in items)) if unmatched <= SHOWN else ""
            yield f"{rule.rule} matches nothing{close}"


def rules_without_effect(rules: Sequence[CompiledRule], items: Sequence[Item], known: Collection[str]) -> Iterable[str]:
    """A problem for each rename or link of which all results, or some of several, are not in the target. Results that a later stage drops
    are no problem."""
    first_name: dict[tuple[Rule, int], str] = {}
    arrived: set[tuple[Rule, int]] = set()
    lost: dict[Rule, str] = {}
    for item in items:
        for step in item.steps:
            first_name.setdefault(step, item.name)
            if item.name in known:
                arrived.add(step)
            elif item.is_first_part:  # the target begins with another number, and each part would get the wrong one
                lost.setdefault(step[0], item.name)
    names_of_rule: dict[Rule, list[tuple[int, str]]] = {}
    for (rule, which), name in first_name.items():
        names_of_rule.setdefault(rule, []).append((which, name))
    for compiled in rules:
        named = names_of_rule.get(compiled.rule, [])
        missing = [name for which, name in named if (compiled.rule, which) not in arrived]
        if missing and len(missing) == len(named):
            yield f"{compiled.rule} gives {missing[0]!r}, and none of its results is in the target{close_words(missing[0], sorted(known))}"
        elif missing or compiled.rule in lost:
            name = missing[0] if missing else lost[compiled.rule]
            close = close_words(name, sorted(known))
            yield f"{compiled.rule} gives {name!r}, which is not in the target, and a part of the source would be lost{close}"


def two_sources_on_one_name(
    items: Sequence[Item],
    known: Collection[str] | None,
    kept: Sequence[CompiledRule],
    sources: Sequence[Checkpoint],
    prefixes: Sequence[Prefix],
    files: bool = False,
) -> dict[str, str]:
    """Each pair of source keys that get one name of the target (without a target: any name) that no rule keeps, with a hint: rules that
    drop the second.

    `files`: whether the target is a file too, so that an average may have been meant.
    """
    first: dict[str, Item] = {}
    problems = {}

    def words(item: Item) -> str:
        number, key = item.source_keys[0]
        where = f" of {sources[number].path}" if len(sources) > 1 else ""
        by = f" (by {', '.join(map(str, item.rules))})" if item.rules else ""
        return f"{key!r}{where}{by}"

    # Many collisions by the same rules become one problem: two whole files would give a line for every key.
    by_rules: dict[Hashable, list[tuple[Item, Item]]] = {}
    for item in items:
        number, key = item.source_keys[0]
        if (known is not None and item.name not in known) or isinstance(sources[number].entries.get(key), Refused):
            continue
        earlier = first.setdefault(item.name, item)
        if earlier is not item and not any(rule.match(item.name) is not None for rule in kept):
            by_rules.setdefault((earlier.source, earlier.rules, item.source, item.rules), []).append((earlier, item))

    def bare(number: int, rows: Iterable[Item]) -> set[str]:
        return {prefixes[number].bare(key) for item in rows for source, key in item.source_keys if source == number}

    for pairs in by_rules.values():
        many = len(pairs) > FEW
        number = pairs[0][1].source_keys[0][0]
        colliding = bare(number, [item for _, item in pairs])
        prefix, path = (f"{number}:", sources[number].path) if len(sources) > 1 else ("", None)
        hint = _collision_hint(colliding, bare(number, items) - colliding, prefix, path, files)
        for earlier, item in pairs[:1] if many else pairs:
            more = f", and on {len(pairs) - 1} more names" if many else ""
            problems[f"two sources land on {item.name!r}: {words(earlier)} and {words(item)}{more}"] = hint
    return problems


def _collision_hint(names: set[str], remaining: set[str], number: str, path: str | None, files: bool) -> str:
    """A hint how to leave these names of a source out: by drop rules, or without the file where it has no other names."""
    if not remaining and path is not None:
        mean = "for the mean of all of them: average=True; or " if files else ""
        return f"{mean}give one of the two files only: {path} has nothing else"
    from ckptsurgeon.rules.drafting.cover import dropping

    return f"drop one of the two: {shlex.join(as_words(rule_options(dropping(names, remaining, number)[:SHOWN])))}"
