"""`concat` joins tensors along an existing dim.

>>> import torch
>>> ADAPTER.kernel({"op": "concat", "dim": 0, "of": 2}, [torch.tensor([1, 2]), torch.tensor([3])], None)[0].tolist()
[1, 2, 3]
"""

from __future__ import annotations

from collections.abc import Sequence

from ckptsurgeon.adapters.op import Adapter, FillContext, Initial, Op, Shape, Tensor, list_of, same_op, signed, whole
from ckptsurgeon.adapters.shapes import bounded, from_front, groups, joined_ranges, need, refused, resized, size_of


def _infer(op: Op, shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    dim, results = need(op, "dim"), []
    for group in groups(op, shapes):
        first, total = group[0], sum(size_of(op, dim, shape) for shape in group)
        different = next((shape for shape in group if resized(shape, dim, 0) != resized(first, dim, 0)), None)
        if different is not None:
            raise refused(op, f"joins dim {dim} of {first} and {different}, which differ in another dim too")
        results.append(bounded(op, resized(first, dim, total)))
    return tuple(results)


def _fill(op: Op, context: FillContext) -> Op:
    dim, sizes = from_front(op, op.get("dim", 0), context.shapes), list(op.get("sizes", ()))
    filled = {"op": "concat", "dim": dim, "of": op.get("of", len(sizes) if "sizes" in op else len(context.shapes))}
    for group in groups(filled, context.shapes) if "sizes" in op else ():
        incoming = [size_of(op, dim, shape) for shape in group]
        if incoming != sizes:
            raise refused(op, f"is to join sizes {sizes[:8]} of dim {dim}, and {incoming[:8]} come in")
    return filled


def _kernel(op: Op, tensors: Sequence[Tensor], _initial: Initial) -> list[Tensor]:
    import torch

    return [torch.cat(list(group), op["dim"]) for group in groups(op, tensors)]


ADAPTER = Adapter(
    words="joins all tensors, or each `of` in a row, along dim `dim`; `sizes` are held against what comes in",
    fields={"dim": signed, "sizes": list_of(whole), "of": whole},
    infer=_infer,
    fill=_fill,
    kernel=_kernel,
    moments=same_op,
    invert=lambda op: {**op, "op": "chunk"},
    ranges=joined_ranges,
    joins=True,
)
