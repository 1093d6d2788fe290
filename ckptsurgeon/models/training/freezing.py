"""Freezes parameters by pattern or by record, and thaws them: `requires_grad`, and eval mode for norms whose statistics would still move.

A wholly frozen layer that keeps running statistics (BatchNorm, InstanceNorm, SyncBatchNorm: anything with a `running_mean`) stays in eval
mode, whatever `model.train()` says; LayerNorm and GroupNorm keep none and are left alone, and so is dropout. Only the layer's own `train`
is replaced, in its instance, so that state_dict, forward and class stay what they are, and a copy or a pickle stays frozen too.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from functools import partial as bound

import torch
from torch import nn

from ckptsurgeon.errors import ModelError, printable
from ckptsurgeon.models.init.recorded import fresh_parameters, known_fresh, known_partial
from ckptsurgeon.models.target.parameters import Named, first_matching_pattern, listed, named, named_tensors
from ckptsurgeon.models.target.skeleton import state_dict_of
from ckptsurgeon.models.training.groups import FRESH, TRANSFERRED
from ckptsurgeon.shown import Shown
from ckptsurgeon.tensors import Checkpoint
from ckptsurgeon.views.folding import fold_keys

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


@dataclass(frozen=True, repr=False)
class Frozen(Shown):
    """What `freeze` froze, or `unfreeze` thawed; printed, a short text.

    Attributes:
        verb: `frozen` or `thawed`.
        keys: the tensors, each by its first name.
        modules: the layers that are kept in eval mode from now on (or, thawed, no longer are).
        trainable: what of the model is trainable now.
        elements: how many numbers `keys` hold.
    """

    verb: str
    keys: tuple[str, ...]
    modules: tuple[str, ...]
    trainable: tuple[str, ...]
    elements: int

    def __str__(self) -> str:
        """The text: names folded."""
        kept = "kept in eval mode" if self.verb == "frozen" else "no longer kept in eval mode"
        rows = [
            (f"{self.verb} {len(self.keys)} tensors, {self.elements:,} elements", self.keys),
            (f"{kept} {len(self.modules)}", self.modules),
            (f"trainable {len(self.trainable)} tensors", self.trainable),
        ]
        return "\n".join(f"{head}: {printable(', '.join(fold_keys(names)))}" for head, names in rows if names)


def freeze(model: nn.Module, what: object, *, partial: str = FRESH) -> Frozen:
    """Turn `requires_grad` off, drop stale gradients, and keep wholly frozen norms in eval mode across `model.train()`.

    Args:
        model: changed in place. Convert to SyncBatchNorm before: conversion builds new layers, which would not be kept in eval mode.
        what: a pattern or several, held against the names of parameters and buffers; or a report, plan or merged checkpoint: then all is
            frozen that is not fresh.
        partial: under a record, whether partly transferred tensors count as `fresh` (they train, since part of them has learned nothing)
            or as `transferred`.

    Returns:
        What is frozen now by this call (what was frozen already included) and what still trains.

    Raises:
        ModelError: a pattern that matches nothing, a record of another model, nothing to freeze, nothing that says what to freeze.
        NoRecordError: a checkpoint that does not record what is fresh.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    >>> print(freeze(net, ["0.*", "1.*"]))
    frozen 4 tensors, 10 elements: {0..1}.{weight,bias}
    kept in eval mode 1: 1
    trainable 2 tensors: 2.{weight,bias}
    >>> net.train()[1].training
    False
    """
    every, buffers = named_tensors(model)
    chosen = _chosen(model, every, buffers, what, partial)
    keys = tuple(first for first, one in every.items() if id(one.tensor) in chosen)
    for first in keys:
        every[first].tensor.requires_grad_(False)
        every[first].tensor.grad = None  # an optimizer would go on stepping with a stale one
    modules = []
    for name, layer in _with_statistics(model).items():
        own = list(layer.parameters())
        if all(not one.requires_grad for one in own) and _covered(layer, chosen, by_record=not is_patterns(what)):
            layer.training = False
            layer.__dict__["train"] = bound(_stay, layer)
            modules.append(name)
    if not keys and not modules:
        raise ModelError("nothing is there to be frozen", hint="patterns are held against whole names: 'layer1.**'")
    return _report("frozen", model, keys, modules)


def unfreeze(model: nn.Module, what: str | Iterable[str] = "**") -> Frozen:
    """Turn `requires_grad` on again; norms that are no longer wholly frozen follow the model's mode again.

    Args:
        model: changed in place.
        what: a pattern or several, held against the names of parameters and buffers; all by default.

    Returns:
        What was thawed, and what trains now.

    Raises:
        ModelError: a pattern that matches nothing.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    >>> _ = freeze(net, "**")
    >>> unfreeze(net, "1.*").modules, net[1].training
    (('1',), True)
    """
    every, buffers = named_tensors(model)
    return thaw(model, every, _chosen(model, every, buffers, listed(what), FRESH))


def thaw(model: nn.Module, every: Mapping[str, Named], chosen: Container[int]) -> Frozen:
    """`unfreeze` for parameters and buffers that are known, by their id."""
    found = [first for first, one in every.items() if id(one.tensor) in chosen]
    keys = tuple(first for first in found if not every[first].trainable and _learns(every[first].tensor))
    for first in keys:
        every[first].tensor.requires_grad_(True)
    modules = []
    for name, layer in _with_statistics(model).items():
        own = list(layer.parameters())
        free = any(one.requires_grad for one in own) if own else _covered(layer, chosen, by_record=False)
        if is_kept(layer) and free:
            del layer.__dict__["train"]
            layer.training = model.training
            modules.append(name)
    return _report("thawed", model, keys, modules)


def is_kept(layer: nn.Module) -> bool:
    """Whether `freeze` keeps this layer in eval mode."""
    own = layer.__dict__.get("train")
    return isinstance(own, bound) and own.func is _stay


def _stay(layer: nn.Module, mode: bool = True) -> nn.Module:
    """Stands in for a kept layer's `train`. A plain function in a `partial`, so that copies and pickles are bound to the new layer."""
    layer.training = False
    return layer


