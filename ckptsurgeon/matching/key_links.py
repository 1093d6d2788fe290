"""From units that go together to keys that do, with what has to be done to their tensors. Knows shapes and roles, and chooses nothing new.

Rule: a tensor goes to the one of its role. A square matrix is turned only where its model's other matrices are, and none whose layer has
other outputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ckptsurgeon.matching.module_tree import Node, Shape, is_float, squeezed
from ckptsurgeon.matching.pairing import Laid
from ckptsurgeon.matching.turning import TURN
from ckptsurgeon.planning.links import Link
from ckptsurgeon.tensors import TensorMeta


def links(laid: Laid) -> Iterator[Link]:
    """The links of the tensors in units that go together."""

    def link(sources: Sequence[str], targets: Sequence[str], op: str) -> Link:
        rival = f"{laid.runner_up[0].path} -> {laid.runner_up[1].path}" if laid.runner_up else ""
        return Link(tuple(sources), tuple(targets), op, laid.margin, laid.evidence, rival)

    if len(laid.sources) == len(laid.targets) == 1:
        for source, target in _roles(laid.sources[0], laid.targets[0]):
            op = _one_to_one(source, target)
            if op == TURN and _other_outputs(laid.sources[0], laid.targets[0]):
                continue
            if op is not None:
                yield link([source.name], [target.name], op)
        return
    whole, parts, joins = (laid.targets[0], laid.sources, True) if len(laid.targets) == 1 else (laid.sources[0], laid.targets, False)
    for tensor, pieces in _fused_roles(whole, parts):
        op = _join(tensor.shape, [piece.shape for piece in pieces], joins)
        if op is None:
            continue
        names = [piece.name for piece in pieces]
        sources, targets = (names, [tensor.name]) if joins else ([tensor.name], names)
        yield link(sources, targets, op)


def _roles(source_unit: Node, target_unit: Node) -> Iterator[tuple[TensorMeta, TensorMeta]]:
    """The tensors of two units that have the same role; those left over, where only one of each has its shape."""
    for role, tensor in source_unit.tensors.items():
        same = target_unit.tensors.get(role)
        if same and (is_float(tensor) == is_float(same) or role == "num_batches_tracked"):
            yield tensor, same
    source_rest = [tensor for role, tensor in source_unit.tensors.items() if role not in target_unit.tensors and is_float(tensor)]
    target_rest = [tensor for role, tensor in target_unit.tensors.items() if role not in source_unit.tensors and is_float(tensor)]
    for tensor in source_rest:
        fits = [target for target in target_rest if target.numel == tensor.numel]
        if len(fits) == 1 and sum(rival.numel == tensor.numel for rival in source_rest) == 1:
            yield tensor, fits[0]


def _other_outputs(source_unit: Node, target_unit: Node) -> bool:
    """Whether two layers have biases of another size: a layer of other sizes, and not the same one turned."""
    biases = [unit.tensors.get("bias") for unit in (source_unit, target_unit)]
    return len({bias.numel for bias in biases if bias}) > 1


def _one_to_one(source: TensorMeta, target: TensorMeta) -> str | None:
    """What makes a tensor the other; None where nothing does."""
    shape = source.shape
    if shape == target.shape:
        return ""
    if squeezed(shape) == squeezed(target.shape):
        return "reshape"
    if len(shape) == 2 and shape == target.shape[::-1]:
        return TURN
    windows = len(shape) == len(target.shape) > 3  # two convolutions whose windows differ are not one flattened
    return "reshape" if source.numel == target.numel and shape[:1] == target.shape[:1] and not windows else None


def _fused_roles(whole: Node, parts: Sequence[Node]) -> Iterator[tuple[TensorMeta, list[TensorMeta]]]:
    """Each tensor of a whole with the tensors that are its parts; a bare parameter is made of the largest of each."""
    for role, tensor in whole.tensors.items():
        if all(role in part.tensors for part in parts):
            yield tensor, [part.tensors[role] for part in parts]
        elif len(whole.tensors) == 1:
            yield tensor, [part.largest for part in parts]


def _join(whole: Shape, parts: Sequence[Shape], joins: bool) -> str | None:
    """The op that makes one of several (`joins`), or several of one. Dims of one, as a convolution over one place has, come and go."""
    if len({len(whole), *map(len, parts)}) == 1:
        return _joined(whole, parts, joins)
    flat_whole, flat_parts = squeezed(whole), list(map(squeezed, parts))
    sources, flat = (parts, flat_parts) if joins else ([whole], [flat_whole])
    op = _joined(flat_whole, flat_parts, joins)
    if op is None or len(squeezed(flat_whole)) < 2 or len({*flat}) > 1:
        return None
    before = f"reshape(shape={list(flat[0])})" if list(sources) != flat else ""
    return " | ".join(filter(None, (before, op, "reshape" if [*parts, whole] != [*flat_parts, flat_whole] and not before else "")))


def _joined(whole: Shape, parts: Sequence[Shape], joins: bool) -> str | None:
    """The same, where all have as many dims."""
    for turn, shapes in (("", parts), (TURN, [shape[::-1] for shape in parts])):
        dims = [
            dim
            for dim in range(len(whole))
            if all(len(shape) == len(whole) and (*shape[:dim], *shape[dim + 1 :]) == (*whole[:dim], *whole[dim + 1 :]) for shape in shapes)
            and sum(shape[dim] for shape in shapes) == whole[dim]
        ]
        if dims:
            return _chain(turn, f"concat(dim={dims[0]})" if joins else f"chunk(dim={dims[0]})", joins)
        if all((len(shapes), *shape) == whole for shape in shapes):
            return _chain(turn, "stack(dim=0)" if joins else "unstack(dim=0)", joins)
        for dim in range(1, len(whole)):
            pair = (*whole[1:dim], whole[dim] // 2, *whole[dim + 1 :])
            if len(shapes) == 2 * whole[0] and all(shape == pair for shape in shapes):
                both = f"concat(dim={dim - 1}, of=2) | stack(dim=0)" if joins else f"unstack(dim=0) | chunk(dim={dim - 1})"
                return _chain(turn, both, joins)
    return None


def _chain(turn: str, op: str, joins: bool) -> str:
    return " | ".join(part for part in ((turn, op) if joins else (op, turn)) if part)
