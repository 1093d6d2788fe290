"""A checkpoint loaded strictly into a model, by the official readers, with every complaint as a finding.

A single file goes in with `load_state_dict(strict=True)`. Shards go in one after the other, so that no more than one is held, and
strictness is torch's own account of what was missing in all of them and unexpected in any. Nothing is compared here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ckptsurgeon.errors import TargetError
from ckptsurgeon.models.target import user_code
from ckptsurgeon.models.verify import names, official
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


def load_strictly(model: nn.Module, checkpoint: Checkpoint, expected: names.Shapes, ties: tuple[tuple[str, ...], ...]) -> Loaded:
    """Load `checkpoint` into `model`, in place.

    Args:
        expected: the model's shapes by key, from before.
        ties: the model's tied keys.

    Returns:
        Findings of `names.compare_names`, and of the codes `load` (a reader or `load_state_dict` failed: an error, or a note where other
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
        found.update(names.shapes_of(state))
        accounts.append(_load(model, state, checkpoint, ties, strict=len(files) == 1))
        del state
    aliases = names.tied_in_model(checkpoint, found, ties)
    if refused:
        return Loaded(found, tuple(refused), False, aliases)
    findings = _settled(names.compare_names(expected, found, aliases), accounts)
    explained = any(finding.level == "error" for finding in findings)
    for account in accounts:
        if account.reason is not None:
            findings.append(Finding("load", account.reason, level="note" if explained and account.fits_are_in else "error"))
    return Loaded(found, tuple(findings), all(account.fits_are_in for account in accounts), aliases)


def _load(model: nn.Module, state: Mapping[str, Any], checkpoint: Checkpoint, ties: tuple[tuple[str, ...], ...], strict: bool) -> _Account:
    if strict:
        aliases = names.tied_in_model(checkpoint, state, ties)
        if aliases:
            state = {**state, **{key: state[kept] for key, kept in aliases.items()}}
    try:
        result: object = user_code.call(checkpoint.path, model.load_state_dict, state, strict=strict)
    except TargetError as error:
        cause = error.__cause__
        fits = isinstance(cause, RuntimeError) and str(cause).startswith(_MISFIT)
        return _Account(None, None, error.reason, fits)
    if strict:
        return _Account(frozenset(), frozenset())
    missing, unexpected = getattr(result, "missing_keys", None), getattr(result, "unexpected_keys", None)
    known = missing is not None and unexpected is not None
    return _Account(frozenset(missing or ()), frozenset(unexpected or ())) if known else _Account(None, None)


def _settled(findings: list[Finding], accounts: list[_Account]) -> list[Finding]:
    """The findings, where torch itself does not miss or wonder at a key as notes that the model's own code settled it."""
    if any(account.missing is None or account.unexpected is None for account in accounts) or not accounts:
        return findings
    missing = frozenset.intersection(*(account.missing or frozenset() for account in accounts))
    unexpected = frozenset().union(*(account.unexpected or frozenset() for account in accounts))
    still = {"missing": missing, "unexpected": unexpected}
    return [
        Finding("hook", f"{finding.message}; the model's own loading code settles that, so it is not compared", finding.key, "note")
        if finding.code in still and finding.key not in still[finding.code]
        else finding
        for finding in findings
    ]
