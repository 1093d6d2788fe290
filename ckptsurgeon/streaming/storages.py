"""Which output keys share one storage: keys that are tied in the target, or that come from one tensor of a source."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from ckptsurgeon.formats.layout import OutTensor
from ckptsurgeon.planning.plan_types import Plan, Step, resolved
from ckptsurgeon.tensors import TensorMeta


def storages_of(plan: Plan, steps: Mapping[str, Step], origins: Callable[[Step], tuple[TensorMeta, ...]]) -> dict[str, int]:
    """A number for each target key; keys with one number are tied: they read the same tensor in the same way, or are one fresh tensor.

    `origins` gives the tensors of files that a step reads.
    """
    group = {key: keys[0] for keys in plan.ties for key in keys}
    numbers: dict[Any, int] = {}
    first: dict[Any, str] = {}
    storages = {}
    for step in plan.steps:
        made = resolved(step, steps)
        leader = group.get(step.target, step.target)
        read = origins(made)
        identity: Any = ("made", leader)
        if read and not all(origin.nbytes for origin in read):
            identity = step.target
        elif read:
            spans = tuple((origin.place, origin.dtype, origin.stride) for origin in read)
            identity = (spans, repr(made.adapters), leader if made.schemes else "", made.action == "keep")
            # One key of the source that goes to two is no tie: each layer of a deeper model is its own.
            if first.setdefault((identity, made.sources), leader) != leader:
                identity = (identity, leader)
        storages[step.target] = numbers.setdefault((identity, step.dtype, step.shape), len(numbers))
    return storages


def tensors_of(plan: Plan, storages: Mapping[str, int], *, alias: bool) -> tuple[list[OutTensor], dict[str, str]]:
    """What to write, and, where ties become aliases, which key stands for which.

    A loader gives an alias its value only where the model ties the two, so with a target only its own ties become aliases.
    """
    group = {key: number for number, keys in enumerate(plan.ties) for key in keys}
    tensors: list[OutTensor] = []
    aliases: dict[str, str] = {}
    first: dict[int, str] = {}
    for step in plan.steps:
        number = storages[step.target]
        kept = first.setdefault(number, step.target)
        linked = kept != step.target and (plan.target is None or group.get(kept, -1) == group.get(step.target, -2))
        if linked and alias:
            aliases[step.target] = kept
        else:
            tensors.append(OutTensor(step.target, step.dtype, step.shape, number))
    return tensors, aliases
