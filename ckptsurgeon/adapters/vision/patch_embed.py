"""`patch_embed` gives a patch embedding another patch size, so that a resized patch gives the same output.

>>> import torch
>>> op = {"to": [2, 2], "mode": "bilinear", "antialias": False}
>>> [round(value, 4) for value in ADAPTER.kernel(op, [torch.full((1, 1, 1, 1), 8.0)], None)[0].flatten().tolist()]
[2.0, 2.0, 2.0, 2.0]
"""

from __future__ import annotations

from ckptsurgeon.adapters.op import Adapter, Check, FillContext, Op, Shape, Tensor, cannot_follow, each, flag
from ckptsurgeon.adapters.shapes import checked, in_words
from ckptsurgeon.adapters.vision.resize import resize
from ckptsurgeon.adapters.vision.sizes import SMOOTH, between, each_with_elements, pair, target_shape
from ckptsurgeon.adapters.widening import widened
from ckptsurgeon.errors import RuleError

MOST_SIDE = 1024  # of a patch: its resize matrix is inverted
_FIELDS: dict[str, Check] = {"to": pair, "mode": SMOOTH, "antialias": flag}


def _shape(op: Op, shape: Shape) -> Shape:
    to, _, _ = checked(op, _FIELDS)
    if len(shape) != 4 or max(*shape[2:], *to) > MOST_SIDE:
        raise RuleError(f"patch_embed takes (D, C, h, w) of sides up to {MOST_SIDE}, not {in_words(shape)} to {to[0]} x {to[1]}")
    return (*shape[:2], *to)


def _fill(op: Op, context: FillContext) -> Op:
    to = op["to"] if "to" in op else target_shape(context, 4, "to", "patch_embed")[2:]
    return {"op": "patch_embed", "to": list(to), "mode": op.get("mode", "bicubic"), "antialias": op.get("antialias", True)}


def _offer(source: Shape, target: Shape) -> Op | None:
    if len(source) != 4 or len(target) != 4 or source[:2] != target[:2]:
        return None
    square = source[2] == source[3] >= 4 and target[2] == target[3] >= 4  # a smaller one may be any convolution
    return {"op": "patch_embed"} if square else None


def _kernel(op: Op, tensor: Tensor) -> Tensor:
    """w' = pinv(Bᵀ) w. The resize is one of rows and one of columns, B = B_h ⊗ B_w, so each side has its own small pseudo-inverse."""
    import torch

    def inverse(size: int, to: int) -> Tensor:
        """pinv(Bᵀ) of one side, (to, size); what the resize makes of the unit vectors are the rows of Bᵀ."""
        units = torch.eye(size, dtype=torch.float64).reshape(1, size, size, 1)
        inverted: Tensor = torch.linalg.pinv(resize(units, op, (to, 1), op["antialias"])[0, :, :, 0])
        return inverted

    kernel = widened(tensor)
    rows, columns = (inverse(size, to).to(kernel.dtype) for size, to in zip(tensor.shape[2:], op["to"], strict=True))
    result: Tensor = rows @ kernel @ columns.T
    return result.to(tensor.dtype)


ADAPTER = Adapter(
    words="a patch embedding for another patch size: w' = pinv(Bᵀ) w, B the resize of a patch as a matrix",
    fields=_FIELDS,
    infer=each_with_elements(_shape),
    fill=_fill,
    kernel=each(_kernel),
    moments=cannot_follow,
    offer=between(_offer),
    floats=True,
    source="Beyer et al. 2023 (arXiv:2212.08013)",
)
