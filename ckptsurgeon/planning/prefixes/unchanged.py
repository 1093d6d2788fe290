"""Sets aside the keys that both sides have with the same shape and that nothing else can concern: no rule, no prefix, no tie, no codes.

Two files with a million equal keys then cost as much as their few others. Names, shapes and dtypes only.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from ckptsurgeon.planning.prefixes.find import changes_nothing
from ckptsurgeon.planning.prefixes.heads import equal_keys
from ckptsurgeon.planning.quantised_weights.find import find
from ckptsurgeon.rules.rules import Outside, Rule
from ckptsurgeon.tensors import Checkpoint


def set_aside(
    source: Checkpoint, target: Checkpoint, rules: Sequence[Rule], outside: Outside
) -> tuple[Collection[str], Checkpoint, Checkpoint]:
    """The keys that keep their names whatever becomes of the others, and both sides without them.

    None where rules, the target's loading code or a library's conversions may concern any key, or another prefix may fit better.

    >>> from ckptsurgeon.tensors import TensorMeta
    >>> side = lambda path, *keys: Checkpoint(path, "safetensors", "0", {key: TensorMeta(key, "F32", (2, 3), (3, 1)) for key in keys})
    >>> keys, source, target = set_aside(side("a", "fc1.weight", "fc2.weight"), side("b", "fc1.weight", "head.weight"), (), Outside())
    >>> list(keys), list(source), list(target)
    (['fc1.weight'], ['fc2.weight'], ['head.weight'])
    """
    if rules or outside.taken or target.naming is not None:
        return (), source, target
    equal = dict.fromkeys(equal_keys(source.tensors, target.tensors))
    if not changes_nothing(source.tensors, target.tensors, equal) or find(source):
        return (), source, target
    for key in (*source.entries, *target.entries, *(key for group in target.ties for key in group)):
        equal.pop(key, None)
    return equal.keys(), _without(source, equal), _without(target, equal)


def _without(side: Checkpoint, keys: Collection[str]) -> Checkpoint:
    return replace(side, tensors={key: tensor for key, tensor in side.tensors.items() if key not in keys})
