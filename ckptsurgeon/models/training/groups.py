"""A model's parameters in groups with different learning rates: transferred (optionally by depth), fresh, and matched by patterns; and
which of them get no weight decay: biases, parameters of at most one dimension, norms and embeddings, or those that patterns match.

Every trainable parameter is in exactly one group, a frozen one in none; this is checked by identity before the groups are returned.
The model is not changed, and nothing is guessed: without a record of what is fresh, an error is raised. Norms and embeddings are recognised
by their module's type, biases by their name.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ckptsurgeon.errors import ModelError
from ckptsurgeon.models.init.recorded import fresh_keys, fresh_parameters, known_fresh, known_partial, refuse_unrecorded
from ckptsurgeon.models.target.parameters import Named, first_matching_pattern, modules_by_path, named, named_tensors
from ckptsurgeon.models.target.skeleton import state_dict_of
from ckptsurgeon.models.training.depth import Depths, depths
from ckptsurgeon.parameter_types import NoDecay

__all__ = ["FRESH", "TRANSFERRED", "check_decay", "check_groups", "check_rates", "fresh_keys", "known_fresh", "param_groups"]

TRANSFERRED, FRESH = "transferred", "fresh"
NO_DECAY = "/no decay"
_UNDECAYED = (_NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.Embedding, nn.EmbeddingBag)


@dataclass(frozen=True)
class _Groups:
    """The groups being built, by (kind, depth, without decay), which is also their order in the result."""

    rates: dict[tuple[int, int, bool], tuple[str, float | None]] = field(default_factory=dict)
    members: dict[tuple[int, int, bool], list[tuple[str, torch.Tensor]]] = field(default_factory=dict)

    def add(self, group: tuple[int, int, bool], name: str, rate: float | None, first: str, parameter: torch.Tensor) -> None:
        self.rates[group] = (name, rate)
        self.members.setdefault(group, []).append((first, parameter))


def param_groups(
    model: nn.Module,
    source: object,
    *,
    lr: float | None,
    fresh_lr: float | None = None,
    fresh_scale: float | None = None,
    weight_decay: float | None = None,
    overrides: Mapping[str, float] | None = None,
    layer_decay: float | None = None,
    layers: str | Iterable[str] | None = None,
    no_decay: NoDecay = False,
    partial: str = TRANSFERRED,
) -> list[dict[str, Any]]:
    """Parameter groups for any `torch.optim` optimizer: `transferred`, `fresh`, then one for each override; empty groups are left out.

    A tied parameter counts once, under its first name. It is fresh only if all its keys are, since otherwise its values came from a
    source. An override applies if its pattern matches any of the parameter's names: those in the model, with or without wrappers'
    segments, and its keys in the state_dict.

    Args:
        model: on any device; its `requires_grad` flags decide what is trainable.
        source: the record of what is fresh, as for `fresh_keys`.
        lr: the transferred parameters' learning rate; None leaves it to the optimizer.
        fresh_lr: the fresh parameters' learning rate.
        fresh_scale: instead of `fresh_lr`: the fresh parameters' rate is `lr` × fresh_scale.
        weight_decay: for all groups; None leaves it to the optimizer.
        overrides: learning rates by pattern of parameter names, which take precedence; the first matching pattern wins.
        layer_decay: a transferred parameter's rate is `lr` × layer_decay ** (depth below the head), so that the head's is `lr`, the last
            layer's `lr` × layer_decay, and the stem's the least: layer-wise decay as in ELECTRA (Clark et al. 2020, arXiv:2003.10555) and
            BEiT (Bao et al. 2021, arXiv:2106.08254). Fresh parameters and overrides keep their rate.
        layers: patterns for the layers, as for `depths`; None uses a timm model's own `group_matcher`, or finds them in the module tree.
        no_decay: what gets no weight decay, as for `without_decay`; such parameters are in groups of their own, named `…/no decay`.
        partial: whether partly transferred tensors count as `transferred` or as `fresh`.

    Returns:
        Dicts of `name`, `params` (the parameters), `param_names`, and `lr` and `weight_decay` where they are known. All groups have
        `param_names`, as torch's optimizers require, which then keep it in their state_dict.

    Raises:
        NoRecordError: as `fresh_keys` and, with `partial="fresh"`, `partial_keys`.
        ModelError: recorded keys that the model does not have, a parameter of which the record says nothing, a pattern that matches no
            trainable parameter, nothing trainable, a lazy parameter, a rate that is negative or not a number, both or none of
            `fresh_lr` and `fresh_scale` if one is needed, or layers that can't be found (`depths`).

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    >>> groups = param_groups(net, ["1.weight", "1.bias"], lr=1e-3, fresh_lr=1e-2)
    >>> [(group["name"], group["lr"], group["param_names"]) for group in groups]
    [('transferred', 0.001, ['0.weight', '0.bias']), ('fresh', 0.01, ['1.weight', '1.bias'])]
    """
    rates = dict(overrides or {})
    check_rates({"lr": lr, "fresh_lr": fresh_lr, "fresh_scale": fresh_scale, "weight_decay": weight_decay, **rates})
    _check_choices(lr, fresh_lr, fresh_scale, layer_decay, layers, partial)
    parameters, buffers = named_tensors(model)
    tensors = [*parameters.values(), *buffers.values()]
    keys = state_dict_of(model, type(model).__name__)
    fresh = known_fresh(keys, tensors, source) | (known_partial(keys, tensors, source) if partial == FRESH else frozenset())
    trainable = {first: parameter for first, parameter in parameters.items() if parameter.trainable}
    if not trainable:
        raise ModelError(
            "the model has no trainable parameter", hint="set requires_grad_(True) on what should learn" if parameters else None
        )
    frozen_names = [name for parameter in parameters.values() if not parameter.trainable for name in parameter.all_names]
    chosen = first_matching_pattern(rates, {first: parameter.all_names for first, parameter in trainable.items()}, frozen_names, "frozen")
    refuse_unrecorded(keys, tensors, source, chosen, "pass its own record, or give it a rate by pattern: overrides={{'{}': 1e-2}}")
    undecayed = without_decay(model, no_decay)
    fresh_first = fresh_parameters(parameters, buffers, fresh, chosen) & trainable.keys() - chosen.keys()
    rate = lr * fresh_scale if lr is not None and fresh_scale is not None else fresh_lr
    if fresh_first and rate is None:
        hint = "give fresh_lr=1e-2, or fresh_scale=10"
        first = next(first for first in trainable if first in fresh_first)
        raise ModelError(f"{len(fresh_first)} parameters are fresh, but have no learning rate", key=first, hint=hint)
    layer_depths = depths(model, layers, trainable.keys() - fresh_first - chosen.keys()) if layer_decay is not None else None
    built, kinds = _Groups(), {text: number for number, text in enumerate(rates, start=2)}
    for first, parameter in trainable.items():
        no_weight_decay = first in undecayed
        if first in chosen:
            built.add((kinds[chosen[first]], 0, no_weight_decay), chosen[first], rates[chosen[first]], first, parameter.tensor)
        elif first in fresh_first:
            built.add((1, 0, no_weight_decay), FRESH, rate, first, parameter.tensor)
        else:
            depth, name, own = _by_depth(layer_depths, first, lr, layer_decay)
            built.add((0, depth, no_weight_decay), name, own, first, parameter.tensor)
    groups = [_group(*built.rates[group], weight_decay, group[2], built.members[group]) for group in sorted(built.rates)]
    check_groups(model, groups)
    _check_claims(parameters, fresh, groups)
    return groups


def check_groups(model: nn.Module, groups: Iterable[Mapping[str, Any]]) -> None:
    """Check that every trainable parameter of the model is in exactly one group, and that the groups contain nothing else.

    Args:
        groups: dicts with `params`, such as an optimizer's `param_groups`.

    Raises: ModelError: otherwise; it names each parameter that is in no group, in several groups, twice in a group, or in a group though it
        is frozen.

    >>> net = nn.Linear(3, 2)
    >>> check_groups(net, [{"name": "all", "params": [net.weight]}])
    Traceback (most recent call last):
    ckptsurgeon.errors.ModelError: bias: is trainable, but in no group
    """
    parameters = named(model)
    ids = {id(names.tensor) for names in parameters.values()}
    titles_of: dict[int, list[str]] = {}
    problems = []
    for number, group in enumerate(groups):
        title = str(group.get("name", number))
        for parameter in group["params"]:
            titles_of.setdefault(id(parameter), []).append(title)
            if id(parameter) not in ids:
                problems.append(
                    (f"a parameter of shape {tuple(parameter.shape)}", f"is in the group {title!r}, but is no parameter of the model")
                )
    for first, names in parameters.items():
        titles = titles_of.get(id(names.tensor), [])
        if len(titles) > 1:
            problems.append((first, f"is in {len(titles)} groups: {', '.join(map(repr, titles))}"))
        elif titles and not names.trainable:
            problems.append((first, f"is frozen, but in the group {titles[0]!r}"))
        elif names.trainable and not titles:
            problems.append((first, "is trainable, but in no group"))
    if len(problems) == 1:
        raise ModelError(problems[0][1], key=problems[0][0])
    if problems:
        lines = tuple(f"{name}: {reason}" for name, reason in problems)
        raise ModelError(f"{len(problems)} parameters are not in exactly one group", key=problems[0][0], problems=lines)


def _check_claims(every: Mapping[str, Named], fresh: frozenset[str], groups: Iterable[Mapping[str, Any]]) -> None:
    """Check that the parameters which share a fresh key are all in the same group. ModelError otherwise."""
    group_of = {id(parameter): group["name"] for group in groups for parameter in group["params"]}
    claims: dict[str, list[str]] = {}
    for parameter in every.values():
        for key in parameter.keys if parameter.trainable else ():
            claims.setdefault(key, []).append(group_of[id(parameter.tensor)])
    for key, titles in claims.items():
        if key in fresh and len(set(titles)) > 1:
            words = " and ".join(map(repr, titles))
            raise ModelError(f"is fresh, but the {len(titles)} parameters that share its memory are in different groups: {words}", key=key)


def _by_depth(layer_depths: Depths | None, first: str, lr: float | None, decay: float | None) -> tuple[int, str, float | None]:
    if layer_depths is None or lr is None or decay is None:
        return 0, TRANSFERRED, lr
    depth = layer_depths.of[first]
    return depth, f"{TRANSFERRED}/{layer_depths.label(depth)}", lr * decay ** (layer_depths.top - depth)


def _group(
    name: str, lr: float | None, decay: float | None, no_weight_decay: bool, members: list[tuple[str, torch.Tensor]]
) -> dict[str, Any]:
    settings = {"lr": lr, "weight_decay": 0.0 if no_weight_decay else decay}
    return {
        "name": name + (NO_DECAY if no_weight_decay else ""),
        "params": [parameter for _, parameter in members],
        "param_names": [first for first, _ in members],
        **{option: value for option, value in settings.items() if value is not None},
    }


def check_rates(rates: Mapping[str, float | None]) -> None:
    for name, value in rates.items():
        if value is None:
            continue
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
            raise ModelError(f"{name} can't be {value!r}", hint="give a number of at least 0")


def _check_choices(
    lr: float | None, fresh_lr: float | None, fresh_scale: float | None, layer_decay: float | None, layers: object, partial: str
) -> None:
    if fresh_lr is not None and fresh_scale is not None:
        raise ModelError("fresh_lr and fresh_scale are both given", hint="give only one: fresh_lr is a rate, fresh_scale a multiple of lr")
    if fresh_scale is not None and lr is None:
        raise ModelError("fresh_scale multiplies lr, which is missing", hint="give lr, or fresh_lr")
    if partial not in (TRANSFERRED, FRESH):
        raise ModelError(f"partial can't be {partial!r}", hint="give 'transferred' or 'fresh'")
    if layer_decay is None:
        if layers is not None:
            raise ModelError("layers are given without layer_decay", hint="give layer_decay=0.75")
        return
    check_decay(layer_decay)
    if lr is None:
        raise ModelError("layer_decay multiplies lr, which is missing", hint="give lr")


def check_decay(value: object) -> None:
    """ModelError for a layer decay that is not a number above 0 and at most 1."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= 1:
        raise ModelError(f"layer_decay can't be {value!r}", hint="give a number above 0 and at most 1, such as 0.75")


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
