"""Which parameters get no weight decay: biases, all of one dimension or none, norms and embeddings; or those that patterns name.

Norms and embeddings are told by their module's type, biases by their name. Nothing is changed here.
"""

from __future__ import annotations

from collections.abc import Collection

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ckptsurgeon.errors import ModelError
from ckptsurgeon.models.target.parameters import first_matching_pattern, modules_by_path, named
from ckptsurgeon.parameter_types import NoDecay

_PLAIN = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.Embedding, nn.EmbeddingBag)


def without_decay(model: nn.Module, rule: NoDecay, among: Collection[str] | None = None) -> frozenset[str]:
    """First names of the parameters that get no weight decay; a tied one gets none if any of its names says so.

    Args:
        rule: True for the usual ones (biases, parameters of at most one dimension, norms and embeddings by module type), False for none,
            patterns for those that they match, and True among patterns for the usual ones too.
        among: first names of the parameters that are asked about; None for the trainable ones.

    Raises:
        ModelError: a pattern matches none of them, or the rule is something else.

    >>> sorted(without_decay(nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2)), True))
    ['0.weight', '1.bias']
    """
    words = [rule] if isinstance(rule, (bool, str)) else list(rule)
    if not all(isinstance(word, (bool, str)) for word in words):
        raise ModelError(f"no_decay can't be {rule!r}", hint="give True, or patterns such as ['**.bias']")
    parameters = named(model)
    wanted = {first: one.every for first, one in parameters.items() if (one.trainable if among is None else first in among)}
    rest = [name for first, one in parameters.items() if first not in wanted for name in one.every]
    found = set(
        first_matching_pattern([word for word in words if isinstance(word, str)], wanted, rest, "frozen" if among is None else "other")
    )
    if True in words:
        modules = modules_by_path(model)
        for first in wanted:
            places = [_layer(name) for name in parameters[first].bare]
            owners = [modules[path] for path, _ in places if path in modules]
            leaves = [leaf for _, leaf in places]
            biased = any(leaf.endswith("bias") or leaf.startswith("bias_") for leaf in leaves)  # bias_k, bias_ih_l0
            if parameters[first].tensor.ndim <= 1 or biased or any(isinstance(owner, _PLAIN) for owner in owners):
                found.add(first)
    return frozenset(found)


def _layer(name: str) -> tuple[str, str]:
    """The path of the layer that a parameter is of, and its name there, also where it is parametrized.

    >>> _layer("fc.bias"), _layer("fc.parametrizations.weight.original0")
    (('fc', 'bias'), ('fc', 'weight'))
    """
    path, _, leaf = name.rpartition(".")
    head, found, parametrized = path.rpartition("parametrizations.")
    return (head.removesuffix("."), parametrized) if found and leaf.startswith("original") else (path, leaf)
