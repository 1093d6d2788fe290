"""The results of a run, as frozen values: findings, casts, and the reports of merge, transfer, verify and check.

Reports have no text of their own: `shown` finds the view that makes it, so that printing a report shows the command line's table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from ckptsurgeon.shown import Result, Shown
from ckptsurgeon.tensors import TensorMeta

Level = Literal["error", "warning", "note"]
PROOFS = ("full", "copied", "none")  # which bytes of an output are read back and compared: all, those that are not shared, none
FRESH = "is fresh"  # the only reason for a state that was not carried that the report on the weights gives too


@dataclass(frozen=True)
class Coverage:
    """The share of a target that was transferred.

    Attributes:
        tensors: the share of its tensors, from 0 to 1.
        elements: the share of its elements, from 0 to 1.
        counts: how many tensors were transferred, and how many the target has.
    """

    tensors: float
    elements: float
    counts: tuple[int, int] = field(default=(0, 0))

    @classmethod
    def of(cls, transferred: Mapping[str, TensorMeta], target: Mapping[str, TensorMeta], filled: int = 0) -> Coverage:
        """Coverage of a target. An empty target is wholly covered.

        Args:
            transferred: the tensors of the target that were transferred.
            target: all tensors of the target.
            filled: how many elements of `transferred` no source gives.

        Returns:
            The shares and counts.
        """
        total = sum(tensor.numel for tensor in target.values())
        done = sum(tensor.numel for tensor in transferred.values()) - filled
        return cls(
            tensors=len(transferred) / len(target) if target else 1.0,
            elements=done / total if total else float(len(transferred) == len(target)),
            counts=(len(transferred), len(target)),
        )


@dataclass(frozen=True, repr=False)
class Finding(Shown):
    """An error, a warning or a note.

    Attributes:
        code: what it is, by a stable name.
        message: a sentence about it.
        key: the key it is about, or None.
        level: `error`, `warning` or `note`; only an error makes a no.
    """

    code: str
    message: str
    key: str | None = None
    level: Level = "error"


@dataclass(frozen=True, repr=False)
class Cast(Shown):
    """A change of a tensor's dtype, and what it lost.

    Attributes:
        key: the target key.
        source_dtype: the dtype before, by safetensors' code.
        target_dtype: the dtype after.
        largest_error: the largest absolute difference of a value.
        changed: how many elements are not exactly kept.
        overflowed: how many finite values became infinite or wrapped.
        truncated: how many values lost a part (fraction, imaginary part) to an integer, boolean or real dtype.
    """

    key: str
    source_dtype: str
    target_dtype: str
    largest_error: float = 0.0
    changed: int = 0
    overflowed: int = 0
    truncated: int = 0


@dataclass(frozen=True, repr=False)
class Verification(Result):
    """The outcome of comparing a written file with a model, skeleton or checkpoint.

    Attributes:
        device: where it was loaded.
        tensors: how many were compared.
        findings: what does not fit, and notes.
        bitwise: whether values were compared bit for bit; else only names, dtypes and shapes.
        outputs: the shapes of a forward pass's outputs, by their path in the result.
        fresh: the keys that the file records as fresh; None without a record.
        root: the nested dict of the file that was used.
        in_place: whether the values that a live model has were compared, and nothing was loaded.
        source: the file.
        target: what it was compared with.
    """

    device: str
    tensors: int
    findings: tuple[Finding, ...] = ()
    bitwise: bool = True
    outputs: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    fresh: tuple[str, ...] | None = None
    root: str = ""
    in_place: bool = False
    source: str = field(default="", repr=False, compare=False)
    target: str = field(default="", repr=False, compare=False)

    @property
    def ok(self) -> bool:
        """Whether no finding is an error."""
        return not any(finding.level == "error" for finding in self.findings)


@dataclass(frozen=True, repr=False)
class CarriedState(Result):
    """What became of the training state that a checkpoint has in addition to the weights.

    Every parameter of the new optimizer is in exactly one of `carried`, `adapted` and `zeroed`.

    Attributes:
        place: where the optimizer's state was: its dotted path, and its file if that is another one.
        by: how each parameter's state was identified: by `names`, or by the `order` of the parameters.
        carried: parameters whose state was carried unchanged.
        adapted: parameters whose moments were adapted with their weights.
        zeroed: parameters that start without a state.
        not_carried: the parts of the source's state that are not used or start at zero, each with the reason.
        casts: the moments whose dtype changed.
        others: what else was carried: `scheduler`, `scaler`, `ema`; for a merged file the names of values.
        ema: the report of the averaged copy's own transfer.
        paths: the source's dotted paths that this tells of.
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
    paths: tuple[str, ...] = ()


