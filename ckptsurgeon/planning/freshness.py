"""Marks the values of a plan that an earlier merge initialised and that were not trained since: they are still fresh.

A merged file records which of its values are fresh. A result is fresh if every tensor that it is made of is recorded as fresh. It is partly
fresh if only some are, or if one is recorded as partly fresh, such as an average of a trained and a fresh head. Casts and adapters don't
change that. A target file's own values keep what that file records.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ckptsurgeon.planning.plan_types import Step
from ckptsurgeon.tensors import Checkpoint

WORDS = "fresh since an earlier merge"


def mark_fresh(steps: Sequence[Step], sources: Sequence[Checkpoint], target: Checkpoint | None) -> tuple[Step, ...]:
    """The steps; those that take fresh or partly fresh values have `fresh` or `partial` set."""
    files = [*sources, *([target] if target is not None else [])]
    if not any(file.provenance for file in files):
        return tuple(steps)
    fresh = [_recorded(file, "fresh") for file in files]
    partial = [_recorded(file, "partial") for file in files]

    def marked(step: Step) -> Step:
        source_keys = step.sources or (((len(sources), step.target),) if step.action == "keep" else ())
        are_fresh = [key in fresh[number] for number, key in source_keys]
        if are_fresh and all(are_fresh):
            return replace(step, fresh=True, reason=f"{step.reason}; {WORDS}")
        return replace(step, partial=any(are_fresh) or any(key in partial[number] for number, key in source_keys))

    return tuple(map(marked, steps))


def _recorded(file: Checkpoint, kind: str) -> frozenset[str]:
    return frozenset((file.provenance or {}).get(kind, ()))
