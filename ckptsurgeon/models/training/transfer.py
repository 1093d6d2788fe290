"""Puts a plan's values into a live model. Before the first copy, every value is available and every tensor is known to be writable.

The plan decides which value goes where. Values come through `fetch`, so nothing here opens a file. A value in a file is read directly into
the model's memory, without a memory map: a mapped file that shrinks would kill the process. Keys that a module's own loading code can reach
go through torch's `load_state_dict` first, all or nothing.

To a CUDA device values go through two page-locked buffers: while one is copied, the other is filled, again only when the copy out of it has
ended; all copies have ended when the block ends.
"""

from __future__ import annotations

import ctypes
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ckptsurgeon.errors import CheckpointError, ModelError, TargetError, VerificationError
from ckptsurgeon.hints import shortened
from ckptsurgeon.models.init.schemes import layer_of, owner_of
from ckptsurgeon.models.init.schemes import value as scheme_value
from ckptsurgeon.models.init.user_functions import Fill
from ckptsurgeon.models.init.values import tensor_bytes
from ckptsurgeon.models.own_loading.load import load, reachable_keys
from ckptsurgeon.models.own_loading.snapshot import Undo
from ckptsurgeon.models.target import user_code
from ckptsurgeon.models.target.loaders import changing_loaders, storage_of, tensors_of
from ckptsurgeon.models.target.skeleton import state_dict_of
from ckptsurgeon.planning.plan_types import Plan, resolved
from ckptsurgeon.progress import Held, phase
from ckptsurgeon.storage.copying import BUFFER
from ckptsurgeon.streaming.in_threads import in_threads
from ckptsurgeon.streaming.reading import Read, Reader
from ckptsurgeon.streaming.signals import undisturbed
from ckptsurgeon.streaming.values import Buffer, tensor_from
from ckptsurgeon.tensors import TensorMeta

_EXTRA = "_extra_state"
BUFFERS = 2


@dataclass(frozen=True)
class InFile:
    """A value that is in a file and not read yet."""

    meta: TensorMeta
    reader: Reader

    def into(self, tensor: torch.Tensor, stage: Stage) -> Iterator[Read]:
        """The reads that bring it into a tensor of its shape and dtype; none where that takes more, which is done here: on any device."""
        plain = type(tensor) in (torch.Tensor, nn.Parameter) and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()
        device = tensor.device.type if plain and tensor.numel() else None
        if device == "cpu":
            memory: Any = (ctypes.c_ubyte * (tensor.numel() * tensor.element_size())).from_address(tensor.data_ptr())
            tensor.view(-1)[:0].zero_()  # bumps the version counter, so that autograd notices the change
            yield from self.reader.reads(self.meta, memoryview(memory).cast("B"))
        elif device == "cuda" and not tensor.is_quantized:
            stage.copy(self.reader.parts(self.meta), tensor)
        else:
            tensor.copy_(in_memory(self))


Value = torch.Tensor | InFile


