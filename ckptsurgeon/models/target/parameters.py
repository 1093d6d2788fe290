"""Lists a model's parameters and buffers with all their names, and matches patterns against these. Nothing is changed here.

A tensor's names in the model (`named_parameters`) and its keys in the state_dict may differ: wrappers and hooks rename keys. A key belongs
to the tensor that is its value; if a hook saved a copy instead, the name decides. A tied parameter is listed under its first name, in the
order of registration. A pattern matches a tensor if it matches any of its names; a pattern that matches no tensor is an error.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ckptsurgeon.errors import ModelError
from ckptsurgeon.models.target import user_code
from ckptsurgeon.models.target.skeleton import tie_key
from ckptsurgeon.rules.meant import meant_hint
from ckptsurgeon.rules.patterns import Pattern, compile_pattern
from ckptsurgeon.wrappers import WRAPPERS


@dataclass(frozen=True)
class Named:
    """A parameter or buffer with its `names` in the model in order, its names without wrappers' segments (`bare`), and its `keys` in the
    state_dict, which may be none."""

    names: tuple[str, ...]
    bare: tuple[str, ...]
    keys: tuple[str, ...]
    tensor: torch.Tensor

    @property
    def trainable(self) -> bool:
        """Whether it requires a gradient now."""
        return self.tensor.requires_grad

    @cached_property
    def all_names(self) -> tuple[str, ...]:
        """All its names, which patterns are matched against."""
        return tuple(dict.fromkeys((*self.names, *self.bare, *self.keys)))


def named(model: nn.Module) -> dict[str, Named]:
    """The parameters by their first names, in the model's order. Raises ModelError for a lazy one, whose object is replaced later.

    >>> list(named(nn.Linear(3, 2)))
    ['weight', 'bias']
    """
    return named_tensors(model)[0]


def named_tensors(model: nn.Module) -> tuple[dict[str, Named], dict[str, Named]]:
    """The parameters, as `named` gives them, and the buffers likewise; a non-persistent buffer has no key. Raises as `named`.

    >>> [list(part) for part in named_tensors(nn.BatchNorm1d(2))]
    [['weight', 'bias'], ['running_mean', 'running_var', 'num_batches_tracked']]
    """
    by_id: dict[int, tuple[torch.Tensor, list[str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if is_lazy(parameter):
            raise ModelError("is lazy: it has no shape before the first forward pass", key=name, hint="run one forward pass first")
        by_id.setdefault(id(parameter), (parameter, []))[1].append(name)
    parameters = len(by_id)
    for name, buffer in model.named_buffers(remove_duplicate=False):
        by_id.setdefault(id(buffer), (buffer, []))[1].append(name)
    wrappers, paths = _wrappers(model), _paths(model)
    bare = {
        number: tuple(dict.fromkeys(_unwrapped(name, wrappers) for name in paths.get(number, names)))
        for number, (_, names) in by_id.items()
    }
    keys = _keys(_live_state_dict(model), by_id, bare)
    rows = [(names[0], Named(tuple(names), bare[number], tuple(keys[number]), tensor)) for number, (tensor, names) in by_id.items()]
    return dict(rows[:parameters]), dict(rows[parameters:])


def by_name(model: nn.Module, parameters: Iterable[Named]) -> dict[str, Named]:
    """These parameters by every name in the model, in the order of registration; a tied one is listed under each of its names."""
    known = {name: parameter for parameter in parameters for name in parameter.names}
    return {name: known[name] for name, _ in model.named_parameters(remove_duplicate=False) if name in known}


def modules_by_path(model: nn.Module) -> dict[str, nn.Module]:
    """Every module by its path without wrappers' segments; a wrapper has the same path as its inner module, which is the one listed.

    >>> list(modules_by_path(nn.DataParallel(nn.Sequential(nn.Linear(3, 2)))))
    ['', '0']
    """
    wrappers = _wrappers(model)
    return {_unwrapped(path, wrappers): module for path, module in model.named_modules(remove_duplicate=False)}


def _wrappers(model: nn.Module) -> set[str]:
    return {path for path, module in model.named_modules(remove_duplicate=False) if inner(module) is not module}


def _paths(model: nn.Module) -> dict[int, list[str]]:
    """The paths of each parameter and buffer by its id, even if a wrapper overrides `named_parameters`."""
    by_id: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for leaf, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                by_id.setdefault(id(tensor), []).append(f"{path}.{leaf}" if path else leaf)
    return by_id


def inner(module: nn.Module) -> nn.Module:
    """The module within one or more wrappers; any other module itself. A wrapper has no parameters of its own and one child, whose name is
    among `WRAPPERS`.

    >>> inner(nn.DataParallel(nn.Linear(3, 2))), inner(nn.Flatten())
    (Linear(in_features=3, out_features=2, bias=True), Flatten(start_dim=1, end_dim=-1))
    """
    while True:
        children = {id(child): child for child in module._modules.values() if child is not None}
        if (
            len(children) != 1
            or not WRAPPERS.issuperset(module._modules)
            or any(parameter is not None for parameter in module._parameters.values())
        ):
            return module
        (module,) = children.values()


def _unwrapped(name: str, wrappers: Iterable[str]) -> str:
    """A name in the model without the segments that name a wrapper's child."""
    segments = name.split(".")
    return ".".join(
        segment for depth, segment in enumerate(segments) if segment not in WRAPPERS or ".".join(segments[:depth]) not in wrappers
    )


