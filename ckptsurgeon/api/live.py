"""From a checkpoint to the first training step: transfer into a live model, initialise what is fresh, parameter groups.

The verbs of `api` that need torch and a model; imported only when one of them is used.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from ckptsurgeon.api import gates, opening
from ckptsurgeon.api.opening import Given
from ckptsurgeon.api.provenance import still_fresh
from ckptsurgeon.errors import ModelError, RootError, StaleError
from ckptsurgeon.models import groups, initialize
from ckptsurgeon.models.official import at_root
from ckptsurgeon.models.skeleton import checkpoint_of, checkpoint_of_state_dict, state_dict_of
from ckptsurgeon.models.transfer import put
from ckptsurgeon.models.values import tensor_bytes
from ckptsurgeon.report import Cast, Finding, Report
from ckptsurgeon.streaming.apply import with_data
from ckptsurgeon.streaming.reading import Reader
from ckptsurgeon.streaming.values import Buffer, cast, refuse_losses, reported, tensor_from
from ckptsurgeon.surgery.plan import Plan, Step, make_plan
from ckptsurgeon.surgery.rules import Rule
from ckptsurgeon.tensors import Checkpoint
from ckptsurgeon.views import text

if TYPE_CHECKING:
    import torch
    from torch import nn

State = Mapping[str, Any]


def transfer(
    source: Given,
    model: nn.Module,
    rules: Sequence[Rule],
    *,
    root: str | None,
    seed: int,
    allow_cast: Iterable[str],
    min_coverage: float | None,
    strict: bool,
) -> Report:
    """See `ckptsurgeon.transfer`."""
    goal = checkpoint_of(model, type(model).__name__)
    given, live = _open(source, root, goal)
    plan = make_plan([given], goal, rules, seed=seed, allow_cast=allow_cast)
    gates.check(plan, min_coverage=min_coverage, strict=strict)
    with Reader([given]) as reader:
        casts: list[Cast] = []
        values = {step.target: _value(step, given, live, reader, casts) for step in plan.steps if step.sources}
        refuse_losses(casts, plan.allow_cast)
        reader.check_unchanged()
        extra = {entry.target: given.entries[entry.source[1]] for entry in plan.entries if entry.source is not None}
        put(plan, model, values.__getitem__, extra)
        _check_still_unchanged(reader)
    report = Report(
        sources=(given.path,),
        target=goal.path,
        transferred=plan.transferred,
        kept=plan.kept,
        fresh=plan.fresh,
        dropped=tuple((row.source, row.reason) for row in plan.dropped),
        coverage=plan.coverage,
        casts=reported(casts),
        findings=(*plan.findings, *_untrained(plan, given)),
    )
    return replace(report, text=text.report(report))


def _check_still_unchanged(reader: Reader) -> None:
    # Values are copied straight from the file's pages: reading them all beforehand would take the memory of a second model.
    try:
        reader.check_unchanged()
    except StaleError as error:
        error.reason = "changed while it was copied into the model, which may hold a mixture now"
        error.hint = "transfer again when nothing writes to it"
        raise


def _untrained(plan: Plan, given: Checkpoint) -> list[Finding]:
    keys = still_fresh(plan, [given])
    if not keys:
        return []
    words = f"{len(keys)} of the transferred keys are fresh on the source's own record: for groups, give param_groups the file instead"
    return [Finding("fresh-in-source", words, keys[0], "note")]


def _open(source: Given, root: str | None, goal: Checkpoint) -> tuple[Checkpoint, State]:
    """The source as a checkpoint, and, when it is in memory, its live tensors."""
    from torch import nn

    if root is not None and isinstance(source, (nn.Module, Mapping)) and not isinstance(source, Checkpoint):
        source = at_root(source, root)
        if not isinstance(source, Mapping):
            raise RootError(f"has no state_dict at {root!r}", path="the source")
    if isinstance(source, nn.Module):
        state = state_dict_of(source, type(source).__name__)
        return checkpoint_of(source, type(source).__name__), state
    if isinstance(source, Mapping) and not isinstance(source, Checkpoint):
        return checkpoint_of_state_dict(source), source
    return opening.open_source(source, root=root, target=goal), {}


def _value(step: Step, given: Checkpoint, live: State, reader: Reader, casts: list[Cast]) -> torch.Tensor:
    """A step's value. One that needs no cast is not copied: it lies in the file's mapping, or in the live source."""
    key = step.sources[0][1]
    if key in live:
        tensor: torch.Tensor = live[key].detach()
        if tensor.device.type == "meta":
            raise ModelError("has no values: it is on the meta device", path=given.path, key=key)
        if step.cast is None:
            return tensor
        parts: Iterable[Buffer] = [tensor_bytes(tensor)]
    else:
        origin = with_data(given, key)
        if step.cast is None:
            return tensor_from(reader.view(origin), origin.dtype).view(step.shape)
        parts = reader.parts(origin)
    data = bytearray().join(cast(step.target, parts, given[key].dtype, step.cast, casts))
    return tensor_from(data, step.dtype).view(step.shape)


def _record(source: Any) -> Any:
    """What says which keys are fresh: a report, plan or checkpoint as it is; a path is opened."""
    return opening.open_source(source) if isinstance(source, (str, os.PathLike)) else source


def param_groups(
    model: nn.Module,
    source: Any,
    *,
    lr: float | None,
    fresh_lr: float | None,
    fresh_scale: float | None,
    weight_decay: float | None,
    overrides: Mapping[str, float] | None,
) -> list[dict[str, Any]]:
    """See `ckptsurgeon.param_groups`."""
    if isinstance(source, Mapping) and not isinstance(source, Checkpoint):
        overrides, source = {**source, **(overrides or {})}, ()
    return groups.param_groups(
        model, _record(source), lr=lr, fresh_lr=fresh_lr, fresh_scale=fresh_scale, weight_decay=weight_decay, overrides=overrides
    )


def initialize_fresh(model: nn.Module, source: Any, scheme: str | Mapping[str, str], seed: int) -> tuple[str, ...]:
    """See `ckptsurgeon.initialize`."""
    return initialize.initialize(model, _record(source), scheme, seed=seed)