def in_memory(value: Value) -> torch.Tensor:
    """The value as a tensor; one in a file is read."""
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
    """Copy all transferred tensors, and those that a rule initialises, into `model`, in place, on any device.

    Args:
        plan: made for this model.
        fetch: returns a target key's value, of the target's shape and dtype, on any device; raises if it has none or a cast is refused.
        extra: values that are not tensors, by key.
        schemes: the functions of user-defined schemes, by name.
        handed: values that the model's own loading code gets unchanged, by the names that this code expects.
        held: collects what a progress callback raises, since the model must not be left half filled.

    Raises:
        ModelError: the model is on meta, or has a tensor that can't be written to. The model is unchanged.
        TargetError: the model's own code fails; what it did outside the model can't be undone. The model is unchanged.
        VerificationError: the model does not have the new values afterwards. They are undone.
        UnreadableError, StaleError: a file fails or shrinks while it is read; the error lists the tensors that have new values by then.
            Extra state, and what the model's own loading code changed, is undone. An interrupt waits until all values are copied.
    """
    name = type(model).__name__
    state = state_dict_of(model, name)
    values: dict[str, Value] = {}
    copies: dict[str, str] = {}
    steps = {step.target: step for step in plan.steps}
    positions = {key: position for position, key in enumerate(state)}
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
                owner, leaf = layer_of(model, leader)
                values[step.target] = scheme_value(scheme, leader, step.shape, step.dtype, plan.seed, owner, schemes, leaf)
    # `from(KEY)` gives the value that KEY gets, or keeps.
    values.update({key: values[copied] if copied in values else state[copied].clone() for key, copied in copies.items()})
    for key in values:
        check_writable(key, state[key])
    own_storages = {storage_of(tensor) for tensor in tensors_of(model) if not is_traceable_wrapper_subclass(tensor)}
    # A source that shares the model's memory would change while the model does.
    values = {
        key: value.clone() if isinstance(value, torch.Tensor) and storage_of(value) in own_storages else value
        for key, value in sorted(values.items(), key=lambda item: positions[item[0]])
    }
    loaders = changing_loaders(model, state)
    foreign = {key for key in values if storage_of(state[key]) not in own_storages and state[key].numel()}
    if foreign or any(key.rpartition(".")[2] != _EXTRA or owner_of(model, key) is None for key in extra):
        foreign = set(values)  # the state_dict does not share the model's memory
    through_loader = reachable_keys(state, loaders, foreign)
    if not loaders and not through_loader and not foreign:
        with undisturbed(), torch.no_grad():
            set_extra(model, state, extra, name)
            _copy(state, values, held, lambda: reset_extra(model, state, extra, name))
        return
    computed = {step.target for step in plan.steps if step.action == "load"}
    loader_values = {
        key: _owned(value) for key, value in (*((key, values[key]) for key in values if key in through_loader), *handed.items())
    }
    rest = {key: value for key, value in values.items() if key not in through_loader}
    later = {*rest, *(step.target for step in plan.steps if step.holds_own)}
    undo = load(model, state, loader_values, extra, loaders, plan.versions, later, computed)
    after = state_dict_of(model, name)
    reachable = {key for loader in loaders.values() for key in loader.keys}
    wrong = [key for key in foreign - reachable if not _same_bits(after.get(key), in_memory(values[key]))]
    if wrong:
        with undisturbed():
            undo()
        raise VerificationError("the model does not have the values that were loaded into it; it is unchanged", key=wrong[0])
    with undisturbed(), torch.no_grad():
        _copy(after, rest, held, undo, "; what its own loading code changed in it is undone")


def _owned(value: Value) -> torch.Tensor:
    """A copy of a value, which the model's code may change."""
    return in_memory(value) if isinstance(value, InFile) else value.detach().clone()


@dataclass(frozen=True, slots=True)
class _Part:
    """A read for a key's tensor, or None where nothing is left to read, and whether it is the last one for it."""

    key: str
    read: Read | None
    last: bool

    @property
    def nbytes(self) -> int:
        return 0 if self.read is None else self.read.nbytes

    def do(self) -> None:
        if self.read is not None:
            self.read.do()


def _parts(state: Mapping[str, Any], values: Mapping[str, Value], stage: Stage) -> Iterator[_Part]:
    for key, value in values.items():
        if isinstance(value, torch.Tensor):
            state[key].copy_(value)
        reads = [*value.into(state[key], stage)] if isinstance(value, InFile) else []
        yield from (_Part(key, read, last=False) for read in reads[:-1])
        yield _Part(key, reads[-1] if reads else None, last=True)


def _copy(state: Mapping[str, Any], values: Mapping[str, Value], held: Held, undo: Undo, undone: str = "") -> None:
    """Copy values into the model. If a value can't be read, those copied before stay, and `undo` is run; `undone` says so."""
    done: list[str] = []
    with phase("transferring", sum(_size(state[key]) for key in values), held=held) as advance:
        try:
            with Stage() as stage, in_threads(_Part.do, _parts(state, values, stage)) as results:
                for part, _ in results:
                    if part.last:
                        done.append(part.key)
                        advance(_size(state[part.key]))
        except BaseException as error:
            undo()
            if isinstance(error, CheckpointError):
                say_half_filled(
                    error, done, f"the model holds {len(done)} of {len(values)} new tensors by now, and perhaps parts of more{undone}"
                )
            raise


