"""Which modules of a model load in their own way, and what such code may reach.

A module's own way is an overridden `_load_from_state_dict`, a hook before or after loading, or, for the model itself, an overridden
`load_state_dict`. Such code gets every key below its module. torch's own norms and the wrappers of activation checkpointing do no more than
plain copying does, nor do FSDP's hooks, so they don't count. Nothing is run here.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from ckptsurgeon.loading import Loader
from ckptsurgeon.models.target.sharding import local
from ckptsurgeon.planning.own_loading.versions import module_paths
from ckptsurgeon.wrappers import HIDDEN, unwrap

# torch's own code that gives what copying a key's value gives.
_PLAIN = (nn.Module._load_from_state_dict, _NormBase._load_from_state_dict, _InstanceNorm._load_from_state_dict)
_WRAPPING = ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper._pre_load_state_dict_hook")
# FSDP's own code, which puts sharded parameters back in their places around a load.
_SHARDING = "torch.distributed.fsdp."
# torch's own code that takes keys under an older name, and leaves today's names alone.
_RENAMING = ("torch.nn.utils.parametrizations", "weight_norm.<locals>._weight_norm_compat_hook")


def find_loaders(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Loader]:
    """The modules of `model` with loading code of their own, by path, with the keys of its state_dict that the code can reach.

    >>> find_loaders(nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)), {})
    {}
    """
    found = [(path, module, changes) for path, module, changes in _modules(model) if changes is not None]
    if not found:
        return {}
    below: dict[str, set[str]] = {}
    by_storage: dict[int, set[str]] = {}
    heads = {unwrap(path, HIDDEN) for path, _, _ in found}
    for key, value in state.items():
        for head in module_paths(unwrap(key, HIDDEN)):
            if head in heads:
                below.setdefault(head, set()).add(key)
        if isinstance(value, torch.Tensor):
            by_storage.setdefault(storage_of(value), set()).add(key)
    loaders = {}
    for path, module, changes in found:
        keys = set(below.get(unwrap(path, HIDDEN), ()))
        for tensor in tensors_of(module):
            keys |= by_storage.get(storage_of(tensor), set())
        loaders[path] = Loader(type(module).__name__, frozenset(keys), changes)
    return loaders


def tensors_of(module: nn.Module) -> list[torch.Tensor]:
    """Every parameter and buffer of a module and all below it, those that no file holds among them."""
    return [*module.parameters(), *module.buffers()]


def storage_of(tensor: torch.Tensor) -> int:
    """What tensors that share memory have in common; of a sharded tensor, that of this rank's part. Another wrapper around tensors has no
    memory of its own, and shares none."""
    try:
        return int(local(tensor).untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return -id(tensor)


def _modules(model: nn.Module) -> Iterator[tuple[str, nn.Module, bool | None]]:
    """Every module with whether its code may change values; None where it loads as any other does."""
    for path, module in model.named_modules(remove_duplicate=False):
        changes = _changes(module)
        if not path and _overridden(module, "load_state_dict", (nn.Module.load_state_dict,)):
            changes = True
        yield path, module, changes


def _changes(module: nn.Module) -> bool | None:
    hooks = [_place(getattr(hook, "hook", hook)) for hook in module._load_state_dict_pre_hooks.values()]
    hooks = [place for place in hooks if place != _WRAPPING and not place[0].startswith(_SHARDING)]
    after = [hook for hook in module._load_state_dict_post_hooks.values() if not _place(hook)[0].startswith(_SHARDING)]
    own = after or _overridden(module, "_load_from_state_dict", _PLAIN)
    if own or any(place != _RENAMING for place in hooks):
        return True
    return False if hooks else None


def _overridden(module: nn.Module, name: str, plain: tuple[Any, ...]) -> bool:
    return name in vars(module) or getattr(type(module), name) not in plain


def _place(hook: Any) -> tuple[str, str]:
    return str(getattr(hook, "__module__", "")), str(getattr(hook, "__qualname__", ""))
