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
    table,
)
from ckptsurgeon.views.text.words import coverage as coverage_words


def report(found: Report, verbose: bool = False, width: int | None = None) -> str:
    """What a merge, an apply or a transfer did."""
    most = most_rows(verbose)
    many = f" in {len(found.files)} files" if len(found.files) > 1 else ""
    where = f"Wrote {name(found.output)} ({rounded(found.nbytes)}{many})" if found.output else f"Transferred into {name(found.target)}"
    lines = [f"{where}: coverage {coverage_words(found.coverage)}"]
    if any(found.roots) or (found.output and (found.target or len(found.sources) > 1)):
        lines.append(f"  {_sources(found)}{f' → {name(found.target)}' if found.target else ''}")
    lines += [heading("transferred", len(found.transferred), _adapted(found))]
    if verbose:
        lines += keys(found.transferred, width, None, "transferred")
    if found.partial:
        lines += [
            heading("partly", len(found.partial), "trained in part: the rest was filled up, or is fresh in a source"),
            *keys(found.partial, width, most, "partly"),
        ]
    if found.kept:
        lines += [heading("kept", len(found.kept), "the target's own values"), *keys(found.kept, width, most)]
    lines += [heading("fresh", len(found.fresh), _fresh(found)), *keys(found.fresh, width, most, "fresh")]
    lines.append(heading("dropped", len(found.dropped), "of the source"))
    lines += folded([(key, (reason,)) for key, reason in found.dropped], width, most, "dropped")
    if found.casts:
        lines += [heading("lossy casts", len(found.casts)), *_casts(found.casts, width, most)]
    if found.optimizer is not None:
        lines += _carried(found.optimizer, width, most)
    lines += findings(found.findings, verbose, width)
    if found.verification is not None:
        lines.append("  " + proved(found.verification))
    elif found.proven:
        lines.append("  " + answer("proven", True) + ": read back and held against the plan, byte by byte")
    return fitted(lines, width)


def carried(found: CarriedState, verbose: bool = False, width: int | None = None) -> str:
    """What became of the training state beside the weights."""
    return fitted(_carried(found, width, most_rows(verbose)), width)


def _carried(found: CarriedState, width: int | None, most: int | None) -> list[str]:
    lines = []
    if found.place:
        told = {
            "names": "by the parameters' names",
            "order": "by the parameters' order, every shape held against it",
            "model": "by the model's own order of parameters, every shape held against it",
        }
        lines.append(f"  optimizer state from {name(found.place)}, {told.get(found.by, found.by)}")
        adapted = f"{len(found.adapted)} of them adapted with their weights" if found.adapted else ""
        lines.append(heading("carried", len(found.carried) + len(found.adapted), adapted))
        lines.append(heading("at zero", len(found.zeroed), "start without"))
    rows = [(key, (reason,)) for key, reason in found.not_carried if reason != FRESH]  # the report lists the fresh ones with the weights
    lines += [heading("not carried", len(rows)), *folded(rows, width, most, "not carried")] if rows else []
    if found.casts:
        lines += [heading("lossy casts", len(found.casts), "of moments"), *_casts(found.casts, width, most)]
    lines += [f"  also carried: {listing(found.others)}"] if found.others else []
    if found.ema is not None:
        lines.append(f"  averaged copy: coverage {coverage_words(found.ema.coverage)}")
        if found.ema.casts:
            lines += [heading("lossy casts", len(found.ema.casts), "of the averaged copy"), *_casts(found.ema.casts, width, most)]
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


def skeleton(found: Checkpoint, output: str) -> str:
    """What was saved of a target."""
    return f"Wrote {name(output)}: {count(len(found), 'tensor')} of {name(found.path)}, {count(found.numel, 'element')}"


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
    before = sum(max(len(row[place]) for row in [head, *cells]) + 2 for place in range(len(head) - 1))
    body: list[list[str]] = []
    for *cell, params_cell in cells:
        first, *more = [params_cell] if width is None else broken(params_cell, max(width - before, 24))
        body += [[*cell, first], *([*[""] * len(cell), rest] for rest in more)]
    under = ["-" * max(map(columns, column)) for column in zip(head, *body, strict=True)]
    top, *rest = aligned([head, under, *body])
    return joined([styled(top, "strong"), *rest], "\n")


def _sources(found: Report) -> str:
    """The sources, each with the root that was read."""
    roots = found.roots or ("",) * len(found.sources)
    return name(" + ".join(f"{path} (root {root})" if root else path for path, root in zip(found.sources, roots, strict=True)))


def _fresh(found: Report) -> str:
    if found.still_fresh:
        return f"initialised, {len(found.still_fresh)} of them by an earlier merge and not trained since"
    return "initialised, not from the source"


def _adapted(found: Report) -> str:
    return f"{len(found.adapted)} of them by adapters" if found.adapted else ""