def _live_state_dict(model: nn.Module) -> Mapping[str, Any]:
    """The state_dict with the model's own tensors, if it can have them."""
    parameters = inspect.signature(model.state_dict).parameters
    live = "keep_vars" in parameters or any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    state: Mapping[str, Any] = user_code.call(type(model).__name__, partial(model.state_dict, keep_vars=True) if live else model.state_dict)
    return state


def _keys(
    state: Mapping[str, Any], by_id: Mapping[int, tuple[torch.Tensor, list[str]]], bare: Mapping[int, tuple[str, ...]]
) -> dict[int, list[str]]:
    """The keys of each tensor: of entries that are this tensor or share its memory, and of copies with its name."""
    keys: dict[int, list[str]] = {number: [] for number in by_id}
    tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    shared: dict[Any, list[int]] = {}
    for number, (tensor, _) in by_id.items():
        shared.setdefault(_memory(tensor), []).append(number)
    copies = []
    for key, value in tensors.items():
        owners = [id(value)] if id(value) in by_id else shared.get(_memory(value), [])
        by_name = [number for number in owners if key in by_id[number][1] or key in bare[number]]
        for number in by_name or owners:
            keys[number].append(key)
        if not owners:
            copies.append(key)
    without_keys = {name: number for number, own in keys.items() if not own for name in (*by_id[number][1], *bare[number])}
    for key in copies:
        owner = without_keys.get(key)
        if owner is not None and tensors[key].shape == by_id[owner][0].shape:
            keys[owner].append(key)
    return keys


def _memory(tensor: torch.Tensor) -> Any:
    """The `tie_key` of a tensor; its id if it has none."""
    try:
        return tie_key(tensor)
    except (NotImplementedError, RuntimeError):  # sparse tensors and some subclasses have no storage
        return id(tensor)


def keys_by_name(tensors: Iterable[Named]) -> dict[str, tuple[str, ...]]:
    """The state_dict keys for every name of a tensor: the key with that name if there is one, else all its keys.

    >>> keys_by_name(named(nn.DataParallel(nn.Linear(3, 2))).values())["weight"]
    ('module.weight',)
    """
    return {name: (name,) if name in tensor.keys else tensor.keys for tensor in tensors for name in tensor.all_names if tensor.keys}


def listed(patterns: str | Iterable[str]) -> tuple[str, ...]:
    """A tuple of patterns, also for a single one.

    >>> listed("fc.*"), listed(["fc.*"])
    (('fc.*',), ('fc.*',))
    """
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def first_matching_pattern(
    patterns: Iterable[str], candidates: Mapping[str, Iterable[str]], excluded: Iterable[str], excluded_kind: str
) -> dict[str, str]:
    """Assign candidates to patterns: the first pattern that matches any name of a candidate wins.

    Args:
        candidates: the first name of each candidate, with all its names.
        excluded: the names of parameters that are no candidates.
        excluded_kind: what the error message calls the excluded parameters.

    Raises:
        ModelError: a pattern matches no candidate; the error lists all such patterns.

    >>> first_matching_pattern(["b*", "*"], {"a": ["a"], "b": ["b"]}, [], "")
    {'b': 'b*', 'a': '*'}
    """
    pattern_of: dict[str, str] = {}
    problems = []
    for text in patterns:
        pattern = compile_pattern(text)
        firsts = matched(pattern, candidates)
        for first in firsts:
            pattern_of.setdefault(first, text)
        if not firsts:
            only = any(pattern.match(name) is not None for name in excluded)
            problems.append((f"the pattern {text!r} matches {f'{excluded_kind} parameters only' if only else 'no parameter'}", text))
    if problems:
        hint = meant_hint(problems[0][1], [*(name for names in candidates.values() for name in names), *excluded])
        if len(problems) == 1:
            raise ModelError(problems[0][0], hint=hint)
        raise ModelError(f"{len(problems)} patterns match nothing", hint=hint, problems=tuple(reason for reason, _ in problems))
    return pattern_of


def matched(pattern: Pattern, names: Mapping[str, Iterable[str]]) -> dict[str, dict[str, str]]:
    """The entries that have a name which matches the pattern, each with the pattern's parts in the first such name.

    >>> matched(compile_pattern("fc{i}.*"), {"fc1.weight": ["module.fc1.weight", "fc1.weight"], "head": ["head"]})
    {'fc1.weight': {'i': '1'}}
    """
    pattern.learn(name for own_names in names.values() for name in own_names)
    rows = (
        (first, next((parts for name in own_names if (parts := pattern.match(name)) is not None), None))
        for first, own_names in names.items()
    )
    return {first: parts for first, parts in rows if parts is not None}
