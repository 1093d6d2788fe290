"""Weights that one side holds with their dims in another order: `x @ w` for `linear`, a convolution's window before its channels.

Rule: a side is looked at turned as a whole, where enough of its weights fit in no other way; a square matrix, which fits both ways, is
turned as those of its kind are. JAX has the heads of an attention as a dim of their own, which is looked at as one with the next.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ckptsurgeon.matching.evidence.vocabulary import concepts
from ckptsurgeon.matching.module_tree import MEMBER, around, fold
from ckptsurgeon.planning.links import Link
from ckptsurgeon.tensors import TensorMeta

Tensors = Mapping[str, TensorMeta]
Shape = tuple[int, ...]
TURN = "transpose"  # what turns a matrix, as an adapt rule writes it
TURNS = {2: TURN, 3: "permute([0, 2, 1])"}  # the same of one matrix and of a stack of them, by the number of dims
TURNED = "turned, as those of its kind that are not square"
AS_IT_IS = "as it is, like those of its name that are not square"
# Parts side by side along the other dim, turned: of square ones, both fit.
BESIDE = {"chunk(dim=1)": f"{TURN} | chunk(dim=0)", "concat(dim=1)": f"concat(dim=0) | {TURN}"}
_LEAST = 0.1  # of the weights that may be turned, that must fit turned only


class Look(NamedTuple):
    """In which order a tensor's dims are looked at, and which two of them, then, as one: the first of the two, if any."""

    order: tuple[int, ...]
    one: int | None = None

    def shape(self, shape: Shape) -> Shape:
        """How a tensor of this shape looks."""
        dims = [shape[dim] for dim in self.order]
        return tuple(dims if self.one is None else [*dims[: self.one], dims[self.one] * dims[self.one + 1], *dims[self.one + 2 :]])

    def op(self, shape: Shape) -> str:
        """What makes it so, as an adapt rule writes it."""
        rising = self.order == tuple(range(len(self.order)))
        turn = "" if rising else TURN if self.order == (1, 0) else f"permute({list(self.order)})"
        sizes = [-1 if at == self.one else size for at, size in enumerate(self.shape(shape))]
        return " | ".join(filter(None, (turn, "" if self.one is None else f"reshape(shape={sizes})")))


# How dims stand elsewhere, by their number: a matrix (and a bias of heads), a stack of matrices and projections to heads and from them, a
# window before its channels (in, out; or, where each channel has a window of its own, channels and one).
_LOOKS = {
    2: (Look((1, 0)), Look((0, 1), 0)),
    3: (Look((2, 1, 0)), Look((1, 2, 0)), Look((0, 2, 1)), Look((1, 2, 0), 0), Look((2, 0, 1), 1)),
    4: (Look((3, 2, 0, 1)), Look((2, 3, 0, 1))),
    5: (Look((4, 3, 0, 1, 2)),),
}


@dataclass(frozen=True)
class Turned:
    """The source's tensors as they are in the file, and how those look that are looked at otherwise."""

    source: Tensors
    looks: Mapping[str, Look] = field(default_factory=dict)

    def chain(self, name: str, *ops: str) -> str:
        """The ops of a link, after the one that turns its sources."""
        return " | ".join(op for op in (self.op(name), *ops) if op)

    def op(self, name: str) -> str:
        """What turns a tensor, as an adapt rule writes it; "" for one that is looked at as it is."""
        return self.looks[name].op(self.source[name].shape) if name in self.looks else ""

    def seen(self, tensor: TensorMeta) -> TensorMeta:
        """A tensor as it is looked at."""
        return replace(tensor, shape=self.looks[tensor.name].shape(tensor.shape)) if tensor.name in self.looks else tensor


def turned(source: Tensors, target: Tensors) -> Turned:
    """The source's weights turned, those of one kind (matrices, windows) where more fit only so than only as they are; else as they are."""
    shapes = {tensor.shape for tensor in target.values()}
    kernels = any(map(_kernel, source)) != any(map(_kernel, target))  # JAX's and TensorFlow's word: `x @ kernel`
    along = _along_biases(source), _along_biases(target)
    kernels = kernels or along in (({0}, {1}), ({1}, {0}))
    looks: dict[str, Look] = {}
    for many, look in ((many, look) for many, every in _LOOKS.items() for look in every):
        of_biases = many == 2 and look.one is not None
        weights = {
            key: tensor.shape
            for key, tensor in source.items()
            if len(tensor.shape) == many and not (many == 2 and _table(key)) and (key.endswith("bias") or not of_biases)
        }
        if any(map(_kernel, weights)):
            weights = {key: shape for key, shape in weights.items() if _kernel(key)}
        fits = {key: look.shape(shape) in shapes for key, shape in weights.items()}
        only = sum(shape not in shapes and fits[key] for key, shape in weights.items())
        never = sum(shape in shapes and not fits[key] for key, shape in weights.items())
        if (kernels and not never) or (only > never and only >= _LEAST * len(weights)):
            looks = {key: look for key in weights if fits[key]} | looks
    return Turned(source, looks)


