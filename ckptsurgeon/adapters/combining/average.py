"""`average` is the weighted mean of tensors of one shape, computed in float64 and rounded once: so the mean of equal values is that
value, and one that lies half way between two bfloat16 values goes where the exact mean does, although 1/3 is no binary number.

>>> import torch
>>> ADAPTER.kernel({"weights": [0.75, 0.25]}, [torch.tensor([4.0]), torch.tensor([8.0])], None)[0].tolist()
[5.0]
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from ckptsurgeon.adapters import widening
from ckptsurgeon.adapters.op import Adapter, FillContext, Initial, Op, Shape, Tensor, cannot_follow, list_of, number
from ckptsurgeon.adapters.shapes import need, refused
from ckptsurgeon.errors import RuleError

_SLACK = 1e-6  # how far from 1 the sum of a plan's weights may be


def _infer(op: Op, shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    weights = need(op, "weights")
    different = next((shape for shape in shapes if shape != shapes[0]), None)
    if different is not None:
        raise refused(op, f"goes over {shapes[0]} and {different}, which differ")
    if not shapes or len(weights) != len(shapes):
        raise refused(op, f"has {len(weights)} weights for {len(shapes)} tensors")
    if not all(0 <= weight <= 1 + _SLACK for weight in weights) or abs(math.fsum(weights) - 1) > _SLACK:
        raise refused(op, "has weights in the plan that do not sum to 1")
    return (shapes[0],)


def _fill(op: Op, context: FillContext) -> Op:
    weights = op.get("weights", [1] * len(context.shapes))
    largest = max(weights, default=0)
    if largest <= 0 or min(weights) < 0:
        raise refused(op, f"has weights {list(weights)[:8]}", "weights are not negative, and one at least is more than 0")
    scaled = [weight / largest for weight in weights]  # scaled before they are summed, so that no sum overflows
    return {"op": "average", "weights": [weight / math.fsum(scaled) for weight in scaled]}


def _kernel(op: Op, tensors: Sequence[Tensor], _initial: Initial) -> list[Tensor]:
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


ADAPTER = Adapter(
    words="the mean of all tensors, by `weights` if given: out = sum of w_i * in_i, where the sum of w_i is 1",
    fields={"weights": list_of(number)},
    infer=_infer,
    fill=_fill,
    kernel=_kernel,
    moments=cannot_follow,
    floats=True,
    complexes=True,
    joins=True,
    elementwise=True,
    source="Wortsman et al. 2022, Model soups, arXiv:2203.05482",
)
