"""What a target model's own loading code does with a source's keys that the model has no name for: tried out, and given to the rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ckptsurgeon.api._opening import Target
from ckptsurgeon.api._rules import Ruling
from ckptsurgeon.planning.apply_rules import Names, name_sources
from ckptsurgeon.planning.averaging import Weights
from ckptsurgeon.rules.loading_code import Taken, is_below
from ckptsurgeon.tensors import Checkpoint, TensorMeta

if TYPE_CHECKING:
    from torch import nn


def learned(
    sources: Sequence[Checkpoint],
    target: Checkpoint | None,
    model: Callable[[], nn.Module] | None,
    ruling: Ruling,
    *,
    average: Weights | None = None,
    auto: str | None = None,
) -> Ruling:
    """The ruling with what the model's loading code takes. The code runs only where a source has names below its module that the target
    has not, or has with another shape; `model` gives a model on which it may run."""
    if target is None or model is None or not target.loaders:
        return ruling
    names = name_sources(sources, target, ruling.rules, ruling.outside, average=average, auto=auto)
    found: dict[int, Taken] = {}
    for number, source in enumerate(sources):
        given = _given(number, source, names, target)
        if _asks(given, target):
            from ckptsurgeon.models.own_loading.probe import probe
            from ckptsurgeon.planning.own_loading.versions import stated

            versions = stated(number, sources, names, target.loaders)
            found[number] = probe(model(), target.loaders, given, versions)
    return replace(ruling, outside=replace(ruling.outside, taken=found)) if found else ruling


def taken_as_it_stands(source: Checkpoint, target: Target) -> Taken:
    """What the target's loading code does with a file's own names, as torch's load of that file would have it do."""
    goal, model = target.checkpoint, target.any_model
    if model is None or not _asks(source, goal):
        return Taken()
    from ckptsurgeon.formats.pickle.unpickled import written_out
    from ckptsurgeon.models.own_loading.probe import probe
    from ckptsurgeon.planning.own_loading.versions import plain

    recorded = written_out(source.module_metadata)
    return probe(model(), goal.loaders, source, {path: plain(recorded[path]) for path in goal.loaders if path in recorded})


def _asks(given: Mapping[str, TensorMeta], target: Checkpoint) -> bool:
    """Whether a module with loading code gets names that the target has not, or has with another shape."""
    strange = (name for name, meta in given.items() if name not in target or target[name].shape != meta.shape)
    return any(is_below(name, path) for name in strange for path in target.loaders)


def _given(number: int, source: Checkpoint, names: Names, target: Checkpoint) -> dict[str, TensorMeta]:
    """A source's tensors by name; one that adapters make fit counts as the target's."""
    fitted = {name for name, claim in names.claims.items() if claim.asked and name in target}
    return {
        name: target[name] if name in fitted else source[key]
        for (other, key), given in names.names_of.items()
        if other == number and key in source
        for name in given
    }
