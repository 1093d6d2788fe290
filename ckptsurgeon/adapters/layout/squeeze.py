"""`squeeze` removes a dim of size 1, or all of them.

>>> import torch
>>> ADAPTER.kernel({"dim": 0}, [torch.zeros(1, 3, 1)], None)[0].shape
torch.Size([3, 1])
"""

from __future__ import annotations

from ckptsurgeon.adapters.layout.reshape import fill_as_reshape
from ckptsurgeon.adapters.op import Adapter, Op, Shape, each, same_op, signed
from ckptsurgeon.adapters.shapes import refused, size_of, whole_ranges


def _shape(op: Op, shape: Shape) -> Shape:
    if "dim" not in op:
        return tuple(size for size in shape if size != 1)
    dim = op["dim"]
    if size_of(op, dim, shape) != 1:
        raise refused(op, f"takes out dim {dim}, and {shape} has {shape[dim]} there, not 1")
    return shape[:dim] + shape[dim + 1 :]


ADAPTER = Adapter(
    words="takes out dim `dim`, which has size 1; without it all dims of size 1",
    fields={"dim": signed},
    infer=each(_shape),
    fill=fill_as_reshape(_shape, 0),
    kernel=each(lambda op, tensor: tensor.squeeze(op["dim"]) if "dim" in op else tensor.squeeze()),
    moments=same_op,
    invert=lambda op: {"op": "unsqueeze", "dim": op["dim"]} if "dim" in op else {"op": "reshape"},
    ranges=whole_ranges,
)
