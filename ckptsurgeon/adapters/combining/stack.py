"""`stack` joins tensors of one shape along a new dim.

>>> import torch
>>> ADAPTER.kernel({"op": "stack", "dim": 0, "of": 2}, [torch.tensor([1, 2]), torch.tensor([3, 4])], None)[0].tolist()
[[1, 2], [3, 4]]
"""

from __future__ import annotations

from collections.abc import Sequence

from ckptsurgeon.adapters.op import Adapter, FillContext, Initial, Op, Shape, Tensor, same_op, signed, whole
from ckptsurgeon.adapters.shapes import bounded, from_front, groups, joined_ranges, need, refused


def _infer(op: Op, shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    dim, results = need(op, "dim"), []
    for group in groups(op, shapes):
        first = group[0]
        different = next((shape for shape in group if shape != first), None)
        if different is not None:
            raise refused(op, f"stacks {first} and {different}, which differ")
        if not 0 <= dim <= len(first):
            raise refused(op, f"adds dim {dim}, and {first} has {len(first)} dims")
        results.append(bounded(op, (*first[:dim], len(group), *first[dim:])))
    return tuple(results)


def _fill(op: Op, context: FillContext) -> Op:
    return {"op": "stack", "dim": from_front(op, op.get("dim", 0), context.shapes, 1), "of": op.get("of", len(context.shapes))}


def _kernel(op: Op, tensors: Sequence[Tensor], _initial: Initial) -> list[Tensor]:
    import torch

    return [torch.stack(list(group), op["dim"]) for group in groups(op, tensors)]


ADAPTER = Adapter(
    words="makes all tensors, or each `of` in a row, one along a new dim `dim`: out[i] = in_i",
    fields={"dim": signed, "of": whole},
    infer=_infer,
    fill=_fill,
    kernel=_kernel,
    moments=same_op,
    invert=lambda op: None if "of" in op else {**op, "op": "unstack"},
    ranges=joined_ranges,
    joins=True,
)
