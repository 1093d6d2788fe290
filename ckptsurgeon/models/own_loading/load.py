"""Loads values into a model by torch's `load_state_dict`, so that its modules' own loading code runs; on failure the model is unchanged.

Only the keys that such code can reach are loaded this way, as values that the code may change. For every other key the model's own tensor
is passed: that changes nothing and needs no second copy.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from ckptsurgeon.errors import CheckpointError, TargetError
from ckptsurgeon.loading import Loader
from ckptsurgeon.models.own_loading.snapshot import Undo, take_snapshot, values_of
from ckptsurgeon.models.target import user_code
from ckptsurgeon.models.target.loaders import storage_of, tensors_of
from ckptsurgeon.models.target.skeleton import state_dict_of, tie_key
from ckptsurgeon.streaming.signals import undisturbed

OUTSIDE = "the model is as it was before; what its loading code did outside of it can't be undone"


def reachable_keys(state: Mapping[str, Any], loaders: Mapping[str, Loader], also: Collection[str] = ()) -> set[str]:
    """The keys that loading code can reach, those of `also`, and all keys that share memory with one of them."""
    keys = {key for loader in loaders.values() if loader.changes for key in loader.keys} | set(also)
    memory = {storage_of(state[key]) for key in keys if isinstance(state.get(key), torch.Tensor) and state[key].numel()}
    return keys | {key for key, value in state.items() if isinstance(value, torch.Tensor) and storage_of(value) in memory}


def load(
    model: nn.Module,
    state: Mapping[str, Any],
    values: Mapping[str, torch.Tensor],
    extra: Mapping[str, Any],
    loaders: Mapping[str, Loader],
    versions: Mapping[str, Any],
    later: Collection[str] = (),
    computed: Collection[str] = (),
) -> Undo:
    """Run `model.load_state_dict(strict=False)` on `values`, which the model's code may change, and return a function that undoes it.

    Args:
        extra: values that are not tensors, by key.
        versions: the metadata recorded for these modules when the values were saved.
        later: keys that the caller writes afterwards; here they keep the model's own value.
        computed: keys whose value the model's code must compute from other keys.

    Raises:
        TargetError: the model's code fails, refuses the values, or gives the model other tensors. The model is unchanged.
    """
    name = type(model).__name__
    inputs: OrderedDict[str, Any] = OrderedDict()
    for key, model_value in state.items():
        if key in values or key in extra:
            inputs[key] = values[key] if key in values else extra[key]
        elif key in later:
            inputs[key] = model_value
    inputs.update({key: value for key, value in values.items() if key not in state})
    metadata = {path: module_metadata for path, module_metadata in getattr(state, "_metadata", {}).items() if path not in loaders}
    inputs._metadata = copy.deepcopy({**metadata, **versions})  # type: ignore[attr-defined]
    restore = _snapshot(model, state, values, loaders)
    before = values_of(state, computed)

    def undo() -> None:
        restore()
        _restore_extra_state(model, state, extra, name)

    try:
        result = user_code.call(name, model.load_state_dict, inputs, strict=False)
        after = values_of(state_dict_of(model, name), before)
        left_out = getattr(result, "missing_keys", None) or ()  # with keys that hooks filled in
        missing = {key for key in left_out if after.get(key) == before.get(key)}
        filled = {tie_key(state[key]) for key in computed if key not in missing}  # a tied key gets its value through another name
        _check_computed([key for key in state if key in computed and key in missing and tie_key(state[key]) not in filled], name)
        _check_not_lost([key for key in getattr(result, "unexpected_keys", None) or () if key in state and key in values], name)
        _check_same_tensors(state, state_dict_of(model, name), name)
    except BaseException as error:
        with undisturbed():
            undo()
        if isinstance(error, CheckpointError):
            error.reason += f"; {OUTSIDE}"
        raise
    return undo


def _snapshot(model: nn.Module, state: Mapping[str, Any], values: Mapping[str, torch.Tensor], loaders: Mapping[str, Loader]) -> Undo:
    """Snapshot all that loading may change: modules with loading code and their submodules, and tensors that share memory with `values`."""
    custom = {path: module for path, module in model.named_modules(remove_duplicate=False) if path in loaders and loaders[path].changes}
    modules = [submodule for module in custom.values() for submodule in module.modules()]
    memory = {storage_of(state[key]) for key in values if isinstance(state.get(key), torch.Tensor)}
    all_tensors = tensors_of(model)
    if not memory <= {storage_of(tensor) for tensor in all_tensors}:  # the state_dict's tensors are not the model's own
        return take_snapshot([*model.modules()], all_tensors)
    tensors = [tensor for module in custom.values() for tensor in tensors_of(module)]
    return take_snapshot(modules, [*tensors, *(tensor for tensor in all_tensors if storage_of(tensor) in memory)])


def _restore_extra_state(model: nn.Module, state: Mapping[str, Any], extra: Mapping[str, Any], name: str) -> None:
    """Set the modules' extra state back to what `state` has."""
    modules = dict(model.named_modules(remove_duplicate=False))
    for key in extra:
        module = modules.get(key.rpartition(".")[0])
        try:
            if module is not None:
                user_code.call(name, module.set_extra_state, state[key])
        except TargetError:
            continue  # a module that refuses its own extra state has taken no other either


def _check_computed(missing: list[str], name: str) -> None:
    if missing:
        raise TargetError(
            "the model's loading code should have computed a value, but did not: what it computes depends on values, not on names alone",
            path=name,
            key=missing[0],
            hint="load the file by torch once, save model.state_dict(), and take that file",
        )


def _check_not_lost(lost: list[str], name: str) -> None:
    if lost:
        raise TargetError(
            f"its load_state_dict does not take {len(lost)} of its own state_dict's keys, so their values would be lost",
            path=name,
            key=lost[0],
            hint="the hook that renames them needs one that renames them back: register_load_state_dict_pre_hook",
        )


def _check_same_tensors(before: Mapping[str, Any], after: Mapping[str, Any], name: str) -> None:
    def shapes(state: Mapping[str, Any]) -> dict[str, Any]:
        return {key: (tuple(value.shape), value.dtype) for key, value in state.items() if isinstance(value, torch.Tensor)}

    old, new = shapes(before), shapes(after)
    changed = next((key for key in (*old, *new) if old.get(key) != new.get(key)), None)
    if changed is not None:
        raise TargetError(
            "the model's loading code replaces tensors by tensors of another shape or dtype, which the plan can't take into account",
            path=name,
            key=changed,
            hint="load the file by torch once, save model.state_dict(), and take that file",
        )
