"""What becomes of layouts in doubt: a person takes them as they stand, names the adapter, or is shown the choices as rules.

Rule: a doubt is settled by name alone. Accepting what is uncertain settles none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from ckptsurgeon.errors import RuleError
from ckptsurgeon.hints import close_words
from ckptsurgeon.matching.rules_from_links import to_toml
from ckptsurgeon.planning.links import Layout, Link
from ckptsurgeon.rules import variables
from ckptsurgeon.rules.drafting.cover import cover
from ckptsurgeon.rules.drafting.drafts import Known
from ckptsurgeon.rules.patterns import compile_pattern
from ckptsurgeon.rules.rules import Rule, compile_rule, quoted

ALL = "**"  # what `as-is` alone stands for


@dataclass(frozen=True)
class Way:
    """One way to settle a doubt: what lies how, in words, and the rules that carry it out for all keys of the doubt."""

    words: str
    rules: tuple[Rule, ...]


@dataclass(frozen=True)
class Open:
    """Links that are in doubt for one reason, and the ways to settle it, of which the first takes them as they stand."""

    kind: str
    links: tuple[Link, ...]
    ways: tuple[Way, ...]

    @property
    def targets(self) -> tuple[str, ...]:
        """The target's keys."""
        return tuple(key for link in self.links for key in link.targets)

    @property
    def untold(self) -> str:
        """What shapes can't tell, in words."""
        if any({*choice.sources} != {*link.sources} for link in self.links for choice in link.choices):
            return "which of the two is which can't be told by names and shapes"
        return "the keys are sure, the order of elements can't be told by shapes"

    @property
    def adapts(self) -> tuple[Rule, ...]:
        """The rules of its ways that have adapters."""
        return tuple(rule for way in self.ways for rule in way.rules if rule.kind == "adapt")

    @property
    def variables(self) -> tuple[str, ...]:
        """The numbers that its rules need, and that nothing told."""
        return tuple(dict.fromkeys(name for rule in self.adapts for name in variables.names_in(rule.result)))


def settled(link: Link, layout: Layout, words: str) -> Link:
    """A link with its layout chosen, and who says so."""
    evidence = (*link.evidence, f"{layout.words}, {words}")
    return replace(link, sources=layout.sources, targets=layout.targets, op=layout.op, doubt="", choices=(), evidence=evidence)


def with_numbers(
    links: Iterable[Link], numbers: Mapping[str, int], used: set[str], own_numbers: Callable[[], Mapping[str, int]] | None = None
) -> list[Link]:
    """The links, the variables of their layouts filled in as far as numbers are known; `used` gets the names of those that were given.

    `told` gives the target's own, and is asked where a number is still needed.
    """
    filled = _filled(links, numbers, used)
    needs = any(variables.names_in(layout.op) for link in filled for layout in link.choices)
    return _filled(filled, own_numbers(), set()) if needs and own_numbers is not None else filled


def _filled(links: Iterable[Link], numbers: Mapping[str, int], used: set[str]) -> list[Link]:
    def known(layout: Layout) -> Layout:
        return replace(layout, op=variables.filled(layout.op, numbers, used))

    return [replace(link, choices=tuple(map(known, link.choices))) if link.doubt else link for link in links]


def as_they_stand(links: Sequence[Link], patterns: Sequence[str]) -> list[Link]:
    """The links, those settled whose target key a pattern matches. RuleError for a pattern that matches none."""
    compiled = [(pattern, compile_pattern(pattern)) for pattern in patterns]
    open_keys = [key for link in links if link.doubt for key in link.targets]
    idle = [text for text, pattern in compiled if text != ALL and not any(pattern.match(key) is not None for key in open_keys)]
    if idle:
        words = close_words(idle[0], open_keys) if open_keys else ": no layout is in doubt"
        raise RuleError(f"the layout as-is of {idle[0]!r} matches no link whose layout is in doubt{words}")

    def meant(link: Link) -> bool:
        return bool(link.doubt) and any(pattern.match(key) is not None for _, pattern in compiled for key in link.targets)

    return [settled(link, link.choices[0], "as you say") if meant(link) else link for link in links]


def by_rules(links: Sequence[Link], rules: Sequence[Rule]) -> tuple[list[Link], tuple[Rule, ...]]:
    """The links, those with one target with the adapters of the rules over target keys that name it, and the rules that did so."""
    compiled = [(rule, compile_rule(rule)) for rule in rules]
    used: list[Rule] = []

    def adapted(link: Link) -> Link:
        rule = next((rule for rule, form in compiled if len(link.targets) == 1 and form.match(link.targets[0]) is not None), None)
        if rule is None:
            return link
        used.append(rule)
        return replace(link, op=rule.result, doubt="", choices=(), evidence=(*link.evidence, f"by your {rule}"))

    changed = [adapted(link) for link in links]
    return changed, tuple(rule for rule in rules if rule in used)


def open_layouts(links: Iterable[Link], name: Mapping[str, str], known: Known) -> tuple[Open, ...]:
    """The doubts that are left, one for each kind, with the rules of each way; `name` is what patterns see of a source's key."""
    kinds: dict[str, list[Link]] = {}
    for link in links:
        if link.doubt:
            kinds.setdefault(link.choices[0].kind, []).append(link)
    return tuple(Open(kind, tuple(doubted), tuple(_ways(doubted, name, known))) for kind, doubted in kinds.items())


def as_is_options(layout: Open, opened: Sequence[Open]) -> str:
    """What takes the links of one doubt as they stand, and those of no other, as words of a command line."""
    if len(opened) < 2:
        return "--layout as-is"
    patterns = cover(layout.targets, [key for rival in opened if rival is not layout for key in rival.targets])
    return " ".join(f"--layout as-is{' ' if '*' in pattern else '='}{quoted(pattern)}" for pattern in patterns)


def _ways(links: Sequence[Link], name: Mapping[str, str], known: Known) -> Iterable[Way]:
    for at in range(max(len(link.choices) for link in links)):
        by_op: dict[str, list[Link]] = {}
        all_words: dict[str, None] = {}
        for link in links:
            choice = link.choices[at if at < len(link.choices) else 0]
            form = replace(link, sources=choice.sources, targets=choice.targets, op=variables.blank(choice.op))
            by_op.setdefault(choice.op, []).append(form)
            all_words[choice.words] = None
        rules = (
            replace(ruled.rule, result=op) if ruled.rule.kind == "adapt" else ruled.rule
            for op, forms in by_op.items()
            for ruled in to_toml.doubts(forms, name, known)
        )
        yield Way(" or ".join(list(all_words)[:2]), tuple(rules))
