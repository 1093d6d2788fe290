"""A model's parameters in groups that learn at different rates: transferred (by depth, if wanted), fresh, and what patterns name.

Every trainable parameter is in exactly one group, a frozen one in none; that is checked by identity before anything is returned.
Nothing here changes the model or guesses what is fresh: where no record says so, that is an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ckptsurgeon.errors import ModelError
from ckptsurgeon.models.init.recorded import fresh_keys, fresh_parameters, known_fresh, known_partial
from ckptsurgeon.models.target.parameters import Named, first_matching_pattern, named, named_tensors
from ckptsurgeon.models.target.skeleton import state_dict_of
from ckptsurgeon.models.training.decay import without_decay
from ckptsurgeon.models.training.depth import Depths, depths
from ckptsurgeon.parameter_types import NoDecay

__all__ = ["FRESH", "TRANSFERRED", "check_decay", "check_groups", "check_rates", "fresh_keys", "known_fresh", "param_groups"]

TRANSFERRED, FRESH = "transferred", "fresh"
NO_DECAY = "/no decay"


@dataclass(frozen=True)
class _Rows:
    """The groups as they fill: by place (kind, depth, without decay), in which order they are given out."""

    rates: dict[tuple[int, int, bool], tuple[str, float | None]] = field(default_factory=dict)
    members: dict[tuple[int, int, bool], list[tuple[str, torch.Tensor]]] = field(default_factory=dict)

    def add(self, place: tuple[int, int, bool], name: str, rate: float | None, first: str, parameter: torch.Tensor) -> None:
        self.rates[place] = (name, rate)
        self.members.setdefault(place, []).append((first, parameter))


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
    """Parameter groups for any `torch.optim` optimizer: `transferred`, `fresh`, then one for each override; empty ones left out.

    A tied parameter counts once, under its first name; it is fresh only if all its keys are, since otherwise a source gave it its
    values, and an override takes it if the pattern matches any of its names. A name is one of the model's, with wrappers' segments or
    without, or a key of the state_dict.

    Args:
        model: on any device; its `requires_grad` flags say what is trainable.
        source: what is fresh, as for `fresh_keys`.
        lr: the transferred parameters' learning rate; None leaves it to the optimizer.
        fresh_lr: the fresh parameters' learning rate, or
        fresh_scale: what `lr` is multiplied with for them.
        weight_decay: for all groups; None leaves it to the optimizer.
        overrides: learning rate by pattern of parameter names, before all else; the first pattern that matches wins.
        layer_decay: a transferred parameter's rate is `lr` × layer_decay ** (depth below the head), so that the head's is `lr`, the last
            layer's `lr` × layer_decay, and the stem's the least: layer-wise decay as in ELECTRA (Clark et al. 2020, arXiv:2003.10555) and
            BEiT (Bao et al. 2021, arXiv:2106.08254). Fresh parameters and overrides keep their rate.
        layers: what the layers are, as for `depths`; None asks a timm model's own `group_matcher`, and else finds them in the module tree.
        no_decay: what gets no weight decay, as for `without_decay`; each group then comes in two, the second named `…/no decay`.
        partial: whether tensors that are partly transferred count as `transferred` or as `fresh`.

    Returns:
        Dicts of `name`, `params` (the parameters), `param_names`, and `lr` and `weight_decay` where they are known. All have
        `param_names`, as torch's optimizers want it, and keep it through their state_dict.

    Raises:
        NoRecordError: as `fresh_keys` and, with `partial="fresh"`, `partial_keys`.
        ModelError: keys on record that the model has not, a pattern that matches no trainable parameter, nothing trainable, a lazy
            parameter, a rate that is negative or not a number, both or none of `fresh_lr` and `fresh_scale` where one is needed, layers
            that can't be told (`depths`).

    >>> net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    >>> groups = param_groups(net, ["1.weight", "1.bias"], lr=1e-3, fresh_lr=1e-2)
    >>> [(group["name"], group["lr"], group["param_names"]) for group in groups]
    [('transferred', 0.001, ['0.weight', '0.bias']), ('fresh', 0.01, ['1.weight', '1.bias'])]
    """
    given = dict(overrides or {})
    check_rates({"lr": lr, "fresh_lr": fresh_lr, "fresh_scale": fresh_scale, "weight_decay": weight_decay, **given})
    _check_choices(lr, fresh_lr, fresh_scale, layer_decay, layers, partial)
    every, buffers = named_tensors(model)
    tensors = [*every.values(), *buffers.values()]
    keys = state_dict_of(model, type(model).__name__)
    fresh = known_fresh(keys, tensors, source) | (known_partial(keys, tensors, source) if partial == FRESH else frozenset())
    trainable = {first: one for first, one in every.items() if one.trainable}
    if not trainable:
        raise ModelError("the model has no trainable parameter", hint="set requires_grad_(True) on what should learn" if every else None)
    chosen = first_matching_pattern(given, {first: one.every for first, one in trainable.items()}, _frozen_names(every), "frozen")
    bare = without_decay(model, no_decay)
    newest = fresh_parameters(every, buffers, fresh, chosen) & trainable.keys() - chosen.keys()
    rate = lr * fresh_scale if lr is not None and fresh_scale is not None else fresh_lr
    if newest and rate is None:
        hint = "give fresh_lr=1e-2, or fresh_scale=10"
        first = next(first for first in trainable if first in newest)
        raise ModelError(f"{len(newest)} parameters are fresh, and no rate is given for them", key=first, hint=hint)
    deep = depths(model, layers, trainable.keys() - newest - chosen.keys()) if layer_decay is not None else None
    rows, turns = _Rows(), {text: number for number, text in enumerate(given, start=2)}
    for first, one in trainable.items():
        plain = first in bare
        if first in chosen:
            rows.add((turns[chosen[first]], 0, plain), chosen[first], given[chosen[first]], first, one.tensor)
        elif first in newest:
            rows.add((1, 0, plain), FRESH, rate, first, one.tensor)
        else:
            depth, name, own = _by_depth(deep, first, lr, layer_decay)
            rows.add((0, depth, plain), name, own, first, one.tensor)
    groups = [_group(*rows.rates[place], weight_decay, place[2], rows.members[place]) for place in sorted(rows.rates)]
    check_groups(model, groups)
    _check_claims(every, fresh, groups)
    return groups


def check_groups(model: nn.Module, groups: Iterable[Mapping[str, Any]]) -> None:
    """Every trainable parameter of the model is in exactly one group, and nothing else is in any.

    Args:
        groups: dicts with `params`, such as an optimizer's `param_groups`.

    Raises:
        ModelError: it is not so; each parameter that is in none, in two, twice in one, or frozen in one is named.

    >>> net = nn.Linear(3, 2)
    >>> check_groups(net, [{"name": "all", "params": [net.weight]}])
    Traceback (most recent call last):
    ckptsurgeon.errors.ModelError: bias: is trainable, and in no group
    """
    every = named(model)
    known = {id(one.tensor) for one in every.values()}
    places: dict[int, list[str]] = {}
    problems = []
    for number, group in enumerate(groups):
        title = str(group.get("name", number))
        for parameter in group["params"]:
            places.setdefault(id(parameter), []).append(title)
            if id(parameter) not in known:
                problems.append((f"a parameter of shape {tuple(parameter.shape)}", f"is in the group {title!r}, and not the model's"))
    for first, one in every.items():
        found = places.get(id(one.tensor), [])
        if len(found) > 1:
            problems.append((first, f"is in {len(found)} groups: {', '.join(map(repr, found))}"))
        elif found and not one.trainable:
            problems.append((first, f"is frozen, and in the group {found[0]!r}"))
        elif one.trainable and not found:
            problems.append((first, "is trainable, and in no group"))
    if len(problems) == 1:
        raise ModelError(problems[0][1], key=problems[0][0])
    if problems:
        lines = tuple(f"{name}: {reason}" for name, reason in problems)
        raise ModelError(f"{len(problems)} parameters are not in exactly one group", key=problems[0][0], problems=lines)


def _check_claims(every: Mapping[str, Named], fresh: frozenset[str], groups: Iterable[Mapping[str, Any]]) -> None:
    """Every fresh key of a trainable parameter is claimed by exactly one group. ModelError otherwise."""
    group_of = {id(parameter): group["name"] for group in groups for parameter in group["params"]}
    claims: dict[str, list[str]] = {}
    for one in every.values():
        for key in one.keys if one.trainable else ():
            claims.setdefault(key, []).append(group_of[id(one.tensor)])
    for key, titles in claims.items():
        if key in fresh and len(set(titles)) > 1:
            words = " and ".join(map(repr, titles))
            raise ModelError(f"is fresh, and of {len(titles)} parameters that share its memory, in the groups {words}", key=key)


def _by_depth(deep: Depths | None, first: str, lr: float | None, decay: float | None) -> tuple[int, str, float | None]:
    if deep is None or lr is None or decay is None:
        return 0, TRANSFERRED, lr
    depth = deep.of[first]
    return depth, f"{TRANSFERRED}/{deep.label(depth)}", lr * decay ** (deep.top - depth)


def _group(name: str, lr: float | None, decay: float | None, plain: bool, members: list[tuple[str, torch.Tensor]]) -> dict[str, Any]:
    known = {"lr": lr, "weight_decay": 0.0 if plain else decay}
    return {
        "name": name + (NO_DECAY if plain else ""),
        "params": [parameter for _, parameter in members],
        "param_names": [first for first, _ in members],
        **{word: value for word, value in known.items() if value is not None},
    }


def _frozen_names(every: Mapping[str, Named]) -> list[str]:
    return [name for one in every.values() if not one.trainable for name in one.every]


def check_rates(rates: Mapping[str, float | None]) -> None:
    for name, value in rates.items():
        if value is None:
            continue
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not math.isfinite(value) or value < 0:
            raise ModelError(f"{name} can't be {value!r}", hint="a rate is a number that is not negative")


def _check_choices(
    lr: float | None, fresh_lr: float | None, fresh_scale: float | None, layer_decay: float | None, layers: object, partial: str
) -> None:
    if fresh_lr is not None and fresh_scale is not None:
        raise ModelError("fresh_lr and fresh_scale are both given", hint="give one: fresh_lr is a rate, fresh_scale a multiple of lr")
    if fresh_scale is not None and lr is None:
        raise ModelError("fresh_scale multiplies lr, and no lr is given", hint="give lr, or fresh_lr")
    if partial not in (TRANSFERRED, FRESH):
        raise ModelError(f"partial can't be {partial!r}", hint="give 'transferred' or 'fresh'")
    if layer_decay is None:
        if layers is not None:
            raise ModelError("layers says what the layers are, and no layer_decay is given", hint="give layer_decay=0.75")
        return
    check_decay(layer_decay)
    if lr is None:
        raise ModelError("layer_decay multiplies lr, and no lr is given", hint="give lr")


def check_decay(value: object) -> None:
    """Raises ModelError for a layer decay that is no number above 0 and up to 1."""
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 < value <= 1:
        raise ModelError(f"layer_decay can't be {value!r}", hint="give a number above 0 and up to 1, such as 0.75")
