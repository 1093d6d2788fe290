"""Numbered lists of single layers into which one side puts layers that the other has not: a norm behind each convolution.

Rule: a layer moves as a whole. Equal names lose where more layers of a list fit otherwise: its layers go in their order to
those that hold the same, if that is so in one way, which leaves no more than an end over; otherwise what would be torn is left open.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from ckptsurgeon.matching.align import in_order, only_way
from ckptsurgeon.planning.links import Link
from ckptsurgeon.tensors import TensorMeta

Tensors = Mapping[str, TensorMeta]
Layer = dict[str, tuple[int, ...]]  # shapes by the names of tensors
_PART = re.compile(r"(.*\.)?(\d{1,9})\.([^.]+)")
_MOST = 256  # layers of a list
_NONE: Layer = {}


def counted_anew(
    source: Tensors, target: Tensors, same: Mapping[str, str], bare: Mapping[str, str]
) -> tuple[dict[str, str], dict[str, str]]:
    """`same` without what tears layers, and what goes elsewhere in its list instead: target names by source keys."""
    kept, moved = dict(same), {}
    keys = {name: key for key, name in bare.items()}
    lists = _lists({name: source[key] for name, key in keys.items()}), _lists(target)
    for head in lists[0].keys() & lists[1].keys():
        here, there = (side[head] for side in lists)
        way = _way(here, there)
        lost = {*way, *way.values()} if way else {at for at in here.keys() & there.keys() if _torn(at, here, there)}
        for number, layer in here.items():
            for part in layer:
                key = keys[f"{head}{number}.{part}"]
                if number in lost and way.get(number) != number:
                    kept.pop(key, None)
                if way.get(number, number) != number and f"{head}{way[number]}.{part}" in target:
                    moved[key] = f"{head}{way[number]}.{part}"
    return kept, moved


def _lists(side: Tensors) -> dict[str, dict[int, Layer]]:
    """The layers of lists, by the list's head and the number."""
    found: dict[str, dict[int, Layer]] = {}
    for name, tensor in side.items():
        if part := _PART.fullmatch(name):
            found.setdefault(part[1] or "", {}).setdefault(int(part[2]), {})[part[3]] = tensor.shape
    return found


def _alike(layer: Layer, other: Layer) -> float:
    """1 for layers that hold the same, less where one of them has a bias more, else 0."""
    differ = layer.items() ^ other.items()
    return 0.0 if not layer or len(differ) > 1 or {name for name, _ in differ} - {"bias"} else 0.75 if differ else 1.0


def _way(here: Mapping[int, Layer], there: Mapping[int, Layer]) -> dict[int, int]:
    """The one way in which layers go to those that hold the same, in their order, where it gains more than it leaves over and that stands
    at an end."""
    rows, columns = sorted(here), sorted(there)
    if rows == columns or max(len(rows), len(columns)) > _MOST:
        return {}
    table = [[_alike(here[row], there[column]) for column in columns] for row in rows]
    pairs = in_order(table)
    ends = ({at for at, _ in pairs}, len(rows)), ({at for _, at in pairs}, len(columns))
    whole = any({*range(1, count - 1)} <= placed for placed, count in ends)
    gain = len(pairs) - sum(bool(_alike(here[at], there.get(at, _NONE))) for at in here)
    whole = whole and gain > min(len(rows), len(columns)) - len(pairs)
    return {rows[row]: columns[column] for row, column in pairs} if whole and only_way(table, pairs) else {}


def _torn(at: int, here: Mapping[int, Layer], there: Mapping[int, Layer]) -> bool:
    """Whether two layers of one number have one tensor in the same shape and one in another, and one is a norm or others' equal."""
    layer, other = here[at], there[at]
    flat = [max(map(len, side.values())) < 2 for side in (layer, other)]
    torn = len({layer[name] == other[name] for name in layer.keys() & other.keys()}) > 1
    return torn and (flat[0] != flat[1] or layer in there.values() or other in here.values())


def torn_biases(links: Iterable[Link], source: Tensors) -> Iterator[Link]:
    """The biases that part from the weight beside them, among single layers of lists."""
    pairs: dict[str, list[tuple[str, str, Link]]] = {"weight": [], "bias": []}
    for link in links:
        if link.clear and len(link.sources) == len(link.targets) == 1:
            (here, part), (there, other) = ((key.rpartition(".")[::2]) for key in (*link.sources, *link.targets))
            if part == other and part in pairs and here[here.rfind(".") + 1 :].isdecimal() and there[there.rfind(".") + 1 :].isdecimal():
                pairs[part].append((here, there, link))
    goes: dict[tuple[int, str], set[str]] = {}
    for here, there, _ in pairs["weight"]:
        goes.setdefault((0, here), set()).add(there)
        goes.setdefault((1, there), set()).add(here)
    for here, there, link in pairs["bias"]:
        if f"{here}.weight" in source and not (there in goes.get((0, here), {there}) and here in goes.get((1, there), {here})):
            yield link
