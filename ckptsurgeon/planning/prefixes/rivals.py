"""Prefixes between which the names can't decide, each with the rules that choose it; and the renames that exchange one prefix for another.

Rule: what is offered works as it stands: it leaves the one change that it is for, and no rival of it.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ckptsurgeon.planning.prefixes.find import Change, Choice, find_exchange
from ckptsurgeon.planning.prefixes.heads import Tensors
from ckptsurgeon.rules.drafting.cover import dropping
from ckptsurgeon.rules.rules import Rule
from ckptsurgeon.wrappers import WRAPPERS, unwrap

FEW = 4  # that are offered


@dataclass(frozen=True)
class Way:
    """A change of names: in words, which source keys it makes equal to which target keys, and the rules that ask for it."""

    words: str
    mapping: Mapping[str, str] = field(repr=False)
    rules: tuple[Rule, ...]

    @property
    def options(self) -> tuple[str, ...]:
        """The rules as the words of a command line."""
        return tuple(word for rule in self.rules for word in rule.options)

    def __str__(self) -> str:
        count = len(self.mapping)
        return f"{self.words}: {count} tensor{'s' if count != 1 else ''} equal, with {shlex.join(self.options)}"


def ways_to_choose(choice: Choice, source: Tensors, number: int | None = None) -> tuple[Way, ...]:
    """The rivals, each with the rules that choose it; `number` is the source's, where it is one of several."""
    head = "" if number is None else f"{number}:"
    found = []
    for rival in choice.rivals[:FEW]:
        words = str(rival.prefix) or "names as they are"
        found.append(Way(words, rival.mapping, _rules(rival, choice.rivals, source, head)))
    return tuple(found)


def _rules(chosen: Change, rivals: Sequence[Change], source: Tensors, head: str) -> tuple[Rule, ...]:
    """Drops of the keys that only the others take; where these have the names that the chosen ones get, or are the same, a rename too."""
    prefix, taken = chosen.prefix, chosen.mapping.values()
    rename = Rule("rename", f"{head}{prefix.stripped}{{**rest}}", f"{prefix.added}{{**rest}}")
    others = {key for rival in rivals for key in rival.mapping} - chosen.mapping.keys()
    if chosen.collides:
        others |= {key for key in source if key in taken and key not in chosen.mapping}
    if not others:
        return (rename,)
    left_out = {unwrap(key, WRAPPERS) for key in others}
    seen = {prefix.bare(key) for key in chosen.mapping}
    rest = {name for key in source if key not in others for name in (key, unwrap(key, WRAPPERS))}
    if left_out & seen:  # without its prefix one can't be told from the other
        return (rename, *dropping(left_out, rest, head))
    return dropping(left_out, rest | seen, head)


def ways_to_exchange(source: Tensors, target: Tensors) -> tuple[Way, ...]:
    """The renames that exchange one prefix for another, the best first."""
    found = []
    for change in find_exchange(source, target)[:FEW]:
        strip, add = change.prefix.stripped, change.prefix.added
        rule = Rule("rename", f"{strip}{{**rest}}", f"{add}{{**rest}}")
        found.append(Way(f"prefix {strip} exchanged for {add}", change.mapping, (rule,)))
    return tuple(found)
