"""Finds the values of a merged file that loading code determines: those that a module's own code makes of values of another version, and
those of tensors whose memory overlaps. torch loads them into a fresh model; a second load, of what the file will hold, must give the same
model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.errors import PlanError
from ckptsurgeon.loading import Loader
from ckptsurgeon.models.init.values import tensor_bytes
from ckptsurgeon.models.own_loading.load import load, reachable_keys
from ckptsurgeon.models.target.skeleton import state_dict_of
from ckptsurgeon.planning.plan_types import Plan, Step
from ckptsurgeon.tensors import Checkpoint

Fetch = Callable[[str], torch.Tensor]


def is_needed(plan: Plan, target: Checkpoint, versionless: bool) -> bool:
    """Whether loading code determines any value, or must be tried because the file format keeps no versions."""
    return bool(plan.loaded or target.overlaps or (versionless and target.loaded_keys))


def loaded_values(
    plan: Plan, target: Checkpoint, build: Callable[[int], nn.Module], fetch: Fetch, extra: Mapping[str, Any], versionless: bool
) -> dict[str, torch.Tensor]:
    """The values to write instead of the plan's, by key, in the model's dtype.

    Args:
        build: returns a fresh model for a seed.
        fetch: returns the plan's value of a key, or of a name in `plan.handed`, in the plan's dtype.
        extra: values that are not tensors, by key.
        versionless: whether the file's format keeps no module versions.

    Raises:
        PlanError: no file of this format would load to the same model.
        TargetError: the model's own code fails.
    """
    loaders = {path: loader for path, loader in target.loaders.items() if loader.changes}
    steps = {step.target: step for step in plan.steps}
    reference = build(plan.seed)
    state = state_dict_of(reference, target.path)
    keys = reachable_keys(state, loaders, [key for group in target.overlaps for key in group]) & steps.keys()
    computed = {key for key, step in steps.items() if step.action == "load"}
    inputs = {key: fetch(key) for key in (*(key for key in keys if _has_value(steps[key])), *plan.handed)}
    later = [key for key, step in steps.items() if (step.sources and key not in keys) or step.holds_own]
    load(reference, state, inputs, extra, loaders, plan.versions, later, computed)
    expected = state_dict_of(reference, target.path)
    chosen = {key for path in plan.loaded for key in loaders[path].keys} | {key for group in target.overlaps for key in group}
    recorded = {} if versionless else {path: plan.module_metadata[path] for path in loaders if path in plan.module_metadata}
    differing = None
    for trial in (chosen, keys) if versionless else (chosen,):
        values = {key: expected[key].detach().clone() for key in trial & keys}
        as_written = {key: _cast(values[key], steps[key]) if key in values else fetch(key) for key in keys}
        reloaded = build(plan.seed)
        load(reloaded, state_dict_of(reloaded, target.path), as_written, extra, loaders, recorded, later)
        differing = _first_difference(reference, reloaded, keys, steps, loaders)
        if differing is None:
            return values
    raise _refusal(str(differing), target, loaders, versionless, bool(computed))


def _has_value(step: Step) -> bool:
    return (bool(step.sources) and step.action != "load") or (step.fresh and step.schemes != ("model",))


def _cast(value: torch.Tensor, step: Step) -> torch.Tensor:
    return value.to(getattr(torch, BY_CODE[step.dtype].torch))


def _first_difference(
    first: nn.Module, second: nn.Module, keys: Iterable[str], steps: Mapping[str, Step], loaders: Mapping[str, Loader]
) -> str | None:
    """The first tensor with different values in two models: these keys compared in the file's dtype, then non-persistent buffers."""
    states = [state_dict_of(model, "model") for model in (first, second)]
    for key in keys:
        pair = [_cast(state[key].detach(), steps[key]) for state in states]
        if tensor_bytes(pair[0]) != tensor_bytes(pair[1]):
            return key
    hidden = [dict(model.named_buffers(remove_duplicate=False)) for model in (first, second)]
    for name, tensor in hidden[0].items():
        below = any(name.startswith(f"{path}." if path else "") for path in loaders)
        cast = any(BY_CODE[steps[key].dtype].torch != str(states[0][key].dtype).removeprefix("torch.") for key in keys)
        if below and not cast and name not in states[0] and tensor_bytes(tensor) != tensor_bytes(hidden[1][name]):
            return name
    return None


def _refusal(key: str, target: Checkpoint, loaders: Mapping[str, Loader], versionless: bool, computed: bool) -> PlanError:
    path = max((path for path in loaders if not path or key.startswith(f"{path}.")), key=len, default="")
    described = f"{path or 'the model itself'}, a {loaders[path].name}," if path in loaders else target.path
    if versionless:
        reason = f"{described} loads by the version of its values, which safetensors does not keep: it would load to another model"
        return PlanError(reason, path=target.path, key=key, hint="write a .pt file instead: -o OUT.pt")
    cause = "is computed from keys that the source does not have" if computed else "would be fresh"
    return PlanError(
        f"{described} changes what it loads every time, and a part of its values {cause}: no file loads to the same model",
        path=target.path,
        key=key,
        hint=f"keep the model's own values: drop=[{f'{path}.**' if path else '**'!r}]",
    )
