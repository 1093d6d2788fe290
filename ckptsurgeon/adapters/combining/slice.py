"""`slice` takes a part of one dim.

>>> import torch
>>> ADAPTER.kernel({"dim": 0, "start": 1, "stop": 3}, [torch.tensor([10, 11, 12, 13])], None)[0].tolist()
[11, 12]
"""

from __future__ import annotations

from ckptsurgeon.adapters.op import Adapter, FillContext, Op, Shape, each, same_op, signed, whole
from ckptsurgeon.adapters.shapes import from_front, need, part_ranges, refused, resized, size_of, target_size


def _shape(op: Op, shape: Shape) -> Shape:
    dim, start, stop = need(op, "dim"), need(op, "start"), need(op, "stop")
    size = size_of(op, dim, shape)
    if not 0 <= start <= stop <= size:
        raise refused(op, f"takes {start} to {stop} of dim {dim}, and {shape} has {size} there")
    return resized(shape, dim, stop - start)


def _fill(op: Op, context: FillContext) -> Op:
    dim, start = from_front(op, op.get("dim", 0), context.shapes), op.get("start", 0)
    return {
        "op": "slice",
        "dim": dim,
        "start": start,
        "stop": op["stop"] if "stop" in op else start + target_size(op, context, dim, "stop"),
    }


ADAPTER = Adapter(
    words="elements `start` (0) to `stop` of dim `dim`, `stop` left out; without it as many as the target has",
    fields={"dim": signed, "start": whole, "stop": whole},
    infer=each(_shape),
    fill=_fill,
    kernel=each(lambda op, tensor: tensor.narrow(op["dim"], op["start"], op["stop"] - op["start"])),
    moments=same_op,
    ranges=part_ranges(lambda op, _shape: (op["start"], op["stop"])),
)
