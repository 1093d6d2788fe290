"""Prepares a plan's values for a sharded model: some are read from files block by block, the others are computed whole and narrowed.

Before anything is changed, each value is either known to be in open files, within their bounds, or in memory as this rank's blocks, and the
casts' losses are counted. If a value needs a whole sharded tensor, all ranks gather it together, in the plan's order.

`plain_layer` is an unsharded copy of a layer: its class without FSDP's, whole parameters without values, no hooks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from ckptsurgeon.dtypes import BY_CODE, widens
from ckptsurgeon.errors import ModelError
from ckptsurgeon.models.init.schemes import KEEP, concrete, layer_of
from ckptsurgeon.models.init.schemes import value as scheme_value
from ckptsurgeon.models.init.user_functions import Fill
from ckptsurgeon.models.sharded.planner import own_parts, whole
from ckptsurgeon.models.sharded.ranks import Ranks
from ckptsurgeon.models.sharded.values import Part, Ready, Stored, Value, narrowed
from ckptsurgeon.models.target.sharding import is_sharded, own_class
from ckptsurgeon.planning.plan_types import Plan, Step, resolved
from ckptsurgeon.progress import nobody, phase
from ckptsurgeon.report import Cast
from ckptsurgeon.storage.pieces import Block
from ckptsurgeon.streaming.adapting import adapted_and_cast
from ckptsurgeon.streaming.reading import Reader
from ckptsurgeon.streaming.step_values import ranges_of, with_data
from ckptsurgeon.streaming.values import added, code_of, memory_of, tensor_from
from ckptsurgeon.streaming.writing import torn
from ckptsurgeon.tensors import Checkpoint, Piece, Span, TensorMeta, contiguous_stride

Loss = tuple[str, Block | None, Cast]  # the key, the block that was cast (None for the whole tensor), and what the cast loses
Wholes = Sequence[torch.Tensor]


@dataclass(frozen=True)
class Computed:
    """A value that `make` computes whole, from whole values of the sharded tensors `needs`; the casts' losses are added to its list."""

    make: Callable[[Wholes, list[Cast]], torch.Tensor]
    needs: tuple[torch.Tensor, ...] = ()


