"""Pairs of units that their neighbours settle: those between certain pairs, and norms that stray from their convolution."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from ckptsurgeon.matching.module_tree import Node, module_of
from ckptsurgeon.matching.pairing import Laid
from ckptsurgeon.planning.links import ENOUGH, Link
from ckptsurgeon.tensors import TensorMeta


def between(units: Sequence[Laid], source: Node, target: Node, trust: float) -> list[Laid]:
    """Doubtful pairs between neighbours that are certain pairs are doubtful no more, where the order of keys can be trusted."""
    if trust < 0.5:
        return list(units)
    placed = {id(laid.sources[0]): laid.targets[0] for laid in units if _single(laid) and laid.margin >= ENOUGH}
    beside = tuple({id(unit): (before, after) for before, unit, after in _triples(node)} for node in (source, target))
    decided = []
    for laid in units:
        if _single(laid) and 0 < laid.margin < ENOUGH:
            here, there = beside[0][id(laid.sources[0])], beside[1][id(laid.targets[0])]
            if all(
                source_neighbour is target_neighbour is None
                or (source_neighbour and target_neighbour and placed.get(id(source_neighbour)) is target_neighbour)
                for source_neighbour, target_neighbour in zip(here, there, strict=True)
            ):
                laid = replace(laid, margin=ENOUGH, evidence=(*laid.evidence, "between the same neighbours"))
        decided.append(laid)
    return decided


def strayed(units: Sequence[Laid], behind: Mapping[int, Node]) -> list[Laid]:
    """The pairs, those of two norms in doubt whose convolutions (`behind`, by the norm's id) are certain to be other layers'."""
    certain = [laid for laid in units if _single(laid) and laid.margin >= ENOUGH]
    partners = {
        id(node): id(other)
        for laid in certain
        for node, other in zip((*laid.sources, *laid.targets), (*laid.targets, *laid.sources), strict=True)
    }

    def elsewhere(laid: Laid) -> bool:
        before = behind.get(id(laid.sources[0])), behind.get(id(laid.targets[0]))
        return all(before) and any(partners.get(id(node), id(other)) != id(other) for node, other in (before, before[::-1]))

    return [
        replace(laid, margin=min(laid.margin, 0.0), evidence=(*laid.evidence, "the convolution before it goes elsewhere"))
        if _single(laid) and elsewhere(laid)
        else laid
        for laid in units
    ]


def counted(links: Sequence[Link], source: Mapping[str, TensorMeta]) -> list[Link]:
    """The links, where a norm's count of batches goes where its running statistics do: it has no shape of its own."""
    homes = {
        module_of(link.targets[0]): link
        for link in links
        if len(link.sources) == len(link.targets) == 1 and link.targets[0].endswith(".running_var")
    }

    def followed(link: Link) -> Link:
        norm = homes.get(module_of(link.targets[0])) if link.targets[0].endswith(".num_batches_tracked") else None
        key = f"{module_of(norm.sources[0])}.num_batches_tracked" if norm else ""
        if norm is None or key not in source or link.sources == (key,):
            return link
        return replace(link, sources=(key,), margin=norm.margin, evidence=("of the same norm",), runner_up="")

    return [followed(link) for link in links]


def _single(laid: Laid) -> bool:
    return len(laid.sources) == len(laid.targets) == 1


def _triples(node: Node) -> Iterator[tuple[Node | None, Node, Node | None]]:
    units = sorted((unit for unit in node.units()), key=lambda unit: unit.at)
    return zip([None, *units[:-1]], units, [*units[1:], None], strict=True)
