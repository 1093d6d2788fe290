"""Weights that one side holds with their dims in another order: `x @ w` for `linear`, a convolution's window before its channels.

Rule: a side is looked at turned as a whole, where enough of its weights fit in no other way; a square matrix, which fits both ways, is
turned as those of its kind are. JAX has the heads of an attention as a dim of their own, which is looked at as one with the next.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import NamedTuple

from ckptsurgeon.matching.evidence.vocabulary import concepts
from ckptsurgeon.matching.module_tree import MEMBER, around, fold, module_of
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
# Layers that go from a model's width and back to it, by words that say so, each set by itself.
_FROM = ({"q"}, {"k"}, {"v"}, {"qkv"}, {"kv"}, {"up"}, {"gate"}, {"first"}, {"wi"}, {"linear", "#1"})
_BACK = ({"out"}, {"down"}, {"linear", "#2"})
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

    def undone(self, shape: Shape) -> str:
        """What makes a tensor of this shape of one that looks so."""
        sizes = [shape[dim] for dim in self.order]
        if self.one is not None:
            sizes[self.one] = -1
        back = [self.order.index(dim) for dim in range(len(self.order))]
        return " | ".join([f"reshape(shape={sizes})", *([] if back == sorted(back) else [f"permute({back})"])])


# How dims stand elsewhere, by their number: a matrix (and a bias of heads), a stack of matrices and projections to heads and from them, a
# window before its channels (in, out; or, where each channel has a window of its own, channels and one), or between them; and back.
_LOOKS = {
    2: (Look((1, 0)), Look((0, 1), 0)),
    3: (Look((2, 1, 0)), Look((1, 2, 0)), Look((0, 2, 1)), Look((1, 2, 0), 0), Look((2, 0, 1), 1)),
    4: (Look((3, 2, 0, 1)), Look((2, 3, 0, 1)), Look((0, 2, 3, 1)), Look((0, 3, 1, 2)), Look((2, 3, 1, 0)), Look((0, 1, 3, 2), 1)),
    5: (Look((4, 3, 0, 1, 2)), Look((0, 2, 3, 4, 1)), Look((0, 4, 1, 2, 3)), Look((2, 3, 4, 1, 0))),
}
# The target's projections to heads and from them, and the biases of these, as the matrices and vectors that they are elsewhere.
_HEADS = {2: (Look((0, 1), 0),), 3: (Look((0, 1, 2), 1), Look((1, 0, 2), 1), Look((0, 1, 2), 0))}
_LINEAR_HEADS = Look((1, 2, 0), 0), Look((0, 2, 1), 0), Look((2, 0, 1), 1)
_MOST_PARTS = 3  # that a matrix is made of: queries, keys and values
_OF_HEADS = frozenset({"q", "k", "v"})


@dataclass(frozen=True)
class Turned:
    """Both sides' tensors as they are in the files, and how those look that are looked at otherwise.

    `told` says that biases or names tell so, and not shapes alone.
    """

    source: Tensors
    target: Tensors
    looks: Mapping[str, Look] = field(default_factory=dict)
    target_looks: Mapping[str, Look] = field(default_factory=dict)
    told: bool = False

    def chain(self, source: str, op: str, target: str) -> str:
        """The ops of a link, after the one that turns its sources, and before the one that makes the target of what it looks like."""
        look = self.target_looks.get(target)
        return " | ".join(filter(None, (self.op(source), op, look.undone(self.target[target].shape) if look else "")))

    def op(self, name: str) -> str:
        """What turns a tensor, as an adapt rule writes it; "" for one that is looked at as it is."""
        return self.looks[name].op(self.source[name].shape) if name in self.looks else ""


def seen(side: Tensors, looks: Mapping[str, Look]) -> dict[str, TensorMeta]:
    """The tensors of a side as they are looked at."""
    return {key: replace(tensor, shape=looks[key].shape(tensor.shape)) if key in looks else tensor for key, tensor in side.items()}


def turned(source: Tensors, target: Tensors) -> Turned:
    """Both sides' weights turned: the source's as `_turned` says, and the target's projections to heads as matrices of that kind."""
    outputs = _outputs(source)
    across = {*map(tuple, (outputs, _outputs(target)))} == {(0,), (1,)}
    plain = _turned(source, target, across)
    are_turned = any(look.order == (1, 0) for look in plain.values())
    heads = _with_heads(source, target, outputs == {0} and not are_turned) if len(outputs) == 1 else {}
    looks = _turned(source, seen(target, heads), across=True) if heads and are_turned else plain
    return Turned(source, target, looks, heads, across)


