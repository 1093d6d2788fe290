"""Freezes parameters by pattern or by record, and thaws them: sets `requires_grad`, and eval mode for norms with running statistics.

A wholly frozen layer with running statistics (BatchNorm, InstanceNorm, SyncBatchNorm: anything with a `running_mean`) stays in eval
mode even after `model.train()`. LayerNorm, GroupNorm and dropout are not changed. Only the `train` method of the layer's instance is
replaced, so state_dict, forward and class stay the same, and a copy or a pickle stays frozen too.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from functools import partial as bound

from torch import nn

from ckptsurgeon.errors import ModelError, printable
from ckptsurgeon.models.init.recorded import fresh_parameters, known_fresh, known_partial, refuse_unrecorded
from ckptsurgeon.models.target.parameters import Named, first_matching_pattern, listed, named, named_tensors
from ckptsurgeon.models.target.skeleton import state_dict_of
from ckptsurgeon.models.training.groups import FRESH, TRANSFERRED
from ckptsurgeon.shown import Shown
from ckptsurgeon.tensors import Checkpoint
from ckptsurgeon.views.folding import fold_keys

_STATISTICS = ("running_mean", "running_var")


@dataclass(frozen=True, repr=False)
class Frozen(Shown):
    """The result of `freeze` or `unfreeze`. `str()` gives a short text.

    Attributes:
        verb: `frozen` or `thawed`.
        keys: the tensors, each by its first name.
        modules: the layers that are kept in eval mode from now on (after thawing: those that no longer are).
        trainable: the parameters that are trainable now.
        elements: the number of elements in `keys`.
    """

    verb: str
    keys: tuple[str, ...]
    modules: tuple[str, ...]
    trainable: tuple[str, ...]
    elements: int

    def __str__(self) -> str:
        """A short text with folded names."""
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
        what: one or more patterns for names of parameters and buffers; or a report, plan or merged checkpoint, which freezes everything
            that is not fresh.
        partial: with a record, whether partly transferred tensors count as `fresh` (and train, since a part of them is untrained)
            or as `transferred`.

    Returns:
        What this call froze (including what was frozen already) and what is still trainable.

    Raises:
        ModelError: a pattern matches nothing, a record belongs to another model, there is nothing to freeze, or `what` is neither a
            pattern nor a record.
        NoRecordError: a checkpoint that does not record what is fresh.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), nn.Linear(2, 2))
    >>> print(freeze(net, ["0.*", "1.*"]))
    frozen 4 tensors, 10 elements: {0..1}.{weight,bias}
    kept in eval mode 1: 1
    trainable 2 tensors: 2.{weight,bias}
    >>> net.train()[1].training
    False
    """
    parameters, buffers = named_tensors(model)
    chosen = _chosen(model, parameters, buffers, what, partial)
    keys = tuple(first for first, parameter in parameters.items() if id(parameter.tensor) in chosen)
    for first in keys:
        parameters[first].tensor.requires_grad_(False)
        parameters[first].tensor.grad = None  # an optimizer would keep stepping with a stale gradient
    modules = []
    for name, layer in _with_statistics(model).items():
        own_parameters = list(layer.parameters())
        if all(not parameter.requires_grad for parameter in own_parameters) and _covered(layer, chosen, by_record=not is_patterns(what)):
            layer.training = False
            layer.__dict__["train"] = bound(_stay, layer)
            modules.append(name)
    if not keys and not modules:
        raise ModelError("there is no parameter to freeze", hint="a pattern must match a whole name: 'layer1.**'")
    return _report("frozen", model, keys, modules)


def unfreeze(model: nn.Module, what: str | Iterable[str] = "**") -> Frozen:
    """Turn `requires_grad` on again; norms that are no longer wholly frozen follow the model's mode again.

    Args:
        model: changed in place.
        what: one or more patterns for names of parameters and buffers; all by default.

    Returns:
        What was thawed, and what is trainable now.

    Raises:
        ModelError: a pattern that matches nothing.

    >>> net = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    >>> _ = freeze(net, "**")
    >>> unfreeze(net, "1.*").modules, net[1].training
    (('1',), True)
    """
    parameters, buffers = named_tensors(model)
    return thaw(model, parameters, _chosen(model, parameters, buffers, listed(what), FRESH))


