"""What is decided once both trees are laid on each other: doubts that neighbours settle, tensors that several targets share, tensors that
stand apart from their module on one side."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from math import inf

from ckptsurgeon.surgery.matching.align import Laid, Left, Record
from ckptsurgeon.surgery.matching.forest import Node, is_float, squeezed
from ckptsurgeon.surgery.matching.result import Link
from ckptsurgeon.surgery.matching.ties import ENOUGH
from ckptsurgeon.surgery.matching.words import concepts
from ckptsurgeon.tensors import TensorMeta

# An output layer is often the embedding itself: what the two are called.
_EMBEDS, _HEADS = {"embed", "tok", "shared"}, {"head", "embed", "out", "tok", "shared", "decoder", "lm", "proj"}


def between(units: Sequence[Laid], source: Node, target: Node, trust: float) -> list[Laid]:
    """Doubtful pairs between neighbours that are certain pairs are doubtful no more, where the order of keys can be trusted."""
    if trust < 0.5:
        return list(units)
    placed = {id(laid.sources[0]): laid.targets[0] for laid in units if _single(laid) and laid.margin >= ENOUGH}
    beside = tuple({id(unit): (before, after) for before, unit, after in _triples(node)} for node in (source, target))
    found = []
    for laid in units:
        if _single(laid) and 0 < laid.margin < ENOUGH:
            here, there = beside[0][id(laid.sources[0])], beside[1][id(laid.targets[0])]
            if all(
                one is other is None or (one and other and placed.get(id(one)) is other) for one, other in zip(here, there, strict=True)
            ):
                laid = replace(laid, margin=ENOUGH, evidence=(*laid.evidence, "between the same neighbours"))
        found.append(laid)
    return found


def _single(laid: Laid) -> bool:
    return len(laid.sources) == len(laid.targets) == 1


def _triples(node: Node) -> Iterator[tuple[Node | None, Node, Node | None]]:
    units = sorted((unit for unit in node.units()), key=lambda unit: unit.at)
    return zip([None, *units[:-1]], units, [*units[1:], None], strict=True)


def shared(record: Record, left: Left, source: Node) -> list[Laid]:
    """Targets without a source of their own, whose shape the source has once: an embedding that is the output layer too, and the like."""
    owners: dict[int, Laid] = {}
    for laid in record.units:
        if _single(laid):
            owners.setdefault(laid.targets[0].form, laid)
    count = Counter(unit.form for unit in source.units())
    lost = {id(unit) for node in record.lost for unit in node.units()}
    found = []
    for node in left.targets:
        owner = owners.get(node.form)
        if id(node) in lost or owner is None or len(node.main) < 2 or count[node.form] != 1:
            continue
        told, other = set(concepts(node.path)), set(concepts(owner.targets[0].path))
        tied = bool(_EMBEDS & other and _HEADS & told)
        same_name = node.path.rpartition(".")[2] == owner.targets[0].path.rpartition(".")[2]
        margin = min(owner.margin, inf if tied or same_name else 0.5)
        found.append(Laid(owner.sources, (node,), margin, (f"the same tensor as {owner.targets[0].path}",)))
    return found


def orphans(found: Sequence[Link], record: Record, source: Mapping[str, TensorMeta], target: Mapping[str, TensorMeta]) -> list[Link]:
    """Tensors that stand apart from their module on the other side (a fused layer's separate biases), and buffers, by names and places."""
    used, reached = {key for link in found for key in link.sources}, {key for link in found for key in link.targets}
    places = [(laid.sources[0].path, laid.targets[0].path) for laid in record.modules if laid.margin >= ENOUGH]
    places.sort(key=lambda pair: -len(pair[0]))
    free = [tensor for key, tensor in source.items() if key not in used]
    wanted = [tensor for key, tensor in target.items() if key not in reached]
    links: list[Link] = []
    for one, other in places:
        here, there = _below(free, one), _below(wanted, other)
        for tensor in there:
            fits = [item for item in here if _fits(item, tensor, one, other)]
            rivals = [item for item in there if fits and _fits(fits[0], item, one, other)]
            if len(fits) == len(rivals) == 1:
                links.append(Link((fits[0].name,), (tensor.name,), "", ENOUGH, ("named so in modules that go together",)))
                free.remove(fits[0])
                wanted.remove(tensor)
                here.remove(fits[0])
    return links


def _below(tensors: Sequence[TensorMeta], path: str) -> list[TensorMeta]:
    return [tensor for tensor in tensors if not path or tensor.name.startswith(f"{path}.")]


def _fits(one: TensorMeta, other: TensorMeta, here: str, there: str) -> bool:
    """Whether two tensors of equal shape have the same role and, below their modules, share a word that is not common."""
    if one.shape != other.shape or is_float(one) != is_float(other) or not squeezed(one.shape):
        return False
    told, wanted = (concepts(tensor.name[len(path) :].lstrip(".")) for tensor, path in ((one, here), (other, there)))
    return bool(told and wanted) and (told == wanted or (told[-1] == wanted[-1] and set(told) <= {*wanted, "attn", "self"}))