def _learns(parameter: torch.Tensor) -> bool:
    return parameter.is_floating_point() or parameter.is_complex()


def is_patterns(what: object) -> bool:
    """Whether it is patterns, and not a record. A list of names would be a record for `param_groups`; here it says what to freeze."""
    if isinstance(what, str):
        return True
    return isinstance(what, Iterable) and not isinstance(what, (Checkpoint, Mapping)) and not hasattr(what, "fresh")


def _chosen(model: nn.Module, every: Mapping[str, Named], buffers: Mapping[str, Named], what: object, partial: str) -> set[int]:
    """The parameters and buffers that are meant, by their id."""
    tensors = {**every, **buffers}
    if is_patterns(what):
        patterns = listed(what)  # type: ignore[arg-type]
        if not patterns or not all(isinstance(text, str) for text in patterns):
            raise ModelError(f"{what!r} does not say what to freeze", hint="give patterns such as 'layer1.**', or a report")
        return {
            id(tensors[first].tensor)
            for first in first_matching_pattern(patterns, {first: one.every for first, one in tensors.items()}, (), "")
        }
    if partial not in (TRANSFERRED, FRESH):
        raise ModelError(f"partial can't be {partial!r}", hint="give 'transferred' or 'fresh'")
    keys = state_dict_of(model, type(model).__name__)
    fresh = known_fresh(keys, tensors.values(), what)
    if partial == FRESH and _knows_partial(what):
        fresh |= known_partial(keys, tensors.values(), what)
    free = fresh_parameters(every, buffers, fresh) | {first for first, one in buffers.items() if one.keys and fresh.issuperset(one.keys)}
    return {id(one.tensor) for first, one in tensors.items() if first not in free}


def _knows_partial(what: object) -> bool:
    """A file that was merged before partly transferred tensors were recorded has none: its adapters could not fill up."""
    return not isinstance(what, Checkpoint) or "partial" in (what.provenance or {})


def _with_statistics(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that keep running statistics, by name."""
    found = {}
    for name, layer in model.named_modules():
        if any(layer._buffers.get(leaf) is not None for leaf in _STATISTICS[:2]):
            found[name] = layer
    return found


def _covered(layer: nn.Module, chosen: Container[int], *, by_record: bool) -> bool:
    """Whether what was asked for takes the layer: one of its parameters, or, without any and under a record, its statistics.

    A record under which the statistics are fresh leaves the layer alone: in eval mode it would work with none.
    """
    statistics = [layer._buffers[leaf] for leaf in _STATISTICS[:2] if layer._buffers.get(leaf) is not None]
    own = list(layer.parameters())
    taken_statistics = all(id(one) in chosen for one in statistics)
    if not own:
        return taken_statistics
    return any(id(one) in chosen for one in own) and (taken_statistics or not by_record)


def _report(verb: str, model: nn.Module, keys: tuple[str, ...], modules: list[str]) -> Frozen:
    every = named(model)
    elements = sum(every[first].tensor.numel() for first in keys)
    return Frozen(verb, keys, tuple(modules), tuple(first for first, one in every.items() if one.trainable), elements)
