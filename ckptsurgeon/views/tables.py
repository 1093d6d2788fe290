"""Results as a table: GitHub's Markdown, HTML, or CSV. It has all rows; keys are folded, unless `verbose`."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ckptsurgeon.errors import SettingsError
from ckptsurgeon.views.folding import fold
from ckptsurgeon.views.text.words import cells_of, name, shape

if TYPE_CHECKING:
    from ckptsurgeon.matching.proposals.propose import Proposal
    from ckptsurgeon.planning.diff import Diff
    from ckptsurgeon.planning.plan_types import Plan
    from ckptsurgeon.report import CheckReport, Finding, Report, Verification
    from ckptsurgeon.tensors import Archive

FORMS = ("github", "html", "csv")
Cells = tuple[str, ...]
_FORMULA = tuple("=+-@＝＋－＠")  # a spreadsheet computes a cell that begins with one of these


def rendered(form: str, headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Rows as a table of a form.

    Keys come from files of strangers. So CSV is written as OWASP recommends against formula injection: every cell is quoted, and one that a
    spreadsheet would compute begins with an apostrophe.

    Raises:
        SettingsError: there is no such form.

    >>> print(rendered("github", ("key", "shape"), [("a|b", "(2,)")]))
    | key   | shape   |
    |-------|---------|
    | a\\|b  | (2,)    |
    """
    cells = [[name(cell) if str(cell) else "" for cell in row] for row in rows]
    if form == "csv":
        text = io.StringIO()
        quoted = [[f"'{cell}" if cell.startswith(_FORMULA) else cell for cell in row] for row in cells]
        csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL).writerows([headers, *quoted])
        return text.getvalue()
    if form not in FORMS:
        raise SettingsError(f"there is no table {form!r}", key="--table", hint=f"one of {', '.join(FORMS)}")
    from tabulate import tabulate  # type: ignore[import-untyped]

    if form == "github":
        cells = [[cell.replace("|", "\\|") for cell in row] for row in cells]
    return str(tabulate(cells, headers=list(headers), tablefmt=form, disable_numparse=True))


def _folded(rows: Iterable[tuple[str, Cells]], verbose: bool) -> list[Sequence[str]]:
    return [(key, *cells) for key, cells in rows] if verbose else cells_of(fold(rows))


def archive(result: Archive, form: str, verbose: bool = False) -> str:
    """`inspect`: a row for each tensor, with the bytes of one; with `--tree` a row for each module."""
    from ckptsurgeon.views.selected import roots_shown, selected, tree

    several = len(result.state_dicts) > 1
    root_header = ["root"] if several else []
    rows: list[Sequence[object]] = []
    for root in roots_shown(result):
        chosen = selected(root.tensors, result.look)
        root_cell = [root.root] if several else []
        if result.look.depth:
            rows += [[*root_cell, row.path, *row.numbers] for row in tree(chosen, result.look)]
            continue
        cells = ((key, (tensor.dtype, shape(tensor.shape), str(tensor.nbytes))) for key, tensor in chosen.items())
        rows += [[*root_cell, *row] for row in _folded(cells, verbose)]
    if result.look.depth:
        return rendered(form, [*root_header, "module", "tensors", "elements", "bytes"], rows)
    return rendered(form, [*root_header, "key", "dtype", "shape", "bytes"], rows)


def diff(result: Diff, form: str, verbose: bool = False, only: Sequence[str] = (), stat: bool = False) -> str:
    """`diff`: a row for each key that differs, and with `verbose` for each that matches; with `stat` a row for each module."""
    from ckptsurgeon.views.counted import COUNTED, LETTERS, categories, counted

    if stat:
        return rendered(form, ["module", *COUNTED], [[row.path, *row.numbers] for row in counted(result)])
    rows: dict[str, list[tuple[str, Cells]]] = {
        "mismatched": [(row.key, (shape(row.source_shape), shape(row.target_shape))) for row in result.mismatched],
        "missing": [(key, ("", shape(result.missing_shapes[key]) if key in result.missing_shapes else "")) for key in result.missing],
        "extra": [(key, (shape(result.extra_shapes[key]) if key in result.extra_shapes else "", "")) for key in result.extra],
        "dtype": [(row.key, (row.source_dtype, row.target_dtype)) for row in result.dtype_changed],
        "matched": [(key, ("", "")) for key in result.matched],
        "dropped": [(key, ("", "")) for key in result.dropped],
    }
    shown = categories(only) or tuple(word for word in LETTERS if verbose or word not in ("matched", "dropped"))
    return rendered(form, ("status", "key", "source", "target"), [[word, *row] for word in shown for row in _folded(rows[word], verbose)])


