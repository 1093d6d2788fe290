"""From a checkpoint to the first training step: transfer into a live model, initialise what is fresh, parameter groups.

The verbs of `api` that need torch and a model; imported only when one of them is used.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ckptsurgeon import gates, opening
from ckptsurgeon.models import groups, initialize
from ckptsurgeon.models.skeleton import checkpoint_of, checkpoint_of_state_dict, state_dict_of
from ckptsurgeon.models.transfer import put
from ckptsurgeon.opening import Given
from ckptsurgeon.report import Cast, Report
from ckptsurgeon.streaming.reading import Reader
from ckptsurgeon.streaming.values import bytes_of, cast, refuse_losses, reported, tensor_from
from ckptsurgeon.surgery.plan import Step, make_plan
from ckptsurgeon.surgery.rules import Rule
from ckptsurgeon.tensors import Checkpoint
from ckptsurgeon.views import text

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
    report = Report(
        sources=(given.path,),
        target=goal.path,
        transferred=plan.transferred,
        kept=plan.kept,
        fresh=plan.fresh,
        dropped=tuple((row.source, row.reason) for row in plan.dropped),
        coverage=plan.coverage,
        casts=reported(casts),
        findings=plan.findings,
    )
    return replace(report, text=text.report(report))


def _open(source: Given, root: str | None, goal: Checkpoint) -> tuple[Checkpoint, State]:
    """The source as a checkpoint, and, when it is in memory, its live tensors."""
    if isinstance(source, nn.Module):
        state = state_dict_of(source, type(source).__name__)
        return checkpoint_of(source, type(source).__name__), state
    if isinstance(source, Mapping) and not isinstance(source, Checkpoint):
        return checkpoint_of_state_dict(source), source
    return opening.open_source(source, root=root, target=goal), {}


def _value(step: Step, given: Checkpoint, live: State, reader: Reader, casts: list[Cast]) -> torch.Tensor:
    """A step's value on the CPU. One that needs no cast is not copied: it lies in the file's mapping, or in the live source."""
    origin = given[step.sources[0][1]]
    if step.cast is None:
        if origin.name in live:
            return live[origin.name].detach()  # type: ignore[no-any-return]
        return tensor_from(reader.view(origin), origin.dtype).view(step.shape)
    parts = [bytes_of(live[origin.name].detach().cpu())] if origin.name in live else reader.parts(origin)
    made, found = cast(step.target, parts, origin.dtype, step.cast)
    data = bytearray().join(made)
    casts += found
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
