"""`unsqueeze` adds a dim of size 1.

>>> import torch
>>> ADAPTER.kernel({"dim": 1}, [torch.zeros(4, 3)], None)[0].shape
torch.Size([4, 1, 3])
"""

from __future__ import annotations

from ckptsurgeon.adapters.layout.reshape import fill_as_reshape
from ckptsurgeon.adapters.op import Adapter, Op, Shape, each, same_op, signed
from ckptsurgeon.adapters.shapes import bounded, need, refused, whole_ranges


def _shape(op: Op, shape: Shape) -> Shape:
    dim = need(op, "dim")
    if not 0 <= dim <= len(shape):
        raise refused(op, f"adds dim {dim}, and {shape} has {len(shape)} dims")
    return bounded(op, (*shape[:dim], 1, *shape[dim:]))


ADAPTER = Adapter(
    words="adds a dim of size 1 as dim `dim`",
    fields={"dim": signed},
    infer=each(_shape),
    fill=fill_as_reshape(_shape, 1),
    kernel=each(lambda op, tensor: tensor.unsqueeze(op["dim"])),
    moments=same_op,
    invert=lambda op: {**op, "op": "squeeze"},
    ranges=whole_ranges,
)
