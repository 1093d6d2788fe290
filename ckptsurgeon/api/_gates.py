"""When a plan is a no: nothing transferred, less than asked for, or, under `strict`, keys that no rule names. Pure."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from math import prod
from typing import TYPE_CHECKING

from ckptsurgeon.command import Command, at_root
from ckptsurgeon.errors import CoverageError, PlanError, RuleError, StrictError
from ckptsurgeon.planning.plan import Plan
from ckptsurgeon.planning.plan_types import Step, way_to_look
from ckptsurgeon.report import Finding
from ckptsurgeon.rules.patterns import compile_pattern
from ckptsurgeon.sizes import percent

if TYPE_CHECKING:
    from ckptsurgeon.api._options import RuleOptions


OPEN_LAYOUT, LAYOUT_CHOICE = "open-layout", "layout-choice"  # the codes of what a plan leaves open, and of each way to settle it


def refuse_open(plan: Plan, path: str | None = None) -> None:
    """Raises PlanError for a plan that leaves a layout open: what is in doubt is not written."""
    opened = [finding for finding in plan.findings if finding.code in (OPEN_LAYOUT, LAYOUT_CHOICE)]
    if not opened:
        return
    first, target = plan.sources[0], plan.target.spec if plan.target else ""
    if path is None:
        raise open_error(opened, first.path, target)
    again = Command("plan", first.path, target, path, (*at_root(first.root), ("match",)))
    raise open_error(opened, path, target, f"plan again with one of these ways: {shlex.join(again.words)} --overwrite --layout as-is")


def open_error(opened: Sequence[Finding], path: str, target: str, hint: str | None = None) -> PlanError:
    """The refusal that names what is open with the ways to settle it; `hint` is for a plan in a file."""
    look = shlex.join(["ckptsurgeon", "match", path, target])
    return PlanError(
        "shapes can't tell in which order the elements of some tensors lie, and none is chosen",
        path=path,
        problems=tuple(
            f"{finding.key}: {finding.message}" if finding.code == OPEN_LAYOUT else f"  {finding.message}" for finding in opened
        ),
        hint=hint or f"add one of these ways; layout='as-is' takes all as they stand; see them side by side: {look}",
    )


def check(plan: Plan, options: RuleOptions) -> None:
    """Raises CoverageError or StrictError, both a true no, for a plan that must not be followed."""
    min_coverage, first = options.min_coverage, plan.sources[0]
    path = first.path
    if min_coverage is not None and not 0 <= min_coverage <= 1:
        raise PlanError(f"a coverage of {min_coverage} is not between 0 and 1", hint="min_coverage=0.9 asks for 90 %")
    opened = {step.target: step for step in plan.steps if not step.sources and step.reason.startswith("open: ")}
    if plan.steps and not opened and (not any(step.sources for step in plan.steps) or (plan.partial and not plan.coverage.elements)):
        look = way_to_look(path, first.root, first.live, None if plan.target is None else plan.target.spec)
        raise CoverageError("nothing fits: no tensor of the target would be taken from it", path=path, hint=f"see why: {look}")
    if min_coverage is not None and _explained(plan, opened) < min_coverage:
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


def _explained(plan: Plan, opened: Mapping[str, Step]) -> float:
    """The lesser share of tensors and elements that are transferred, or sure but for their layout."""
    total = sum(prod(step.shape) for step in plan.steps)
    more = sum(prod(step.shape) for step in opened.values())
    return min(
        plan.coverage.tensors + (len(opened) / len(plan.steps) if opened else 0.0),
        plan.coverage.elements + (more / total if opened and total else 0.0),
    )


def refuse_idle_casts(allowed: Iterable[str], keys: Collection[str]) -> None:
    """Raises RuleError for a pattern of casts that are allowed which no key of the output matches."""
    compiled = {pattern: compile_pattern(pattern) for pattern in allowed}
    idle = [pattern for pattern, form in compiled.items() if not any(form.match(key) is not None for key in keys)]
    if idle:
        from ckptsurgeon.rules.meant import meant_words

        problems = tuple(f"allow-cast {pattern!r} matches nothing{meant_words(pattern, keys)}" for pattern in idle)
        raise RuleError("patterns that allow no cast", problems=problems, hint="name keys as the output has them")