def thaw(model: nn.Module, parameters: Mapping[str, Named], chosen: Container[int]) -> Frozen:
    """`unfreeze` for the parameters and buffers whose ids are `chosen`; `parameters` is `named(model)`."""
    names = [first for first, parameter in parameters.items() if id(parameter.tensor) in chosen]
    frozen = ((first, parameters[first].tensor) for first in names if not parameters[first].trainable)
    keys = tuple(first for first, tensor in frozen if tensor.is_floating_point() or tensor.is_complex())
    for first in keys:
        parameters[first].tensor.requires_grad_(True)
    modules = []
    for name, layer in _with_statistics(model).items():
        own_parameters = list(layer.parameters())
        in_training = (
            any(parameter.requires_grad for parameter in own_parameters) if own_parameters else _covered(layer, chosen, by_record=False)
        )
        if is_kept(layer) and in_training:
            del layer.__dict__["train"]
            layer.training = model.training
            modules.append(name)
    return _report("thawed", model, keys, modules)


def is_kept(layer: nn.Module) -> bool:
    """Whether `freeze` keeps this layer in eval mode."""
    method = layer.__dict__.get("train")
    return isinstance(method, bound) and method.func is _stay


def _stay(layer: nn.Module, mode: bool = True) -> nn.Module:
    """Replaces the `train` of a layer kept in eval mode. A function in a `partial`, so that copies and pickles bind to the new layer."""
    layer.training = False
    return layer


def is_patterns(what: object) -> bool:
    """Whether `what` is patterns and not a record. A list of names is a record for `param_groups`; here it lists what to freeze."""
    if isinstance(what, str):
        return True
    return isinstance(what, Iterable) and not isinstance(what, (Checkpoint, Mapping)) and not hasattr(what, "fresh")


def _chosen(model: nn.Module, parameters: Mapping[str, Named], buffers: Mapping[str, Named], what: object, partial: str) -> set[int]:
    """The ids of the parameters and buffers that `what` selects."""
    tensors = {**parameters, **buffers}
    if is_patterns(what):
        patterns = listed(what)  # type: ignore[arg-type]
        if not patterns or not all(isinstance(text, str) for text in patterns):
            raise ModelError(f"{what!r} does not say what to freeze", hint="give patterns such as 'layer1.**', or a report")
        return {
            id(tensors[first].tensor)
            for first in first_matching_pattern(patterns, {first: named.all_names for first, named in tensors.items()}, (), "")
        }
    if partial not in (TRANSFERRED, FRESH):
        raise ModelError(f"partial can't be {partial!r}", hint="give 'transferred' or 'fresh'")
    keys = state_dict_of(model, type(model).__name__)
    fresh = known_fresh(keys, tensors.values(), what)
    if partial == FRESH and _knows_partial(what):
        fresh |= known_partial(keys, tensors.values(), what)
    refuse_unrecorded(keys, tensors.values(), what, (), "freeze by patterns instead: freeze(model, ['layer1.**'])")
    trained = fresh_parameters(parameters, buffers, fresh) | {
        first for first, named in buffers.items() if named.keys and fresh.issuperset(named.keys)
    }
    return {id(named.tensor) for first, named in tensors.items() if first not in trained}


def _knows_partial(what: object) -> bool:
    """Whether a record lists partly transferred tensors. Older merged files have no such list: adapters could not fill tensors then."""
    return not isinstance(what, Checkpoint) or "partial" in (what.provenance or {})


def _with_statistics(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that keep running statistics, by name."""
    return {name: layer for name, layer in model.named_modules() if any(layer._buffers.get(leaf) is not None for leaf in _STATISTICS)}


def _covered(layer: nn.Module, chosen: Container[int], *, by_record: bool) -> bool:
    """Whether `chosen` includes one of the layer's parameters or, for a layer without parameters, its statistics.

    With a record, the statistics must be included too: fresh ones would give a layer in eval mode no usable statistics.
    """
    statistics = [layer._buffers[leaf] for leaf in _STATISTICS if layer._buffers.get(leaf) is not None]
    parameters = list(layer.parameters())
    has_statistics = all(id(tensor) in chosen for tensor in statistics)
    if not parameters:
        return has_statistics
    return any(id(tensor) in chosen for tensor in parameters) and (has_statistics or not by_record)


def _report(verb: str, model: nn.Module, keys: tuple[str, ...], modules: list[str]) -> Frozen:
    parameters = named(model)
    elements = sum(parameters[first].tensor.numel() for first in keys)
    return Frozen(verb, keys, tuple(modules), tuple(first for first, parameter in parameters.items() if parameter.trainable), elements)
