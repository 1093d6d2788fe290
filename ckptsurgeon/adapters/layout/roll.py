"""`roll` shifts the elements of a dim cyclically.

>>> import torch
>>> ADAPTER.kernel({"dim": 0, "by": 2}, [torch.tensor([1, 2, 10, 20])], None)[0].tolist()
[10, 20, 1, 2]
"""

from __future__ import annotations

from ckptsurgeon.adapters.op import Adapter, FillContext, Op, Shape, Tensor, each, same_op, signed
from ckptsurgeon.adapters.shapes import from_front, need, size_of


def _shape(op: Op, shape: Shape) -> Shape:
    size_of(op, need(op, "dim"), shape)
    need(op, "by")
    return shape


def _fill(op: Op, context: FillContext) -> Op:
    return {"op": op["op"], "dim": from_front(op, op.get("dim", 0), context.shapes), "by": need(op, "by")}


def _kernel(op: Op, tensor: Tensor) -> Tensor:
    import torch

    return torch.roll(tensor, op["by"], op["dim"])


ADAPTER = Adapter(
    words="moves the elements of dim `dim` on by `by` places, round its end: out[(i + by) mod n] = in[i]; by half of n it swaps the halves",
    fields={"dim": signed, "by": signed},
    infer=each(_shape),
    fill=_fill,
    kernel=each(_kernel),
    moments=same_op,
    invert=lambda op: {**op, "by": -op["by"]} if "by" in op else None,
)
