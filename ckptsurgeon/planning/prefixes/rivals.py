"""Prefixes between which the names can't decide, each with the rules that choose it; and the renames that exchange one prefix for another.

Rule: what is offered was tried: the sources were named again with these rules, and they leave no rival, give exactly the change that they
are for, and change nothing else. Of what was tried the first is offered, from the shortest on.
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

FEW = 4  # that are offered
MANY = 24  # rules, more of which nobody would paste: a change that needs them is told without


@dataclass(frozen=True)
class Way:
    """A change of names: in words, which source keys it makes equal to which target keys, and the rules that ask for it, if few do."""

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


def ways_to_choose(
    sources: Sequence[Checkpoint], target: Checkpoint | None, names: Names, rules: Sequence[Rule] = (), *, average: Weights | None = None
) -> tuple[tuple[Way, ...], ...]:
    """By source, the rivals that `names` has, each with the rules that choose it when they are added to those that were given."""
    found = []
    for number, choice in enumerate(names.choices):
        tried = _Tried(sources, target, names, tuple(rules), average, number)
        found.append(tuple(tried.way(rival) for rival in choice.rivals[:FEW]))
    return tuple(found)


@dataclass(frozen=True)
class _Tried:
    """What rules are tried on, to choose between the rivals of the source with this number."""

    sources: Sequence[Checkpoint]
    target: Checkpoint | None
    names: Names
    rules: tuple[Rule, ...]
    average: Weights | None
    number: int

    def way(self, chosen: Change) -> Way:
        """A rival with the first rules that choose it."""
        head = f"{self.number}:" if len(self.sources) > 1 else ""
        tried = _rules(chosen, self.names.choices[self.number].rivals, self.sources[self.number], head)
        rules = next((rules for rules in tried if len(rules) <= MANY and self._choose(rules, chosen.mapping)), ())
        return Way(str(chosen.prefix) or "names as they are", chosen.mapping, rules)

    def _choose(self, offered: tuple[Rule, ...], mapping: Mapping[str, str]) -> bool:
        """Whether rules lead to this mapping and to nothing else of the names in question, and leave all others as they are."""
        before, after = self._before, self._named(offered)
        if before is None or after is None or after.choices[self.number].rivals:
            return False
        among = self.names.choices[self.number].among
        source, measure = self.sources[self.number], self.sources[0] if self.target is None else self.target
        ours = {(self.number, key) for key in among}
        landed = [(key, name) for (number, key), given in after.names_of.items() if (number, key) in ours for name in given]
        landed = [(key, name) for key, name in landed if name in measure]
        fitting = {key: name for key, name in landed if source[key].shape == measure[name].shape}
        return (
            fitting == mapping
            and len({name for _, name in landed}) == len(landed)
            and {place: given for place, given in before.names_of.items() if place not in ours}
            == {place: given for place, given in after.names_of.items() if place not in ours}
        )

    @cached_property
    def _before(self) -> Names | None:
        return self._named(())

    def _named(self, offered: tuple[Rule, ...]) -> Names | None:
        """The names under the rules, those that are offered before what rules files say; None where they can't be followed.

        Of several sources, what another one gives as well is a question of its own.
        """
        at = next((place for place, rule in enumerate(self.rules) if rule.file), len(self.rules))
        apart = (Rule("keep", "**"),) if len(self.sources) > 1 else ()
        outside = replace(self.names.outside, taken={})
        try:
            return name_sources(
                self.sources, self.target, (*self.rules[:at], *offered, *self.rules[at:], *apart), outside, average=self.average
            )
        except CheckpointError:
            return None


def _rules(chosen: Change, rivals: Sequence[Change], source: Checkpoint, head: str) -> Iterator[tuple[Rule, ...]]:
    """Rules that may choose a change, the shortest first: by its prefix, by what each of its keys gets for its head, and key by key."""
    from ckptsurgeon.rules.drafting.cover import dropping

    others = {key for rival in rivals for key in rival.mapping} - chosen.mapping.keys()
    if chosen.collides:
        taken = chosen.mapping.values()
        others |= {key for key in source if key in taken and key not in chosen.mapping}
    yield _by_prefix(chosen, others, source, head)
    moved = tuple(_by_heads(chosen.mapping, head))
    yield (*dropping(others, source.keys() - others, head), *moved)
    rest = (Rule("drop", f"{head}**"),) if len(source) + len(source.entries) > len(chosen.mapping) else ()
    yield (*moved, *rest)
    if len(chosen.mapping) <= MANY:
        yield (*(Rule("rename", head + literal(key), literal(name)) for key, name in chosen.mapping.items()), *rest)


def _by_prefix(chosen: Change, others: set[str], source: Tensors, head: str) -> tuple[Rule, ...]:
    """Drops of the keys that only the others take; where these have the names that the chosen ones get, or are the same, a rename too."""
    prefix = chosen.prefix
    rename = Rule("rename", f"{head}{literal(prefix.stripped)}{{**rest}}", f"{literal(prefix.added)}{{**rest}}")
    if not others:
        return (rename,)
    from ckptsurgeon.rules.drafting.cover import dropping

    left_out = {unwrap(key, WRAPPERS) for key in others}
    seen = {prefix.bare(key) for key in chosen.mapping}
    rest = {name for key in source if key not in others for name in (key, unwrap(key, WRAPPERS))}
    if left_out & seen:  # without its prefix one can't be told from the other
        return (rename, *dropping(left_out, rest, head))
    return dropping(left_out, rest | seen, head)


def _by_heads(mapping: Mapping[str, str], head: str) -> Iterator[Rule]:
    """A rename for each head that keys lose and what they get for it, the longest first."""
    heads: dict[tuple[str, str], None] = {}
    for key, name in mapping.items():
        one, other = literal(key).split("."), literal(name).split(".")
        same = 0
        while same < min(len(one), len(other)) and one[-1 - same] == other[-1 - same]:
            same += 1
        rest = "{**rest}" if same else ""
        heads[".".join([*one[: len(one) - same], rest]).rstrip("."), ".".join([*other[: len(other) - same], rest]).rstrip(".")] = None
    for pattern, result in sorted(heads, key=lambda row: -len(row[0])):
        yield Rule("rename", head + pattern, result)


def ways_to_exchange(source: Tensors, target: Tensors) -> tuple[Way, ...]:
    """The renames that exchange one prefix for another, the best first."""
    found = []
    for change in find_exchange(source, target)[:FEW]:
        strip, add = change.prefix.stripped, change.prefix.added
        rule = Rule("rename", f"{literal(strip)}{{**rest}}", f"{literal(add)}{{**rest}}")
        found.append(Way(f"prefix {strip} exchanged for {add}", change.mapping, (rule,)))
    return tuple(found)
