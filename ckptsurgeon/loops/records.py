"""A transfer as a training loop keeps it: metrics for the log, and the record in the loop's checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckptsurgeon.report import Report

BY = ("epoch", "step")


@dataclass(frozen=True)
class Recorded:
    """The record of a transfer in a resumed run: which keys got a source's values, which are fresh, and which are partly transferred."""

    transferred: tuple[str, ...]
    fresh: tuple[str, ...]
    partial: tuple[str, ...] = ()


def numbers(report: Report) -> dict[str, float]:
    """Return a report as metrics: coverage as shares from 0 to 1, everything else as counts.

    >>> from ckptsurgeon.report import Coverage
    >>> numbers(Report(("a.pt",), "Net", ("w",), (), ("b",), (), Coverage(0.5, 0.9, (1, 2))))["transfer/fresh"]
    1.0
    """
    counts = {name: getattr(report, name) for name in ("transferred", "fresh", "adapted", "partial", "dropped")}
    return {
        "transfer/coverage_tensors": report.coverage.tensors,
        "transfer/coverage_elements": report.coverage.elements,
        **{f"transfer/{name}": float(len(keys)) for name, keys in counts.items()},
    }


def record(report: Report | Recorded) -> dict[str, list[str]]:
    """Return the part of a report that a checkpoint keeps."""
    return {name: list(getattr(report, name)) for name in ("transferred", "fresh", "partial")}


def recorded(state: Mapping[str, Any]) -> Recorded:
    """Read back what `record` returned.

    >>> recorded({"transferred": ["w"], "fresh": ["b"], "partial": []}).fresh
    ('b',)
    """
    return Recorded(tuple(state["transferred"]), tuple(state["fresh"]), tuple(state.get("partial", ())))
