"""Sources of the order in which an optimizer numbers parameters: the keys' order in a file, and a live model with its optimizer.

torch numbers parameters in the order in which a model registers them, group after group. A file's keys are in that order unless they were
sorted. torch's `_metadata` in the file proves that they are; keys in alphabetical order count as sorted. Pure.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.planning.plan_types import Step
from ckptsurgeon.tensors import Checkpoint

# The buffers of torch's norms. Other buffers are recognised by dtype, by a live model, or because no parameter has their shape.
BUFFERS = frozenset({"running_mean", "running_var", "num_batches_tracked"})
_NUMBERS = re.compile(r"(\d+)")

Keys = tuple[str, ...]


@dataclass(frozen=True)
class LiveOrder:
    """The order of a live model's parameters, in the source's keys. A parameter has no source key, one, or several that are joined.

    Attributes:
        registered: the source keys of each of the model's parameters, in the order of registration.
        groups: the same by the groups of the live optimizer; empty without an optimizer.
        options: these groups' hyper-parameters.
        passed: source keys to skip: buffers of the model, and copies of a parameter that is tied in it.
        named: the source keys of each parameter, by every name that it has in the model.
        as_registered: whether the optimizer, if there is one, has its parameters in the order of registration, in one group.
        leads: whether this order may decide alone if the file's order does not.
    """

    registered: tuple[Keys, ...]
    groups: tuple[tuple[Keys, ...], ...] = ()
    options: tuple[Mapping[str, Any], ...] = ()
    passed: frozenset[str] = frozenset()
    named: Mapping[str, Keys] = field(default_factory=dict)
    as_registered: bool = True
    leads: bool = False


def live_order(
    names: Mapping[str, Keys],
    parameters: Sequence[Keys],
    buffers: Iterable[str],
    groups: Sequence[Sequence[Keys]],
    options: Sequence[Mapping[str, Any]],
    steps: Mapping[str, Step],
    source: Checkpoint,
    leads: bool,
) -> LiveOrder:
    """The order of a live model's parameters, in the source's keys.

    Args:
        names: every name of every parameter, with its keys in the model's state_dict.
        parameters: the keys of each parameter, in the order of registration.
        buffers: the keys of the persistent buffers.
        groups: the keys of the parameters in each group of the optimizer.
        options: the groups' hyper-parameters.
        steps: the weights' plan by target key.
        source: the checkpoint that the plan reads.
        leads: whether this order may decide alone if the file's order does not.
    """
    firsts = {key: group[0] for group in source.ties for key in group}
    used = {key for step in steps.values() for _, key in step.sources}
    prefixes = Counter(key[: -len(step.target)] for step in steps.values() for _, key in step.sources if key.endswith(step.target))
    prefix = prefixes.most_common(1)[0][0] if prefixes else ""

    def all_counterparts(keys: Keys) -> list[Keys]:
        """For each of a parameter's target keys, the source keys that it comes from, if any."""
        counterparts = [tuple(firsts.get(key, key) for _, key in steps[target].sources) for target in keys if target in steps]
        if not any(counterparts):  # the source has it with another shape, so no step reads it
            counterparts = [
                (firsts.get(prefix + key, prefix + key),) for key in keys if prefix + key in source and prefix + key not in used
            ]
        return [source_keys for source_keys in counterparts if source_keys]

    def counterpart(keys: Keys) -> Keys:
        return next((tuple(dict.fromkeys(source_keys)) for source_keys in all_counterparts(keys)), ())

    index_of = {keys: index for index, keys in enumerate(parameters)}
    indices = [index_of.get(keys, -1) for group in groups for keys in group]
    copies = {key for keys in parameters for source_keys in all_counterparts(keys) for key in source_keys if key not in counterpart(keys)}
    return LiveOrder(
        tuple(map(counterpart, parameters)),
        tuple(tuple(map(counterpart, group)) for group in groups),
        tuple(options),
        frozenset(key for buffer in buffers for key in counterpart((buffer,))) | copies,
        {name: counterpart(keys) for name, keys in names.items()},
        len(groups) <= 1 and indices == sorted(indices),
        leads,
    )


def candidates(source: Checkpoint, passed: Collection[str] = ()) -> list[str]:
    """The source's keys that may be parameters, in the file's order: tied keys once, and none of `passed`."""
    later = {key for group in source.ties for key in group[1:]}
    return [
        key
        for key, tensor in source.items()
        if key not in later
        and key not in passed
        and key.rpartition(".")[2] not in BUFFERS
        and BY_CODE[tensor.dtype].kind in ("float", "complex")
    ]


def order_of_keys(source: Checkpoint) -> Literal["registered", "plain", "sorted"]:
    """Which order a state_dict's keys are in.

    `registered` if torch's `_metadata` lists the modules in the same order; `sorted` if the names are sorted (within each dtype, as
    safetensors sorts them, and with numbers compared as numbers or as text); else `plain`.

    >>> from ckptsurgeon.tensors import TensorMeta
    >>> def order(*keys, **more):
    ...     return order_of_keys(Checkpoint("", "", "", {key: TensorMeta(key, "F32", (), ()) for key in keys}, **more))
    >>> order("b.weight", "b.bias"), order("a", "b"), order("b.w", "a.w", module_metadata={"b": {}, "a": {}}), order("a.2", "a.10")
    ('plain', 'sorted', 'registered', 'sorted')
    """
    index_of = {path: index for index, path in enumerate(source.module_metadata)}
    modules = [index_of.get(key.rpartition(".")[0], -1) for key in source]
    as_metadata = bool(index_of) and modules == sorted(modules) and modules[:1] != [-1]
    by_name = _sorted(source)
    if as_metadata and not (by_name and len(set(modules)) < len(modules)):  # `_metadata` says nothing of the order within a module
        return "registered"
    return "sorted" if by_name else "plain"


def _sorted(source: Checkpoint) -> bool:
    by_dtype: dict[str, list[str]] = {}
    for key, tensor in source.items():
        by_dtype.setdefault(tensor.dtype, []).append(key)
    return any(all(keys == sorted(keys, key=sort_key) for keys in by_dtype.values()) for sort_key in (None, _natural))


def _natural(key: str) -> list[tuple[int, int, str]]:
    """A sort key that compares the numbers in a name by value."""
    parts = _NUMBERS.split(key)
    return [(0, int(part), "") if number % 2 and len(part) < 20 else (1, 0, part) for number, part in enumerate(parts)]