def _along_biases(side: Tensors) -> set[int]:
    """The dim that has the size of the bias, of the matrices that have one and are not square; both for a side of both kinds."""
    found: set[int] = set()
    for key, tensor in side.items():
        bias = side.get(f"{key.removesuffix('weight')}bias") if key.endswith(".weight") and len(tensor.shape) == 2 else None
        if bias is not None and len(bias.shape) == 1 and len({*tensor.shape}) == 2 and bias.shape[0] in tensor.shape:
            found.add(tensor.shape.index(bias.shape[0]))
    return found


def _kernel(key: str) -> bool:
    return key.endswith("kernel")


def _table(key: str) -> bool:
    """Whether a matrix is a table by its name, which is looked up in and never turned."""
    return bool(set(concepts(key)) & {"embed", "tok", "pos"})


def squares_turned(links: Sequence[Link], source: Tensors, target: Tensors) -> list[Link]:
    """The links, where a square matrix is turned as those of its name are that are not square, or is not.

    A bare square parameter that is a layer's weight elsewhere is turned also as other such parameters are, whatever their names; one whose
    name no other has, and the square parts of a matrix, as all of its block are.
    """
    shapes = {id(link): source[link.sources[0]].shape[-2:] for link in links if _of_matrices(link, source, target)}
    oblong = [link for link in links if id(link) in shapes and len({*shapes[id(link)]}) > 1]
    by_kind: dict[tuple[str, str], set[str]] = {}
    by_block: dict[tuple[str, str], set[str]] = {}
    for link in oblong:
        by_kind.setdefault(_kind(link), set()).add(link.op)
        if all(_block(link)):
            by_block.setdefault(_block(link), set()).add(link.op)
    of_bare = {link.op for link in oblong if _bare(link)}
    told = {_kind(link) for link in oblong if link.clear}

    def settled(link: Link) -> Link:
        turn = TURNS.get(len(source[link.sources[0]].shape), "")
        if link.op in BESIDE and by_block.get(_block(link)) == {TURN} and squares(link, source, target):
            return replace(link, op=BESIDE[link.op], evidence=(*link.evidence, TURNED))
        if id(link) not in shapes or len({*shapes[id(link)]}) > 1 or link.op:
            return link
        ops = by_kind.get(_kind(link), by_block.get(_block(link), set()))
        if ops == {turn} or (_bare(link) and of_bare == {turn}):
            return replace(link, op=turn, evidence=(*link.evidence, TURNED))
        as_it_is = ops == {""} and _kind(link) in told and (of_bare == {""} or not _bare(link))
        return replace(link, evidence=(*link.evidence, AS_IT_IS)) if as_it_is else link

    return [settled(link) for link in links]


def _block(link: Link) -> tuple[str, str]:
    """The blocks of numbered lists that a link's keys stand in, whichever their numbers are."""
    return fold(around(link.sources[0], MEMBER)), fold(around(link.targets[0], MEMBER))


def squares(link: Link, source: Tensors, target: Tensors) -> bool:
    """Whether the parts that a matrix is cut into or made of are square."""
    parts = [source[key] for key in link.sources] if len(link.sources) > 1 else [target[key] for key in link.targets]
    return all(len(part.shape) == 2 and len({*part.shape}) == 1 for part in parts)


def _kind(link: Link) -> tuple[str, str]:
    return fold(link.sources[0]), fold(link.targets[0])


def _of_matrices(link: Link, source: Tensors, target: Tensors) -> bool:
    """Whether a link is of one matrix, or of one stack of them, which may be turned."""
    return (
        len(link.sources) == len(link.targets) == 1
        and link.op in ("", TURNS.get(len(source[link.sources[0]].shape)))
        and not _table(link.targets[0])
        and len(source[link.sources[0]].shape) == len(target[link.targets[0]].shape) in TURNS
    )


def _bare(link: Link) -> bool:
    """Whether a matrix is a parameter by itself on one side, and a layer's weight on the other."""
    return link.sources[0].endswith("weight") != link.targets[0].endswith("weight")
