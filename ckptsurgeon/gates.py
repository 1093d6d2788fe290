"""When a plan is a no: nothing transferred, less than asked for, or, under `strict`, keys that no rule names. Pure."""

from __future__ import annotations

from ckptsurgeon.errors import CoverageError, PlanError, StrictError
from ckptsurgeon.surgery.plan import Plan
from ckptsurgeon.tensors import Coverage


def check(plan: Plan, *, min_coverage: float | None = None, strict: bool = False) -> None:
    """Raises CoverageError or StrictError, both a true no, for a plan that must not be followed."""
    path = plan.sources[0].path
    if min_coverage is not None and not 0 <= min_coverage <= 1:
        raise PlanError(f"a coverage of {min_coverage} is not between 0 and 1", hint="--min-coverage 0.9 asks for 90 %")
    if plan.steps and not plan.transferred:
        raise CoverageError(
            "nothing fits: no tensor of the target would be taken from it",
            path=path,
            hint=f"see why with: ckptsurgeon diff {path} {plan.target.spec if plan.target is not None else 'TARGET'}",
        )
    if min_coverage is not None and min(plan.coverage.tensors, plan.coverage.elements) < min_coverage:
        raise CoverageError(f"covers {words(plan.coverage)}, and {_percent(min_coverage)} is asked for", path=path)
    if strict and plan.loose:
        more = len(plan.loose) - 20
        raise StrictError(
            f"{len(plan.loose)} keys are missing, extra or mismatched, and no rule names them",
            path=path,
            problems=plan.loose[:20] + ((f"and {more} more",) if more > 0 else ()),
            hint="name each: --rename, --drop, or --init",
        )


def words(coverage: Coverage) -> str:
    """Coverage as a person reads it; never rounded up to the whole.

    >>> words(Coverage(0.5, 0.99999))
    '50.0 % of tensors, 99.9 % of elements'
    """
    return f"{_percent(coverage.tensors)} of tensors, {_percent(coverage.elements)} of elements"


def _percent(share: float) -> str:
    return f"{int(share * 1000 + 1e-9) / 10:.1f} %"
