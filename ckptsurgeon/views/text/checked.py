"""The texts of `verify` and `check`."""

from __future__ import annotations

from ckptsurgeon.report import CheckReport, FileCheck, Verification
from ckptsurgeon.views.folding import fold_siblings
from ckptsurgeon.views.text.words import MOST, count, findings, fitted, listing, name, shape


def verification(found: Verification, path: str, target: str, verbose: bool = False, width: int | None = None) -> str:
    """What was compared, every finding, a forward pass's shapes, and what is on record as fresh."""
    lines = [f"{name(path)} → {name(target)}: {'ok' if found.ok else 'NOT ok'}", f"  {proved(found)}"]
    # torch's own words for what the other findings say one by one
    shown = [finding for finding in found.findings if verbose or (finding.code, finding.level) != ("load", "note")]
    lines += findings(shown, verbose, width)
    lines += [f"  forward pass: {name(place)} {shape(dims)}" for place, dims in found.outputs.items()]
    if found.fresh:
        fresh = found.fresh if verbose else fold_siblings(found.fresh)
        lines.append(f"  fresh on record: {listing(fresh, None if verbose else 8)}")
    return fitted(lines, width)


def proved(found: Verification) -> str:
    """How much was compared, and how."""
    errors = sum(finding.level == "error" for finding in found.findings)
    compared = count(found.tensors, "tensor")
    if not found.bitwise:
        return f"{'verified' if found.ok else 'NOT verified'}: names, dtypes and shapes of {compared}"
    if not found.ok:
        return f"NOT verified on {found.device}: {count(errors, 'error')}; {compared} compared"
    return f"verified: {compared}, loaded strictly on {found.device} and compared bit for bit"


def check(found: CheckReport, verbose: bool = False) -> str:
    """A line for each thing found, keys of which the same is said together, and the totals; of a good file nothing."""
    lines = [line for file in found.files for line in _file(file, verbose)]
    bad = sum(not file.ok for file in found.files)
    return "\n".join([*lines, f"{count(len(found.files), 'file')} checked, {f'{bad} not good' if bad else 'all good'}"])


def _file(found: FileCheck, verbose: bool) -> list[str]:
    together: dict[tuple[str, str], list[str]] = {}
    for place, finding in enumerate(found.findings):
        level = "" if finding.level == "error" else f" ({finding.level})"
        apart = f"\0{place}" if verbose else ""
        together.setdefault((f"{finding.code}{level}", finding.message + apart), []).extend(
            [finding.key] if finding.key is not None else []
        )
    most = None if verbose else MOST
    lines = []
    for (code, message), keys in list(together.items())[:most]:
        about = f"{listing(fold_siblings(keys), 4)}: " if keys else ""
        lines.append(f"{name(found.path)}: {code} {about}{name(message.partition(chr(0))[0])}")
    rest = len(together) - len(lines)
    return lines + ([f"{name(found.path)}: and {rest} more (-v shows all)"] if rest else [])
