"""ckptsurgeon: take the weights that fit from a checkpoint, put them into a model that is not quite the same, prove that it worked.

The verbs live in `ckptsurgeon.api`; they are loaded when first used (PEP 562), and torch only when a model is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckptsurgeon.version import VERSION as __version__

if TYPE_CHECKING:
    from ckptsurgeon.api import (
        apply,
        check,
        diff,
        initialize,
        inspect,
        load_plan,
        merge,
        open,
        param_groups,
        plan,
        skeleton,
        transfer,
        verify,
    )
    from ckptsurgeon.errors import CheckpointError
    from ckptsurgeon.tensors import Checkpoint, TensorMeta

_HOMES = {"CheckpointError": "errors", "Checkpoint": "tensors", "TensorMeta": "tensors"}

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "TensorMeta",
    "__version__",
    "apply",
    "check",
    "diff",
    "initialize",
    "inspect",
    "load_plan",
    "merge",
    "open",
    "param_groups",
    "plan",
    "skeleton",
    "transfer",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOMES.get(name, 'api')}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
