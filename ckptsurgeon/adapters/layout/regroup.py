"""What adapters share that put the elements of one dim in another order: a dim taken as several, of which the last two are swapped."""

from __future__ import annotations

from ckptsurgeon.adapters.op import Op, Place, Shape, Tensor
from ckptsurgeon.adapters.shapes import from_front, need, part_of


def regrouped(tensor: Tensor, dim: int, *sizes: int) -> Tensor:
    """Dim `dim` under the shape `sizes`, whose last two dims are swapped, flat again."""
    last = dim + len(sizes) - 1
    parts = tensor.reshape((*tensor.shape[:dim], *sizes, *tensor.shape[dim + 1 :]))
    return parts.transpose(last - 1, last).reshape(tensor.shape)


def parted_shape(op: Op, shape: Shape) -> Shape:
    """`shape` itself. RuleError where its dim has no `parts` equal parts."""
    part_of(op, need(op, "dim"), need(op, "parts"), shape)
    return shape


def fill_parted(op: Op, place: Place) -> Op:
    """The op with its dim, 0 if left out, and the number of its parts, 2 if left out."""
    return {"op": op["op"], "dim": from_front(op, op.get("dim", 0), place.shapes), "parts": op.get("parts", 2)}
