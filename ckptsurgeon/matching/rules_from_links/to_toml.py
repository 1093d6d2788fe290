"""Proposed rules as a commented rules file: what each is for, how sure, and what was left out. The same links give the same text.

Rule: links that are uncertain stand in comments at the top, as rules that a person can take the mark from; no rule below hides them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import inf
from typing import TYPE_CHECKING

from ckptsurgeon.errors import RuleError, printable
from ckptsurgeon.matching.rules_from_links.generalise import Ruled
from ckptsurgeon.matching.rules_from_links.modules import line_of, renamings
from ckptsurgeon.planning.links import Link
from ckptsurgeon.rules.drafting.drafts import Draft, Known
from ckptsurgeon.rules.drafting.rows import literal, rows
from ckptsurgeon.rules.patterns import literal as one_key
from ckptsurgeon.rules.rulefile import OPEN, SET, to_toml
from ckptsurgeon.rules.rules import Rule, linked

if TYPE_CHECKING:
    from ckptsurgeon.matching.layouts.choices import Open

NOWHERE = "\0"  # what no name begins with: each rename is written, also of what keeps its name
_MOST = 3  # kinds of evidence that are told of one rule


def evidence(links: Iterable[Link]) -> str:
    """What speaks for links, the most frequent first, and the smallest margin.

    >>> evidence([Link(("a",), ("b",), "", 2.5, ("same place",), "c -> b")])
    'same place; margin 2.5 over c -> b'
    """
    all_links = list(links)
    counts = Counter(words for link in all_links for words in link.evidence)
    kinds = [words for words, _ in counts.most_common(_MOST)]
    return "; ".join([", ".join(kinds), margin(all_links)]) if kinds else margin(all_links)


def margin(links: Iterable[Link]) -> str:
    """The smallest margin of links, and what it is over."""
    least = min(links, key=lambda link: link.margin)
    if least.margin == inf:
        return "nothing else is possible"
    return f"margin {least.margin:.1f}" + (f" over {least.runner_up}" if least.runner_up else "")


def comment(ruled: Ruled) -> str:
    """What a rule is for, in a line."""
    if ruled.rule.kind == "stage":
        return "From here on rules see the names that those above gave."
    if ruled.links:
        count = sum(len(link.targets) for link in ruled.links)
        return f"{count} {'tensor' if count == 1 else 'tensors'}: {evidence(ruled.links)}"
    count = len(ruled.without)
    return f"{count} {'key' if count == 1 else 'keys'} of the source that no certain link has, and that would go by name"


def sketched(links: Sequence[Link]) -> list[Ruled]:
    """Links as rules for a person to look at, that match no other key of these links."""
    names = {key: key for link in links for key in link.sources}
    return doubts(links, names, Known(names))


def arrow(rule: Rule) -> str:
    """A rule on one line, as a text shows it.

    >>> arrow(Rule("adapt", "qkv.{p} -> q.{p} + k.{p} + v.{p}", "chunk"))
    'qkv.{p}  →  q.{p} + k.{p} + v.{p}  by chunk'
    """
    sources, results = linked(rule)
    if rule.kind == "drop":
        return f"{rule.pattern}  left out"
    if not results:
        return f"{rule.pattern}  by {rule.result}"
    return f"{' + '.join(sources)}  →  {' + '.join(results)}" + (f"  by {rule.result}" if rule.kind == "adapt" else "")


def doubts(links: Sequence[Link], name: Mapping[str, str], known: Known) -> list[Ruled]:
    """Uncertain links as rules, as few as match nothing but their keys. None is applied, and several may want one key."""
    name = {key: one_key(source_name) for key, source_name in name.items()}
    rules: list[Ruled] = []
    for op in dict.fromkeys(link.op for link in links):
        by_line = {line_of(link, name): link for link in links if link.op == op}
        alone = not op or all(len(line.sources) == len(line.targets) == 1 for line in by_line)
        plain = alone and len({line.sources for line in by_line}) == len(by_line)
        for draft in renamings(rows(by_line), NOWHERE) if plain else map(Draft.of, rows(by_line)):
            own = {name[key] for line in draft.lines for key in by_line[line].sources}
            for part in [draft] if _whole(draft, own, known) else [Draft.of(literal(line)) for line in draft.lines]:
                rules += _rules(part, op, tuple(by_line[line] for line in part.lines))
    return rules


def _whole(draft: Draft, own: set[str], known: Known) -> bool:
    """Whether a draft is well formed, and matches its own names alone."""
    try:
        return set(known.matched(draft.compiled)) <= own
    except RuleError:
        return False


def _rules(draft: Draft, op: str, links: tuple[Link, ...]) -> Iterator[Ruled]:
    """A draft as rules: a link of single tensors is a rename, if the name changes, and an op of the target's key."""
    if op and len(draft.patterns) == len(draft.results) == 1:
        keys = dict.fromkeys(link.targets[0] for link in links)
        if any(link.sources != link.targets for link in links):
            yield Ruled(Rule("adapt", f"{draft.patterns[0]} -> {draft.results[0]}", op), links)
        else:
            yield from (Ruled(Rule("adapt", one_key(key), op), links) for key in keys)
    else:
        yield Ruled(draft.rule, links)


def toml(
    head: Sequence[str], before: Sequence[Rule], doubtful: Sequence[Ruled], ruled: Sequence[Ruled], opened: Sequence[Open] = ()
) -> str:
    """The text of a rules file: a heading, the person's own rules, the uncertain ones and open layouts in comments, and the rules."""
    parts = ["".join(f"# {printable(line)}\n" for line in head)]
    if before:
        parts.append("# Given, and not looked for:\n" + to_toml(before))
    if doubtful:
        parts.append(
            "# Uncertain, so not applied. Take the mark from the lines of a rule to apply it;\n"
            "# a [[drop]] below that is for its keys alone must go then.\n"
        )
        parts += [_doubt(item) for item in doubtful]
    parts += [_open(item) for item in opened]
    if ruled:
        parts.append(to_toml([item.rule for item in ruled], [comment(item) for item in ruled]))
    return "\n".join(parts)


def _open(layout: Open) -> str:
    """The ways to settle an open layout, each as rules in comments."""
    lines = [
        f"{OPEN}{layout.kind}), {len(layout.targets)} tensors: {layout.untold}.",
        "# Take the mark from the rules of one way; a [[drop]] below that is for their keys alone must go then.",
    ]
    if layout.variables:
        lines += ["#", f"# [{SET}]", *(f"# {name} = 0  # say how many" for name in layout.variables)]
    for way in layout.ways:
        lines += ["#", f"# {printable(way.words)}:", *(f"# {line}" for line in to_toml(way.rules).splitlines() if line)]
    return "".join(f"{line}\n" for line in lines)


def _doubt(ruled: Ruled) -> str:
    count = sum(len(link.targets) for link in ruled.links)
    heading = f"# {count} {'tensor' if count == 1 else 'tensors'}: {printable(evidence(ruled.links))}\n"
    return heading + "".join(f"# {line}\n" for line in to_toml([ruled.rule]).splitlines())
