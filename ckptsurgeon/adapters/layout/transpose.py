"""`transpose` swaps two dims.

>>> import torch
>>> ADAPTER.kernel({"dims": [0, 1]}, [torch.tensor([[1, 2, 3], [4, 5, 6]])], None)[0].tolist()
[[1, 4], [2, 5], [3, 6]]
"""

from __future__ import annotations

from ckptsurgeon.adapters.op import Adapter, FillContext, Op, Shape, each, list_of, same_op, signed
from ckptsurgeon.adapters.shapes import from_front, need, refused, size_of


def _shape(op: Op, shape: Shape) -> Shape:
    dims = need(op, "dims")
    if len(dims) != 2 or dims[0] == dims[1]:
        raise refused(op, f"swaps two dims, not {list(dims)[:4]}")
    swapped = list(shape)
    swapped[dims[0]], swapped[dims[1]] = size_of(op, dims[1], shape), size_of(op, dims[0], shape)
    return tuple(swapped)


def _fill(op: Op, context: FillContext) -> Op:
    short = next((shape for shape in context.shapes if len(shape) < 2), None)
    if short is not None:
        raise refused(op, f"needs two dims, and {short} has {len(short)}", "name only the weights: '**.weight'")
    return {"op": op["op"], "dims": [from_front(op, dim, context.shapes) for dim in op.get("dims", (-2, -1))]}


def _offer(source: Shape, target: Shape) -> Op | None:
    fits = len(source) == 2 and source == target[::-1] and source[0] != source[1] and 1 not in source  # reshape offers those with 1
    return {"op": "transpose"} if fits else None


ADAPTER = Adapter(
    words="swaps two dims, without `dims` the last two: out[j, i] = in[i, j]",
    fields={"dims": list_of(signed)},
    infer=each(_shape),
    fill=_fill,
    kernel=each(lambda op, tensor: tensor.transpose(*op["dims"])),
    moments=same_op,
    invert=lambda op: op,
    offer=_offer,
)
