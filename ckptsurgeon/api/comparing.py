"""The verb that holds names and shapes of two sides against each other: diff. It writes nothing."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ckptsurgeon.api import _opening
from ckptsurgeon.api._opening import silent
from ckptsurgeon.api._own_loading import learned
from ckptsurgeon.api._rules import Rules, gather
from ckptsurgeon.parameter_types import Given, Note, Renames
from ckptsurgeon.planning.diff import Diff, compare
from ckptsurgeon.rules.rules import from_arguments

if TYPE_CHECKING:
    from ckptsurgeon.planning.links import Link
    from ckptsurgeon.tensors import TensorMeta


def diff(
    source: Given,
    target: Given,
    *,
    root: str | None = None,
    rename: Renames = (),
    drop: Iterable[str] = (),
    keep: Iterable[str] = (),
    adapt: Renames = (),
    rules: Rules = (),
    reverse: bool = False,
    auto: str | None = None,
    note: Note = silent,
) -> Diff:
    """What of `target` does `source` cover: matched, missing, extra and mismatched keys, after wrapper prefixes and rules.

    Raises:
        CheckpointError: one of them can't be read or built.
        RuleError: rules that match nothing or collide.

    >>> diff("fixtures/net_params.pkl", "fixtures/variants.py:NetTwoClasses").coverage.counts
    (8, 10)
    """
    seen = _opening.look(source)
    ruling = gather(from_arguments(rename, drop, (), adapt, keep), rules, reverse=reverse, schemes=False, note=note)
    aim = _opening.open_target(target, note=note)
    goal = aim.checkpoint
    given = _opening.open_source(seen, root=root, target=goal)
    ruling = learned([given], goal, aim.any_model, ruling, auto=auto)
    found = compare(given, goal, ruling.rules, ruling.outside, auto, _links)
    return replace(found, options=(*ruling.options, *(["--auto", auto] if auto else [])))


def _links(source: Mapping[str, TensorMeta], target: Mapping[str, TensorMeta]) -> Sequence[Link]:
    """Matching, loaded where keys are left over on both sides."""
    from ckptsurgeon.matching.matcher import match

    return match(source, target).links
