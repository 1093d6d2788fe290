"""The library's verbs, each in one call; nothing here prints. The command line is their thin twin, training code their first client.

Modules without a leading `_` have the verbs. The others are shared: opening arguments, rules and options, gates, writing, proof. A verb's
module is imported when the verb is first used (PEP 562), so that `inspect` does not import what only `merge` needs.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ckptsurgeon.api._rules import load_rules
    from ckptsurgeon.api._stale import load_plan
    from ckptsurgeon.api._writing import output_format
    from ckptsurgeon.api.checking import check
    from ckptsurgeon.api.comparing import diff
    from ckptsurgeon.api.looking import inspect, open, skeleton
    from ckptsurgeon.api.matching import match
    from ckptsurgeon.api.merging import apply, merge, plan
    from ckptsurgeon.api.tuning import freeze, groups, initialize, param_groups, transfer, unfreeze
    from ckptsurgeon.api.verifying import verify

_MODULES = {
    "checking": ("check",),
    "comparing": ("diff",),
    "looking": ("inspect", "open", "skeleton"),
    "matching": ("match",),
    "merging": ("apply", "merge", "plan"),
    "_rules": ("load_rules",),
    "_stale": ("load_plan",),
    "_writing": ("output_format",),
    "tuning": ("freeze", "groups", "initialize", "param_groups", "transfer", "unfreeze"),
    "verifying": ("verify",),
}
_MODULE_OF = {verb: module for module, verbs in _MODULES.items() for verb in verbs}

__all__ = [
    "apply",
    "check",
    "diff",
    "freeze",
    "groups",
    "initialize",
    "inspect",
    "load_plan",
    "load_rules",
    "match",
    "merge",
    "open",
    "output_format",
    "param_groups",
    "plan",
    "skeleton",
    "transfer",
    "unfreeze",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ckptsurgeon.arguments import checked

    globals()[name] = verb = checked(getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name))
    return verb
