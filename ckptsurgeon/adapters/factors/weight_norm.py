"""`weight_norm` makes a weight of its length g and its direction v, as torch does, or both of a weight: w = g · v / ‖v‖, a norm for each
index of one dim.

>>> import torch
>>> g, v = torch.tensor([[10.0]]), torch.tensor([[3.0, 4.0]])
>>> ADAPTER.kernel({"dim": 0}, [g, v], None)[0].tolist()
[[6.0, 8.0]]
>>> ADAPTER.kernel({"dim": 0, "part": "g"}, [torch.tensor([[6.0, 8.0]])], None)[0].tolist()
[[10.0]]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

from ckptsurgeon.adapters.op import Adapter, Initial, Op, Place, Shape, Tensor, cannot_follow, one_of, or_none, signed
from ckptsurgeon.adapters.shapes import from_front, need, refused, size_of
from ckptsurgeon.errors import RuleError

PARTS = ("g", "v")  # what a weight is taken apart into, in this order


def lengths_of(shape: Shape, dim: int | None) -> Shape:
    """The shape of g for a weight; `dim` None is one norm of the whole.

    >>> lengths_of((8, 4, 3), 0), lengths_of((8, 4, 3), 2), lengths_of((8, 4, 3), None)
    ((8, 1, 1), (1, 1, 3), ())
    """
    return () if dim is None else tuple(size if at == dim else 1 for at, size in enumerate(shape))


def dims_of(g: Shape, v: Shape) -> tuple[int | None, ...]:
    """The dims over which g can be the lengths of v, as its shape says; none where it can't. All of several give the same.

    >>> dims_of((8, 1, 1), (8, 4, 3)), dims_of((), (8, 4)), dims_of((1, 1), (1, 4)), dims_of((8, 4), (8, 4))
    ((0,), (None,), (0,), ())
    """
    if not v or not prod(v):
        return ()
    return tuple(dim for dim in (None, *range(len(v))) if lengths_of(v, dim) == g)


def _norm(op: Op) -> int | None:
    dim: int | None = need(op, "dim")
    return dim


def _pairs(op: Op, shapes: Sequence[Shape]) -> Iterator[tuple[Shape, Shape]]:
    if not shapes or len(shapes) % 2:
        raise refused(op, f"takes g and v by turns, and {len(shapes)} tensors come in")
    return zip(shapes[::2], shapes[1::2], strict=True)


def _infer(op: Op, shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    dim = _norm(op)
    if "part" in op:
        return tuple(_part(op, shape, dim) for shape in shapes)
    for g, v in _pairs(op, shapes):
        if dim not in dims_of(g, v):
            raise refused(op, f"takes g and then v, and {g} are no lengths of {v} over dim {dim}", "name g first: a.weight_g + a.weight_v")
    return shapes[1::2]


def _part(op: Op, shape: Shape, dim: int | None) -> Shape:
    if not shape or not prod(shape):
        raise refused(op, f"takes a weight apart, and {shape} has no direction")
    if dim is not None:
        size_of(op, dim, shape)
    return lengths_of(shape, dim) if op["part"] == "g" else shape


def _fill(op: Op, place: Place) -> Op:
    part = op.get("part", PARTS[place.index] if len(place.shapes) == 1 and place.of == len(PARTS) else None)
    told = [] if part is None else _told_by_target(part, place)
    if part is None:
        told = [dims_of(g, v) for g, v in _pairs(op, place.shapes)]
    if "dim" in op:
        dim = None if op["dim"] is None else from_front(op, op["dim"], place.shapes[1::2] if part is None else place.shapes)
    elif told:
        dims = [dim for dim in told[0] if all(dim in row for row in told)]
        if not dims:
            pairs = " and ".join(f"{g}, {v}" for g, v in zip(place.shapes[::2], place.shapes[1::2], strict=False))
            words = f"can't tell its dim: {pairs or place.siblings} are no g and v of one"
            raise refused(op, words, "name g first: a.weight_g + a.weight_v")
        dim = dims[0]
    else:
        dim = 0  # torch's own default
    return {"op": "weight_norm", "dim": dim, **({} if part is None else {"part": part})}


def _told_by_target(part: str, place: Place) -> list[tuple[int | None, ...]]:
    """The dims that the target's g says, where its shape is known."""
    alone = place.wanted if part == "g" else None
    g = place.siblings[0] if len(place.siblings) == len(PARTS) else alone
    return [] if g is None else [dims_of(g, shape) for shape in place.shapes]


def _kernel(op: Op, tensors: Sequence[Tensor], _initial: Initial) -> list[Tensor]:
    if op.get("part") == "v":
        for tensor in tensors:
            _lengths(tensor, op["dim"])
        return list(tensors)
    if op.get("part") == "g":
        return [_lengths(tensor, op["dim"]) for tensor in tensors]
    return [_weight(g, v, op["dim"]) for g, v in zip(tensors[::2], tensors[1::2], strict=True)]


def _weight(g: Tensor, v: Tensor, dim: int | None) -> Tensor:
    import torch

    _lengths(v, dim)
    return torch._weight_norm(v, g, -1 if dim is None else dim)


def _lengths(v: Tensor, dim: int | None) -> Tensor:
    """The norms of a direction. RuleError where one is zero: it points nowhere, and torch would divide by it."""
    import torch

    found = torch.norm_except_dim(v, 2, -1 if dim is None else dim)
    if bool((found == 0).any()):
        where = "the whole" if dim is None else f"a slice of dim {dim}"
        raise RuleError(f"weight_norm divides by the norm of v, and {where} is all zeros")
    return found


ADAPTER = Adapter(
    words="w = g * v / |v|, of g and v by turns, with a norm for each index of dim `dim` (told by g's shape; None: one for the whole); "
    "of one tensor for two results: g = |w| and v = w",
    fields={"dim": or_none(signed), "part": one_of(*PARTS)},
    infer=_infer,
    fill=_fill,
    kernel=_kernel,
    moments=cannot_follow,
    floats=True,
    joins=True,
    source="Salimans and Kingma 2016, Weight normalization, arXiv:1602.07868; torch._weight_norm",
)
