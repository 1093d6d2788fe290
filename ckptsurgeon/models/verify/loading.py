"""A checkpoint loaded strictly into a model, by the official readers, with every complaint as a finding.

A single file goes in with `load_state_dict(strict=True)`. Shards go in one after the other, so that no more than one is held, and
strictness is torch's own account of what was missing in all of them and unexpected in any. Nothing is compared here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ckptsurgeon.errors import TargetError
from ckptsurgeon.models.target import user_code
from ckptsurgeon.models.verify import official
from ckptsurgeon.planning.fits import misfits, shapes_of, tied_keys
from ckptsurgeon.report import Finding
from ckptsurgeon.tensors import Checkpoint

_MISFIT = "Error(s) in loading state_dict"


@dataclass(frozen=True)
class Loaded:
    """What loading came to: the file's `found` shapes by key, the findings, and whether what fits is now in the model.

    `aliases` are model keys that take their value from another key of the file, since the model ties them.
    """

    found: Mapping[str, tuple[int, ...] | None]
    findings: tuple[Finding, ...]
    complete: bool
    aliases: Mapping[str, str]


@dataclass(frozen=True)
class _Account:
    """One load_state_dict: torch's missing and unexpected keys (None where it doesn't say), and why it failed, if it did."""

    missing: frozenset[str] | None
    unexpected: frozenset[str] | None
    reason: str | None = None
    fits_are_in: bool = True


def load_strictly(model: nn.Module, checkpoint: Checkpoint, skeleton: Checkpoint) -> Loaded:
    """Load `checkpoint` into `model`, in place.

    Args:
        skeleton: the model's state_dict, from before.

    Returns:
        Findings of `misfits`, and of the codes `load` (a reader or `load_state_dict` failed: an error, or a note where other
        findings explain it) and `hook` (a note: the model's own code took care of a key that is missing or unexpected).
    """
    files = official.data_files(checkpoint)
    found: dict[str, tuple[int, ...] | None] = {}
    accounts: list[_Account] = []
    refused: list[Finding] = []
    for file in files:
        try:
            state = official.load_file(checkpoint, file)
        except TargetError as error:
            refused.append(Finding("load", f"torch's or safetensors' reader refuses {file}: {error.reason}"))
            continue
        found.update({key: tuple(value.shape) if isinstance(value, torch.Tensor) else None for key, value in state.items()})
        accounts.append(_load(model, state, checkpoint, skeleton.ties, strict=len(files) == 1))
        del state
    aliases = tied_keys(checkpoint, found, skeleton.ties)
    if refused:
        return Loaded(found, tuple(refused), False, aliases)
    findings = _as_torch_says(misfits(found, shapes_of(skeleton), aliases), accounts)
    explained = any(finding.level == "error" for finding in findings)
    for account in accounts:
        if account.reason is not None:
            findings.append(Finding("load", account.reason, level="note" if explained and account.fits_are_in else "error"))
    return Loaded(found, tuple(findings), all(account.fits_are_in for account in accounts), aliases)


def _load(model: nn.Module, state: Mapping[str, Any], checkpoint: Checkpoint, ties: tuple[tuple[str, ...], ...], strict: bool) -> _Account:
    if strict:
        aliases = tied_keys(checkpoint, state, ties)
        if aliases:
            state = {**state, **{key: state[kept] for key, kept in aliases.items()}}
    told: list[Any] = []  # torch's account, also of a load that fails
    hook = model.register_load_state_dict_post_hook(lambda _model, keys: told.append(keys))  # type: ignore[no-untyped-call]
    reason, fits_are_in = None, True
    try:
        result: object = user_code.call(checkpoint.path, model.load_state_dict, state, strict=strict)
        told = [result] if hasattr(result, "missing_keys") and hasattr(result, "unexpected_keys") else told
    except TargetError as error:
        cause = error.__cause__
        reason, fits_are_in = error.reason, isinstance(cause, RuntimeError) and str(cause).startswith(_MISFIT)
    finally:
        hook.remove()
    if not told:
        done = frozenset[str]() if strict and reason is None else None
        return _Account(done, done, reason, fits_are_in)
    return _Account(frozenset(told[-1].missing_keys), frozenset(told[-1].unexpected_keys), reason, fits_are_in)


def _as_torch_says(findings: list[Finding], accounts: list[_Account]) -> list[Finding]:
    """The findings; where torch counts a key neither as missing nor as unexpected, a note that the model's own code took care of it."""
    if any(account.missing is None or account.unexpected is None for account in accounts) or not accounts:
        return findings
    missing = frozenset.intersection(*(account.missing or frozenset() for account in accounts))
    unexpected = frozenset().union(*(account.unexpected or frozenset() for account in accounts))
    still = {"missing": missing, "unexpected": unexpected}
    return [
        Finding("hook", f"{finding.message}; the model's own loading code takes care of it, so it is not compared", finding.key, "note")
        if finding.code in still and finding.key not in still[finding.code]
        else finding
        for finding in findings
    ]
