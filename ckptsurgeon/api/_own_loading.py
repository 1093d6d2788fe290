"""Runs a target model's own loading code on source keys that the model has no name for, and adds what it takes to the rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ckptsurgeon.api._opening import Target
from ckptsurgeon.api._rules import Ruling
from ckptsurgeon.planning.apply_rules import Names, name_sources
from ckptsurgeon.planning.averaging import Weights
from ckptsurgeon.rules.loading_code import Taken, needs_probe
from ckptsurgeon.tensors import Checkpoint, TensorMeta

if TYPE_CHECKING:
    from torch import nn


def learned(
    sources: Sequence[Checkpoint],
    target: Checkpoint | None,
    model: Callable[..., nn.Module] | None,
    ruling: Ruling,
    *,
    average: Weights | None = None,
    auto: str | None = None,
) -> Ruling:
    """The ruling, with the names that the model's loading code takes.

    The code runs only if a source has names below its module that the target lacks or has with another shape, or if no source and no rule
    gives one of the module's keys, which the code may fill in; `model` returns a model on which it may run (`Target.any_model`).
    """
    if target is None or model is None or not target.loaders:
        return ruling
    names = name_sources(sources, target, ruling.rules, ruling.outside, average=average, auto=auto)
    taken: dict[int, Taken] = {}
    ruled = (*names.inits, *names.keeps)
    absent = {key for key in target if key not in names.claims and all(rule.match(key) is None for rule in ruled)}
    for number, source in enumerate(sources):
        tensors = _renamed(number, source, names, target)
        if needs_probe(tensors, target, absent):
            from ckptsurgeon.models.own_loading.probe import probe
            from ckptsurgeon.planning.own_loading.versions import stated

            versions = stated(number, sources, names, target.loaders)
            given = {key: target[key] for key in target if key not in absent}  # the code gets what other sources and rules give, too
            tried = probe(model, target.loaders, {**given, **tensors}, versions, absent)
            taken[number] = replace(tried, handed={name: head for name, head in tried.handed.items() if name in tensors})
    return replace(ruling, outside=replace(ruling.outside, taken=taken)) if taken else ruling


def taken_as_it_stands(source: Checkpoint, target: Target) -> Taken:
    """The names that the target's loading code takes from a file, as in `load_state_dict`."""
    model = target.any_model
    if model is None:
        return Taken()
    from ckptsurgeon.models.own_loading.probe import probe_file

    return probe_file(model, target.checkpoint, source)


def _renamed(number: int, source: Checkpoint, names: Names, target: Checkpoint) -> dict[str, TensorMeta]:
    """A source's tensors by their new names; one that adapters make fit has the target's shape."""
    fitted = {name for name, claim in names.claims.items() if claim.ops and name in target}
    return {
        name: target[name] if name in fitted else source[key]
        for (owner, key), new_names in names.names_of.items()
        if owner == number and key in source
        for name in new_names
    }
