"""Rules that matching adds to a call's own: what `plan`, `merge` and `transfer` share under `match=`."""

from __future__ import annotations

from dataclasses import replace

from ckptsurgeon.api._rules import Ruling
from ckptsurgeon.errors import PlanError
from ckptsurgeon.matching.proposals.propose import LEAST, propose
from ckptsurgeon.tensors import Checkpoint


def matched(found: list[Checkpoint], target: Checkpoint | None, ruling: Ruling, accept: bool) -> Ruling:
    """A call's rules, and after them those that matching adds. Raises CoverageError where it finds too little."""
    if target is None or len(found) != 1:
        raise PlanError(
            "matching is between one source and a target", hint="match one at a time: ckptsurgeon match CKPT TARGET -o rules.toml"
        )
    proposed = propose(found[0], target, ruling.rules, ruling.outside, accept=accept)
    refusal = proposed.refusal(LEAST)
    if refusal is not None:
        raise refusal
    return replace(ruling, rules=proposed.rules)
