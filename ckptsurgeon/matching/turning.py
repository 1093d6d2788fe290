"""Weights that one side holds with their dims in another order: `x @ w` for `linear`, a convolution's window before its channels.

Rule: a side is looked at turned as a whole, where enough of its weights fit in no other way; a square matrix, which fits both ways, is
turned as those of its kind are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from ckptsurgeon.matching.evidence.vocabulary import concepts
from ckptsurgeon.matching.module_tree import fold
from ckptsurgeon.planning.links import Link
from ckptsurgeon.tensors import TensorMeta

Tensors = Mapping[str, TensorMeta]
Shape = tuple[int, ...]
TURN = "transpose"  # what turns a matrix, as an adapt rule writes it
TURNED = "turned, as those of its kind that are not square"
AS_IT_IS = "as it is, like those of its name that are not square"
_LEAST = 0.1  # of the weights that may be turned, that must fit turned only
# How a window's dims stand before its channels (in, out) elsewhere, by the number of dims.
_WINDOWS = {3: (2, 1, 0), 4: (3, 2, 0, 1), 5: (4, 3, 0, 1, 2)}


@dataclass(frozen=True)
class Turned:
    """The source's tensors as they are in the file, and what turns those of them that are looked at turned."""

    source: Tensors
    ops: Mapping[str, str] = field(default_factory=dict)

    def chain(self, name: str, *ops: str) -> str:
        """The ops of a link, after the one that turns its sources."""
        return " | ".join(op for op in (self.ops.get(name, ""), *ops) if op)

    def seen(self, tensor: TensorMeta) -> TensorMeta:
        """A tensor as it is looked at."""
        if tensor.name not in self.ops:
            return tensor
        return replace(tensor, shape=tuple(tensor.shape[dim] for dim in _dims(tensor.shape)))


def _dims(shape: Shape) -> tuple[int, ...]:
    return _WINDOWS.get(len(shape), tuple(range(len(shape)))[::-1])


def _op(shape: Shape) -> str:
    return TURN if len(shape) == 2 else f"permute({list(_dims(shape))})"


def turned(source: Tensors, target: Tensors) -> Turned:
    """The source's weights turned, those of one kind (matrices, windows) where more fit only so than only as they are; else as they are."""
    shapes = {tensor.shape for tensor in target.values()}
    kernels = any(map(_kernel, source)) != any(map(_kernel, target))  # JAX's and TensorFlow's word: `x @ kernel`
    ops: dict[str, str] = {}
    for many in (2, *_WINDOWS):
        weights = {key: tensor.shape for key, tensor in source.items() if len(tensor.shape) == many and not (many == 2 and _table(key))}
        turned_shapes = {key: tuple(shape[dim] for dim in _dims(shape)) for key, shape in weights.items()}
        if any(map(_kernel, weights)):
            weights = {key: shape for key, shape in weights.items() if _kernel(key)}
        only = sum(shape not in shapes and turned_shapes[key] in shapes for key, shape in weights.items())
        never = sum(shape in shapes and turned_shapes[key] not in shapes for key, shape in weights.items())
        if (kernels and not never) or (only > never and only >= _LEAST * len(weights)):
            ops |= {key: _op(shape) for key, shape in weights.items() if turned_shapes[key] in shapes}
    return Turned(source, ops)


def _kernel(key: str) -> bool:
    return key.endswith("kernel")


def _table(key: str) -> bool:
    """Whether a matrix is a table by its name, which is looked up in and never turned."""
    return bool(set(concepts(key)) & {"embed", "tok", "pos"})


def squares_turned(links: Sequence[Link], source: Tensors, target: Tensors) -> list[Link]:
    """The links, where a square matrix is turned as those of its name are that are not square, or is not.

    A bare square parameter that is a layer's weight elsewhere is turned also as other such parameters are, whatever their names.
    """
    shapes = {id(link): source[link.sources[0]].shape for link in links if _of_matrices(link, source, target)}
    oblong = [link for link in links if id(link) in shapes and len({*shapes[id(link)]}) > 1]
    by_kind: dict[tuple[str, str], set[str]] = {}
    for link in oblong:
        by_kind.setdefault(_kind(link), set()).add(link.op)
    of_bare = {link.op for link in oblong if _bare(link)}
    told = {_kind(link) for link in oblong if link.clear}

    def settled(link: Link) -> Link:
        if id(link) not in shapes or len({*shapes[id(link)]}) > 1 or link.op:
            return link
        ops = by_kind.get(_kind(link), set())
        if ops == {TURN} or (_bare(link) and of_bare == {TURN}):
            return replace(link, op=TURN, evidence=(*link.evidence, TURNED))
        as_it_is = ops == {""} and _kind(link) in told and (of_bare == {""} or not _bare(link))
        return replace(link, evidence=(*link.evidence, AS_IT_IS)) if as_it_is else link

    return [settled(link) for link in links]


def _kind(link: Link) -> tuple[str, str]:
    return fold(link.sources[0]), fold(link.targets[0])


def _of_matrices(link: Link, source: Tensors, target: Tensors) -> bool:
    """Whether a link is of one matrix, which may be turned."""
    return (
        len(link.sources) == len(link.targets) == 1
        and link.op in ("", TURN)
        and not _table(link.targets[0])
        and len(source[link.sources[0]].shape) == len(target[link.targets[0]].shape) == 2
    )


def _bare(link: Link) -> bool:
    """Whether a matrix is a parameter by itself on one side, and a layer's weight on the other."""
    return link.sources[0].endswith("weight") != link.targets[0].endswith("weight")
