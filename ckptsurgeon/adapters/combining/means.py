"""Adapters that take means of values, in a wider dtype than theirs.

`average` is the weighted mean of tensors of one shape, computed in float64 and rounded once: so the mean of equal values is that
value, and one that lies half way between two bfloat16 values goes where the exact mean does, although 1/3 is no binary number.

>>> import torch
>>> AVERAGE.kernel({"weights": [0.75, 0.25]}, [torch.tensor([4.0]), torch.tensor([8.0])], None)[0].tolist()
[5.0]

`group_mean` reduces the number of heads for grouped-query attention: each new head is the mean of a group of adjacent heads.

>>> GROUP_MEAN.kernel({"heads": 4, "to": 2, "dim": 0}, [torch.tensor([1.0, 10.0, 3.0, 30.0, 5.0, 50.0, 7.0, 70.0])], None)[0].tolist()
[2.0, 20.0, 6.0, 60.0]
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ckptsurgeon.adapters import widening
from ckptsurgeon.adapters.op import Adapter, FillContext, Initial, Op, Shape, Tensor, cannot_follow, each, list_of, number, signed, whole
from ckptsurgeon.adapters.shapes import from_front, need, part_of, refused, resized, target_size
from ckptsurgeon.errors import RuleError

_SLACK = 1e-6  # how far from 1 the sum of a plan's weights may be


def _average_infer(op: Op, shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    weights = need(op, "weights")
    different = next((shape for shape in shapes if shape != shapes[0]), None)
    if different is not None:
        raise refused(op, f"goes over {shapes[0]} and {different}, which differ")
    if not shapes or len(weights) != len(shapes):
        raise refused(op, f"has {len(weights)} weights for {len(shapes)} tensors")
    if not all(0 <= weight <= 1 + _SLACK for weight in weights) or abs(math.fsum(weights) - 1) > _SLACK:
        raise refused(op, "has weights in the plan that do not sum to 1")
    return (shapes[0],)


def _average_fill(op: Op, context: FillContext) -> Op:
    weights = op.get("weights", [1] * len(context.shapes))
    largest = max(weights, default=0)
    if largest <= 0 or min(weights) < 0:
        raise refused(op, f"has weights {list(weights)[:8]}", "weights are not negative, and one at least is more than 0")
    scaled = [weight / largest for weight in weights]  # scaled before they are summed, so that no sum overflows
    return {"op": "average", "weights": [weight / math.fsum(scaled) for weight in scaled]}


def _average_kernel(op: Op, tensors: Sequence[Tensor], _initial: Initial) -> list[Tensor]:
    import torch

    unfit = next((tensor.dtype for tensor in tensors if not (tensor.is_floating_point() or tensor.is_complex())), None)
    if unfit is not None:
        raise RuleError(f"average goes over floats, and a tensor is {widening.in_words(unfit)}")
    wide, weights, divisor = torch.complex128 if tensors[0].is_complex() else torch.float64, op["weights"], 1.0
    if tensors[0].dtype != wide:  # sums of narrower values can't overflow, and with weights of 1 they are exact until they are divided
        weights = [weight / max(weights) for weight in weights]
        divisor = math.fsum(weights)
    out = tensors[0].new_empty(tensors[0].shape)
    for block in widening.blocks(out.shape):
        total = tensors[0][block].to(wide) * weights[0]
        for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
            total.add_(tensor[block].to(wide), alpha=weight)
        out[block] = (total / divisor).to(out.dtype)
    return [out]


AVERAGE = Adapter(
    words="the mean of all tensors, by `weights` if given: out = sum of w_i * in_i, where the sum of w_i is 1",
    fields={"weights": list_of(number)},
    infer=_average_infer,
    fill=_average_fill,
    kernel=_average_kernel,
    moments=cannot_follow,
    floats=True,
    complexes=True,
    joins=True,
    elementwise=True,
    source="Wortsman et al. 2022, Model soups, arXiv:2203.05482",
)


def _group_mean_shape(op: Op, shape: Shape) -> Shape:
    dim, heads, to = need(op, "dim"), need(op, "heads"), need(op, "to")
    size = part_of(op, dim, heads, shape)
    if not 1 <= to <= heads or heads % to:
        raise refused(op, f"can't take the mean of {heads} heads in {to} groups of equal size")
    return resized(shape, dim, to * size)


def _group_mean_fill(op: Op, context: FillContext) -> Op:
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


def _group_mean_kernel(op: Op, tensor: Tensor) -> Tensor:
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


GROUP_MEAN = Adapter(
    words="`to` heads of `heads`, the target's number if left out: each is the mean of heads / to that stand side by side along `dim`",
    fields={"heads": whole, "to": whole, "dim": signed},
    infer=each(_group_mean_shape),
    fill=_group_mean_fill,
    kernel=each(_group_mean_kernel),
    moments=cannot_follow,
    floats=True,
    complexes=True,
    source="Ainslie et al. 2023, GQA, arXiv:2305.13245",
)
