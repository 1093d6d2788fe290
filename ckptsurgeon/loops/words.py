"""What a loop's log is told of a transfer: plain numbers, and the record that a checkpoint keeps of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ckptsurgeon.report import Report

BY = ("epoch", "step")


@dataclass(frozen=True)
class Recorded:
    """What a resumed run knows of its transfer: which keys it took, and which it did not."""

    transferred: tuple[str, ...]
    fresh: tuple[str, ...]
    partial: tuple[str, ...] = ()


def numbers(report: Report) -> dict[str, float]:
    """A report as metrics: coverage as shares from 0 to 1, the rest counts.

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
    """A report as a checkpoint keeps it."""
    return {name: list(getattr(report, name)) for name in ("transferred", "fresh", "partial")}


def recorded(state: Mapping[str, Any]) -> Recorded:
    """`record` read back.

    >>> recorded({"transferred": ["w"], "fresh": ["b"], "partial": []}).fresh
    ('b',)
    """
    return Recorded(tuple(state["transferred"]), tuple(state["fresh"]), tuple(state.get("partial", ())))
