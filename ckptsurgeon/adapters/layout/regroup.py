"""What adapters that reorder the elements of one dim share: the dim is split into several, and the last two are swapped."""

from __future__ import annotations

from ckptsurgeon.adapters.op import FillContext, Op, Shape, Tensor
from ckptsurgeon.adapters.shapes import from_front, need, part_of


def regrouped(tensor: Tensor, dim: int, *sizes: int) -> Tensor:
    """The tensor with `dim` split into `sizes`, the last two of them swapped, and flattened again."""
    last = dim + len(sizes) - 1
    parts = tensor.reshape((*tensor.shape[:dim], *sizes, *tensor.shape[dim + 1 :]))
    return parts.transpose(last - 1, last).reshape(tensor.shape)


def parted_shape(op: Op, shape: Shape) -> Shape:
    """`shape` itself. RuleError where its dim has no `parts` equal parts."""
    part_of(op, need(op, "dim"), need(op, "parts"), shape)
    return shape


def fill_parted(op: Op, context: FillContext) -> Op:
    """The op with its dim, 0 if left out, and the number of its parts, 2 if left out."""
    return {"op": op["op"], "dim": from_front(op, op.get("dim", 0), context.shapes), "parts": op.get("parts", 2)}
