"""Marks the values of a plan that were fresh in an earlier merge and were not trained since: they are still fresh, under their new names.

A result is fresh if every tensor that it is made of is fresh on its own file's record; it is partly transferred if only some are, or if one
is partly transferred itself: an average of a trained and a fresh head, trained rows with fresh ones below. No cast or adapter makes a fresh
value a trained one. A target file's own values keep what that file's record says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ckptsurgeon.planning.plan_types import Step
from ckptsurgeon.tensors import Checkpoint

WORDS = "fresh since an earlier merge"


def mark_fresh(steps: Sequence[Step], sources: Sequence[Checkpoint], target: Checkpoint | None) -> tuple[Step, ...]:
    """The steps, those that take fresh or partly transferred values marked so."""
    files = [*sources, *([target] if target is not None else [])]
    if not any(file.provenance for file in files):
        return tuple(steps)
    fresh = [_recorded(file, "fresh") for file in files]
    partial = [_recorded(file, "partial") for file in files]

    def marked(step: Step) -> Step:
        places = step.sources or (((len(sources), step.target),) if step.action == "keep" else ())
        found = [key in fresh[number] for number, key in places]
        if found and all(found):
            return replace(step, fresh=True, reason=f"{step.reason}; {WORDS}")
        return replace(step, partial=any(found) or any(key in partial[number] for number, key in places))

    return tuple(map(marked, steps))


def _recorded(file: Checkpoint, kind: str) -> frozenset[str]:
    return frozenset((file.provenance or {}).get(kind, ()))
