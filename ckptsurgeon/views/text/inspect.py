"""The texts of `inspect`, and of what rules can name."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.planning.quantised import find
from ckptsurgeon.planning.training_places import lightning_average
from ckptsurgeon.shown import styled
from ckptsurgeon.sizes import rounded
from ckptsurgeon.tensors import Archive, Checkpoint, Refused, StateDict, find_ties
from ckptsurgeon.views.folding import fold
from ckptsurgeon.views.text.words import cells_of, count, fitted, keys, level_line, listing, most_rows, name, quantised, shape, table

ROWS = 40


def archive(found: Archive, verbose: bool = False, width: int | None = None) -> str:
    """The format, the roots, every tensor folded (of several roots, only the chosen one's), and what else the file holds."""
    lines = [styled(name(found.path), "strong") + f": {found.format}, {rounded(sum(stamp.size for stamp in found.files))}"]
    if found.part is not None:
        lines.append(f"  {found.part.reason}")
        lines.append(f"  {found.part.hint}")
    if found.chosen is not None:
        lines += _state_dict(found.chosen, True, verbose, width)
    else:
        several = len(found.state_dicts) > 1
        averaged = lightning_average([one.root for one in found.state_dicts], found.beside)
        for state_dict in found.state_dicts:
            lines += _state_dict(state_dict, verbose or not several, verbose, width)
            if state_dict.root == averaged:
                lines.append(
                    "    the average of the weights (Lightning's averaging_state says so); current_model_state has the last step's"
                )
        if several and not verbose:
            lines.append(f"  {len(found.state_dicts)} state_dicts; see the tensors of one with --root, of all with -v")
    if found.globals:
        lines.append(f"  asks for {count(len(found.globals), 'name')} beyond the allow-list; none is imported:")
        lines += table([(one,) for one in found.globals], width, most_rows(verbose))
    if found.provenance is not None:
        lines += _provenance(found.provenance, verbose, width)
    if found.beside:
        lines.append(f"  beside the tensors: {listing(found.beside, None if verbose else 8)}")
    return fitted([*lines, *(level_line("note", name(note)) for note in found.notes)], width)


def _state_dict(found: StateDict | Checkpoint, tensors: bool, verbose: bool, width: int | None) -> list[str]:
    alike = Counter((tensor.dtype, tensor.shape) for tensor in found.tensors.values())  # of a million tensors most are
    dtypes: Counter[str] = Counter()
    numel = nbytes = 0
    for (code, dims), number in alike.items():
        dtypes[code] += number
        numel += number * prod(dims)
        nbytes += number * prod(dims) * BY_CODE[code].size
    root = f"root {name(found.root)}: " if found.root else ""
    kinds = ", ".join(f"{number} {code}" for code, number in dtypes.most_common())
    lines = [f"  {root}{count(len(found.tensors), 'tensor')}, {count(numel, 'element')}, {rounded(nbytes)} ({kinds})"]
    if tensors:
        cells = {(code, dims): (code, shape(dims)) for code, dims in alike}
        rows = ((key, cells[tensor.dtype, tensor.shape]) for key, tensor in found.tensors.items())
        lines += table(
            [(key, *cells) for key, cells in rows] if verbose else cells_of(fold(rows, dtype_of)), width, None if verbose else ROWS
        )
        lines += [f"    tied, one tensor: {listing(group)}" for group in (found.ties or find_ties(found.tensors))[: most_rows(verbose)]]
    lines += quantised(find(found.tensors).values())
    refused = [(key, f"refused: {entry.reason}") for key, entry in found.entries.items() if isinstance(entry, Refused)]
    return lines + (table(refused, width, most_rows(verbose), "refused") if refused else [])


def dtype_of(cells: tuple[str, str]) -> str:
    """What the leaves of a module must agree in to share a line."""
    return cells[0]


def _provenance(record: Mapping[str, Any], verbose: bool, width: int | None) -> list[str]:
    fresh = record["fresh"]
    line = f"  merged by {name(record.get('tool', 'ckptsurgeon'))}, {count(len(fresh), 'tensor')} fresh"
    return [line + ":", *keys(fresh, width, most_rows(verbose))] if fresh else [line]


def known(rows: Sequence[tuple[str, str, tuple[str, ...], str]], width: int | None = None) -> str:
    """What rules can name: kind, name, arguments and words of each."""
    lines = []
    for kind in dict.fromkeys(row[0] for row in rows):
        lines.append(styled(f"{kind}s", "strong"))
        for _, one, arguments, words in (row for row in rows if row[0] == kind):
            lines += [f"  {one}({', '.join(arguments)})" if arguments else f"  {one}", f"      {words}"]
    return fitted(lines, width)
