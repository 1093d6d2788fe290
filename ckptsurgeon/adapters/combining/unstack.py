"""`unstack` takes one index of a dim, and removes the dim.

>>> import torch
>>> ADAPTER.kernel({"dim": 0, "index": 1}, [torch.tensor([[1, 2], [3, 4]])], None)[0].tolist()
[3, 4]
"""

from __future__ import annotations

from ckptsurgeon.adapters.op import Adapter, FillContext, Op, Shape, each, same_op, signed, whole
from ckptsurgeon.adapters.shapes import from_front, need, part_ranges, refused, size_of


def _shape(op: Op, shape: Shape) -> Shape:
    dim, index = need(op, "dim"), need(op, "index")
    size = size_of(op, dim, shape)
    if not 0 <= index < size:
        raise refused(op, f"takes number {index} of dim {dim}, and {shape} has {size} there (they count from 0)")
    return shape[:dim] + shape[dim + 1 :]


def _fill(op: Op, context: FillContext) -> Op:
    dim = from_front(op, op.get("dim", 0), context.shapes)
    index = op.get("index", context.number)
    if index is None and context.of == 1:
        raise refused(op, "does not know which one to take", "number the results ('w -> w.{i}'), name every one, or say index=")
    if index is None:
        for shape in context.shapes:
            if size_of(op, dim, shape) != context.of:
                raise refused(op, f"has {context.of} results, and {shape} has {shape[dim]} in dim {dim}")
    return {"op": "unstack", "dim": dim, "index": context.index if index is None else index}


ADAPTER = Adapter(
    words="number `index` of dim `dim`, without that dim; the index is what the result's name says: out = in[index]",
    fields={"dim": signed, "index": whole},
    infer=each(_shape),
    fill=_fill,
    kernel=each(lambda op, tensor: tensor.select(op["dim"], op["index"])),
    moments=same_op,
    invert=lambda op: None if "index" in op else {**op, "op": "stack"},
    ranges=part_ranges(lambda op, _shape: (op["index"], op["index"] + 1)),
    counts_parts=True,
)
