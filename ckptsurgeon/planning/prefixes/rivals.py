"""Rival prefixes, each with the rules that choose it; and the renames that exchange one prefix for another.

Rules are tried before they are offered: applied to the sources, they must leave no rival, make exactly the change that they are for, and
change nothing else. The shortest rules that do so are offered.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING

from ckptsurgeon.command import Option, as_words
from ckptsurgeon.errors import CheckpointError
from ckptsurgeon.planning.apply_rules import Names, name_sources
from ckptsurgeon.planning.prefixes.find import Change, find_exchange
from ckptsurgeon.planning.prefixes.heads import Tensors
from ckptsurgeon.rules.patterns import literal
from ckptsurgeon.rules.rules import Rule, rule_options
from ckptsurgeon.tensors import Checkpoint
from ckptsurgeon.wrappers import WRAPPERS, unwrap

if TYPE_CHECKING:
    from ckptsurgeon.planning.averaging import Weights

FEW = 4  # how many changes are offered
MANY = 24  # how many rules are offered for a change at most; one that needs more is listed without rules


@dataclass(frozen=True)
class NameChange:
    """A change of names: in words, as a mapping from source keys to target keys, and as rules (none where too many are needed)."""

    words: str
    mapping: Mapping[str, str] = field(repr=False)
    rules: tuple[Rule, ...]

    @property
    def options(self) -> tuple[Option, ...]:
        """The rules as the options of a command."""
        return rule_options(self.rules)

    def __str__(self) -> str:
        count = len(self.mapping)
        how = f"with {shlex.join(as_words(self.options))}" if self.rules else "which takes a rule for each key"
        return f"{self.words}: {count} tensor{'s' if count != 1 else ''} equal, {how}"


def rivals_with_rules(
    sources: Sequence[Checkpoint], target: Checkpoint | None, names: Names, rules: Sequence[Rule] = (), *, average: Weights | None = None
) -> tuple[tuple[NameChange, ...], ...]:
    """For each source, its rivals, each with the rules that choose it when they are added to `rules`."""
    trials = [_Trial(sources, target, names, tuple(rules), average, number) for number in range(len(names.choices))]
    return tuple(
        tuple(trial.with_rules(rival) for rival in choice.rivals[:FEW]) for trial, choice in zip(trials, names.choices, strict=True)
    )


@dataclass(frozen=True)
class _Trial:
    """The inputs with which rules are tried that choose between the rivals of source `number`."""

    sources: Sequence[Checkpoint]
    target: Checkpoint | None
    names: Names
    rules: tuple[Rule, ...]
    average: Weights | None
    number: int

    def with_rules(self, chosen: Change) -> NameChange:
        """A rival with the first rules that choose it."""
        head = f"{self.number}:" if len(self.sources) > 1 else ""
        candidates = _rules(chosen, self.names.choices[self.number].rivals, self.sources[self.number], head)
        rules = next((rules for rules in candidates if len(rules) <= MANY and self._choose(rules, chosen.mapping)), ())
        return NameChange(str(chosen.prefix) or "names as they are", chosen.mapping, rules)

    def _choose(self, offered: tuple[Rule, ...], mapping: Mapping[str, str]) -> bool:
        """Whether the offered rules give the compared keys exactly this mapping, and change no other key."""
        before, after = self._before, self._named(offered)
        if before is None or after is None or after.choices[self.number].rivals:
            return False
        among = self.names.choices[self.number].among
        source, reference = self.sources[self.number], self.sources[0] if self.target is None else self.target
        compared = {(self.number, key) for key in among}
        landed = [(key, name) for (number, key), names in after.names_of.items() if (number, key) in compared for name in names]
        landed = [(key, name) for key, name in landed if name in reference]
        fitting = {key: name for key, name in landed if source[key].shape == reference[name].shape}
        return (
            fitting == mapping
            and len({name for _, name in landed}) == len(landed)
            and {source_key: names for source_key, names in before.names_of.items() if source_key not in compared}
            == {source_key: names for source_key, names in after.names_of.items() if source_key not in compared}
        )

    @cached_property
    def _before(self) -> Names | None:
        return self._named(())

    def _named(self, offered: tuple[Rule, ...]) -> Names | None:
        """The names with the offered rules, which come before the rules of files; None where they can't be followed.

        With several sources, `keep **` is added, so that two sources on one name are no problem here.
        """
        first_of_file = next((index for index, rule in enumerate(self.rules) if rule.file), len(self.rules))
        keep = (Rule("keep", "**"),) if len(self.sources) > 1 else ()
        outside = replace(self.names.outside, taken={})
        try:
            return name_sources(
                self.sources,
                self.target,
                (*self.rules[:first_of_file], *offered, *self.rules[first_of_file:], *keep),
                outside,
                average=self.average,
            )
        except CheckpointError:
            return None


def _rules(chosen: Change, rivals: Sequence[Change], source: Checkpoint, head: str) -> Iterator[tuple[Rule, ...]]:
    """Rules that may choose a change, the shortest first: by the rivals' prefixes, by its own, by the heads of its keys, and key by key."""
    from ckptsurgeon.rules.drafting.cover import dropping

    left_out = {key for rival in rivals for key in rival.mapping} - chosen.mapping.keys()
    if chosen.collides:
        taken = chosen.mapping.values()
        left_out |= {key for key in source if key in taken and key not in chosen.mapping}
    yield tuple(Rule("drop", f"{head}{literal(unwrap(rival.prefix.stripped, WRAPPERS))}**") for rival in rivals if rival is not chosen)
    yield _by_prefix(chosen, left_out, source, head)
    moved = tuple(_by_heads(chosen.mapping, head))
    yield (*dropping(left_out, source.keys() - left_out, head), *moved)
    rest = (Rule("drop", f"{head}**"),) if len(source) + len(source.entries) > len(chosen.mapping) else ()
    yield (*moved, *rest)
    if len(chosen.mapping) <= MANY:
        yield (*(Rule("rename", head + literal(key), literal(name)) for key, name in chosen.mapping.items()), *rest)