@dataclass(frozen=True)
class Origins:
    """The origins of a plan's values.

    Attributes:
        plan: made for the model.
        source: the checkpoint; `live`: its tensors, if it is in memory.
        reader: reads the source's files.
        model: the target; `state`: its state_dict.
        kernels, schemes: the user's own, by name.
    """

    plan: Plan
    source: Checkpoint
    live: Mapping[str, Any]
    reader: Reader
    model: nn.Module
    state: Mapping[str, Any]
    kernels: Mapping[str, Any] = field(default_factory=dict)
    schemes: Mapping[str, Fill] = field(default_factory=dict)

    def all(self) -> dict[str, Stored | Computed]:
        """The origin of each key's value, for keys that get one.

        Raises:
            ModelError: a live source's tensor on meta.
            PlanError, RuleError: as a transfer into a model that isn't sharded.
        """
        steps = {step.target: step for step in self.plan.steps}
        origins = {step.target: self._of(step, steps) for step in self.plan.steps}
        return {key: origin for key, origin in origins.items() if origin is not None}

    def _of(self, step: Step, steps: Mapping[str, Step]) -> Stored | Computed | None:
        if step.sources:
            return self._transferred(step)
        if step.action != "init":
            return None
        origin = resolved(step, steps)
        if origin is step:
            make = self._scheme(step, step.schemes[0])
            return None if make is None else Computed(lambda _wholes, _casts: make())
        computed = self._of(origin, steps)
        return computed if computed is not None else _kept(self.state[origin.target])

    def _transferred(self, step: Step) -> Stored | Computed:
        keys = [key for _, key in step.sources]
        dtype = self.source[keys[0]].dtype
        if not any(key in self.live for key in keys):
            metas = [with_data(self.source, key) for key in keys]
            for span in (span for meta in metas for span in meta.spans):
                self.reader.locate(span)  # opened, compared with its stamp and unpacked now, before the first copy
            if not step.adapters:
                return Stored(step.target, metas[0], self.reader)
            ranges = ranges_of(metas, step.adapters)
            if ranges is not None:
                return Stored(step.target, _of_runs(step, dtype, ranges), self.reader)
        tensors = [self._whole_source(key) for key in keys]
        needs = tuple(tensor for tensor in tensors if isinstance(tensor, torch.Tensor) and is_sharded(tensor))
        initial_value = (
            self._scheme(step, step.schemes[0]) if step.schemes else _never
        )  # None if an adapter fills with the model's own value
        current = self.state[step.target].detach()
        for_filling = (current,) if initial_value is None and is_sharded(current) else ()

        def make(wholes: Wholes, casts: list[Cast]) -> torch.Tensor:
            gathered = iter(wholes)
            inputs = [tensor() if callable(tensor) else next(gathered) if is_sharded(tensor) else tensor for tensor in tensors]
            if not step.adapters and step.cast is None:
                return inputs[0]
            initial = initial_value or (lambda: wholes[-1] if for_filling else current)
            return adapted_and_cast(step, inputs, dtype, initial, self.kernels, casts)

        return Computed(make, (*needs, *for_filling))

    def _whole_source(self, key: str) -> torch.Tensor | Callable[[], torch.Tensor]:
        """A source's tensor, or a function that reads it."""
        if key not in self.live:
            meta = with_data(self.source, key)
            return lambda: tensor_from(self.reader.read(meta), meta.dtype).view(meta.shape)
        tensor: torch.Tensor = self.live[key].detach()
        if tensor.device.type == "meta":
            raise ModelError("has no values: it is on the meta device", path=self.source.path, key=key)
        return tensor if is_sharded(tensor) else tensor.resolve_conj().resolve_neg()

    def _scheme(self, step: Step, scheme: str) -> Callable[[], torch.Tensor] | None:
        """A function that gives a scheme's value, the same on every rank; None for the model's own value."""
        key = self.plan.leader(step.target)
        owner, leaf = layer_of(self.model, key)
        if scheme == KEEP or concrete(scheme, key, step.shape, step.dtype, owner, leaf) == KEEP:
            return None
        layer = None if owner is None else plain_layer(owner)
        return lambda: scheme_value(scheme, key, step.shape, step.dtype, self.plan.seed, layer, self.schemes, leaf)


def prepare_values(origins: Mapping[str, Stored | Computed], state: Mapping[str, Any], ranks: Ranks) -> tuple[dict[str, Value], list[Loss]]:
    """All values, ready to be loaded, and what casts lose in this rank's parts. All ranks must call this together.

    Raises:
        CheckpointError: whatever computing a value raises, on this rank or another.
    """
    values: dict[str, Value] = {}
    losses: list[Loss] = []
    with ranks.step():
        parts: dict[str, list[Part]] = {}
        for part in own_parts({key: state[key] for key in origins}):
            parts.setdefault(part.key, []).append(part)
        changed = {key for key, origin in origins.items() if not isinstance(origin, Stored) or code_of(state[key]) != origin.meta.dtype}
        with phase("converting", len(changed), "tensors") if changed else nullcontext(nobody) as advance:
            for key, origin in origins.items():
                if isinstance(origin, Stored):
                    values[key] = origin
                    losses += _lost(origin, state[key], parts.get(key, ()))
                elif not origin.needs:
                    values[key] = _narrowed(key, origin, (), parts.get(key, ()), losses)
                advance(key in changed)
    for key, origin in origins.items():
        if isinstance(origin, Computed) and origin.needs:
            wholes = [whole(tensor) for tensor in origin.needs]
            with ranks.step():
                values[key] = _narrowed(key, origin, wholes, parts.get(key, ()), losses)
    return values, losses


def without_tied(values: Mapping[str, Value], state: Mapping[str, Any], ties: Iterable[Sequence[str]]) -> dict[str, Value]:
    """The values without those of tied keys after the first, since tied keys are one tensor.

    Raises:
        PlanError: tied keys get different values.
    """
    remaining = dict(values)
    for group in ties:
        first, *rest = [key for key in group if key in values] or [""]
        for key in rest:
            if not _same(remaining.pop(key), values[first], state[key]):
                raise torn(first, key)
    return remaining


