"""The provenance record that a merge writes into its output: no path and no time, so that the same input gives the same bytes."""

from __future__ import annotations

from typing import Any

from ckptsurgeon import __version__
from ckptsurgeon.planning.plan import Plan, digest


def record(plan: Plan) -> dict[str, Any]:
    """The record of a plan's output: tool, plan digest, sources' fingerprints, seed, and which keys are fresh or kept."""
    return {
        "version": 1,
        "tool": f"ckptsurgeon {__version__}",
        "plan": digest(plan),
        "sources": [{"fingerprint": source.fingerprint, "format": source.format, "root": source.root} for source in plan.sources],
        "target": None if plan.target is None else {"fingerprint": plan.target.fingerprint, "kind": plan.target.kind},
        "seed": plan.seed,
        "coverage": {"tensors": plan.coverage.tensors, "elements": plan.coverage.elements},
        "fresh": list(plan.fresh),
        "kept": list(plan.kept),
        "partial": list(plan.partial),
    }