@dataclass(frozen=True, repr=False)
class Report(Result):
    """What a merge, an apply or a transfer did.

    Every target key is in `transferred`, `kept` or `fresh`.

    Attributes:
        sources: the paths of the sources.
        target: the target's path or spec; empty where a source was converted.
        transferred: keys that took weights from a source.
        kept: keys that kept a target checkpoint's values.
        fresh: keys that were initialised, and have had no training.
        dropped: every source key that was not used, with the reason.
        left_behind: what else the sources hold, by dotted path: other state_dicts, and values that are no weights of the one that was read
            and no training state that `optimizer` tells of.
        coverage: the share of the target that a source gives, fresh or not.
        casts: each change of dtype.
        findings: warnings and notes.
        output: the file or folder that was written, or None.
        nbytes: its size in bytes.
        files: the name and size in bytes of each file that was written: a folder's shards and their index, else the one file.
        shared: how many of its bytes take no space of their own, since the file system shares them with the sources.
        copied: how many bytes were copied unchanged from the sources.
        proof: which bytes of the file were read back and compared with the plan: `full` is all of them, `copied` those that it does not
            share with the sources, `none` none.
        verification: the outcome of loading it into the model, or None.
        adapted: keys whose shape or values adapters changed.
        partial: keys of which only a part is trained: adapters filled up the rest (the new rows of a vocabulary), or a source has it on
            record as fresh.
        still_fresh: those of `fresh` whose value comes from a file that has them on record as fresh; those that a target checkpoint kept
            are in `kept` too.
        roots: by source, which nested dict was read.
        prefixes: by source, how its names were changed: the prefixes that were `stripped` and `added`, and the segments of wrappers that
            were removed (`unwrapped`).
        optimizer: what became of the training state, or None.
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
    proof: str = "none"
    verification: Verification | None = None
    adapted: tuple[str, ...] = ()
    partial: tuple[str, ...] = ()
    still_fresh: tuple[str, ...] = ()
    roots: tuple[str, ...] = ()
    prefixes: tuple[Mapping[str, object], ...] = ()
    optimizer: CarriedState | None = None
    files: tuple[tuple[str, int], ...] = ()
    shared: int = 0
    copied: int = 0
    left_behind: tuple[str, ...] = ()

    @property
    def proven(self) -> bool:
        """Whether the file was held against the plan, but for what it shares with the sources where `proof` is `copied`."""
        return self.proof != "none"


def with_training(report: Report, state: CarriedState) -> Report:
    """A report with what became of the training state, which is then not left behind."""
    names = [(path, re.sub(r" \(\d+ tensors?\)$", "", path)) for path in report.left_behind]
    rest = tuple(path for path, name in names if not any(name == told or name.startswith(f"{told}.") for told in state.paths))
    return replace(report, optimizer=state, left_behind=rest)


@dataclass(frozen=True, repr=False)
class Twins(Shown):
    """The comparison of two models on the same inputs: each output with its largest absolute difference and its largest absolute value,
    None for an output without a counterpart. The models are the `same` where all other outputs differ by at most `tolerance` of that
    value."""

    outputs: tuple[tuple[str, float | None, float | None], ...]
    tolerance: float

    @property
    def same(self) -> bool:
        """Whether there is an output to compare, and all differences are within the tolerance."""
        differences = [(difference, scale) for _, difference, scale in self.outputs if difference is not None and scale is not None]
        return bool(differences) and all(difference <= self.tolerance * scale for difference, scale in differences)


@dataclass(frozen=True, repr=False)
class FileCheck(Shown):
    """What `check` found in one file.

    Attributes:
        path: the file or folder.
        findings: what was found.
    """

    path: str
    findings: tuple[Finding, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether no finding is an error."""
        return not any(finding.level == "error" for finding in self.findings)


@dataclass(frozen=True, repr=False)
class Settings(Shown):
    """A settings file that `check` followed: the settings that were used, and those that were not, because they name code."""

    path: str
    used: tuple[tuple[str, Any], ...] = ()
    not_used: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True, repr=False)
class CheckReport(Result):
    """What `check` found in all files.

    Attributes:
        files: each file with its findings, in the order of the paths.
        settings: the settings file that was followed, or None.
    """

    files: tuple[FileCheck, ...]
    settings: Settings | None = None

    @property
    def ok(self) -> bool:
        """Whether every file is ok."""
        return all(file.ok for file in self.files)
