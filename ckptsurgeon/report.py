"""What a run has to say, as frozen values: findings, casts, and the reports of merge, transfer, verify and check.

A report words nothing itself: `shown` finds the view that does, so that printing a report shows the command line's table.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ckptsurgeon.shown import Result, Shown
from ckptsurgeon.tensors import Coverage

Level = Literal["error", "warning", "note"]
FRESH = "is fresh"  # the one reason for a state that was not carried which the weights' own report gives too


@dataclass(frozen=True)
class Finding:
    """One thing found, with a stable `code`, the key it is about (or None) and a sentence. Only an `error` makes a no."""

    code: str
    message: str
    key: str | None = None
    level: Level = "error"


@dataclass(frozen=True)
class Cast:
    """A change of dtype (safetensors' codes): `largest_error` is absolute, in the tensor's own unit; `changed` counts elements
    whose value is not exactly kept, `overflowed` finite values that became infinite or wrapped, `truncated` values that lost a part
    (fraction, imaginary part) to an integer, boolean or real dtype."""

    key: str
    source_dtype: str
    target_dtype: str
    largest_error: float = 0.0
    changed: int = 0
    overflowed: int = 0
    truncated: int = 0


@dataclass(frozen=True, repr=False)
class Verification(Result):
    """The outcome of holding a written file against a model, skeleton or checkpoint.

    `device` is where it was loaded, `tensors` how many were compared bit for bit (by name, dtype and shape alone where `bitwise` is
    False), `outputs` the shapes of a forward pass by place, `fresh` the keys that the file records as fresh, or None without a record,
    `root` the nested dict of the file that was taken. `source` and `target` are what was held against what.
    """

    device: str
    tensors: int
    findings: tuple[Finding, ...] = ()
    bitwise: bool = True
    outputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    fresh: tuple[str, ...] | None = None
    root: str = ""
    source: str = field(default="", repr=False, compare=False)
    target: str = field(default="", repr=False, compare=False)

    @property
    def ok(self) -> bool:
        """Whether no finding is an error."""
        return not any(finding.level == "error" for finding in self.findings)


@dataclass(frozen=True, repr=False)
class CarriedState(Result):
    """What became of the training state that stands beside the weights.

    Every parameter of the new optimizer is in exactly one of `carried` (its state came as it was), `adapted` (its moments were adapted with
    it) and `zeroed` (it starts without). `not_carried` has whatever of the source's state went nowhere or starts at zero, with the reason.
    `place` is where the optimizer's state stood, `by` what told whose it is: `names`, or the `order` of the parameters. `others` names what
    else was carried (`scheduler`, `scaler`, `ema`); `ema` is the report of the averaged copy's own transfer.
    """

    place: str = ""
    by: str = ""
    carried: tuple[str, ...] = ()
    adapted: tuple[str, ...] = ()
    zeroed: tuple[str, ...] = ()
    not_carried: tuple[tuple[str, str], ...] = ()
    casts: tuple[Cast, ...] = ()
    others: tuple[str, ...] = ()
    ema: Report | None = None


@dataclass(frozen=True, repr=False)
class Report(Result):
    """What a merge, an apply or a transfer did.

    Every target key is in exactly one of `transferred` (took weights from a source), `kept` (stayed as a target checkpoint had it)
    and `fresh` (initialised). `still_fresh` are those of the fresh ones that come from a file which has them on record as fresh: an earlier
    merge initialised them, and no training since; those that the target checkpoint kept are in `kept` too. `coverage` counts all that a
    source gives, fresh or not. `adapted` are those whose
    shape or values adapters changed, `partial` those of which only a part is trained: adapters filled up the rest (the new rows of a
    vocabulary), or a source has it on record as fresh. `dropped` has every source key that went nowhere, with the reason. `proven`: the
    file was held against the plan byte by byte. `roots` and `prefixes` say by source which nested dict was read, and how its names were
    changed: what was `stripped`, `added`, and which segments of wrappers were taken out (`unwrapped`).
    """

    sources: tuple[str, ...]
    target: str
    transferred: tuple[str, ...]
    kept: tuple[str, ...]
    fresh: tuple[str, ...]
    dropped: tuple[tuple[str, str], ...]
    coverage: Coverage
    casts: tuple[Cast, ...] = ()
    findings: tuple[Finding, ...] = ()
    output: str | None = None
    nbytes: int = 0
    proven: bool = False
    verification: Verification | None = None
    adapted: tuple[str, ...] = ()
    partial: tuple[str, ...] = ()
    still_fresh: tuple[str, ...] = ()
    roots: tuple[str, ...] = ()
    prefixes: tuple[Mapping[str, object], ...] = ()
    optimizer: CarriedState | None = None


@dataclass(frozen=True, repr=False)
class Twins(Shown):
    """Two models run on the same inputs: by output its greatest absolute difference and its greatest absolute value, None for one that
    has no counterpart. They are the `same` where each output that has one differs by at most `tolerance` of that value."""

    outputs: tuple[tuple[str, float | None, float | None], ...]
    tolerance: float

    @property
    def same(self) -> bool:
        """Whether there is an output to compare, and all differences are within the tolerance."""
        found = [(difference, scale) for _, difference, scale in self.outputs if difference is not None and scale is not None]
        return bool(found) and all(difference <= self.tolerance * scale for difference, scale in found)


@dataclass(frozen=True, repr=False)
class FileCheck(Shown):
    """What `check` found in one file."""

    path: str
    findings: tuple[Finding, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether no finding is an error."""
        return not any(finding.level == "error" for finding in self.findings)


@dataclass(frozen=True, repr=False)
class Settings(Shown):
    """A settings file that `check` followed: what it asked for, and what of it was not used, since it names code. By key, as written."""

    path: str
    used: tuple[tuple[str, Any], ...] = ()
    not_used: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, repr=False)
class CheckReport(Result):
    """What `check` found in all files, and the settings that it followed, if any."""

    files: tuple[FileCheck, ...]
    settings: Settings | None = None

    @property
    def ok(self) -> bool:
        """Whether every file is ok."""
        return all(file.ok for file in self.files)
