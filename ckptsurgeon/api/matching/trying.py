"""Runs both models on a person's inputs with the source's weights, and settles layouts in doubt by which of them gives the same outputs.

Rule: the layouts of one kind are tried for all layers at once, and each kind's with each other's. One is chosen only where its outputs are
the same within the tolerance, and no other's come near; what outputs can't tell apart stays in doubt.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from ckptsurgeon.api import _live
from ckptsurgeon.api._opening import Target
from ckptsurgeon.api._options import RuleOptions
from ckptsurgeon.api._rules import Ruling, bring
from ckptsurgeon.errors import CheckpointError, PlanError
from ckptsurgeon.matching.layouts.choices import settled
from ckptsurgeon.matching.proposals.propose import Proposal, again
from ckptsurgeon.models.target.heads import numbers_of
from ckptsurgeon.models.verify import output_comparison
from ckptsurgeon.parameter_types import Note
from ckptsurgeon.planning.links import Link
from ckptsurgeon.report import Twins
from ckptsurgeon.rules import variables
from ckptsurgeon.tensors import Checkpoint

if TYPE_CHECKING:
    from torch import nn

MOST = 64  # runs
APART = 10.0  # how many times as far off the next best must be

Choice = tuple[int, ...]  # for each kind of layout that is open, the number of its way


@dataclass(frozen=True)
class _Trial:
    """One choice of layouts, what it leads to, and how far the outputs differ, of their greatest value."""

    choice: Choice
    proposal: Proposal
    twins: Twins

    @property
    def off(self) -> float:
        """How far the outputs differ at most."""
        rows = [difference / scale if scale else difference for _, difference, scale in self.twins.outputs if difference is not None]
        missing = any(difference is None for _, difference, _ in self.twins.outputs)
        return float("inf") if missing or not rows else max(rows)


def tried(
    found: Proposal, given: Checkpoint, aim: Target, origin: Target, forward: str, tolerance: float, note: Note, conversions: bool
) -> Proposal:
    """The proposal with how both models' outputs compare; layouts that were open are settled where the outputs decide them.

    Raises PlanError where one of the two is no model.
    """
    for one in (origin, aim):
        if one.build is None:
            raise PlanError("is no model that can be run", path=one.checkpoint.path, hint="write module:Net")
    assert origin.build is not None and aim.build is not None
    inputs = output_comparison.make_inputs(forward, note)
    source = origin.build(0)
    _live.transfer(given, source, lambda: Ruling(()), RuleOptions(strict=True), step=True)  # what the checkpoint is of must take all of it

    def run(proposal: Proposal) -> Twins:
        return output_comparison.compare(source, _target(proposal, given, aim, note, conversions), inputs, tolerance)

    if not found.open:
        return replace(found, forward=run(found))
    trials = []
    for choice, proposal in itertools.islice(_choices(_known(found, numbers_of(source), note)), MOST):
        try:
            trials.append(_Trial(choice, proposal, run(proposal)))
        except CheckpointError:
            if not any(choice):
                raise  # as they stand, which must run
    best, *others = sorted(trials, key=lambda trial: trial.off)
    if not best.twins.same:
        note("no layout gives the same outputs from both models")
        return replace(found, forward=trials[0].twins)
    near = [trial for trial in others if trial.twins.same and trial.off < APART * best.off]
    near += [trial for trial in others if trial.twins.same and trial not in near and trial.off == best.off]
    if any(not _alike(best.proposal, trial.proposal, given, aim, note, conversions) for trial in near):
        note("several layouts give the same outputs from both models: other inputs may tell them apart")
        return replace(found, forward=best.twins)
    first = min([best, *near], key=lambda trial: trial.choice)
    return replace(first.proposal, forward=first.twins)


def _known(found: Proposal, numbers: Mapping[str, int], note: Note) -> Proposal:
    """The proposal with the numbers that the source's model says filled in."""

    def told(link: Link) -> Link:
        return replace(link, choices=tuple(replace(one, op=variables.filled(one.op, numbers)) for one in link.choices))

    known = again(found, [told(link) if link.doubt else link for link in found.links])
    for name in dict.fromkeys(name for one in known.open for name in one.variables):
        note(f"what needs {name} is not tried: --set {name}=N")
    return known


def _choices(found: Proposal) -> Iterator[tuple[Choice, Proposal]]:
    """Each choice of a way for each kind, as they stand first, with the proposal that it leads to."""
    kinds = {id(link): place for place, one in enumerate(found.open) for link in one.links}
    for choice in itertools.product(*(range(len(one.ways)) for one in found.open)):
        links = []
        for link in found.links:
            if id(link) in kinds:
                at = choice[kinds[id(link)]]
                layout = link.choices[at if at < len(link.choices) else 0]
                links.append(settled(link, layout, "and both models give the same outputs"))
            else:
                links.append(link)
        if not any(variables.names_in(link.op) for link in links):
            yield choice, again(found, links)


def _target(proposal: Proposal, given: Checkpoint, aim: Target, note: Note, conversions: bool) -> nn.Module:
    """A fresh target with the source's weights as a proposal has them."""
    assert aim.build is not None
    model = aim.build(0)
    _live.transfer(given, model, lambda: bring(proposal.rules, note), RuleOptions(conversions=conversions), step=True)
    return model


def _alike(one: Proposal, other: Proposal, given: Checkpoint, aim: Target, note: Note, conversions: bool) -> bool:
    """Whether two proposals lead to the very same weights."""
    import torch

    states = [_target(proposal, given, aim, note, conversions).state_dict() for proposal in (one, other)]
    return all(torch.equal(value, states[1][key]) for key, value in states[0].items() if isinstance(value, torch.Tensor))
