"""The texts of `merge`, `apply`, `transfer`, `skeleton` and `groups`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckptsurgeon.report import FRESH, CarriedState, Cast, Report
from ckptsurgeon.shown import joined, styled
from ckptsurgeon.sizes import rounded
from ckptsurgeon.tensors import Checkpoint
from ckptsurgeon.views.folding import fold_keys
from ckptsurgeon.views.text.check import proved
from ckptsurgeon.views.text.words import (
    aligned,
    answer,
    broken,
    columns,
    count,
    findings,
    fitted,
    folded,
    heading,
    keys,
    listing,
    most_rows,
    name,
    places,
    table,
)
from ckptsurgeon.views.text.words import coverage as coverage_words


def report(report: Report, verbose: bool = False, width: int | None = None) -> str:
    """What a merge, an apply or a transfer did."""
    most = most_rows(verbose)
    many = f" in {len(report.files)} files" if len(report.files) > 1 else ""
    moved = f", shared {rounded(report.shared)}, copied {rounded(report.copied)}" if report.shared else ""
    wrote = f"Wrote {name(report.output)} ({rounded(report.nbytes)}{many}{moved})"
    lines = [f"{wrote if report.output else f'Transferred into {name(report.target)}'}: coverage {coverage_words(report.coverage)}"]
    if any(report.roots) or (report.output and (report.target or len(report.sources) > 1)):
        lines.append(f"  {_sources(report)}{f' → {name(report.target)}' if report.target else ''}")
    lines += [heading("transferred", len(report.transferred), _adapted(report))]
    if verbose:
        lines += keys(report.transferred, width, None, "transferred")
    if report.partial:
        lines += [
            heading("partly", len(report.partial), "trained in part: the rest was filled up, or is fresh in a source"),
            *keys(report.partial, width, most, "partly"),
        ]
    if report.kept:
        lines += [heading("kept", len(report.kept), "the target's own values"), *keys(report.kept, width, most)]
    lines += [heading("fresh", len(report.fresh), _fresh(report)), *keys(report.fresh, width, most, "fresh")]
    lines.append(heading("dropped", len(report.dropped), "of the source"))
    lines += folded([(key, (reason,)) for key, reason in report.dropped], width, most, "dropped")
    if report.left_behind:
        lines.append(heading("left behind", len(report.left_behind), places(report.left_behind, verbose)))
    if report.casts:
        lines += [heading("lossy casts", len(report.casts)), *_casts(report.casts, width, most)]
    if report.optimizer is not None:
        lines += _carried(report.optimizer, width, most)
    lines += findings(report.findings, verbose, width)
    if report.verification is not None:
        lines.append("  " + proved(report.verification))
    if report.proof == "copied":
        lines.append("  " + answer("proven", True) + ": what it does not share with the sources was held against the plan, byte by byte")
    elif report.proven and report.verification is None:
        lines.append("  " + answer("proven", True) + ": read back and held against the plan, byte by byte")
    return fitted(lines, width)


def carried(state: CarriedState, verbose: bool = False, width: int | None = None) -> str:
    """What became of the training state beside the weights."""
    return fitted(_carried(state, width, most_rows(verbose)), width)


def _carried(state: CarriedState, width: int | None, most: int | None) -> list[str]:
    lines = []
    if state.place:
        ways = {
            "names": "by the parameters' names",
            "order": "by the parameters' order, every shape held against it",
            "model": "by the model's own order of parameters, every shape held against it",
        }
        lines.append(f"  optimizer state from {name(state.place)}, {ways.get(state.by, state.by)}")
        adapted = f"{len(state.adapted)} of them adapted with their weights" if state.adapted else ""
        lines.append(heading("carried", len(state.carried) + len(state.adapted), adapted))
        lines.append(heading("at zero", len(state.zeroed), "start without"))
    rows = [(key, (reason,)) for key, reason in state.not_carried if reason != FRESH]  # the report lists the fresh ones with the weights
    lines += [heading("not carried", len(rows)), *folded(rows, width, most, "not carried")] if rows else []
    if state.casts:
        lines += [heading("lossy casts", len(state.casts), "of moments"), *_casts(state.casts, width, most)]
    lines += [f"  also carried: {listing(state.others)}"] if state.others else []
    if state.ema is not None:
        lines.append(f"  averaged copy: coverage {coverage_words(state.ema.coverage)}")
        if state.ema.casts:
            lines += [heading("lossy casts", len(state.ema.casts), "of the averaged copy"), *_casts(state.ema.casts, width, most)]
    return lines


def _casts(casts: Sequence[Cast], width: int | None, most: int | None) -> list[str]:
    """A row for each cast; of many, a row for each pair of dtypes."""
    if most is None or len(casts) <= most:
        rows = [(c.key, f"{c.source_dtype} → {c.target_dtype}", _loss([c])) for c in casts]
        return table(rows, width, most)
    pairs: dict[str, list[Cast]] = {}
    for cast in casts:
        pairs.setdefault(f"{cast.source_dtype} → {cast.target_dtype}", []).append(cast)
    rows = [(pair, count(len(same), "tensor"), _loss(same)) for pair, same in pairs.items()]
    return table(rows, width, most)


def _loss(casts: Sequence[Cast]) -> str:
    """What casts lost together; the largest error is that of the values that did not overflow."""
    changed, overflowed, truncated = (sum(getattr(c, name) for c in casts) for name in ("changed", "overflowed", "truncated"))
    words = [f"{count(changed, 'value')} changed, by at most {max(c.largest_error for c in casts):.3g}"]
    words += [f"{overflowed:,} overflowed (infinite, saturated or wrapped)"] if overflowed else []
    words += [f"{truncated:,} truncated"] if truncated else []
    return "; ".join(words)


def skeleton(checkpoint: Checkpoint, output: str) -> str:
    """What was saved of a target."""
    return f"Wrote {name(output)}: {count(len(checkpoint), 'tensor')} of {name(checkpoint.path)}, {count(checkpoint.numel, 'element')}"


def groups(rows: Sequence[Mapping[str, Any]], verbose: bool = False, width: int | None = None) -> str:
    """A row per parameter group."""
    decay = any(row["weight_decay"] is not None for row in rows)
    headers = ["group", "lr", *(["weight decay"] if decay else []), "tensors", "parameters"]
    cells = []
    for row in rows:
        decays = [f"{row['weight_decay']:g}" if row["weight_decay"] is not None else ""] if decay else []
        params = list(row["params"]) if verbose else fold_keys(row["params"])
        cells.append([name(row["name"]), f"{row['lr']:g}", *decays, str(len(row["params"])), listing(params, None if verbose else 6)])
    head = [f"{header}  " for header in headers]
    before = sum(max(len(row[column_index]) for row in [head, *cells]) + 2 for column_index in range(len(head) - 1))
    body: list[list[str]] = []
    for *cell, params_cell in cells:
        first, *more = [params_cell] if width is None else broken(params_cell, max(width - before, 24))
        body += [[*cell, first], *([*[""] * len(cell), rest] for rest in more)]
    under = ["-" * max(map(columns, column)) for column in zip(head, *body, strict=True)]
    top, *rest = aligned([head, under, *body])
    return joined([styled(top, "strong"), *rest], "\n")


def _sources(report: Report) -> str:
    """The sources, each with the root that was read."""
    roots = report.roots or ("",) * len(report.sources)
    return name(" + ".join(f"{path} (root {root})" if root else path for path, root in zip(report.sources, roots, strict=True)))


def _fresh(report: Report) -> str:
    if report.still_fresh:
        return f"initialised, {len(report.still_fresh)} of them by an earlier merge and not trained since"
    return "initialised, not from the source"


def _adapted(report: Report) -> str:
    return f"{len(report.adapted)} of them by adapters" if report.adapted else ""
