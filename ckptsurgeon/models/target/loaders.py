"""Finds the modules of a model that have loading code of their own, and the keys that such code can reach.

Loading code is an overridden `_load_from_state_dict`, a hook before or after loading, or, for the model itself, an overridden
`load_state_dict`. It gets every key below its module. The code of torch's norms, of the wrappers for activation checkpointing and of FSDP
gives what plain copying gives, so it doesn't count. Nothing is run here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.instancenorm import _InstanceNorm

from ckptsurgeon.loading import Loader
from ckptsurgeon.models.target.sharding import local
from ckptsurgeon.planning.own_loading.versions import module_paths
from ckptsurgeon.wrappers import HIDDEN, unwrap

# torch's code that gives what copying a key's value gives.
PLAIN = (nn.Module._load_from_state_dict, _NormBase._load_from_state_dict, _InstanceNorm._load_from_state_dict)
_WRAPPING = ("torch.distributed.algorithms._checkpoint.checkpoint_wrapper", "ActivationWrapper._pre_load_state_dict_hook")
# FSDP's code, which gathers and shards parameters around a load.
_SHARDING = "torch.distributed.fsdp."
# torch's code that also accepts keys with an older name.
_RENAMING = ("torch.nn.utils.parametrizations", "weight_norm.<locals>._weight_norm_compat_hook")


def find_loaders(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Loader]:
    """The modules of `model` with loading code of their own, by path, with the keys of its state_dict that the code can reach.

    >>> find_loaders(nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1)), {})
    {}
    """
    modules = model.named_modules(remove_duplicate=False)
    rows = [(path, module, changes) for path, module in modules if (changes := _changes(path, module)) is not None]
    if not rows:
        return {}
    below: dict[str, set[str]] = {}
    by_storage: dict[int, set[str]] = {}
    heads = {unwrap(path, HIDDEN) for path, _, _ in rows}
    for key, value in state.items():
        for head in module_paths(unwrap(key, HIDDEN)):
            if head in heads:
                below.setdefault(head, set()).add(key)
        if isinstance(value, torch.Tensor):
            by_storage.setdefault(storage_of(value), set()).add(key)
    loaders = {}
    for path, module, changes in rows:
        keys = set(below.get(unwrap(path, HIDDEN), ()))
        for tensor in tensors_of(module):
            keys |= by_storage.get(storage_of(tensor), set())
        loaders[path] = Loader(type(module).__name__, frozenset(keys), changes)
    return loaders


def changing_loaders(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Loader]:
    """Those of `find_loaders` that may change values."""
    return {path: loader for path, loader in find_loaders(model, state).items() if loader.changes}


def tensors_of(module: nn.Module) -> list[torch.Tensor]:
    """Every parameter and buffer of a module and its submodules, non-persistent buffers included, each once."""
    held = (tensors for part in module.modules() for tensors in (part._parameters, part._buffers) if tensors)
    return list({id(tensor): tensor for tensors in held for tensor in tensors.values() if tensor is not None}.values())


def storage_of(tensor: torch.Tensor) -> int:
    """A number that is equal for tensors which share memory; for a sharded tensor, that of this rank's part. Another tensor without a
    storage of its own shares memory with none."""
    try:
        return int(local(tensor).untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):
        return -id(tensor)


def _changes(path: str, module: nn.Module) -> bool | None:
    """Whether a module's loading code may change values; None for a module without such code."""
    hooks = [_module_and_name(getattr(hook, "hook", hook)) for hook in module._load_state_dict_pre_hooks.values()]
    hooks = [name for name in hooks if name != _WRAPPING and not name[0].startswith(_SHARDING)]
    own = hooks_after(module) or _overridden(module, "_load_from_state_dict", PLAIN)
    own = own or (not path and _overridden(module, "load_state_dict", (nn.Module.load_state_dict,)))
    if own or any(name != _RENAMING for name in hooks):
        return True
    return False if hooks else None


def hooks_after(module: nn.Module) -> list[Any]:
    """A module's hooks that run after loading, without those of FSDP."""
    return [hook for hook in module._load_state_dict_post_hooks.values() if not _module_and_name(hook)[0].startswith(_SHARDING)]


def _overridden(module: nn.Module, name: str, plain: tuple[Any, ...]) -> bool:
    return name in vars(module) or getattr(type(module), name) not in plain


def _module_and_name(hook: Any) -> tuple[str, str]:
    return str(getattr(hook, "__module__", "")), str(getattr(hook, "__qualname__", ""))
