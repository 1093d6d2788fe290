"""`in_channels` gives a kernel another number of input channels, so that a grey image gives the same output.

>>> import torch
>>> ADAPTER.kernel({"dim": 1, "channels": 1}, [torch.tensor([[1.0, 2.0, 3.0]])], None)[0].tolist()
[[6.0]]
"""

from __future__ import annotations

from ckptsurgeon.adapters.op import Adapter, Check, FillContext, Op, Shape, Tensor, cannot_follow, each, signed
from ckptsurgeon.adapters.shapes import checked, in_words
from ckptsurgeon.adapters.vision.sizes import axis, between, each_with_elements, first_shape, positive, target_shape
from ckptsurgeon.adapters.widening import widened
from ckptsurgeon.errors import RuleError

_FIELDS: dict[str, Check] = {"dim": signed, "channels": positive}


def _shape(op: Op, shape: Shape) -> Shape:
    dim, channels = checked(op, _FIELDS)
    if dim not in range(len(shape)):
        raise RuleError(f"in_channels: {in_words(shape)} has no dimension {dim}")
    if 1 < channels < shape[dim]:
        raise RuleError(
            f"in_channels can't tell how {shape[dim]} channels become {channels}",
            hint="it sums to 1 or repeats to more; choose channels with slice or rows(index=[...], dim=1)",
        )
    return (*shape[:dim], channels, *shape[dim + 1 :])


def _fill(op: Op, context: FillContext) -> Op:
    dims = len(first_shape(context))
    dim = axis(op.get("dim", 1), dims)
    if "channels" in op:
        return {"op": "in_channels", "dim": dim, "channels": op["channels"]}
    target = target_shape(context, dims, "channels", "in_channels")
    if dim not in range(dims):
        raise RuleError(f"in_channels: {in_words(target)} has no dimension {dim}")
    return {"op": "in_channels", "dim": dim, "channels": target[dim]}


def _offer(source: Shape, target: Shape) -> Op | None:
    if len(source) not in (3, 4, 5) or len(source) != len(target):
        return None
    same = (source[0], *source[2:]) == (target[0], *target[2:])
    known = target[1] == 1 or (source[1] in (1, 3) and target[1] > source[1])
    return {"op": "in_channels"} if same and known and {source[1], target[1]} & {1, 3} else None


def _kernel(op: Op, tensor: Tensor) -> Tensor:
    dim, new_count = op["dim"], op["channels"]
    old_count = tensor.shape[dim]
    if new_count == 1:
        return widened(tensor).sum(dim, keepdim=True).to(tensor.dtype)
    scaled = (widened(tensor) * (old_count / new_count)).to(tensor.dtype)
    result = tensor.new_empty(*tensor.shape[:dim], new_count, *tensor.shape[dim + 1 :])
    for start in range(0, new_count, old_count):
        count = min(old_count, new_count - start)
        result.narrow(dim, start, count).copy_(scaled.narrow(dim, 0, count))
    return result


ADAPTER = Adapter(
    words="a kernel for another number N of input channels: their sum for 1, else its C repeated in turn and multiplied by C / N",
    fields=_FIELDS,
    infer=each_with_elements(_shape),
    fill=_fill,
    kernel=each(_kernel),
    moments=cannot_follow,
    offer=between(_offer),
    floats=True,
)