def _same(first: Value, second: Value, tensor: torch.Tensor) -> bool:
    if isinstance(first, Stored) and isinstance(second, Stored) and replace(first.meta, name="") == replace(second.meta, name=""):
        return True
    for part in own_parts({"": tensor}):
        memories = [torch.empty_like(part.memory) for _ in range(2)]
        for value, memory in zip((first, second), memories, strict=True):
            value.into(replace(part, memory=memory))
        if memory_of(memories[0]) != memory_of(memories[1]):
            return False
    return True


def summed(by_rank: Iterable[Iterable[Loss]]) -> list[Cast]:
    """The total losses of casts, from each rank's losses. A block that several ranks have is counted once.

    >>> row = Cast("w", "F32", "F16", 0.5, changed=1)
    >>> [cast.changed for cast in summed([[("w", ((0, 1),), row)], [("w", ((0, 1),), row), ("w", ((1, 2),), row)]])]
    [2]
    """
    by_key: dict[str, dict[Block | None, Cast]] = {}
    for key, block, cast in (row for rank in by_rank for row in rank):
        by_key.setdefault(key, {}).setdefault(block, cast)
    casts = []
    for rows in by_key.values():
        total, *rest = [rows[None]] if None in rows else rows.values()
        for cast in rest:
            total = added(total, cast)
        casts.append(total)
    return casts


def _lost(value: Stored, tensor: torch.Tensor, parts: Iterable[Part]) -> Iterator[Loss]:
    """What a cast to the tensor's dtype loses, part by part; nothing if the dtype can hold all values of the file's dtype."""
    code = code_of(tensor)
    if code != value.meta.dtype and not widens(value.meta.dtype, code):
        yield from ((value.key, part.block, value.lost(part.block, code)) for part in parts)


def _narrowed(key: str, origin: Computed, wholes: Wholes, parts: Sequence[Part], losses: list[Loss]) -> Ready:
    """This rank's blocks of a computed value. Without a block on this rank, the value is not computed."""
    if not parts:
        return Ready(())
    casts: list[Cast] = []
    whole = origin.make(wholes, casts)
    losses += [(key, None, cast) for cast in casts]
    return Ready([(part.block, narrowed(whole, part.block).clone()) for part in parts])


def _kept(tensor: torch.Tensor) -> Computed:
    """The model's own value of another key."""
    if is_sharded(tensor):
        return Computed(lambda wholes, _casts: wholes[0], (tensor,))
    return Computed(lambda _wholes, _casts: tensor.detach())


def _never() -> torch.Tensor:
    raise AssertionError("no adapter of this step fills with an initial value")


def _of_runs(step: Step, dtype: str, ranges: Iterable[Span]) -> TensorMeta:
    """A tensor that adapters make by moving bytes only, described as runs of elements in its sources' files."""
    size, start, pieces = BY_CODE[dtype].size, 0, []
    for span in ranges:
        count = span.nbytes // size
        pieces.append(Piece(span, (start,), (count,), (1,)))
        start += count
    return TensorMeta(step.target, dtype, step.shape, contiguous_stride(step.shape), None, tuple(pieces))


def plain_layer(module: nn.Module) -> nn.Module:
    """The module itself if none of its tensors is sharded; else a copy of it and its submodules, with whole tensors on meta for the sharded
    ones. Other attributes are shared. The module is unchanged.

    >>> layer = nn.Linear(3, 2)
    >>> plain_layer(layer) is layer
    True
    """
    if not any(is_sharded(tensor) for tensor in (*module.parameters(), *module.buffers())):
        return module
    return _copied(module)


def _copied(module: nn.Module) -> nn.Module:
    kind: Any = own_class(module)
    copy: nn.Module = kind.__new__(kind)
    attributes = {
        name: OrderedDict() if isinstance(value, OrderedDict) and "hooks" in name else value for name, value in vars(module).items()
    }
    attributes["_parameters"] = {name: _whole(tensor) for name, tensor in module._parameters.items()}
    attributes["_buffers"] = {name: _whole(tensor) for name, tensor in module._buffers.items()}
    attributes["_modules"] = {name: None if child is None else _copied(child) for name, child in module._modules.items()}
    vars(copy).update(attributes)
    return copy


def _whole(tensor: torch.Tensor | None) -> torch.Tensor | None:
    if tensor is None or not is_sharded(tensor):
        return tensor
    whole = torch.empty(tuple(tensor.shape), dtype=tensor.dtype, device="meta")
    return nn.Parameter(whole, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else whole
