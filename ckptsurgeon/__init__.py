"""ckptsurgeon: take the weights that fit from a checkpoint, put them into a model that is not quite the same, prove that it worked.

The verbs live in `ckptsurgeon.api`; they are loaded when first used (PEP 562), and torch only when a model is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckptsurgeon.version import VERSION as __version__

if TYPE_CHECKING:
    from ckptsurgeon.adapters.user_adapter import adapter
    from ckptsurgeon.api import (
        apply,
        check,
        diff,
        freeze,
        initialize,
        inspect,
        load_plan,
        load_rules,
        match,
        merge,
        open,
        param_groups,
        plan,
        skeleton,
        transfer,
        unfreeze,
        verify,
    )
    from ckptsurgeon.errors import CheckpointError
    from ckptsurgeon.limit_table import limits
    from ckptsurgeon.models.training.thawing import Thaw
    from ckptsurgeon.rules.rules import Rule
    from ckptsurgeon.tensors import Checkpoint, TensorMeta

_HOMES = {
    "adapter": "adapters.user_adapter",
    "Rule": "rules.rules",
    "Thaw": "models.training.thawing",
    "CheckpointError": "errors",
    "limits": "limit_table",
    "Checkpoint": "tensors",
    "TensorMeta": "tensors",
}

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Rule",
    "TensorMeta",
    "Thaw",
    "__version__",
    "adapter",
    "apply",
    "check",
    "diff",
    "freeze",
    "initialize",
    "inspect",
    "limits",
    "load_plan",
    "load_rules",
    "match",
    "merge",
    "open",
    "param_groups",
    "plan",
    "skeleton",
    "transfer",
    "unfreeze",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    from ckptsurgeon.errors import libraries

    with libraries():
        return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'api')}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
