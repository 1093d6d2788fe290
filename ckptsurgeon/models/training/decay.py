"""Selects the parameters without weight decay: biases, parameters of at most one dimension, norms and embeddings; or those that patterns
match.

Norms and embeddings are recognised by their module's type, biases by their name. Nothing is changed here.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ckptsurgeon.errors import ModelError
from ckptsurgeon.models.target.parameters import first_matching_pattern, modules_by_path, named
from ckptsurgeon.parameter_types import NoDecay

_UNDECAYED = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.Embedding, nn.EmbeddingBag)


def without_decay(model: nn.Module, rule: NoDecay, among: Collection[str] | None = None) -> frozenset[str]:
    """First names of the parameters that get no weight decay. A tied parameter gets none if the rule holds for any of its names.

    Args:
        rule: True for biases, parameters of at most one dimension, norms and embeddings; False for no parameter; patterns for those that
            they match. True among patterns adds what True alone selects.
        among: first names of the parameters to consider; None for the trainable ones.

    Raises:
        ModelError: a pattern matches none of them, or the rule has another type.

    >>> sorted(without_decay(nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2)), True))
    ['0.weight', '1.bias']
    """
    words = [rule] if isinstance(rule, (bool, str)) else list(rule)
    if not all(isinstance(word, (bool, str)) for word in words):
        raise ModelError(f"no_decay can't be {rule!r}", hint="give True, or patterns such as ['**.bias']")
    parameters = named(model)
    candidates = {
        first: parameter.all_names for first, parameter in parameters.items() if (parameter.trainable if among is None else first in among)
    }
    excluded = [name for first, parameter in parameters.items() if first not in candidates for name in parameter.all_names]
    no_decay = set(
        first_matching_pattern(
            [word for word in words if isinstance(word, str)], candidates, excluded, "frozen" if among is None else "other"
        )
    )
    if True in words:
        modules = modules_by_path(model)
        for first in candidates:
            positions = [_layer(name) for name in parameters[first].bare]
            owners = [modules[path] for path, _ in positions if path in modules]
            leaves = [leaf for _, leaf in positions]
            biased = any(leaf.endswith("bias") or leaf.startswith("bias_") for leaf in leaves)  # bias_k, bias_ih_l0
            if parameters[first].tensor.ndim <= 1 or biased or any(isinstance(owner, _UNDECAYED) for owner in owners):
                no_decay.add(first)
    return frozenset(no_decay)


def _layer(name: str) -> tuple[str, str]:
    """The path of a parameter's layer and the parameter's name in it, also for a parametrized one.

    >>> _layer("fc.bias"), _layer("fc.parametrizations.weight.original0")
    (('fc', 'bias'), ('fc', 'weight'))
    """
    path, _, leaf = name.rpartition(".")
    head, separator, parametrized = path.rpartition("parametrizations.")
    return (head.removesuffix("."), parametrized) if separator and leaf.startswith("original") else (path, leaf)
