"""The texts of `verify` and `check`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ckptsurgeon.report import CheckReport, FileCheck, Finding, Settings, Verification
from ckptsurgeon.shown import joined, styled
from ckptsurgeon.views.folding import fold_keys
from ckptsurgeon.views.text.words import LEVELS, answer, count, findings, fitted, listing, most_rows, name, of_several, shape

if TYPE_CHECKING:
    from ckptsurgeon.finding_codes import Code


def verification(verification: Verification, verbose: bool = False, width: int | None = None) -> str:
    """What was compared, every finding, the shapes of a forward pass, and the keys that are recorded as fresh."""
    root = f" (root {name(verification.root)})" if verification.root else ""
    lines = [
        f"{name(verification.source)}{root} → {name(verification.target)}: "
        + answer("ok" if verification.ok else "NOT ok", verification.ok),
        "  " + proved(verification),
    ]
    # torch's own message, which the other findings repeat one by one
    shown = [finding for finding in verification.findings if verbose or (finding.code, finding.level) != ("load", "note")]
    lines += findings(shown, verbose, width)
    lines += [f"  forward pass: {name(output)} {shape(dims)}" for output, dims in verification.outputs.items()]
    if verification.fresh:
        fresh = verification.fresh if verbose else fold_keys(verification.fresh)
        lines.append(f"  fresh on record: {listing(fresh, None if verbose else 8)}")
    return fitted(lines, width)


def proved(verification: Verification) -> str:
    """How much was compared, and how."""
    errors = sum(finding.level == "error" for finding in verification.findings)
    compared = count(verification.tensors, "tensor")
    if not verification.bitwise and (verification.ok or verification.tensors):
        return answer("verified" if verification.ok else "NOT verified", verification.ok) + f": names, dtypes and shapes of {compared}"
    if not verification.ok:
        where = "" if verification.device == "none" else f" on {verification.device}"
        return answer("NOT verified", False) + f"{where}: {count(errors, 'error')}; {compared} compared"
    how = f"as the model holds them on {verification.device}," if verification.in_place else f"loaded strictly on {verification.device} and"
    return answer("verified", True) + f": {compared}, {how} compared bit for bit"


def check(report: CheckReport, verbose: bool = False, width: int | None = None) -> str:
    """A line for each finding, keys with the same finding together, and the totals; nothing for a good file.

    Notes are counted, and shown with `verbose`.
    """
    lines = [line for file in report.files for line in _file(file, verbose)]
    lines += [followed(report.settings)] if report.settings is not None else []
    return fitted([*lines, totals(report, verbose)], width)


def followed(settings: Settings) -> str:
    """The settings file, its settings that were used, and those that were not."""
    used, unused = (", ".join(f"{key} = {_toml(value)}" for key, value in rows) for rows in (settings.used, settings.not_used))
    aside = f"; not followed, since it names code: {unused}" if unused else ""
    return name(f"settings: {settings.path}: {used or 'nothing that holds here'}{aside}")


def _toml(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


def totals(report: CheckReport, verbose: bool = True) -> str:
    """How many files were checked, how many are not good, unused targets of the settings, and the command that explains a code."""
    bad = sum(not file.ok for file in report.files)
    first = next((finding.code for file in report.files for finding in file.findings if finding.level == "error"), "")
    read_on = f" (what a code means: ckptsurgeon check --explain {first})" if bad else ""
    notes = 0 if verbose else sum(finding.level == "note" for file in report.files for finding in file.findings)
    aside = f"; {count(notes, 'note')} (-v shows {'it' if notes == 1 else 'them'})" if notes else ""
    unheld = [value for _, value in report.settings.not_used] if report.settings is not None else []
    gate = f"; not held against {listing([*map(str, dict.fromkeys(unheld))])}" if unheld else ""
    good = answer(f"{bad} not good" if bad else "all good", not bad)
    return f"{count(len(report.files), 'file')} checked, " + good + f"{gate}{aside}{read_on}"


def alike(findings: Sequence[Finding], apart: bool = False) -> dict[tuple[str, str, str], list[str]]:
    """The keys of equal findings, by code, level and message; with `apart` each finding by itself."""
    together: dict[tuple[str, str, str], list[str]] = {}
    for number, finding in enumerate(findings):
        message = f"{finding.message}\0{number}" if apart else finding.message
        together.setdefault((finding.code, finding.level, message), []).extend([finding.key] if finding.key is not None else [])
    return together


def about(keys: Sequence[str], message: str, most: int | None = 4) -> str:
    """The keys, and the message about them."""
    words = (of_several(message) or message) if len(keys) > 1 else message
    return f"{f'{listing(fold_keys(keys), most)}: ' if keys else ''}{name(words)}"


def _file(file: FileCheck, verbose: bool) -> list[str]:
    shown = [finding for finding in file.findings if verbose or finding.level != "note"]
    rows = list(alike(shown, apart=verbose).items())
    lines = []
    for (code, level, message), keys in rows[: most_rows(verbose)]:
        kind = "" if level == "error" else f" ({level})"
        words = f" {about(keys, message.partition(chr(0))[0])}"
        lines.append(styled(name(file.path), "strong") + ": " + styled(f"{code}{kind}", LEVELS.get(level)) + words)
    rest = len(rows) - len(lines)
    return lines + ([styled(f"{name(file.path)}: and {rest} more (-v shows all)", "faint")] if rest else [])


def explain(codes: Sequence[Code], width: int | None = None) -> str:
    """The meaning of codes, why they matter and what to do."""
    blocks = []
    for row in codes:
        option = f"   (looked for with {row.option})" if row.option else ""
        lines = [
            styled(f"{row.code} {row.name}", "strong") + option,
            f"  {row.meaning}",
            f"  Why it matters: {row.why}",
            f"  What to do: {row.todo}",
        ]
        blocks.append(fitted(lines, width))
    return joined(blocks, "\n\n")
