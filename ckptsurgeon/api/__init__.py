"""The library's verbs, each in one call; nothing here prints. The command line is their thin twin, training code their first client.

`looking`, `merging` and `tuning` are the verbs; the other modules are what they share: opening what a person gives, gates, proof, checks.
"""

from ckptsurgeon.api.looking import check, diff, inspect, open, skeleton, verify
from ckptsurgeon.api.merging import apply, load_plan, merge, output_format, plan
from ckptsurgeon.api.ruling import load_rules
from ckptsurgeon.api.tuning import freeze, groups, initialize, param_groups, transfer, unfreeze

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
