"""Puts a plan's values into a live model: every value is at hand, and every tensor is known to take one, before the first copy.

It decides nothing; the plan does. Values come through `fetch`, so that nothing here opens a file. What lies in a file is read straight into
the model's memory: never mapped, since a mapped file that becomes shorter kills the process, and never held whole. What a module's own
loading code can reach goes through torch's `load_state_dict` first, all or nothing.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ckptsurgeon.errors import CheckpointError, ModelError, TargetError, VerificationError
from ckptsurgeon.hints import shortened
from ckptsurgeon.models.init import initialize
from ckptsurgeon.models.init.user_functions import Fill
from ckptsurgeon.models.init.values import tensor_bytes
from ckptsurgeon.models.own_loading.load import load, reachable_keys
from ckptsurgeon.models.own_loading.snapshot import Undo
from ckptsurgeon.models.target import user_code
from ckptsurgeon.models.target.loaders import find_loaders, storage_of, tensors_of
from ckptsurgeon.models.target.skeleton import state_dict_of
from ckptsurgeon.planning.plan_types import Plan, resolved
from ckptsurgeon.progress import Held, phase
from ckptsurgeon.streaming.reading import Reader
from ckptsurgeon.streaming.signals import undisturbed
from ckptsurgeon.streaming.values import tensor_from
from ckptsurgeon.tensors import TensorMeta

_EXTRA = "_extra_state"


@dataclass(frozen=True)
class Waiting:
    """A value that still lies in a file."""

    meta: TensorMeta
    reader: Reader

    def into(self, tensor: torch.Tensor) -> None:
        """Read it into a tensor of its shape and dtype, on any device."""
        plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.device.type == "cpu" and tensor.is_contiguous()
        if not plain or tensor.is_conj() or tensor.is_neg() or not tensor.numel():
            tensor.copy_(at_hand(self))
            return
        memory: Any = (ctypes.c_ubyte * (tensor.numel() * tensor.element_size())).from_address(tensor.data_ptr())
        self.reader.read_into(self.meta, memoryview(memory).cast("B"))
        tensor.view(-1)[:0].zero_()  # autograd learns that the tensor has changed


Value = torch.Tensor | Waiting


def at_hand(value: Value) -> torch.Tensor:
    """A value in memory."""
    if isinstance(value, torch.Tensor):
        return value
    return tensor_from(value.reader.read(value.meta), value.meta.dtype).view(value.meta.shape)


def put(
    plan: Plan,
    model: nn.Module,
    fetch: Callable[[str], Value],
    extra: Mapping[str, Any],
    schemes: Mapping[str, Fill],
    handed: Mapping[str, Value] = {},
    held: Held = None,
) -> None:
    """Copy every transferred tensor, and every one that a rule initialises, into `model`, in place, on whatever device it is.

    Args:
        plan: made for this model.
        fetch: a target key's value, of the target's shape and dtype, on any device; raises for one that can't be had or must not be cast.
        extra: values for keys that are no tensors.
        schemes: a person's own, by name.
        handed: what the model's own loading code gets as it is, by the names that it needs.
        held: gets what a listener to the progress raises, since the model must not be left half filled.

    Raises:
        ModelError: the model is on meta, or has a tensor that can't be written to.
        TargetError: the model's own code fails; what it did outside the model can't be undone.
        VerificationError: what the model holds afterwards is not what was put in.
        The model is as it was before each of them.
        UnreadableError, StaleError: a file fails or shrinks while it is read into the model; they name what the model has of it by then.
        Extra state, and what the model's own loading code changed in it, is as it was before. An interrupt waits until the model is whole.
    """
    name = type(model).__name__
    state = state_dict_of(model, name)
    values: dict[str, Value] = {}
    copies: dict[str, str] = {}
    steps = {step.target: step for step in plan.steps}
    places = {key: place for place, key in enumerate(state)}
    for step in plan.steps:
        if step.action == "load":
            check_writable(step.target, state[step.target])
        elif step.sources:
            values[step.target] = fetch(step.target)
        elif step.fresh:
            scheme = next(str(op["scheme"]) for op in step.ops if op["op"] == "init")
            origin = resolved(step, steps)
            if origin is not step:
                copies[step.target] = origin.target
            elif scheme != "model":
                leader = plan.leader(step.target)
                owner, leaf = initialize.layer_of(model, leader)
                values[step.target] = initialize.value(scheme, leader, step.shape, step.dtype, plan.seed, owner, schemes, leaf)
    # `from(KEY)`: what that key gets, or what it has and keeps.
    values.update({key: values[copied] if copied in values else state[copied].clone() for key, copied in copies.items()})
    for key in values:
        check_writable(key, state[key])
    own = {storage_of(tensor) for tensor in tensors_of(model) if not is_traceable_wrapper_subclass(tensor)}
    # A source that shares the model's memory would change while the model does.
    values = {
        key: value.clone() if isinstance(value, torch.Tensor) and storage_of(value) in own else value
        for key, value in sorted(values.items(), key=lambda item: places[item[0]])
    }
    loaders = {path: loader for path, loader in find_loaders(model, state).items() if loader.changes}
    foreign = {key for key in values if storage_of(state[key]) not in own and state[key].numel()}
    if foreign or any(key.rpartition(".")[2] != _EXTRA or initialize.owner_of(model, key) is None for key in extra):
        foreign = set(values)  # a model whose state_dict is not its own memory
    special = reachable_keys(state, loaders, foreign)
    if not loaders and not special and not foreign:
        with undisturbed(), torch.no_grad():
            set_extra(model, state, extra, name)
            _copy(state, values, held, lambda: reset_extra(model, state, extra, name))
        return
    computed = {step.target for step in plan.steps if step.action == "load"}
    through = {key: _owned(value) for key, value in (*((key, values[key]) for key in values if key in special), *handed.items())}
    rest = {key: value for key, value in values.items() if key not in special}
    undo = load(model, state, through, extra, loaders, plan.versions, rest, computed)
    after = state_dict_of(model, name)
    reachable = {key for loader in loaders.values() for key in loader.keys}
    wrong = [key for key in foreign - reachable if not _same(after.get(key), at_hand(values[key]))]
    if wrong:
        with undisturbed():
            undo()
        raise VerificationError("the model does not hold what was put into it; it is as it was before", key=wrong[0])
    with undisturbed(), torch.no_grad():
        _copy(after, rest, held, undo, "; what its own loading code changed in it is undone")


def _owned(value: Value) -> torch.Tensor:
    """A value that the model's code may change."""
    return at_hand(value) if isinstance(value, Waiting) else value.detach().clone()


