"""What a person reads: each report in about twenty lines, keys folded, totals that reconcile, and the command to run next.

Every name is made printable here, so that a key can't steer a terminal. Widths are left to the terminal.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

from tabulate import tabulate

from ckptsurgeon.errors import printable
from ckptsurgeon.gates import words as coverage_words
from ckptsurgeon.report import CheckReport, Finding, Report, Verification
from ckptsurgeon.surgery.compare import Diff, Hint
from ckptsurgeon.surgery.plan import Plan, Step
from ckptsurgeon.tensors import Archive, Refused, StateDict
from ckptsurgeon.views.folding import fold, fold_siblings

MOST = 12  # lines of one kind before the rest is counted


def size(nbytes: float) -> str:
    """Bytes as a person reads them.

    >>> size(1536)
    '1.5 KB'
    """
    for unit in ("B", "KB", "MB", "GB"):
        if nbytes < 1024:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:.1f} {unit}"
        nbytes /= 1024
    return f"{nbytes:.1f} TB"


def shape(dims: Sequence[int]) -> str:
    """A shape as torch writes it.

    >>> shape((10, 84))
    '(10, 84)'
    """
    return f"({', '.join(map(str, dims))}{',' if len(dims) == 1 else ''})"


def _table(rows: Iterable[Sequence[str]], most: int | None = MOST) -> list[str]:
    """Rows as aligned columns, indented; the rest beyond `most` counted."""
    cells = [[printable(cell) for cell in row] for row in rows]
    shown = cells if most is None else cells[:most]
    lines = [f"    {line}".rstrip() for line in tabulate(shown, tablefmt="plain", disable_numparse=True).splitlines()]
    return lines + ([f"    … and {len(cells) - len(shown)} more (-v shows all)"] if len(cells) > len(shown) else [])


def _folded(rows: Iterable[tuple[str, tuple[str, ...]]], most: int | None = MOST) -> list[str]:
    return _table([(row.key, *_cells(row.common)) for row in fold(rows)], most)


def _keys(keys: Iterable[str], most: int | None) -> list[str]:
    return _table([(key,) for key in fold_siblings(keys)], most)


def _cells(common: Hashable) -> tuple[str, ...]:
    return common if isinstance(common, tuple) else (str(common),)


def _most(verbose: bool) -> int | None:
    return None if verbose else MOST


def archive(found: Archive, verbose: bool = False) -> str:
    """`inspect`: the format, the roots, every tensor folded, and what else the file holds."""
    lines = [f"{printable(found.path)}: {found.format}, {size(sum(stamp.size for stamp in found.files))}"]
    for state_dict in found.state_dicts:
        lines += _state_dict(state_dict, verbose)
    if len(found.state_dicts) > 1:
        lines.append(f"  {len(found.state_dicts)} state_dicts: choose one with --root NAME")
    if found.globals:
        lines.append(f"  asks for {len(found.globals)} names beyond the allow-list; none is imported:")
        lines += _table([(name,) for name in found.globals], _most(verbose))
    if found.provenance is not None:
        fresh = found.provenance["fresh"]
        lines.append(
            f"  merged by {printable(found.provenance.get('tool', 'ckptsurgeon'))}, {len(fresh)} tensors fresh" + (":" if fresh else "")
        )
        lines += _keys(fresh, _most(verbose))
    if found.beside:
        lines.append(f"  beside the tensors: {printable(_listing(found.beside))}")
    lines += [f"  note: {printable(note)}" for note in found.notes]
    return "\n".join(lines)


def _state_dict(state_dict: StateDict, verbose: bool) -> list[str]:
    dtypes = Counter(tensor.dtype for tensor in state_dict.tensors.values())
    numel = sum(tensor.numel for tensor in state_dict.tensors.values())
    root = f"root {printable(state_dict.root)}: " if state_dict.root else ""
    kinds = ", ".join(f"{count} {code}" for code, count in dtypes.most_common())
    lines = [f"  {root}{len(state_dict.tensors)} tensors, {numel:,} elements, {size(state_dict.nbytes)} ({kinds})"]
    rows = [(key, (tensor.dtype, shape(tensor.shape))) for key, tensor in state_dict.tensors.items()]
    lines += _folded(rows, None if verbose else 40)
    lines += _table([(key, f"refused: {entry.reason}") for key, entry in state_dict.entries.items() if isinstance(entry, Refused)])
    return lines


def _listing(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def diff(found: Diff, verbose: bool = False, command: str = "merge") -> str:
    """`diff`: what matches, what does not and why, coverage, and the command to run next."""
    where = f" (root {printable(found.root)})" if found.root else ""
    lines = [f"{printable(found.source)}{where} → {printable(found.target)}"]
    if found.prefix:
        lines.append(f"  {printable(found.prefix)}")
    most = _most(verbose)
    lines.append(f"  matched     {len(found.matched):>5}")
    if verbose:
        lines += _keys(found.matched, None)
    lines.append(f"  mismatched  {len(found.mismatched):>5}" + ("   in both, with another shape" if found.mismatched else ""))
    lines += _folded(
        [(row.key, (shape(row.source_shape), "in the source,", shape(row.target_shape), "in the target")) for row in found.mismatched], most
    )
    lines.append(f"  missing     {len(found.missing):>5}" + ("   only in the target" if found.missing else ""))
    lines += _keys(found.missing, most)
    lines.append(f"  extra       {len(found.extra):>5}" + ("   only in the source" if found.extra else ""))
    lines += _keys(found.extra, most)
    if found.dropped:
        lines.append(f"  dropped     {len(found.dropped):>5}   by a rule")
    if found.dtype_changed:
        lines.append(f"  other dtype {len(found.dtype_changed):>5}   matched; cast when merged")
        lines += _folded([(row.key, (row.source_dtype, "→", row.target_dtype)) for row in found.dtype_changed], most)
    if found.refused:
        lines.append(f"  refused     {len(found.refused):>5}   not told without running the file; leave out with --drop")
        lines += _table(list(found.refused.items()), most)
    done, total = found.coverage.counts
    lines.append(f"Coverage: {done} of {total} tensors: {coverage_words(found.coverage)}.")
    renames = rename_hints(found.hints)
    if renames:
        lines.append(f"  likely renamed: {printable('; '.join(f'{one} → {other}' for one, other in renames))}")
    if done or renames:
        lines.append(f"Next: {next_merge(found, renames)}")
    return "\n".join(lines)


def rename_hints(hints: Sequence[Hint]) -> list[tuple[str, str]]:
    """Hints as renames of whole modules where every part of one goes the same way."""
    pairs = {(_module(hint.extra), _module(hint.missing)) for hint in hints}
    return sorted((_pattern(one), _pattern(other)) for one, other in pairs)


def _module(key: str) -> str:
    return key.rpartition(".")[0] if "." in key else key


def _pattern(module: str) -> str:
    return module + ".{p}"


def next_merge(found: Diff, renames: Sequence[tuple[str, str]]) -> str:
    """The merge that follows a diff, ready to paste."""
    parts = ["ckptsurgeon", "merge", found.source, found.target, "-o", "merged.pt"]
    if found.root:
        parts += ["--root", found.root]
    for one, other in renames[:4]:
        parts += ["--rename", one, other]
    return printable(shlex.join(parts))


def plan(found: Plan, verbose: bool = False) -> str:
    """A plan: its steps folded, what is dropped, and the line that sums it up."""
    most = _most(verbose)
    target = f" → {printable(found.target.spec)}" if found.target is not None else ""
    lines = [f"{printable(' + '.join(source.path for source in found.sources))}{target}"]
    for number, source in enumerate(found.sources):
        words = [f"root {source.root}"] if source.root else []
        words += [f"{name} {value}" for name, value in source.prefix.items() if value]
        if words:
            lines.append(f"  source {number}: {printable(', '.join(words))}")
    lines += _folded([(step.target, _step_words(step)) for step in found.steps], None if verbose else 30)
    if found.dropped:
        lines.append("  dropped:")
        lines += _folded([(row.source, (row.reason,)) for row in found.dropped], most)
    if found.left_behind:
        lines.append(f"  left behind: {printable(_listing(found.left_behind))}")
    lines += [f"  {_finding(finding)}" for finding in found.findings]
    lines.append(summary(found))
    return "\n".join(lines)


def _step_words(step: Step) -> tuple[str, ...]:
    done = step.action if step.cast is None else f"{step.action}, cast to {step.cast}"
    return done, step.dtype, shape(step.shape), step.reason


def summary(found: Plan) -> str:
    """The plan in one line."""
    counts = Counter(step.action for step in found.steps)
    words = [(counts["copy"], "to copy"), (counts["rename"], "to rename"), (counts["adapt"], "to adapt"), (counts["init"], "to initialise")]
    words += [(counts["keep"], "to keep"), (len(found.dropped), "to drop")]
    told = ", ".join(f"{count} {word}" for count, word in words if count) or "nothing to do"
    return f"Plan: {told}. Coverage {coverage_words(found.coverage)}."


def report(found: Report, verbose: bool = False) -> str:
    """What a merge or transfer did."""
    most = _most(verbose)
    where = f"{found.output} ({size(found.nbytes)})" if found.output else found.target
    lines = [f"{'Wrote' if found.output else 'Transferred into'} {printable(where)}: coverage {coverage_words(found.coverage)}"]
    lines.append(f"  transferred {len(found.transferred):>5}")
    if found.kept:
        lines.append(f"  kept        {len(found.kept):>5}   the target's own values")
        lines += _keys(found.kept, most)
    lines.append(f"  fresh       {len(found.fresh):>5}" + ("   initialised, not from the source" if found.fresh else ""))
    lines += _keys(found.fresh, most)
    lines.append(f"  dropped     {len(found.dropped):>5}" + ("   of the source" if found.dropped else ""))
    lines += _folded([(key, (reason,)) for key, reason in found.dropped], most)
    if found.casts:
        lines.append(f"  casts that lose {len(found.casts):>1}")
        lines += _table(
            [(c.key, f"{c.source_dtype} → {c.target_dtype}", f"{c.changed} values, by at most {c.largest_error:.3g}") for c in found.casts],
            most,
        )
    lines += [f"  {_finding(finding)}" for finding in found.findings[: most or None]]
    if found.verification is not None:
        lines.append(f"  {_proved(found.verification)}")
    return "\n".join(lines)


def _proved(found: Verification) -> str:
    how = "loaded strictly into a fresh model on {} and compared bit for bit" if found.bitwise else "names, dtypes and shapes compared ({})"
    return f"{'verified' if found.ok else 'NOT verified'}: {found.tensors} tensors, {how.format(found.device)}"


def _finding(finding: Finding) -> str:
    key = f"{finding.key}: " if finding.key else ""
    return printable(f"{finding.level}: {key}{finding.message}")


def verification(found: Verification, path: str, target: str) -> str:
    """`verify`: what was compared, every finding, and a forward pass's shapes."""
    lines = [f"{printable(path)} → {printable(target)}: {'ok' if found.ok else 'NOT ok'}", f"  {_proved(found)}"]
    lines += [f"  {_finding(finding)}" for finding in found.findings]
    lines += [f"  forward: {printable(place)} {shape(dims)}" for place, dims in found.outputs.items()]
    if found.fresh:
        lines.append(f"  on record as fresh: {printable(_listing(fold_siblings(found.fresh)))}")
    return "\n".join(lines)


def check(found: CheckReport) -> str:
    """`check`: a line per finding, and the totals; nothing at all to say of a good file but its name."""
    lines = []
    for file in found.files:
        for finding in file.findings:
            key = f"{finding.key}: " if finding.key else ""
            lines.append(printable(f"{file.path}: {finding.code} {key}{finding.message}"))
    bad = sum(not file.ok for file in found.files)
    total = f"{len(found.files)} file{'s' if len(found.files) != 1 else ''} checked"
    lines.append(f"{total}, all good" if not bad else f"{total}, {bad} not good")
    return "\n".join(lines)


def groups(rows: Sequence[dict[str, object]]) -> str:
    """`groups`: a row per parameter group."""
    table = []
    for row in rows:
        names = row["params"]
        assert isinstance(names, list)
        keys = _listing(fold_siblings(names), 6)
        decay = "" if row["weight_decay"] is None else f"{row['weight_decay']:g}"
        table.append((printable(row["name"]), f"{row['lr']:g}", decay, str(len(names)), printable(keys)))
    return tabulate(table, headers=("group", "lr", "weight decay", "tensors", "parameters"), tablefmt="simple", disable_numparse=True)
