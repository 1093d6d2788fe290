"""The gate: is a file readable, safe, whole, and does it fit? Every finding of every file at once; no torch unless values are asked for."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from ckptsurgeon.api import opening, proving
from ckptsurgeon.api.opening import Target
from ckptsurgeon.errors import CheckpointError, FormatError, LimitError, RootError, UnreadableError, UnsafeError
from ckptsurgeon.report import CheckReport, FileCheck, Finding
from ckptsurgeon.surgery import roots
from ckptsurgeon.tensors import Archive, Refused
from ckptsurgeon.views import text

# The code of each kind of refusal; a class that is not here has its nearest base's.
CODES: dict[type[CheckpointError], str] = {
    UnreadableError: "CK101",
    FormatError: "CK102",
    LimitError: "CK103",
    RootError: "CK104",
    UnsafeError: "CK201",
    CheckpointError: "CK100",
}
ASKS, REFUSED, FITS, FINITE = "CK201", "CK202", {"missing": "CK301", "unexpected": "CK302", "shape": "CK303", "dtype": "CK304"}, "CK401"


def check_files(paths: Iterable[str], against: Target | None, *, finite: bool = False, root: str | None = None) -> CheckReport:
    """Check every file; nothing is raised for a bad one, it is found."""
    report = CheckReport(tuple(FileCheck(path, tuple(_findings(path, against, finite, root))) for path in paths))
    return replace(report, text=text.check(report))


def _findings(path: str, against: Target | None, finite: bool, root: str | None) -> list[Finding]:
    findings: list[Finding] = []
    try:
        archive = opening.read(path)
        findings += _safety(archive)
        if against is None and root is None:
            checkpoints = [roots.checkpoint(archive, found) for found in archive.state_dicts]
        else:
            checkpoints = [roots.choose(archive, root=root, target=None if against is None else against.checkpoint)]
        if against is not None:
            for found in proving.fits(checkpoints[0], against.checkpoint):
                findings.append(replace(found, code=FITS[found.code]))
        if finite:
            findings += [replace(found, code=FINITE) for checkpoint in checkpoints for found in proving.non_finite(checkpoint)]
    except CheckpointError as error:
        code = next(CODES[kind] for kind in type(error).__mro__ if kind in CODES)
        hint = f" (try: {error.hint})" if error.hint else ""
        findings.append(Finding(code, error.reason + "".join(f"; {problem}" for problem in error.problems) + hint, error.key))
    return findings


def _safety(archive: Archive) -> list[Finding]:
    findings = [Finding(ASKS, f"asks for {name}, which is never imported here and would be elsewhere") for name in archive.globals]
    for state_dict in archive.state_dicts:
        findings += [Finding(REFUSED, f"is {entry.reason}", key) for key, entry in state_dict.entries.items() if isinstance(entry, Refused)]
    return findings
