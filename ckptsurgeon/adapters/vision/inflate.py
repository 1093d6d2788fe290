"""`inflate` turns a kernel for images into one for videos, so that a still video gives the same output as its frame.

>>> import torch
>>> ADAPTER.kernel({"dim": 2, "size": 2, "mode": "mean"}, [torch.full((1, 1, 1, 1), 4.0)], None)[0].flatten().tolist()
[2.0, 2.0]
"""

from __future__ import annotations

from ckptsurgeon.adapters.op import Adapter, Check, FillContext, Op, Shape, Tensor, cannot_follow, each, one_of, signed
from ckptsurgeon.adapters.shapes import checked, in_words
from ckptsurgeon.adapters.vision.sizes import axis, between, each_with_elements, first_shape, positive, target_shape
from ckptsurgeon.adapters.widening import widened
from ckptsurgeon.errors import RuleError

_FIELDS: dict[str, Check] = {"dim": signed, "size": positive, "mode": one_of("mean", "center")}


def _shape(op: Op, shape: Shape) -> Shape:
    dim, size, _ = checked(op, _FIELDS)
    if len(shape) not in (3, 4) or not 2 <= dim <= len(shape):
        raise RuleError(f"inflate takes a kernel such as (O, I, h, w) and a dim from 2 on, not {in_words(shape)} and dim {dim}")
    return (*shape[:dim], size, *shape[dim:])


def _fill(op: Op, context: FillContext) -> Op:
    dims = len(first_shape(context)) + 1
    dim, size = axis(op.get("dim", 2), dims), op.get("size")
    if size is None:
        target = target_shape(context, dims, "size", "inflate")
        if dim not in range(dims):
            raise RuleError(f"inflate: {in_words(target)} has no dimension {dim}")
        size = target[dim]
    return {"op": "inflate", "dim": dim, "size": size, "mode": op.get("mode", "mean")}


def _offer(source: Shape, target: Shape) -> Op | None:
    inserted = len(source) == 4 and len(target) == 5 and (*target[:2], *target[3:]) == source
    return {"op": "inflate"} if inserted and target[2] > 1 else None  # a size of 1 needs a reshape only


def _kernel(op: Op, tensor: Tensor) -> Tensor:
    dim, size = op["dim"], op["size"]
    result = tensor.new_zeros(*tensor.shape[:dim], size, *tensor.shape[dim:])
    if op["mode"] == "center":
        result.select(dim, size // 2).copy_(tensor)
    else:
        result.copy_((widened(tensor) / size).to(tensor.dtype).unsqueeze(dim))
    return result


ADAPTER = Adapter(
    words="a kernel with one dimension more: repeated and divided by its size (mean), or at its middle with zeros around (center)",
    fields=_FIELDS,
    infer=each_with_elements(_shape),
    fill=_fill,
    kernel=each(_kernel),
    moments=cannot_follow,
    offer=between(_offer),
    floats=True,
    source="Carreira & Zisserman 2017 (arXiv:1705.07750)",
)
