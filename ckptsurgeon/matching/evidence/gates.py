"""The gates of a recurrent cell by their names: which units are the parts of torch's `weight_ih` and `weight_hh`, in its order.

Rule: torch lays reset, update and new side by side for a GRU, and input, forget, cell and output for an LSTM. Only a whole that is called
as torch's is has that order; names must say of each part which gate it is, and whether it reads the input or what is hidden.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cache

from ckptsurgeon.matching.module_tree import Node

_SIDES = {"ih": ("i", "x", "ih", "in", "input", "w"), "hh": ("h", "hh", "hidden", "u")}
_SIDE = {word: side for side, words in _SIDES.items() for word in words}
_SILENT = {"w", "b", "weight", "bias", "lin", "linear", "fc", "gate"}  # beside a side and a gate
_NEW, _CELL = ("n", "new", "h", "c", "cand", "candidate", "hat"), ("g", "c", "cell", "cand", "candidate")
# The words of each gate, in torch's order.
_CELLS = (
    (("r", "reset"), ("z", "update"), _NEW),
    (("i", "in", "input"), ("f", "forget"), _CELL, ("o", "out", "output")),
)
_GATES = {word for cell in _CELLS for words in cell for word in words}
_TORCHS = re.compile(r"(ih|hh)(_l\d+)?(_reverse)?")
_TOKEN = re.compile(r"[a-z]+")
_PAIR = re.compile(r"([ixh])([rzniofgc])")


def recurrent_rows(units: Sequence[Node]) -> Iterator[tuple[Node, ...]]:
    """Units of one module that are the gates of one cell, for the input or for what is hidden, in torch's order."""
    read = [(unit, said) for unit in units for said in (_said(unit.path.rpartition(".")[2]),) if said]
    for side in _SIDES:
        by_gate: dict[str, list[Node]] = {}
        for unit, (own_side, gate) in read:
            if own_side == side:
                by_gate.setdefault(gate, []).append(unit)
        for cell in _CELLS:
            row = [unit for words in cell for word in words for unit in by_gate.get(word, ())]
            if len(row) == len(cell) == sum(map(len, by_gate.values())) and len({unit.main for unit in row}) == 1:
                yield tuple(row)


def side_of(row: Sequence[Node]) -> str:
    """Which of torch's two weights a row of gates is part of, `ih` or `hh`; empty where it is no such row."""
    said = {_said(unit.path.rpartition(".")[2]) for unit in row}
    sides = {one[0] if one else "" for one in said}
    return sides.pop() if len(sides) == 1 and len(said) == len(row) else ""


def same_gate(first: Node, second: Node) -> bool | None:
    """Whether two units are the same gate for the same side of a cell; None where a name does not say one."""
    one, other = (_said(unit.path.rpartition(".")[2]) for unit in (first, second))
    if one is None or other is None:
        return None
    return one[0] == other[0] and any(one[1] in words and other[1] in words for cell in _CELLS for words in cell)


def torchs_side(whole: Node) -> str:
    """Which of torch's two a unit is by its name, `ih` or `hh`; empty where it is none, or another library's, whose order is its own."""
    torchs = _TORCHS.fullmatch(whole.path.rpartition(".")[2])
    return torchs[1] if torchs and set(whole.tensors) <= {"weight", "bias"} else ""


@cache
def _said(name: str) -> tuple[str, str] | None:
    """The side and the gate that a name says: `W_ir`, `x2z`, `reset_x`, `U_f`.

    >>> _said("W_ir"), _said("reset_x"), _said("U_f"), _said("conv")
    (('ih', 'r'), ('ih', 'reset'), ('hh', 'f'), None)
    """
    parts: list[str] = []
    for word in _TOKEN.findall(name.lower()):
        pair = _PAIR.fullmatch(word)
        parts += pair.groups() if pair else [word]
    if len(parts) > 2:
        parts = [word for word in parts if word not in _SILENT]
    if len(parts) != 2:
        return None
    gate_first = parts[0] in _GATES and len(parts[0]) > 2 and len(parts[1]) == 1 and parts[1] in _SIDE
    side, gate = parts if parts[0] in _SIDE and parts[1] in _GATES and not gate_first else parts[::-1]
    return (_SIDE[side], gate) if side in _SIDE and gate in _GATES else None
