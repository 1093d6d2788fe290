"""Runs both models on the user's inputs with the source's weights, and chooses the layouts in doubt that give the same outputs.

The layouts of one kind are tried for all layers at once, in every combination of kinds. A combination is chosen only if its outputs are
equal within the tolerance and no other combination's come near; layouts that outputs can't tell apart stay in doubt.
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

MOST = 64  # combinations that are run
APART = 10.0  # the next best combination must differ by this factor more

Choice = tuple[int, ...]  # for each kind of layout in doubt, the number of the choice


@dataclass(frozen=True)
class _Trial:
    """One combination of layouts, the proposal that it gives, and how the outputs compare."""

    choice: Choice
    proposal: Proposal
    twins: Twins

    @property
    def off(self) -> float:
        """The largest difference of the outputs, as a share of their greatest value."""
        rows = [difference / scale if scale else difference for _, difference, scale in self.twins.outputs if difference is not None]
        missing = any(difference is None for _, difference, _ in self.twins.outputs)
        return float("inf") if missing or not rows else max(rows)


def tried(
    proposal: Proposal,
    source: Checkpoint,
    target: Target,
    source_model: Target,
    forward: str,
    tolerance: float,
    note: Note,
    conversions: bool,
) -> Proposal:
    """The proposal with the comparison of both models' outputs; layouts in doubt are chosen where the outputs decide them.

    Raises PlanError if one of the two is no model.
    """
    for side in (source_model, target):
        if side.build is None:
            raise PlanError("is no model that can be run", path=side.checkpoint.path, hint="write module:Net")
    assert source_model.build is not None and target.build is not None
    inputs = output_comparison.make_inputs(forward, note)
    model = source_model.build(0)
    _live.transfer(
        source, model, lambda: Ruling(()), RuleOptions(strict=True), step=True
    )  # the source model must load the whole checkpoint

    def run(candidate: Proposal) -> Twins:
        return output_comparison.compare(model, _target(candidate, source, target, note, conversions), inputs, tolerance)

    if not proposal.open:
        return replace(proposal, forward=run(proposal))
    trials = []
    for choice, candidate in itertools.islice(_choices(_known(proposal, numbers_of(model), note)), MOST):
        try:
            trials.append(_Trial(choice, candidate, run(candidate)))
        except CheckpointError:
            if not any(choice):
                raise  # the layouts as they are: these must run
    best, *others = sorted(trials, key=lambda trial: trial.off)
    if not best.twins.same:
        note("no layout gives the same outputs from both models")
        return replace(proposal, forward=trials[0].twins)
    near = [trial for trial in others if trial.twins.same and trial.off < APART * best.off]
    near += [trial for trial in others if trial.twins.same and trial not in near and trial.off == best.off]
    if any(not _alike(best.proposal, trial.proposal, source, target, note, conversions) for trial in near):
        note("several layouts give the same outputs from both models: other inputs may tell them apart")
        return replace(proposal, forward=best.twins)
    chosen = min([best, *near], key=lambda trial: trial.choice)
    return replace(chosen.proposal, forward=chosen.twins, spelled=True)


def _known(proposal: Proposal, numbers: Mapping[str, int], note: Note) -> Proposal:
    """The proposal with the numbers of heads that the source model has, filled in."""

    def filled(link: Link) -> Link:
        return replace(link, choices=tuple(replace(layout, op=variables.filled(layout.op, numbers)) for layout in link.choices))

    known = again(proposal, [filled(link) if link.doubt else link for link in proposal.links])
    for name in dict.fromkeys(name for layout in known.open for name in layout.variables):
        note(f"what needs {name} is not tried: --set {name}=N")
    return known


def _choices(proposal: Proposal) -> Iterator[tuple[Choice, Proposal]]:
    """Each combination of layouts, the unchanged ones first, with the proposal that it gives."""
    kind_of_link = {id(link): position for position, layout in enumerate(proposal.open) for link in layout.links}
    for choice in itertools.product(*(range(len(layout.ways)) for layout in proposal.open)):
        links = []
        for link in proposal.links:
            if id(link) in kind_of_link:
                number = choice[kind_of_link[id(link)]]
                layout = link.choices[number if number < len(link.choices) else 0]
                links.append(settled(link, layout, "and both models give the same outputs"))
            else:
                links.append(link)
        if not any(variables.names_in(link.op) for link in links):
            yield choice, again(proposal, links)


def _target(proposal: Proposal, source: Checkpoint, target: Target, note: Note, conversions: bool) -> nn.Module:
    """A fresh target model with the source's weights, loaded by the rules of a proposal."""
    assert target.build is not None
    model = target.build(0)
    _live.transfer(source, model, lambda: bring(proposal.rules, note), RuleOptions(conversions=conversions), step=True)
    return model


def _alike(first: Proposal, second: Proposal, source: Checkpoint, target: Target, note: Note, conversions: bool) -> bool:
    """Whether two proposals give identical weights."""
    import torch

    states = [_target(proposal, source, target, note, conversions).state_dict() for proposal in (first, second)]
    return all(torch.equal(value, states[1][key]) for key, value in states[0].items() if isinstance(value, torch.Tensor))
