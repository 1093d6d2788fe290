"""ckptsurgeon: take the weights that fit from a checkpoint, put them into a model that is not quite the same, prove that it worked.

The verbs live in `ckptsurgeon.api`; they are loaded when first used (PEP 562), and torch only when a model is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"  # pyproject.toml reads it from here

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
    from ckptsurgeon.errors import (
        ArgumentError,
        CastError,
        CheckpointError,
        CoverageError,
        DeviceError,
        FormatError,
        InternalError,
        LimitError,
        MissingError,
        ModelError,
        NoRecordError,
        OutOfMemoryError,
        OutputError,
        PartError,
        PlanError,
        PointerError,
        RootError,
        RuleError,
        SettingsError,
        StaleError,
        StrictError,
        TargetError,
        UnreadableError,
        UnsafeError,
        VerificationError,
    )
    from ckptsurgeon.limit_table import limits
    from ckptsurgeon.matching.proposals.propose import Proposal
    from ckptsurgeon.models.training.freezing import Frozen
    from ckptsurgeon.models.training.thawing import Stage, Thaw
    from ckptsurgeon.planning.diff import Diff
    from ckptsurgeon.planning.plan_types import Plan
    from ckptsurgeon.progress import Progress
    from ckptsurgeon.report import CarriedState, Cast, CheckReport, Coverage, FileCheck, Finding, Report, Verification
    from ckptsurgeon.rules.rules import Rule
    from ckptsurgeon.tensors import Archive, Checkpoint, TensorMeta

_HOMES = {
    "adapters.user_adapter": "adapter",
    "limit_table": "limits",
    "matching.proposals.propose": "Proposal",
    "models.training.freezing": "Frozen",
    "models.training.thawing": "Stage Thaw",
    "planning.diff": "Diff",
    "planning.plan_types": "Plan",
    "progress": "Progress",
    "report": "CarriedState Cast CheckReport Coverage FileCheck Finding Report Verification",
    "rules.rules": "Rule",
    "tensors": "Archive Checkpoint TensorMeta",
}
_HOME = {name: home for home, names in _HOMES.items() for name in names.split()}

__all__ = [
    "Archive",
    "ArgumentError",
    "CarriedState",
    "Cast",
    "CastError",
    "CheckReport",
    "Checkpoint",
    "CheckpointError",
    "Coverage",
    "CoverageError",
    "DeviceError",
    "Diff",
    "FileCheck",
    "Finding",
    "FormatError",
    "Frozen",
    "InternalError",
    "LimitError",
    "MissingError",
    "ModelError",
    "NoRecordError",
    "OutOfMemoryError",
    "OutputError",
    "PartError",
    "Plan",
    "PlanError",
    "PointerError",
    "Progress",
    "Proposal",
    "Report",
    "RootError",
    "Rule",
    "RuleError",
    "SettingsError",
    "Stage",
    "StaleError",
    "StrictError",
    "TargetError",
    "TensorMeta",
    "Thaw",
    "UnreadableError",
    "UnsafeError",
    "Verification",
    "VerificationError",
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

    home = "errors" if name.endswith("Error") else _HOME.get(name, "api")
    with libraries():
        return getattr(import_module(f"{__name__}.{home}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
