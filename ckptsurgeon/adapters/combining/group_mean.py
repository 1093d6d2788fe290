"""`group_mean` reduces the number of heads for grouped-query attention: each new head is the mean of a group of adjacent heads.

>>> import torch
>>> ADAPTER.kernel({"heads": 4, "to": 2, "dim": 0}, [torch.tensor([1.0, 10.0, 3.0, 30.0, 5.0, 50.0, 7.0, 70.0])], None)[0].tolist()
[2.0, 20.0, 6.0, 60.0]
"""

from __future__ import annotations

from ckptsurgeon.adapters import widening
from ckptsurgeon.adapters.op import Adapter, FillContext, Op, Shape, Tensor, cannot_follow, each, signed, whole
from ckptsurgeon.adapters.shapes import from_front, need, part_of, refused, resized, target_size
from ckptsurgeon.errors import RuleError


def _shape(op: Op, shape: Shape) -> Shape:
    dim, heads, to = need(op, "dim"), need(op, "heads"), need(op, "to")
    size = part_of(op, dim, heads, shape)
    if not 1 <= to <= heads or heads % to:
        raise refused(op, f"can't take the mean of {heads} heads in {to} groups of equal size")
    return resized(shape, dim, to * size)


def _fill(op: Op, context: FillContext) -> Op:
    if "heads" not in op:
        raise refused(op, "needs the number of heads that come in", "its config says it: group_mean(heads=32)")
    dim, heads = from_front(op, op.get("dim", 0), context.shapes), op["heads"]
    filled = {"op": "group_mean", "heads": heads, "to": op.get("to", heads), "dim": dim}
    if "to" not in op:
        if not context.shapes:
            raise refused(op, "is for one tensor, and gets none")
        size = part_of(op, dim, heads, context.shapes[0])
        rows = target_size(op, context, dim, "to")
        if not size or rows % size:
            raise refused(op, f"can't tell how many heads of {size} rows {rows} rows are", "give the number: group_mean(heads=32, to=8)")
        filled["to"] = rows // size
    return filled


def _kernel(op: Op, tensor: Tensor) -> Tensor:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        raise RuleError(f"group_mean goes over floats, and the tensor is {widening.in_words(tensor.dtype)}")
    dim, heads, to = op["dim"], op["heads"], op["to"]
    size, group = tensor.shape[dim] // heads, tensor.shape[dim] // to
    out = tensor.new_empty(resized(tuple(tensor.shape), dim, to * size))
    for head in range(to):  # one at a time, so that the wider dtype needs little memory
        heads_of_group = tensor.narrow(dim, head * group, group).to(widening.wide(tensor))
        heads_of_group = heads_of_group.reshape(*tensor.shape[:dim], heads // to, size, *tensor.shape[dim + 1 :])
        out.narrow(dim, head * size, size).copy_(heads_of_group.mean(dim))
    return out


ADAPTER = Adapter(
    words="`to` heads of `heads`, the target's number if left out: each is the mean of heads / to that stand side by side along `dim`",
    fields={"heads": whole, "to": whole, "dim": signed},
    infer=each(_shape),
    fill=_fill,
    kernel=each(_kernel),
    moments=cannot_follow,
    floats=True,
    complexes=True,
    source="Ainslie et al. 2023, GQA, arXiv:2305.13245",
)
