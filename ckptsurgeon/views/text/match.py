"""The text of `match`: the rules with their evidence, uncertain links, keys without a link, and the command to run next."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ckptsurgeon.command import Command, at_root
from ckptsurgeon.matching.layouts.choices import as_is_options
from ckptsurgeon.matching.proposals.propose import Proposal
from ckptsurgeon.matching.rules_from_links import to_toml
from ckptsurgeon.planning.links import Link
from ckptsurgeon.rules.rules import option_text, rule_options
from ckptsurgeon.views.text.diff import choices, no_merge, resized
from ckptsurgeon.views.text.words import answer, count, fitted, heading, keys, level_line, most_rows, name, next_step, table
from ckptsurgeon.views.text.words import coverage as coverage_words

ROWS = 20  # rules that are shown
_ALONE = ("min-coverage", "source-model", "forward", "tolerance")  # options that a merge lacks, or means otherwise


def matching(proposal: Proposal, verbose: bool = False, width: int | None = None) -> str:
    """The applied links with their evidence, the uncertain ones with their runners-up, keys without a link, and the command to run next."""
    most = most_rows(verbose)
    root = f" (root {name(proposal.root)})" if proposal.root else ""
    lines = [f"{name(proposal.source)}{root} → {name(proposal.target)}"]
    applied = {id(link) for link in proposal.applied}
    certain = [link for link in proposal.links if id(link) in applied]
    left = [link for link in proposal.links if id(link) not in applied]
    if proposal.before:
        lines.append(f"  by {count(len(proposal.before), 'rule')} of yours, which come first")
    if proposal.conversions:
        lines.append(f"  {proposal.conversions}")
    accepted = ", uncertain ones among them, as you accept them" if any(not link.certain for link in certain) else ""
    lines.append(
        heading("matched", _tensors(certain), f"by {count(len(proposal.ruled), 'rule')}{accepted}" if proposal.ruled else "same names")
    )
    if verbose:
        lines += table([_row(link) for link in certain], width, None)
    else:
        rows = [(to_toml.arrow(one.rule), to_toml.comment(one)) for one in proposal.ruled if one.rule.kind != "stage"]
        stays = sum(link.sources == link.targets and not link.op for link in certain)
        lines += _pairs([*rows, *([(f"{stays} keep their names", "")] if stays and rows else [])], width, ROWS)
    lines += _open(proposal, width)
    opened = {id(link) for one in proposal.open for link in one.links}
    left = [link for link in left if id(link) not in opened]
    lines.append(heading("uncertain", _tensors(left), "not applied, unless you accept it"))
    if verbose:
        lines += table([_row(link) for link in left], width, None)
    else:
        lines += _pairs([(to_toml.arrow(one.rule), to_toml.comment(one)) for one in to_toml.sketched(left)], width, ROWS)
    lines.append(heading("unmatched", len(proposal.unmatched), "only in the target"))
    lines += keys(proposal.unmatched, width, most, "unmatched")
    lines.append(heading("unused", len(proposal.unused), "only in the source"))
    lines += keys(proposal.unused, width, most, "unused")
    lines += resized(proposal.sizes, width)
    lines += [level_line("warning", name(words)) for words in proposal.warnings]
    lines += _twins(proposal)
    done, total = proposal.coverage.counts
    lines.append(f"Matched {coverage_words(proposal.coverage)} of the target ({done} of {count(total, 'tensor')}).")
    if proposal.rivals:
        lines += choices(
            proposal.rivals,
            Command("match", proposal.source, proposal.target, options=(*at_root(proposal.root), *proposal.asked)),
            proposal.in_memory,
            width,
        )
        return fitted(lines, width)
    return fitted([*lines, *_next(proposal, bool(left or proposal.open), width)], width)


def _open(proposal: Proposal, width: int | None) -> list[str]:
    """The layouts in doubt, each with its choices as options to add."""
    lines = []
    for layout in proposal.open:
        lines.append(heading("layout open", len(layout.targets), f"{layout.kind}: {layout.untold}"))
        for way in layout.ways:
            as_is = way is layout.ways[0]
            lines.append(f"    {name(way.words)}:")
            rules = [as_is_options(layout, proposal.open)] if as_is else [option_text(rule) for rule in way.rules]
            lines += [f"      {name(rule)}" for rule in rules[:ROWS]]
            lines += [f"      … and {len(rules) - ROWS} more rules (-o writes all)"] if len(rules) > ROWS else []
        needs = " ".join(f"--set {number}=N" for number in layout.variables)
        lines += [f"    with the number that it needs: {needs}"] if needs else []
    if lines and proposal.forward is None:
        lines.append("    or let your models decide: --source-model module:Net --forward module:make_inputs tries each on one input")
    return lines


def _tensors(links: Iterable[Link]) -> int:
    return sum(len(link.targets) for link in links)


def _pairs(rows: Sequence[tuple[str, str]], width: int | None, most: int) -> list[str]:
    """Each rule with its evidence: on the same line if there is room, else below it, indented."""
    lines = []
    for rule, words in rows[:most]:
        whole = f"    {name(rule)}" + (f"   ({name(words)})" if words else "")
        lines += [whole] if width is None or len(whole) <= width else [f"    {name(rule)}", f"        {name(words)}"]
    return lines + ([f"    … and {len(rows) - most} more (-v shows all keys)"] if len(rows) > most else [])


def _row(link: Link) -> tuple[str, ...]:
    return " + ".join(link.targets), "←", " + ".join(link.sources), link.op or "-", to_toml.evidence([link])


def _twins(proposal: Proposal) -> list[str]:
    """How both models' outputs compare."""
    if proposal.forward is None:
        return []
    same = "the same from both models" if proposal.forward.same else "NOT the same from both models"
    lines = [heading("outputs", len(proposal.forward.outputs), answer(same, proposal.forward.same) + ", run on one input")]
    rows = [
        (output, "no counterpart" if difference is None else f"differs by at most {difference:.3g}, of {scale:.3g}")
        for output, difference, scale in proposal.forward.outputs
    ]
    return lines + table(rows, None)


