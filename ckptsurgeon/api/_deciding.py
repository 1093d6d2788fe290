"""From opened sources and a target to a plan, by the rules and options of a call; and from a plan that was followed to its report.

What `plan`, `merge` and `transfer` share.
"""

from __future__ import annotations

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

OPEN = "open: layout"  # why a key of a layout in doubt takes nothing
MATCHED = "matched"  # the code of what is said of a proof after matching
NOT_THE_MAPPING = "keys were matched: this proves the file, not the mapping, which a run of both models does (match --forward)"


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
        ruling = _matched(sources, target, model, ruling, options)
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
    if options.match:
        made = replace(made, findings=(*made.findings, Finding(MATCHED, NOT_THE_MAPPING, level="note")))
    return ruling, marked(made, ruling.open)


def _matched(
    sources: Sequence[Checkpoint], target: Checkpoint | None, model: Callable[[], nn.Module] | None, ruling: Ruling, options: RuleOptions
) -> Ruling:
    """A call's rules, and after them those that matching adds. Raises CoverageError where it finds too little."""
    if target is None or len(sources) != 1:
        raise PlanError(
            "matching is between one source and a target", hint="match one at a time: ckptsurgeon match CKPT TARGET -o rules.toml"
        )
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
            told=model and partial(numbers_of, model),
        )
    refusal = proposed.refusal(LEAST)
    if refusal is not None:
        raise refusal
    codes = [link for link in proposed.links if DEQUANTIZE in link.evidence and link not in proposed.applied]
    if codes:
        raise CastError(
            f"would get the numbers of {codes[0].sources[0]}, which are codes and no values",
            key=codes[0].targets[0],
            problems=shortened(f"{link.sources[0]} -> {link.targets[0]}" for link in codes[1:]),
            hint=f"make values of them: dequantize=True; or keep the target's own: keep={[codes[0].targets[0]]!r}",
        )
    refuse_unused([name for name in ruling.unused if name not in proposed.numbers_used])
    if proposed.open and target.kind == "skeleton":
        raise open_error([row for one in proposed.open for row in _findings(one, proposed.open)], sources[0].path, target.path)
    return replace(ruling, rules=proposed.rules, open=proposed.open)


def numbers_of(model: Callable[[], nn.Module]) -> Mapping[str, int]:
    """How many heads a model says that it has. Its module is loaded where a layout in doubt needs the number."""
    from ckptsurgeon.models.target.heads import numbers_of as told

    return told(model())


def marked(made: Plan, opened: Sequence[Open]) -> Plan:
    """A plan that says which keys it leaves open, and between which layouts."""
    if not opened:
        return made
    targets = {key for one in opened for key in one.targets}
    sources = {key for one in opened for link in one.links for key in link.sources}
    steps = tuple(
        replace(step, reason="; ".join([OPEN, *step.reason.split("; ")[1:]])) if step.target in targets and not step.sources else step
        for step in made.steps
    )
    dropped = tuple(replace(row, reason=OPEN) if row.source in sources else row for row in made.dropped)
    return replace(
        made, steps=steps, dropped=dropped, findings=(*made.findings, *(row for one in opened for row in _findings(one, opened)))
    )


def _findings(one: Open, opened: Sequence[Open]) -> list[Finding]:
    """What is open, and each way to settle it as words of a command line."""
    from ckptsurgeon.matching.layouts.choices import as_is_options

    needs = f"; needs {' '.join(f'--set {name}=N' for name in one.variables)}" if one.variables else ""
    ways = [as_is_options(one, opened), *(" ".join(map(option_text, way.rules)) for way in one.ways[1:])]
    return [
        Finding(OPEN_LAYOUT, f"layout open ({one.kind}): {len(one.targets)} tensors{needs}", one.targets[0], "warning"),
        *(
            Finding(LAYOUT_CHOICE, f"{way.words}: {options}", one.targets[0], "warning")
            for way, options in zip(one.ways, ways, strict=True)
        ),
    ]


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