def _copy(state: Mapping[str, Any], values: Mapping[str, Value], held: Held, undo: Undo, undone: str = "") -> None:
    """Copy values into the model. Where one can't be read, those before it stay, and `undo` is run; `undone` says so."""
    done: list[str] = []
    with phase("transferring", sum(_size(state[key]) for key in values), held=held) as advance:
        for key, value in values.items():
            try:
                state[key].copy_(value) if isinstance(value, torch.Tensor) else value.into(state[key])
            except BaseException as error:
                undo()
                if isinstance(error, CheckpointError):
                    error.reason += f"; the model holds {len(done)} of {len(values)} new tensors by now, and a part of {key}{undone}"
                    error.problems = shortened([f"{one}: has its new value" for one in done])
                    error.hint = "transfer again when the file is whole, or build the model anew"
                raise
            done.append(key)
            advance(_size(state[key]))


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def check_writable(key: str, tensor: torch.Tensor) -> None:
    """Raises ModelError for a tensor of the model that can't take values in place."""
    if tensor.device.type == "meta":
        raise ModelError("the model is on the meta device and has no memory", key=key, hint="model.to_empty(device='cpu') first")
    if any(step == 0 and size > 1 for size, step in zip(tensor.shape, tensor.stride(), strict=True)):
        raise ModelError(
            "can't take values: it is expanded, so that its elements share memory", key=key, hint="give the model a clone of it"
        )
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ModelError("can't take values: it was made in inference mode", key=key, hint="build the model outside torch.inference_mode()")


def set_extra(model: nn.Module, state: Mapping[str, Any], extra: Mapping[str, Any], name: str) -> None:
    """Give each module its extra state; when one refuses, all have what they had."""
    done: list[str] = []
    try:
        for key, value in extra.items():
            done.append(key)
            _set_one(model, key, value, name)
    except BaseException:
        reset_extra(model, state, done, name)
        raise


def reset_extra(model: nn.Module, state: Mapping[str, Any], keys: Iterable[str], name: str) -> None:
    """Give modules the extra state that `state` has of them again."""
    for key in keys:
        with suppress(TargetError):
            _set_one(model, key, state[key], name)


def _set_one(model: nn.Module, key: str, value: Any, name: str) -> None:
    owner = initialize.owner_of(model, key)
    assert owner is not None
    user_code.call(name, owner.set_extra_state, value)


def _same(found: Any, value: torch.Tensor) -> bool:
    """Whether two tensors have the same bits, on whatever devices."""
    if not isinstance(found, torch.Tensor) or found.shape != value.shape:
        return False
    return tensor_bytes(found.to(value.dtype)) == tensor_bytes(value)
