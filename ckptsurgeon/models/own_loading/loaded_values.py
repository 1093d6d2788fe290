"""The values of a merged file that loading decides: those that a module's own code makes of values of another version, and those of tensors
whose memory overlaps. Each is found by torch's load into a fresh model, and the file is held against that by a second load.
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
    """Whether loading decides any value, or has to be tried since the file keeps no versions."""
    return bool(plan.loaded or target.overlaps or (versionless and target.loaded_keys))


def loaded_values(
    plan: Plan, target: Checkpoint, build: Callable[[int], nn.Module], fetch: Fetch, extra: Mapping[str, Any], versionless: bool
) -> dict[str, torch.Tensor]:
    """The values to write instead of the plan's, by key, in the model's dtype.

    Args:
        build: a fresh model from a seed.
        fetch: the plan's value of a key, in the plan's dtype, and what the plan hands to torch's load, by name.
        extra: values of keys that are no tensors.
        versionless: the file's format keeps no versions.

    Raises:
        PlanError: no such file loads to the same model.
        TargetError: the model's own code fails.
    """
    loaders = {path: loader for path, loader in target.loaders.items() if loader.changes}
    steps = {step.target: step for step in plan.steps}
    truth = build(plan.seed)
    state = state_dict_of(truth, target.path)
    keys = reachable_keys(state, loaders, [key for group in target.overlaps for key in group]) & steps.keys()
    computed = {key for key, step in steps.items() if step.action == "load"}
    given = {key: fetch(key) for key in (*(key for key in keys if _is_given(steps[key])), *plan.handed)}
    others = [key for key, step in steps.items() if step.sources and key not in keys]
    load(truth, state, given, extra, loaders, plan.versions, others, computed)
    wanted = state_dict_of(truth, target.path)
    chosen = {key for path in plan.loaded for key in loaders[path].keys} | {key for group in target.overlaps for key in group}
    recorded = {} if versionless else {path: plan.module_metadata[path] for path in loaders if path in plan.module_metadata}
    unlike = None
    for trial in (chosen, keys) if versionless else (chosen,):
        values = {key: wanted[key].detach().clone() for key in trial & keys}
        as_written = {key: _cast(values[key], steps[key]) if key in values else fetch(key) for key in keys}
        again = build(plan.seed)
        load(again, state_dict_of(again, target.path), as_written, extra, loaders, recorded, others)
        unlike = _unlike(truth, again, keys, steps, loaders)
        if unlike is None:
            return values
    raise _refusal(str(unlike), target, loaders, versionless, bool(computed))


def _is_given(step: Step) -> bool:
    return (bool(step.sources) and step.action != "load") or (step.fresh and step.schemes != ("model",))


def _cast(value: torch.Tensor, step: Step) -> torch.Tensor:
    return value.to(getattr(torch, BY_CODE[step.dtype].torch))


def _unlike(one: nn.Module, other: nn.Module, keys: Iterable[str], steps: Mapping[str, Step], loaders: Mapping[str, Loader]) -> str | None:
    """The first tensor that two models have by different values: of these keys in the file's dtype, and of what no file holds."""
    states = [state_dict_of(model, "model") for model in (one, other)]
    for key in keys:
        pair = [_cast(state[key].detach(), steps[key]) for state in states]
        if tensor_bytes(pair[0]) != tensor_bytes(pair[1]):
            return key
    hidden = [dict(model.named_buffers(remove_duplicate=False)) for model in (one, other)]
    for name, tensor in hidden[0].items():
        below = any(name.startswith(f"{path}." if path else "") for path in loaders)
        cast = any(BY_CODE[steps[key].dtype].torch != str(states[0][key].dtype).removeprefix("torch.") for key in keys)
        if below and not cast and name not in states[0] and tensor_bytes(tensor) != tensor_bytes(hidden[1][name]):
            return name
    return None


def _refusal(key: str, target: Checkpoint, loaders: Mapping[str, Loader], versionless: bool, computed: bool) -> PlanError:
    path = max((path for path in loaders if not path or key.startswith(f"{path}.")), key=len, default="")
    who = f"{path or 'the model itself'}, a {loaders[path].name}," if path in loaders else target.path
    if versionless:
        words = f"{who} loads by the version of its values, which safetensors does not keep: the file would not load to the same model"
        return PlanError(words, path=target.path, key=key, hint="write a .pt file instead: -o OUT.pt")
    part = "is computed from keys that it has not" if computed else "would be fresh"
    return PlanError(
        f"{who} changes what it loads every time, and a part of its values {part}: no file loads to the same model",
        path=target.path,
        key=key,
        hint=f"leave it as the model makes it: drop=[{f'{path}.**' if path else '**'!r}]",
    )