def say_half_filled(error: CheckpointError, done: Iterable[str], words: str) -> None:
    """Add to an error what the model holds by now."""
    error.reason += f"; {words}"
    error.problems = shortened([f"{key}: has its new value" for key in done])
    error.hint = "transfer again when the file is whole, or build the model anew"


def _size(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def check_writable(key: str, tensor: torch.Tensor) -> None:
    """ModelError for a tensor of the model that can't be written to in place."""
    if tensor.device.type == "meta":
        raise ModelError("the model is on the meta device and has no memory", key=key, hint="model.to_empty(device='cpu') first")
    if _shares_memory_with_itself(tensor):
        raise ModelError(
            "can't be written to: its elements share memory, as an expanded tensor's do", key=key, hint="give the model a clone of it"
        )
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ModelError(
            "can't be written to: it was made in inference mode", key=key, hint="build the model outside torch.inference_mode()"
        )


def set_extra(model: nn.Module, state: Mapping[str, Any], extra: Mapping[str, Any], name: str) -> None:
    """Set each module's extra state; if one refuses, restore all."""
    done: list[str] = []
    try:
        for key, value in extra.items():
            done.append(key)
            _set_extra_state(model, key, value, name)
    except BaseException:
        reset_extra(model, state, done, name)
        raise


def reset_extra(model: nn.Module, state: Mapping[str, Any], keys: Iterable[str], name: str) -> None:
    """Set the modules' extra state back to what `state` has."""
    for key in keys:
        with suppress(TargetError):
            _set_extra_state(model, key, state[key], name)


def _set_extra_state(model: nn.Module, key: str, value: Any, name: str) -> None:
    owner = owner_of(model, key)
    assert owner is not None
    user_code.call(name, owner.set_extra_state, value)


def _same_bits(current: Any, value: torch.Tensor) -> bool:
    """Whether two tensors have the same bits, on any devices."""
    if not isinstance(current, torch.Tensor) or current.shape != value.shape:
        return False
    return tensor_bytes(current.to(value.dtype)) == tensor_bytes(value)


def _shares_memory_with_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements of a tensor are one number in memory (`expand`, `as_strided`, `unfold`), so that it can't hold any values."""
    reach = 1
    for step, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)) if tensor.numel() else ():
        if size > 1 and step < reach:  # perhaps: then each element's place is looked at
            extent = 1 + sum((many - 1) * by for many, by in zip(tensor.shape, tensor.stride(), strict=True))
            places = torch.arange(extent).as_strided(tensor.shape, tensor.stride())
            return len(set(places.flatten().tolist())) < tensor.numel()
        reach += (size - 1) * step
    return False


class Stage:
    """The buffers, in the order of their use, each with the event behind the last copy out of it. They are made when first needed."""

    def __init__(self) -> None:
        self._turns: deque[tuple[torch.Tensor, torch.cuda.Event | None]] = deque()

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while self._turns:
            _wait(self._turns.popleft()[1])

    def copy(self, parts: Iterable[Buffer], tensor: torch.Tensor) -> None:
        """Fill a contiguous tensor on a CUDA device with its bytes, which come in parts."""
        if not self._turns:
            self._turns.extend((_page_locked(BUFFER), None) for _ in range(BUFFERS))
        done, flat = 0, tensor.view(-1).view(torch.uint8)
        for part in parts:
            for piece in torch.split(tensor_from(part, "U8"), BUFFER):
                buffer, copied = self._turns.popleft()
                _wait(copied)
                filled = buffer[: len(piece)].copy_(piece)
                self._turns.append((buffer, _handed_over(filled, flat[done : done + len(piece)])))
                done += len(piece)
        assert done == len(flat)


def _page_locked(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def _handed_over(filled: torch.Tensor, target: torch.Tensor) -> torch.cuda.Event:
    """The event behind a copy that the device does later."""
    target.copy_(filled, non_blocking=True)
    copied: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record(torch.cuda.current_stream(target.device))
    return copied


def _wait(copied: torch.cuda.Event | None) -> None:
    if copied is not None:
        copied.synchronize()
