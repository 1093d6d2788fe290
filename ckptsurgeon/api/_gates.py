"""Refuses a plan that transfers nothing or too little, leaves a layout open, or, under `strict`, has keys that no rule names. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING

from ckptsurgeon.command import Command, at_root
from ckptsurgeon.errors import CoverageError, PlanError, RuleError, StrictError
from ckptsurgeon.planning.plan import Plan
from ckptsurgeon.planning.plan_types import Step, viewing_command
from ckptsurgeon.report import Finding
from ckptsurgeon.rules.patterns import compile_pattern
from ckptsurgeon.sizes import percent

if TYPE_CHECKING:
    from ckptsurgeon.api._options import RuleOptions


OPEN_LAYOUT, LAYOUT_CHOICE = "open-layout", "layout-choice"  # the codes of a layout in doubt, and of each way to choose


def refuse_open(plan: Plan, path: str | None = None) -> None:
    """Raises PlanError for a plan that leaves a layout open: what is in doubt is not written."""
    findings = [finding for finding in plan.findings if finding.code in (OPEN_LAYOUT, LAYOUT_CHOICE)]
    if not findings:
        return
    source, target = plan.sources[0], plan.target.spec if plan.target else ""
    if path is None:
        raise open_error(findings, source.path, target)
    command = Command("plan", source.path, target, path, (*at_root(source.root), ("match",)))
    raise open_error(findings, path, target, f"plan again with one of these ways: {shlex.join(command.words)} --overwrite --layout as-is")


def open_error(findings: Sequence[Finding], path: str, target: str, hint: str | None = None) -> PlanError:
    """The error that names the layouts in doubt and the ways to choose; `hint` is for a plan in a file."""
    look = shlex.join(["ckptsurgeon", "match", path, target])
    return PlanError(
        "shapes can't tell in which order the elements of some tensors lie, and none is chosen",
        path=path,
        problems=tuple(
            f"{finding.key}: {finding.message}" if finding.code == OPEN_LAYOUT else f"  {finding.message}" for finding in findings
        ),
        hint=hint or f"add one of these ways; layout='as-is' takes all as they stand; see them side by side: {look}",
    )


def check(plan: Plan, options: RuleOptions) -> None:
    """Raises CoverageError or StrictError (exit code 1) for a plan that must not be carried out."""
    min_coverage, source = options.min_coverage, plan.sources[0]
    path = source.path
    if min_coverage is not None and not 0 <= min_coverage <= 1:
        raise PlanError(f"a coverage of {min_coverage} is not between 0 and 1", hint="min_coverage=0.9 asks for 90 %")
    open_steps = {step.target: step for step in plan.steps if not step.sources and step.reason.startswith("open: ")}
    if plan.steps and not open_steps and (not any(step.sources for step in plan.steps) or (plan.partial and not plan.coverage.elements)):
        look = viewing_command(path, source.root, source.live, None if plan.target is None else plan.target.spec)
        raise CoverageError("nothing fits: no tensor of the target would be taken from it", path=path, hint=f"see why: {look}")
    if plan.target is None and plan.dropped and not plan.steps:
        look = viewing_command(path, source.root, source.live, None)
        raise CoverageError("all of its tensors are dropped, and none is left to write", path=path, hint=f"see their names: {look}")
    if min_coverage is not None and _explained(plan, open_steps) < min_coverage:
        from ckptsurgeon.views.text import words

        raise CoverageError(f"covers {words.coverage(plan.coverage)}, and {percent(min_coverage)} is asked for", path=path)
    if options.strict and plan.loose:
        more = len(plan.loose) - 20
        raise StrictError(
            f"{len(plan.loose)} keys are missing, extra or mismatched, and no rule names them",
            path=path,
            problems=plan.loose[:20] + ((f"and {more} more",) if more > 0 else ()),
            hint="name each: --rename, --drop, or --init",
        )


def _explained(plan: Plan, open_steps: Mapping[str, Step]) -> float:
    """The smaller of two shares, of tensors and of elements, that are transferred or certain except for their layout."""
    total = sum(prod(step.shape) for step in plan.steps)
    open_elements = sum(prod(step.shape) for step in open_steps.values())
    return min(
        plan.coverage.tensors + (len(open_steps) / len(plan.steps) if open_steps else 0.0),
        plan.coverage.elements + (open_elements / total if open_steps and total else 0.0),
    )


def refuse_idle_casts(allowed: Iterable[str], keys: Collection[str]) -> None:
    """Raises RuleError for a pattern of `allow_cast` that matches no key of the output."""
    compiled = {pattern: compile_pattern(pattern) for pattern in allowed}
    unused = [pattern for pattern, form in compiled.items() if not any(form.match(key) is not None for key in keys)]
    if unused:
        from ckptsurgeon.rules.meant import meant_words

        problems = tuple(f"allow-cast {pattern!r} matches nothing{meant_words(pattern, keys)}" for pattern in unused)
        raise RuleError("patterns that allow no cast", problems=problems, hint="name keys as the output has them")