def _by_prefix(chosen: Change, rival_keys: set[str], source: Tensors, head: str) -> tuple[Rule, ...]:
    """Drops of the keys that only the rivals use; a rename too, where these can't be told from the chosen keys by name."""
    prefix = chosen.prefix
    rename = Rule("rename", f"{head}{literal(prefix.stripped)}{{**rest}}", f"{literal(prefix.added)}{{**rest}}")
    if not rival_keys:
        return (rename,)
    from ckptsurgeon.rules.drafting.cover import dropping

    left_out = {unwrap(key, WRAPPERS) for key in rival_keys}
    seen = {prefix.bare(key) for key in chosen.mapping}
    rest = {name for key in source if key not in rival_keys for name in (key, unwrap(key, WRAPPERS))}
    if left_out & seen:  # without the prefix they have the same names
        return (rename, *dropping(left_out, rest, head))
    return dropping(left_out, rest | seen, head)


def _by_heads(mapping: Mapping[str, str], head: str) -> Iterator[Rule]:
    """A rename for each head that is replaced by another, the longest first."""
    heads: dict[tuple[str, str], None] = {}
    for key, name in mapping.items():
        old, new = literal(key).split("."), literal(name).split(".")
        same = 0
        while same < min(len(old), len(new)) and old[-1 - same] == new[-1 - same]:
            same += 1
        rest = "{**rest}" if same else ""
        heads[".".join([*old[: len(old) - same], rest]).rstrip("."), ".".join([*new[: len(new) - same], rest]).rstrip(".")] = None
    for pattern, result in sorted(heads, key=lambda row: -len(row[0])):
        yield Rule("rename", head + pattern, result)


def exchanges_with_rules(source: Tensors, target: Tensors) -> tuple[NameChange, ...]:
    """The renames that exchange one prefix for another, the best first."""
    exchanges = []
    for change in find_exchange(source, target)[:FEW]:
        strip, add = change.prefix.stripped, change.prefix.added
        rule = Rule("rename", f"{literal(strip)}{{**rest}}", f"{literal(add)}{{**rest}}")
        exchanges.append(NameChange(f"prefix {strip} exchanged for {add}", change.mapping, (rule,)))
    return tuple(exchanges)