def _with_heads(source: Tensors, target: Tensors, linear: bool) -> dict[str, Look]:
    """How projections of the target look, and their biases, that have the heads of an attention as a dim of their own.

    They are `x @ w`; where the source's matrices are seen `linear`, so are they.
    """
    shapes = {shape for tensor in source.values() for shape in (tensor.shape, tensor.shape[::-1])}
    whole = shapes | {(shape[0], shape[1] // parts) for shape in shapes if len(shape) == 2 for parts in range(2, _MOST_PARTS + 1)}
    vectors = {(shape[0] // parts,) for shape in shapes if len(shape) == 1 for parts in range(1, _MOST_PARTS + 1)}
    looks: dict[str, Look] = {}
    for key, tensor in target.items():
        many = len(tensor.shape)
        if many not in _HEADS or tensor.shape in shapes or key.endswith("bias") != (many == 2):
            continue
        ways = _LINEAR_HEADS if linear and many > 2 else _HEADS[many]
        if look := next((look for look in ways if look.shape(tensor.shape) in (whole if many > 2 else vectors)), None):
            looks[key] = look
    attentions = {module_of(module_of(key)) for key in looks if {*concepts(module_of(key).rpartition(".")[2])} & _OF_HEADS}
    return {key: look for key, look in looks.items() if module_of(module_of(key)) in attentions}


def _turned(source: Tensors, target: Tensors, across: bool) -> dict[str, Look]:
    """The source's weights turned, those of one kind (matrices, windows) where more fit only so than only as they are; else as they are.

    What fits in two ways is turned as what fits in one of them alone. `across` says that outputs are along the other dim in all matrices.
    """
    kernels = any(map(_kernel, source)) != any(map(_kernel, target))  # JAX's and TensorFlow's word: `x @ kernel`
    biased = {(tensor.shape, _bias(key, target)) for key, tensor in target.items()}
    ways = [_fitting(look, many, source, biased, (across, kernels)) for many, every in _LOOKS.items() for look in every]
    looks: dict[str, Look] = {}
    for _, found in sorted(ways, key=lambda way: sum(way[0] < only for only, _ in ways)):
        looks = found | looks
    return looks


def _fitting(
    look: Look, many: int, source: Tensors, biased: Set[tuple[Shape, int]], told: tuple[bool, bool]
) -> tuple[Set[str], dict[str, Look]]:
    """Which weights of so many dims fit the target looked at so, and not as they are; and how all of these look that fit so.

    `biased` has the target's shapes, each with the number of outputs that its bias has.
    """
    shapes = {shape for shape, _ in biased}
    of_biases = many == 2 and look.one is not None
    weights = {
        key: tensor.shape
        for key, tensor in source.items()
        if len(tensor.shape) == many
        and not (many == 2 and _table(key))
        and (key.endswith("bias") or not of_biases)
        and (look.one is None or tensor.shape not in shapes)
    }
    if any(map(_kernel, weights)):
        weights = {key: shape for key, shape in weights.items() if _kernel(key)}
    fits = {
        key: _fits(look.shape(shape), _bias(key, source), biased) or (shape[0] == 1 and _fused(look.shape(shape), shapes))
        for key, shape in weights.items()
    }
    only = [key for key, shape in weights.items() if shape not in shapes and fits[key]]
    never = sum(shape in shapes and not fits[key] for key, shape in weights.items())
    oblong = [key for key, shape in weights.items() if fits[key] and shape[0] != shape[-1]]
    if look.order == (1, 0) and len(oblong) == 1 < len(weights) and not _bias(oblong[0], source):
        names = Counter(module_of(key).rpartition(".")[2] for key in weights)
        only = only if names[module_of(oblong[0]).rpartition(".")[2]] > 1 else []
    across, kernels = told
    if across and look.order == (1, 0):
        return {*only}, {key: look for key, shape in weights.items() if fits[key] or shape not in shapes}
    if ((kernels or across) and not never) or (len(only) > never and len(only) >= _LEAST * len(weights)):
        return {*only}, {key: look for key in weights if fits[key]}
    return frozenset(), {}


def _bias(key: str, side: Tensors) -> int:
    """How many outputs a weight's bias has; 0 for one without."""
    bias = side.get(f"{module_of(key)}.bias")
    return 0 if bias is None else bias.numel


def _fits(shape: Shape, bias: int, biased: Set[tuple[Shape, int]]) -> bool:
    """Whether a layer of the target has a weight of this shape, and as many outputs where both have a bias."""
    return (shape, bias) in biased or (shape, 0) in biased or (not bias and any(shape == other for other, _ in biased))


def _fused(shape: Shape, parts: Set[Shape]) -> bool:
    """Whether a matrix of this shape is queries, keys and values of these."""
    return len(shape) == 2 and shape[0] % _MOST_PARTS == 0 and (shape[0] // _MOST_PARTS, shape[1]) in parts


def _outputs(side: Tensors) -> set[int]:
    """The dim that outputs are along, of matrices that are not square: they have a bias of its size, or the name of a layer that goes from
    the width of the norms, or back to it; both for a side of both kinds."""
    norms = Counter(tensor.shape for key, tensor in side.items() if len(tensor.shape) == 1 and "norm" in concepts(module_of(key)))
    width = norms.most_common(1)[0][0][0] if norms else 0
    found: set[int] = set()
    from_0 = {module_of(module_of(key)) for key in side if {"linear", "#0"} <= {*concepts(module_of(key).rpartition(".")[2])}}
    for key, tensor in side.items():
        if len(tensor.shape) != 2 or len({*tensor.shape}) == 1 or key.endswith("bias") or _table(key):
            continue
        bias = side.get(f"{module_of(key)}.bias")
        if bias is not None and len(bias.shape) == 1 and bias.shape[0] in tensor.shape:
            found.add(tensor.shape.index(bias.shape[0]))
        elif width in tensor.shape:
            words = {*concepts(module_of(key).rpartition(".")[2])}
            words -= {"linear"} if module_of(module_of(key)) in from_0 else set()  # `linear_1` is the second
            back = any(way <= words for way in _BACK)
            if back or any(way <= words for way in _FROM):
                found.add(tensor.shape.index(width) if back else 1 - tensor.shape.index(width))
    return found


def _kernel(key: str) -> bool:
    return key.endswith("kernel")


def _table(key: str) -> bool:
    """Whether a matrix is a table by its name, which is looked up in and never turned."""
    near = ".".join(key.split(".")[-3:])  # a model may be called after tokens
    return bool(set(concepts(near)) & {"embed", "tok", "pos"}) or module_of(key) == "shared"


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
