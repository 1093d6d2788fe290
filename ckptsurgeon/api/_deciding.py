"""Makes a plan from opened sources, a target, rules and options; and the report of a plan that was carried out.

`plan`, `merge` and `transfer` share it.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from ckptsurgeon.api._gates import LAYOUT_CHOICE, OPEN_LAYOUT, open_error
from ckptsurgeon.api._options import RuleOptions
from ckptsurgeon.api._own_loading import learned
from ckptsurgeon.api._rules import Ruling, refuse_unused
from ckptsurgeon.errors import CastError, PlanError
from ckptsurgeon.hints import shortened
from ckptsurgeon.planning.plan import Plan, make_plan
from ckptsurgeon.report import Finding, Report
from ckptsurgeon.rules.rules import option_text
from ckptsurgeon.tensors import Checkpoint

if TYPE_CHECKING:
    from torch import nn

    from ckptsurgeon.matching.layouts.choices import Open

OPEN = "open: layout"  # the reason of a step or a dropped key whose layout is in doubt
MATCHED = "matched"  # the code of the finding that limits what a proof shows after matching
NOT_THE_MAPPING = "keys were matched: this proves the file, not the mapping, which a run of both models does (match --forward)"


def decide(
    sources: Sequence[Checkpoint], target: Checkpoint | None, model: Callable[..., nn.Module] | None, ruling: Ruling, options: RuleOptions
) -> tuple[Ruling, Plan]:
    """Make the plan, and complete its rules: those of the call, those that matching adds, and what the model's loading code takes.

    Args:
        model: returns a model on which the target's loading code may run; None if the target is no model.

    Raises:
        CoverageError: matching finds too little.
        RuleError, PlanError: as `make_plan`.
    """
    if options.match:
        ruling = _matched(sources, target, model, ruling, options)
    ruling = learned(sources, target, model, ruling, average=options.average, auto=options.auto)
    plan = make_plan(
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
    if options.match:
        plan = replace(plan, findings=(*plan.findings, Finding(MATCHED, NOT_THE_MAPPING, level="note")))
    return ruling, marked(plan, ruling.open)


def _matched(
    sources: Sequence[Checkpoint], target: Checkpoint | None, model: Callable[..., nn.Module] | None, ruling: Ruling, options: RuleOptions
) -> Ruling:
    """A call's rules, and after them those that matching adds. Raises CoverageError if it finds too little."""
    if target is None or len(sources) != 1:
        raise PlanError("matching is between one source and a target", hint=_way_to_match(sources, target))
    from ckptsurgeon.matching.factors import DEQUANTIZE
    from ckptsurgeon.matching.proposals.propose import propose
    from ckptsurgeon.matching.proposals.shares import LEAST
    from ckptsurgeon.progress import phase

    with phase("matching", len(target), "tensors"):
        proposed = propose(
            sources[0],
            target,
            ruling.rules,
            ruling.outside,
            accept=options.accept_uncertain,
            dequantize=options.dequantize,
            layout=tuple(options.layout or ()),
            numbers=options.numbers or {},
            target_numbers=model and partial(numbers_of, model),
        )
    refusal = proposed.refusal(LEAST)
    if refusal is not None:
        raise refusal
    coded = [link for link in proposed.links if DEQUANTIZE in link.evidence and link not in proposed.applied]
    if coded:
        raise CastError(
            f"would get the numbers of {coded[0].sources[0]}, which are codes, not values",
            key=coded[0].targets[0],
            problems=shortened(f"{link.sources[0]} -> {link.targets[0]}" for link in coded[1:]),
            hint=f"dequantize them: dequantize=True; or keep the target's own: keep={[coded[0].targets[0]]!r}",
        )
    refuse_unused([name for name in ruling.unused if name not in proposed.numbers_used])
    if proposed.open and target.kind == "skeleton":
        raise open_error([row for layout in proposed.open for row in _findings(layout, proposed.open)], sources[0].path, target.path)
    return replace(ruling, rules=proposed.rules, open=proposed.open)


def _way_to_match(sources: Sequence[Checkpoint], target: Checkpoint | None) -> str:
    """The hint for a call that can't be matched as a whole."""
    if target is None:
        return "give the target as the last path, or leave out match=True"
    in_memory = target.path.isidentifier()  # the class of a live model
    command = shlex.join(["ckptsurgeon", "match", sources[0].path, target.path, "-o", "rules.toml"])
    words = f"ckptsurgeon.match({sources[0].path!r}, model).rules" if in_memory else command
    return f"match one source at a time, and give the rules of each: {words}"


def numbers_of(model: Callable[[], nn.Module]) -> Mapping[str, int]:
    """How many heads a model has, by its attributes. The model is built only if a layout in doubt needs the number."""
    from ckptsurgeon.models.target import heads

    return heads.numbers_of(model())


def marked(plan: Plan, layouts: Sequence[Open]) -> Plan:
    """The plan with the keys that it leaves open, and the layouts that are possible for them."""
    if not layouts:
        return plan
    targets = {key for layout in layouts for key in layout.targets}
    sources = {key for layout in layouts for link in layout.links for key in link.sources}
    steps = tuple(
        replace(step, reason="; ".join([OPEN, *step.reason.split("; ")[1:]])) if step.target in targets and not step.sources else step
        for step in plan.steps
    )
    dropped = tuple(replace(row, reason=OPEN) if row.source in sources else row for row in plan.dropped)
    return replace(
        plan, steps=steps, dropped=dropped, findings=(*plan.findings, *(row for layout in layouts for row in _findings(layout, layouts)))
    )


def _findings(layout: Open, layouts: Sequence[Open]) -> list[Finding]:
    """A finding for a layout in doubt, and one for each choice, with the options that choose it."""
    from ckptsurgeon.matching.layouts.choices import as_is_options

    needs = f"; needs {' '.join(f'--set {name}=N' for name in layout.variables)}" if layout.variables else ""
    options_of_ways = [as_is_options(layout, layouts), *(" ".join(map(option_text, way.rules)) for way in layout.ways[1:])]
    return [
        Finding(OPEN_LAYOUT, f"layout open ({layout.kind}): {len(layout.targets)} tensors{needs}", layout.targets[0], "warning"),
        *(
            Finding(LAYOUT_CHOICE, f"{way.words}: {options}", layout.targets[0], "warning")
            for way, options in zip(layout.ways, options_of_ways, strict=True)
        ),
    ]


def report_of(plan: Plan, **more: Any) -> Report:
    """The report of a plan that was carried out; `more` are its other fields."""
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
        left_behind=plan.left_behind,
        coverage=plan.coverage,
        adapted=plan.adapted,
        partial=plan.partial,
        **more,
    )
