"""`permute_rope` reorders the rows of rotary queries and keys between Meta's layout (pairs) and Hugging Face's (halves).

>>> import torch
>>> ADAPTER.kernel({"heads": 1, "to": "halves", "dim": 0}, [torch.tensor([1, 10, 2, 20, 3, 30])], None)[0].tolist()
[1, 2, 3, 10, 20, 30]
"""

from __future__ import annotations

from ckptsurgeon.adapters.layout.regroup import regrouped
from ckptsurgeon.adapters.op import Adapter, FillContext, Op, Shape, Tensor, each, one_of, same_op, signed, whole
from ckptsurgeon.adapters.shapes import from_front, need, part_of, refused


def _shape(op: Op, shape: Shape) -> Shape:
    dim, heads = need(op, "dim"), need(op, "heads")
    if need(op, "to") not in ("halves", "pairs"):
        raise refused(op, f"goes to 'halves' or 'pairs', not {str(op['to'])[:20]!r}")
    if part_of(op, dim, heads, shape) % 2:
        raise refused(op, f"needs heads of an even size, and {heads} heads of {shape} have {shape[dim] // heads}")
    return shape


def _fill(op: Op, context: FillContext) -> Op:
    if "heads" not in op:
        raise refused(op, "needs the number of heads", "query heads for q, key-value heads for k: permute_rope(heads=32, to='halves')")
    if "to" not in op:
        raise refused(op, "needs its direction", "to='halves' is Hugging Face's layout, to='pairs' is Meta's")
    return {"op": op["op"], "heads": op["heads"], "to": op["to"], "dim": from_front(op, op.get("dim", 0), context.shapes)}


def _kernel(op: Op, tensor: Tensor) -> Tensor:
    half = tensor.shape[op["dim"]] // op["heads"] // 2
    return regrouped(tensor, op["dim"], op["heads"], *((half, 2) if op["to"] == "halves" else (2, half)))


ADAPTER = Adapter(
    words="rows of rotary queries or keys, in each of `heads` heads: rotated pairs side by side (to='pairs', Meta's Llama), "
    "or their first halves before their second (to='halves', Hugging Face): halves[j * n + i] = pairs[2 * i + j], n half a head",
    fields={"heads": whole, "to": one_of("halves", "pairs"), "dim": signed},
    infer=each(_shape),
    fill=_fill,
    kernel=each(_kernel),
    moments=same_op,
    invert=lambda op: {**op, "to": "pairs" if op["to"] == "halves" else "halves"} if "to" in op else None,
    source="Su et al. 2021, RoFormer, arXiv:2104.09864",
)
