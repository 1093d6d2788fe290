"""The texts of `inspect` and `adapters`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.planning.quantised_weights.find import find
from ckptsurgeon.planning.training_places import lightning_average
from ckptsurgeon.shown import Look, styled
from ckptsurgeon.sizes import percent, rounded
from ckptsurgeon.tensors import Archive, Checkpoint, Refused, StateDict, TensorMeta, find_ties
from ckptsurgeon.views.folding import fold
from ckptsurgeon.views.selected import roots_shown, selected, tree
from ckptsurgeon.views.text.words import (
    cells_of,
    count,
    cut,
    fitted,
    keys,
    level_line,
    listing,
    most_rows,
    name,
    places,
    quantised,
    right_aligned,
    shape,
    table,
)

ROWS = 40


def archive(archive: Archive, verbose: bool = False, width: int | None = None) -> str:
    """The format, the roots, every tensor folded (of several roots, only the chosen one's), and what else the file holds."""
    lines = [styled(name(archive.path), "strong") + f": {archive.format}, {rounded(sum(stamp.size for stamp in archive.files))}"]
    if archive.part is not None:
        lines.append(f"  {archive.part.reason}")
        lines.append(f"  {archive.part.hint}")
    if archive.chosen is not None or archive.look.patterns:
        for one in roots_shown(archive):
            lines += _state_dict(one, archive.look, True, verbose, width)
    else:
        several = len(archive.state_dicts) > 1
        averaged = lightning_average([one.root for one in archive.state_dicts], archive.beside)
        for state_dict in archive.state_dicts:
            lines += _state_dict(state_dict, archive.look, verbose or not several, verbose, width)
            if state_dict.root == averaged:
                lines.append(
                    "    the average of the weights (Lightning's averaging_state says so); current_model_state has the last step's"
                )
        if several and not verbose:
            lines.append(f"  {len(archive.state_dicts)} state_dicts; see the tensors of one with --root, of all with -v")
    if archive.look.patterns:  # only tensors are shown
        return fitted(lines, width)
    if archive.globals:
        lines.append(f"  asks for {count(len(archive.globals), 'name')} beyond the allow-list; none is imported:")
        lines += table([(one,) for one in archive.globals], width, most_rows(verbose))
    if archive.provenance is not None:
        lines += _provenance(archive.provenance, verbose, width)
    if archive.beside:
        lines.append(f"  beside the tensors: {places(archive.beside, verbose)}")
    return fitted([*lines, *(level_line("note", name(note)) for note in archive.notes)], width)


def _state_dict(state_dict: StateDict | Checkpoint, look: Look, tensors: bool, verbose: bool, width: int | None) -> list[str]:
    chosen = selected(state_dict.tensors, look)
    alike = Counter((tensor.dtype, tensor.shape) for tensor in chosen.values())  # most of a million tensors are alike
    dtypes: Counter[str] = Counter()
    numel = nbytes = 0
    for (code, dims), number in alike.items():
        dtypes[code] += number
        numel += number * prod(dims)
        nbytes += number * prod(dims) * BY_CODE[code].size
    root = f"root {name(state_dict.root)}: " if state_dict.root else ""
    kinds = ", ".join(f"{number:,} {code}" for code, number in dtypes.most_common())
    of = f"{len(chosen):,} of " if look.patterns else ""
    lines = [f"  {root}{of}{count(len(state_dict.tensors), 'tensor')}, {count(numel, 'element')}, {rounded(nbytes)} ({kinds})"]
    if tensors and look.depth:
        lines += _tree(chosen, look, nbytes, width, None if verbose else ROWS)
    elif tensors:
        lines += table(tensor_rows(chosen, look, verbose), width, None if verbose else ROWS)
        ties = [group for group in state_dict.ties or find_ties(state_dict.tensors) if any(key in chosen for key in group)]
        lines += [f"    tied, one tensor: {listing(group)}" for group in ties[: most_rows(verbose)]]
    if look.patterns:
        return lines
    lines += quantised(find(state_dict.tensors).values())
    refused = [(key, f"refused: {entry.reason}") for key, entry in state_dict.entries.items() if isinstance(entry, Refused)]
    return lines + (table(refused, width, most_rows(verbose), "refused") if refused else [])


def tensor_rows(tensors: Mapping[str, TensorMeta], look: Look, verbose: bool) -> list[Sequence[str]]:
    """A row for each tensor: its key, dtype and shape, and where they are sorted by it its size; folded without `verbose`."""

    def cells(tensor: TensorMeta) -> tuple[str, str]:
        return tensor.dtype, shape(tensor.shape)

    if verbose:
        sized = look.sort == "size"
        return [(key, *cells(tensor), *([rounded(tensor.nbytes)] if sized else [])) for key, tensor in tensors.items()]
    if look.sort != "size":
        return cells_of(fold(((key, cells(tensor)) for key, tensor in tensors.items()), lambda common: common[0]))
    numbers = {f"{dtype} {dims}": tensor.nbytes for tensor in tensors.values() for dtype, dims in [cells(tensor)]}
    rows = [(numbers[f"{row.common[0]} {row.common[1]}"] * row.count, row) for row in fold((k, cells(t)) for k, t in tensors.items())]  # type: ignore[index]
    rows.sort(key=lambda row: -row[0])
    return [(*cells_of([row])[0], rounded(nbytes)) for nbytes, row in rows]


def _tree(tensors: Mapping[str, TensorMeta], look: Look, nbytes: int, width: int | None, most: int | None) -> list[str]:
    """A row for each module, indented by its level; a narrow terminal gets fewer numbers."""
    heads = ("module", "tensors", "elements", "size", "share")
    rows = [heads]
    for row in tree(tensors, look):
        number, elements, size = row.numbers
        share = percent(size / nbytes if nbytes else 1.0)
        rows.append(("  " * row.level + name(row.name), f"{number:,}", f"{elements:,}", rounded(size), share))
    for columns in ((0, 1, 2, 3, 4), (0, 1, 3, 4), (0, 3, 4), (0, 4)):
        lines = right_aligned([[row[column] for column in columns] for row in rows])
        if width is None or max(map(len, lines)) <= width:
            break
    return cut([styled(lines[0], "faint", 4), *lines[1:]], None if most is None else most + 1)


def _provenance(record: Mapping[str, Any], verbose: bool, width: int | None) -> list[str]:
    fresh = record["fresh"]
    line = f"  merged by {name(record.get('tool', 'ckptsurgeon'))}, {count(len(fresh), 'tensor')} fresh"
    return [line + ":", *keys(fresh, width, most_rows(verbose))] if fresh else [line]


def known(rows: Sequence[tuple[str, str, tuple[str, ...], str]], width: int | None = None) -> str:
    """The adapters and schemes: kind, name, arguments and description of each."""
    lines = []
    for kind in dict.fromkeys(row[0] for row in rows):
        lines.append(styled(f"{kind}s", "strong"))
        for _, entry, arguments, words in (row for row in rows if row[0] == kind):
            lines += [f"  {entry}({', '.join(arguments)})" if arguments else f"  {entry}", f"      {words}"]
    return fitted(lines, width)