def plan(result: Plan, form: str, verbose: bool = False) -> str:
    """`plan`: a row for each step, and for each key that is dropped."""
    steps: dict[str, list[tuple[str, Cells]]] = {}
    for step in result.steps:
        steps.setdefault(step.action, []).append((step.target, (step.dtype, shape(step.shape), step.reason)))
    rows = [[action, *row] for action, same in steps.items() for row in _folded(same, verbose)]
    rows += [["drop", *row] for row in _folded([(row.source, ("", "", row.reason)) for row in result.dropped], verbose)]
    return rendered(form, ("action", "key", "dtype", "shape", "reason"), rows)


def report(result: Report, form: str, verbose: bool = False) -> str:
    """`merge` and `apply`: a row for each key and what became of it."""
    partial = set(result.partial)
    rows: list[Sequence[str]] = []
    for word, keys in (("transferred", result.transferred), ("kept", result.kept), ("fresh", result.fresh)):
        cells = [(key, ("partly" if word == "transferred" and key in partial else "",)) for key in keys]
        rows += [[word, *row] for row in _folded(cells, verbose)]
    rows += [["dropped", *row] for row in _folded([(key, (reason,)) for key, reason in result.dropped], verbose)]
    return rendered(form, ("status", "key", "reason"), rows)


def matching(proposal: Proposal, form: str, verbose: bool = False) -> str:
    """`match`: a row for each link, and for each key of either side without one."""
    del verbose  # links are never folded: each has its own evidence
    applied = {id(link) for link in proposal.applied}
    rows = [
        [
            "matched" if id(link) in applied else "uncertain",
            " + ".join(link.sources),
            " + ".join(link.targets),
            str(link.op or ""),
            ", ".join(map(str, link.evidence)),
        ]
        for link in proposal.links
    ]
    rows += [["unmatched", "", key, "", ""] for key in proposal.unmatched]
    rows += [["unused", key, "", "", ""] for key in proposal.unused]
    return rendered(form, ("status", "source", "target", "adapter", "evidence"), rows)


def check(result: CheckReport, form: str, verbose: bool = False) -> str:
    """`check`: a row for each finding; notes only with `verbose`."""
    rows = [[file.path, *row] for file in result.files for row in _findings(file.findings, verbose) if verbose or row[1] != "note"]
    return rendered(form, ("path", "code", "level", "key", "message"), rows)


def verification(result: Verification, form: str, verbose: bool = False) -> str:
    """`verify`: a row for each finding."""
    return rendered(form, ("code", "level", "key", "message"), _findings(result.findings, verbose))


def groups(rows: Iterable[Mapping[str, Any]], form: str, verbose: bool = False) -> str:
    """`groups`: a row for each parameter with its group's name and rates."""
    cells: list[Sequence[object]] = []
    for row in rows:
        decay = "" if row["weight_decay"] is None else row["weight_decay"]
        cells += [[row["name"], row["lr"], decay, key] for key, *_ in _folded([(key, ()) for key in row["params"]], verbose)]
    return rendered(form, ("group", "lr", "weight decay", "key"), cells)


def known(rows: Iterable[tuple[str, str, Sequence[str], str]], form: str) -> str:
    """`adapters`: a row for each adapter and each scheme."""
    return rendered(
        form, ("kind", "name", "arguments", "words"), [[kind, word, ", ".join(args), words] for kind, word, args, words in rows]
    )


def _findings(findings: Iterable[Finding], verbose: bool) -> list[Sequence[str]]:
    rows = ((finding.key or "", (finding.code, finding.level, finding.message)) for finding in findings)
    return [(code, level, key, message) for key, code, level, message in _folded(rows, verbose)]