def _next(proposal: Proposal, doubtful: bool, width: int | None) -> list[str]:
    if not proposal.links and not proposal.before:
        command = Command("inspect", proposal.source, options=at_root(proposal.root))
        look = next_step("Nothing is matched. See what is there:", command, (proposal.in_memory[0], ""), width)
        return look or ["Nothing is matched."]
    root, asked = at_root(proposal.root), proposal.asked
    names = tuple(option for option in asked if option[0] == "no-conversions")
    if proposal.unkept:
        return [no_merge(proposal.target, proposal.unkept)]
    if proposal.refused is not None:  # the error says what to do
        return []
    if proposal.forward is not None and not proposal.forward.same:
        return ["A link is wrong, or the models compute otherwise: merge nothing before you know (-v shows all links)."]
    merge = Command("merge", proposal.source, proposal.target, proposal.output, (*root, *proposal.options, *rule_options(proposal.beside)))
    if proposal.written is not None:
        first = "Next: choose a layout in it, then" if proposal.open else "Next: read it, then"
        return next_step(first, merge.having(*names, ("rules", proposal.written)), proposal.in_memory, width)
    if doubtful or proposal.refusal() is not None or (proposal.spelled and not proposal.beside):
        closer = Command("match", proposal.source, proposal.target, "rules.toml", (*root, *asked))
        label = "Next: look closer," if any(proposal.in_memory) else "Next: look closer, in a file,"
        return next_step(label, closer, proposal.in_memory, width)
    again = (*(option for option in asked if option[0] not in _ALONE), ("match",))
    spelled = (*names, *rule_options((*proposal.before, *(ruled.rule for ruled in proposal.ruled))))
    return next_step("Next:", merge.having(*(spelled if proposal.spelled else again)), proposal.in_memory, width)
