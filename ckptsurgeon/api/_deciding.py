"""From opened sources and a target to a plan, by the rules and options of a call; and from a plan that was followed to its report.

What `plan`, `merge` and `transfer` share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckptsurgeon.api._options import RuleOptions
from ckptsurgeon.api._own_loading import learned
from ckptsurgeon.api._rules import Ruling
from ckptsurgeon.errors import PlanError
from ckptsurgeon.planning.plan import Plan, make_plan
from ckptsurgeon.report import Report
from ckptsurgeon.tensors import Checkpoint

if TYPE_CHECKING:
    from torch import nn


def decide(
    sources: Sequence[Checkpoint], target: Checkpoint | None, model: Callable[[], nn.Module] | None, ruling: Ruling, options: RuleOptions
) -> tuple[Ruling, Plan]:
    """The plan, and the rules that it follows: a call's own, those that matching adds, and what the model's loading code takes.

    Args:
        model: gives a model on which the target's loading code may run; None where the target is no model.

    Raises:
        CoverageError: matching finds too little.
        RuleError, PlanError: as `make_plan`.
    """
    if options.match:
        ruling = _matched(sources, target, ruling, options)
    ruling = learned(sources, target, model, ruling, average=options.average, auto=options.auto)
    made = make_plan(
        sources,
        target,
        ruling.rules,
        dtype=options.dtype,
        seed=options.seed or 0,
        allow_cast=options.allow_cast,
        average=options.average,
        auto=options.auto,
        dequantize=options.dequantize,
        outside=ruling.outside,
    )
    return ruling, made


def _matched(sources: Sequence[Checkpoint], target: Checkpoint | None, ruling: Ruling, options: RuleOptions) -> Ruling:
    """A call's rules, and after them those that matching adds. Raises CoverageError where it finds too little."""
    if target is None or len(sources) != 1:
        raise PlanError(
            "matching is between one source and a target", hint="match one at a time: ckptsurgeon match CKPT TARGET -o rules.toml"
        )
    from ckptsurgeon.matching.proposals.propose import LEAST, propose

    proposed = propose(sources[0], target, ruling.rules, ruling.outside, accept=options.accept_uncertain, dequantize=options.dequantize)
    refusal = proposed.refusal(LEAST)
    if refusal is not None:
        raise refusal
    return replace(ruling, rules=proposed.rules)


def report_of(plan: Plan, **more: Any) -> Report:
    """The report of a plan that was followed, with what else its caller has to say."""
    return Report(
        sources=tuple(source.path for source in plan.sources),
        target=plan.target.spec if plan.target is not None else "",
        transferred=plan.transferred,
        kept=plan.kept,
        fresh=plan.fresh,
        still_fresh=plan.still_fresh,
        roots=tuple(source.root for source in plan.sources),
        prefixes=tuple(source.prefix for source in plan.sources),
        dropped=tuple((row.source, row.reason) for row in plan.dropped),
        coverage=plan.coverage,
        adapted=plan.adapted,
        partial=plan.partial,
        **more,
    )
