"""`permute` puts all dims in another order.

>>> import torch
>>> ADAPTER.kernel({"dims": [2, 0, 1]}, [torch.zeros(2, 3, 4)], None)[0].shape
torch.Size([4, 2, 3])
"""

from __future__ import annotations

from ckptsurgeon.adapters.op import Adapter, FillContext, Op, Shape, each, list_of, same_op, signed
from ckptsurgeon.adapters.shapes import from_front, need, refused


def _shape(op: Op, shape: Shape) -> Shape:
    dims = need(op, "dims")
    if sorted(dims) != list(range(len(shape))):
        raise refused(op, f"orders dims {list(dims)[:8]}, and {shape} has {len(shape)} dims", "name each dim once")
    return tuple(shape[dim] for dim in dims)


def _fill(op: Op, context: FillContext) -> Op:
    return {"op": op["op"], "dims": [from_front(op, dim, context.shapes) for dim in need(op, "dims")]}


def _invert(op: Op) -> Op | None:
    dims = op.get("dims", ())
    order = [dim + len(dims) * (dim < 0) for dim in dims]
    complete = bool(order) and sorted(order) == list(range(len(order)))
    return {"op": "permute", "dims": [order.index(dim) for dim in range(len(order))]} if complete else None


ADAPTER = Adapter(
    words="puts the dims in the order `dims`: out's dim i is in's dim dims[i]",
    fields={"dims": list_of(signed)},
    infer=each(_shape),
    fill=_fill,
    kernel=each(lambda op, tensor: tensor.permute(tuple(op["dims"]))),
    moments=same_op,
    invert=_invert,
)
