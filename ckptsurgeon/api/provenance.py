"""What a merge writes into its output about itself: values only, no path and no time, so that the same input gives the same bytes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ckptsurgeon.surgery.plan import Plan, digest
from ckptsurgeon.tensors import Checkpoint
from ckptsurgeon.version import VERSION


def still_fresh(plan: Plan, sources: Sequence[Checkpoint]) -> tuple[str, ...]:
    """Target keys that take their value from a source that has it on record as fresh: a merge, not yet trained."""
    on_record = [frozenset((source.provenance or {}).get("fresh", ())) for source in sources]
    return tuple(step.target for step in plan.steps if step.sources and all(key in on_record[number] for number, key in step.sources))


def still_partial(plan: Plan, sources: Sequence[Checkpoint]) -> tuple[str, ...]:
    """Target keys that take their value from a source that has it on record as partly transferred."""
    on_record = [frozenset((source.provenance or {}).get("partial", ())) for source in sources]
    return tuple(step.target for step in plan.steps if any(key in on_record[number] for number, key in step.sources))


def record(plan: Plan, sources: Sequence[Checkpoint]) -> dict[str, Any]:
    """The record of a plan's output: tool, plan digest, sources' fingerprints, seed, and which keys are fresh or kept."""
    fresh = {*plan.fresh, *still_fresh(plan, sources)}
    partial = {*plan.partial, *still_partial(plan, sources)}
    return {
        "version": 1,
        "tool": f"ckptsurgeon {VERSION}",
        "plan": digest(plan),
        "sources": [{"fingerprint": source.fingerprint, "format": source.format, "root": source.root} for source in plan.sources],
        "target": None if plan.target is None else {"fingerprint": plan.target.fingerprint, "kind": plan.target.kind},
        "seed": plan.seed,
        "coverage": {"tensors": plan.coverage.tensors, "elements": plan.coverage.elements},
        "fresh": [step.target for step in plan.steps if step.target in fresh],
        "kept": list(plan.kept),
        "partial": [step.target for step in plan.steps if step.target in partial],
    }
