"""`weight_norm` computes a weight from its length g and its direction v, as torch does, or g and v from a weight: w = g · v / ‖v‖, with a
norm for each index of one dim.

>>> import torch
>>> g, v = torch.tensor([[10.0]]), torch.tensor([[3.0, 4.0]])
>>> WEIGHT_NORM.kernel({"dim": 0}, [g, v], None)[0].tolist()
[[6.0, 8.0]]
>>> WEIGHT_NORM.kernel({"dim": 0, "part": "g"}, [torch.tensor([[6.0, 8.0]])], None)[0].tolist()
[[10.0]]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod

from ckptsurgeon.adapters.op import Adapter, FillContext, Initial, Op, Shape, Tensor, cannot_follow, one_of, or_none, signed
from ckptsurgeon.adapters.shapes import from_front, need, refused, size_of
from ckptsurgeon.errors import RuleError

PARTS = ("g", "v")  # the factors of a weight, in this order


def lengths_of(shape: Shape, dim: int | None) -> Shape:
    """The shape of g for a weight; `dim` None is one norm of the whole.

    >>> lengths_of((8, 4, 3), 0), lengths_of((8, 4, 3), 2), lengths_of((8, 4, 3), None)
    ((8, 1, 1), (1, 1, 3), ())
    """
    return () if dim is None else tuple(size if index == dim else 1 for index, size in enumerate(shape))


def dims_of(g: Shape, v: Shape) -> tuple[int | None, ...]:
    """The dims over which g can be the lengths of v, by its shape; may be empty. Where there are several, all give the same weight.

    >>> dims_of((8, 1, 1), (8, 4, 3)), dims_of((), (8, 4)), dims_of((1, 1), (1, 4)), dims_of((8, 4), (8, 4))
    ((0,), (None,), (0,), ())
    """
    if not v or not prod(v):
        return ()
    return tuple(dim for dim in (None, *range(len(v))) if lengths_of(v, dim) == g)


def _pairs(op: Op, shapes: Sequence[Shape]) -> Iterator[tuple[Shape, Shape]]:
    if not shapes or len(shapes) % 2:
        raise refused(op, f"takes g and v by turns, and {len(shapes)} tensors come in")
    return zip(shapes[::2], shapes[1::2], strict=True)


def _infer(op: Op, shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    dim: int | None = need(op, "dim")
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


def _fill(op: Op, context: FillContext) -> Op:
    part = op.get("part", PARTS[context.index] if len(context.shapes) == 1 and context.of == len(PARTS) else None)
    candidates = [] if part is None else _dims_by_target(part, context)
    if part is None:
        candidates = [dims_of(g, v) for g, v in _pairs(op, context.shapes)]
    if "dim" in op:
        dim = None if op["dim"] is None else from_front(op, op["dim"], context.shapes[1::2] if part is None else context.shapes)
    elif candidates:
        dims = [dim for dim in candidates[0] if all(dim in row for row in candidates)]
        if not dims:
            pairs = " and ".join(f"{g}, {v}" for g, v in zip(context.shapes[::2], context.shapes[1::2], strict=False))
            words = f"can't tell its dim: {pairs or context.siblings} are no g and v of one"
            raise refused(op, words, "name g first: a.weight_g + a.weight_v")
        dim = dims[0]
    else:
        dim = 0  # torch's own default
    return {"op": "weight_norm", "dim": dim, **({} if part is None else {"part": part})}


def _dims_by_target(part: str, context: FillContext) -> list[tuple[int | None, ...]]:
    """The dims that fit the shape of the target's g, where it is known."""
    target_g = context.target if part == "g" else None
    g = context.siblings[0] if len(context.siblings) == len(PARTS) else target_g
    return [] if g is None else [dims_of(g, shape) for shape in context.shapes]


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
    """The norms of a direction. RuleError where one is zero, since torch would divide by it."""
    import torch

    lengths = torch.norm_except_dim(v, 2, -1 if dim is None else dim)
    if bool((lengths == 0).any()):
        where = "the whole" if dim is None else f"a slice of dim {dim}"
        raise RuleError(f"weight_norm divides by the norm of v, and {where} is all zeros")
    return lengths


WEIGHT_NORM = Adapter(
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
