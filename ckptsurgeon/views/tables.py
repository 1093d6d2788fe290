"""The rows of results as a table: Markdown as GitHub has it, HTML, or CSV. All rows are there; keys are folded, unless `verbose`."""

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


def archive(found: Archive, form: str, verbose: bool = False) -> str:
    """`inspect`: a row for each tensor, with the bytes of one; with `--tree` a row for each module."""
    from ckptsurgeon.views.selected import roots_shown, selected, tree

    several = len(found.state_dicts) > 1
    head = ["root"] if several else []
    rows: list[Sequence[object]] = []
    for root in roots_shown(found):
        chosen = selected(root.tensors, found.look)
        first = [root.root] if several else []
        if found.look.depth:
            rows += [[*first, row.path, *row.numbers] for row in tree(chosen, found.look)]
            continue
        cells = ((key, (one.dtype, shape(one.shape), str(one.nbytes))) for key, one in chosen.items())
        rows += [[*first, *row] for row in _folded(cells, verbose)]
    if found.look.depth:
        return rendered(form, [*head, "module", "tensors", "elements", "bytes"], rows)
    return rendered(form, [*head, "key", "dtype", "shape", "bytes"], rows)


def diff(found: Diff, form: str, verbose: bool = False, only: Sequence[str] = (), stat: bool = False) -> str:
    """`diff`: a row for each key that differs, and with `verbose` for each that matches; with `stat` a row for each module."""
    from ckptsurgeon.views.counted import COUNTED, LETTERS, categories, counted

    if stat:
        return rendered(form, ["module", *COUNTED], [[row.path, *row.numbers] for row in counted(found)])
    rows: dict[str, list[tuple[str, Cells]]] = {
        "mismatched": [(row.key, (shape(row.source_shape), shape(row.target_shape))) for row in found.mismatched],
        "missing": [(key, ("", shape(found.missing_shapes[key]) if key in found.missing_shapes else "")) for key in found.missing],
        "extra": [(key, (shape(found.extra_shapes[key]) if key in found.extra_shapes else "", "")) for key in found.extra],
        "dtype": [(row.key, (row.source_dtype, row.target_dtype)) for row in found.dtype_changed],
        "matched": [(key, ("", "")) for key in found.matched],
        "dropped": [(key, ("", "")) for key in found.dropped],
    }
    wanted = categories(only) or tuple(word for word in LETTERS if verbose or word not in ("matched", "dropped"))
    return rendered(form, ("status", "key", "source", "target"), [[word, *row] for word in wanted for row in _folded(rows[word], verbose)])


def plan(found: Plan, form: str, verbose: bool = False) -> str:
    """`plan`: a row for each step, and for each key that is dropped."""
    steps: dict[str, list[tuple[str, Cells]]] = {}
    for step in found.steps:
        steps.setdefault(step.action, []).append((step.target, (step.dtype, shape(step.shape), step.reason)))
    rows = [[action, *row] for action, same in steps.items() for row in _folded(same, verbose)]
    rows += [["drop", *row] for row in _folded([(row.source, ("", "", row.reason)) for row in found.dropped], verbose)]
    return rendered(form, ("action", "key", "dtype", "shape", "reason"), rows)


def report(found: Report, form: str, verbose: bool = False) -> str:
    """`merge` and `apply`: a row for each key and what became of it."""
    partial = set(found.partial)
    rows: list[Sequence[str]] = []
    for word, keys in (("transferred", found.transferred), ("kept", found.kept), ("fresh", found.fresh)):
        cells = [(key, ("partly" if word == "transferred" and key in partial else "",)) for key in keys]
        rows += [[word, *row] for row in _folded(cells, verbose)]
    rows += [["dropped", *row] for row in _folded([(key, (reason,)) for key, reason in found.dropped], verbose)]
    return rendered(form, ("status", "key", "reason"), rows)


def matching(found: Proposal, form: str, verbose: bool = False) -> str:
    """`match`: a row for each link, and for each key of either side without one."""
    del verbose  # links are never folded: each has its own evidence
    applied = {id(link) for link in found.applied}
    rows = [
        [
            "matched" if id(link) in applied else "uncertain",
            " + ".join(link.sources),
            " + ".join(link.targets),
            str(link.op or ""),
            ", ".join(map(str, link.evidence)),
        ]
        for link in found.links
    ]
    rows += [["unmatched", "", key, "", ""] for key in found.unmatched]
    rows += [["unused", key, "", "", ""] for key in found.unused]
    return rendered(form, ("status", "source", "target", "adapter", "evidence"), rows)


def check(found: CheckReport, form: str, verbose: bool = False) -> str:
    """`check`: a row for each thing found; notes with `verbose`."""
    rows = [[file.path, *row] for file in found.files for row in _findings(file.findings, verbose) if verbose or row[1] != "note"]
    return rendered(form, ("path", "code", "level", "key", "message"), rows)


def verification(found: Verification, form: str, verbose: bool = False) -> str:
    """`verify`: a row for each finding."""
    return rendered(form, ("code", "level", "key", "message"), _findings(found.findings, verbose))


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


def _findings(found: Iterable[Finding], verbose: bool) -> list[Sequence[str]]:
    rows = ((one.key or "", (one.code, one.level, one.message)) for one in found)
    return [(code, level, key, message) for key, code, level, message in _folded(rows, verbose)]
