"""The verb that matches two implementations. It reads headers; torch is loaded only for a model as target, or to look at values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ckptsurgeon.api import opening
from ckptsurgeon.api.opening import Given, Note, Renames, silent
from ckptsurgeon.api.ruling import Rules, Ruling, gather
from ckptsurgeon.errors import PlanError
from ckptsurgeon.surgery.matching.propose import LEAST, Proposal, propose
from ckptsurgeon.surgery.rules import from_arguments
from ckptsurgeon.tensors import Checkpoint
from ckptsurgeon.views import text


def match(
    source: Given,
    target: Given,
    *,
    root: str | None = None,
    rename: Renames = (),
    drop: Iterable[str] = (),
    keep: Iterable[str] = (),
    adapt: Renames = (),
    rules: Rules = (),
    reverse: bool = False,
    accept_uncertain: bool = False,
    note: Note = silent,
) -> Proposal:
    """Find the mapping between two implementations of one architecture from what their headers say: names, shapes, numbers and order.

    Args:
        source: a path or a `Checkpoint`.
        target: a spec, model, skeleton or file.
        rename, drop, keep, adapt, rules: what is known already; the keys that these name are not looked for.
        accept_uncertain: let the rules give the uncertain links too.

    Returns:
        A `Matching`: links with their evidence and margin, `rules` to hand to `plan`, `merge` or `transfer`, in `toml` the same as the text
        of a rules file, and `refusal()`, None where the links are worth following. Printed, it is the command line's table.

    Raises:
        CheckpointError: one of them can't be read or built.
        RuleError: rules that can't be followed.

    >>> found = match("fixtures/net_params.pkl", "fixtures/variants.py:NetRenamed")
    >>> [(rule.pattern, rule.result) for rule in found.rules]
    [('fc2.{p}', 'dense2.{p}')]
    """
    seen = opening.look(source)
    ruling = gather(from_arguments(rename, drop, (), adapt, keep), rules, reverse=reverse, schemes=False, note=note)
    goal = opening.open_target(target, note=note).checkpoint
    given = opening.open_source(seen, root=root, target=goal)
    found = propose(given, goal, ruling.rules, ruling.outside, accept=accept_uncertain)
    return replace(found, text=text.matching(found))


def matched(found: list[Checkpoint], target: Checkpoint | None, ruling: Ruling, accept: bool) -> Ruling:
    """A call's rules, and after them those that matching adds. Raises CoverageError where it finds too little."""
    if target is None or len(found) != 1:
        raise PlanError(
            "matching is between one source and a target", hint="match one at a time: ckptsurgeon match CKPT TARGET -o rules.toml"
        )
    proposed = propose(found[0], target, ruling.rules, ruling.outside, accept=accept)
    refusal = proposed.refusal(LEAST)
    if refusal is not None:
        raise refusal
    return replace(ruling, rules=proposed.rules)
