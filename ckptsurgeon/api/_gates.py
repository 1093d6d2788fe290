"""When a plan is a no: nothing transferred, less than asked for, or, under `strict`, keys that no rule names. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal

from ckptsurgeon.errors import CoverageError, PlanError, RuleError, StrictError
from ckptsurgeon.hints import close_words
from ckptsurgeon.planning.plan import Plan
from ckptsurgeon.planning.plan_types import way_to_look
from ckptsurgeon.rules.patterns import compile_pattern

Uncertain = Literal["accepted", "left out"]  # what becomes of links that matching is not certain of


def check(plan: Plan, *, min_coverage: float | None = None, strict: bool = False) -> None:
    """Raises CoverageError or StrictError, both a true no, for a plan that must not be followed."""
    first = plan.sources[0]
    path = first.path
    if min_coverage is not None and not 0 <= min_coverage <= 1:
        raise PlanError(f"a coverage of {min_coverage} is not between 0 and 1", hint="--min-coverage 0.9 asks for 90 %")
    if plan.steps and (not any(step.sources for step in plan.steps) or (plan.partial and not plan.coverage.elements)):
        look = way_to_look(path, first.root, first.live, None if plan.target is None else plan.target.spec)
        raise CoverageError("nothing fits: no tensor of the target would be taken from it", path=path, hint=f"see why: {look}")
    if min_coverage is not None and min(plan.coverage.tensors, plan.coverage.elements) < min_coverage:
        from ckptsurgeon.views.text import words

        raise CoverageError(f"covers {words.coverage(plan.coverage)}, and {words.percent(min_coverage)} is asked for", path=path)
    if strict and plan.loose:
        more = len(plan.loose) - 20
        raise StrictError(
            f"{len(plan.loose)} keys are missing, extra or mismatched, and no rule names them",
            path=path,
            problems=plan.loose[:20] + ((f"and {more} more",) if more > 0 else ()),
            hint="name each: --rename, --drop, or --init",
        )


def matching(match: bool, accept_uncertain: bool) -> Uncertain | None:
    """What matching may apply; None where it is not asked for. PlanError where its choice is given without it."""
    if accept_uncertain and not match:
        raise PlanError("accepts uncertain links, and no match is asked for", hint="--match --accept-uncertain")
    return ("accepted" if accept_uncertain else "left out") if match else None


def refuse_idle_casts(allowed: Iterable[str], keys: Collection[str]) -> None:
    """Raises RuleError for a pattern of casts that are allowed which no key of the output matches."""
    compiled = {pattern: compile_pattern(pattern) for pattern in allowed}
    idle = [pattern for pattern, form in compiled.items() if not any(form.match(key) is not None for key in keys)]
    if idle:
        problems = tuple(f"allow-cast {pattern!r} matches nothing{close_words(pattern, keys)}" for pattern in idle)
        raise RuleError("patterns that allow no cast", problems=problems, hint="name keys as the output has them")


def patterns(given: Iterable[str]) -> tuple[str, ...]:
    """Patterns that are well formed, one or several; found out before anything is written."""
    patterns = (given,) if isinstance(given, str) else tuple(given)
    for pattern in patterns:
        compile_pattern(pattern)
    return patterns
