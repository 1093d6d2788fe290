"""Adapters that give the kernels of convolutions another size.

`in_channels` gives a kernel another number of input channels, so that a grey image gives the same output.

>>> import torch
>>> IN_CHANNELS.kernel({"dim": 1, "channels": 1}, [torch.tensor([[1.0, 2.0, 3.0]])], None)[0].tolist()
[[6.0]]

`inflate` turns a kernel for images into one for videos, so that a still video gives the same output as its frame.

>>> INFLATE.kernel({"dim": 2, "size": 2, "mode": "mean"}, [torch.full((1, 1, 1, 1), 4.0)], None)[0].flatten().tolist()
[2.0, 2.0]

`patch_embed` gives a patch embedding another patch size, so that a resized patch gives the same output.

>>> op = {"to": [2, 2], "mode": "bilinear", "antialias": False}
>>> [round(value, 4) for value in PATCH_EMBED.kernel(op, [torch.full((1, 1, 1, 1), 8.0)], None)[0].flatten().tolist()]
[2.0, 2.0, 2.0, 2.0]
"""

from __future__ import annotations

from ckptsurgeon.adapters.op import Adapter, Check, FillContext, Op, Shape, Tensor, cannot_follow, each, flag, one_of, signed
from ckptsurgeon.adapters.shapes import checked, in_words
from ckptsurgeon.adapters.vision.sizes import SMOOTH, axis, between, each_with_elements, first_shape, pair, positive, resize, target_shape
from ckptsurgeon.adapters.widening import widened
from ckptsurgeon.errors import RuleError

_IN_CHANNELS_FIELDS: dict[str, Check] = {"dim": signed, "channels": positive}
_INFLATE_FIELDS: dict[str, Check] = {"dim": signed, "size": positive, "mode": one_of("mean", "center")}
_PATCH_EMBED_FIELDS: dict[str, Check] = {"to": pair, "mode": SMOOTH, "antialias": flag}
MOST_SIDE = 1024  # of a patch: its resize matrix is inverted


def _in_channels_shape(op: Op, shape: Shape) -> Shape:
    dim, channels = checked(op, _IN_CHANNELS_FIELDS)
    if dim not in range(len(shape)):
        raise RuleError(f"in_channels: {in_words(shape)} has no dimension {dim}")
    if 1 < channels < shape[dim]:
        raise RuleError(
            f"in_channels can't tell how {shape[dim]} channels become {channels}",
            hint="it sums to 1 or repeats to more; choose channels with slice or rows(index=[...], dim=1)",
        )
    return (*shape[:dim], channels, *shape[dim + 1 :])


def _in_channels_fill(op: Op, context: FillContext) -> Op:
    dims = len(first_shape(context))
    dim = axis(op.get("dim", 1), dims)
    if "channels" in op:
        return {"op": "in_channels", "dim": dim, "channels": op["channels"]}
    target = target_shape(context, dims, "channels", "in_channels")
    if dim not in range(dims):
        raise RuleError(f"in_channels: {in_words(target)} has no dimension {dim}")
    return {"op": "in_channels", "dim": dim, "channels": target[dim]}


def _in_channels_offer(source: Shape, target: Shape) -> Op | None:
    if len(source) not in (3, 4, 5) or len(source) != len(target):
        return None
    same = (source[0], *source[2:]) == (target[0], *target[2:])
    known = target[1] == 1 or (source[1] in (1, 3) and target[1] > source[1])
    return {"op": "in_channels"} if same and known and {source[1], target[1]} & {1, 3} else None


def _in_channels_kernel(op: Op, tensor: Tensor) -> Tensor:
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


IN_CHANNELS = Adapter(
    words="a kernel for another number N of input channels: their sum for 1, else its C repeated in turn and multiplied by C / N",
    fields=_IN_CHANNELS_FIELDS,
    infer=each_with_elements(_in_channels_shape),
    fill=_in_channels_fill,
    kernel=each(_in_channels_kernel),
    moments=cannot_follow,
    offer=between(_in_channels_offer),
    floats=True,
)


def _inflate_shape(op: Op, shape: Shape) -> Shape:
    dim, size, _ = checked(op, _INFLATE_FIELDS)
    if len(shape) not in (3, 4) or not 2 <= dim <= len(shape):
        raise RuleError(f"inflate takes a kernel such as (O, I, h, w) and a dim from 2 on, not {in_words(shape)} and dim {dim}")
    return (*shape[:dim], size, *shape[dim:])


def _inflate_fill(op: Op, context: FillContext) -> Op:
    dims = len(first_shape(context)) + 1
    dim, size = axis(op.get("dim", 2), dims), op.get("size")
    if size is None:
        target = target_shape(context, dims, "size", "inflate")
        if dim not in range(dims):
            raise RuleError(f"inflate: {in_words(target)} has no dimension {dim}")
        size = target[dim]
    return {"op": "inflate", "dim": dim, "size": size, "mode": op.get("mode", "mean")}


def _inflate_offer(source: Shape, target: Shape) -> Op | None:
    inserted = len(source) == 4 and len(target) == 5 and (*target[:2], *target[3:]) == source
    return {"op": "inflate"} if inserted and target[2] > 1 else None  # a size of 1 needs a reshape only


def _inflate_kernel(op: Op, tensor: Tensor) -> Tensor:
    dim, size = op["dim"], op["size"]
    result = tensor.new_zeros(*tensor.shape[:dim], size, *tensor.shape[dim:])
    if op["mode"] == "center":
        result.select(dim, size // 2).copy_(tensor)
    else:
        result.copy_((widened(tensor) / size).to(tensor.dtype).unsqueeze(dim))
    return result


INFLATE = Adapter(
    words="a kernel with one dimension more: repeated and divided by its size (mean), or at its middle with zeros around (center)",
    fields=_INFLATE_FIELDS,
    infer=each_with_elements(_inflate_shape),
    fill=_inflate_fill,
    kernel=each(_inflate_kernel),
    moments=cannot_follow,
    offer=between(_inflate_offer),
    floats=True,
    source="Carreira & Zisserman 2017 (arXiv:1705.07750)",
)


def _patch_embed_shape(op: Op, shape: Shape) -> Shape:
    to, _, _ = checked(op, _PATCH_EMBED_FIELDS)
    if len(shape) != 4 or max(*shape[2:], *to) > MOST_SIDE:
        raise RuleError(f"patch_embed takes (D, C, h, w) of sides up to {MOST_SIDE}, not {in_words(shape)} to {to[0]} x {to[1]}")
    return (*shape[:2], *to)


def _patch_embed_fill(op: Op, context: FillContext) -> Op:
    to = op["to"] if "to" in op else target_shape(context, 4, "to", "patch_embed")[2:]
    return {"op": "patch_embed", "to": list(to), "mode": op.get("mode", "bicubic"), "antialias": op.get("antialias", True)}


def _patch_embed_offer(source: Shape, target: Shape) -> Op | None:
    if len(source) != 4 or len(target) != 4 or source[:2] != target[:2]:
        return None
    square = source[2] == source[3] >= 4 and target[2] == target[3] >= 4  # a smaller one may be any convolution
    return {"op": "patch_embed"} if square else None


def _patch_embed_kernel(op: Op, tensor: Tensor) -> Tensor:
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


PATCH_EMBED = Adapter(
    words="a patch embedding for another patch size: w' = pinv(Bᵀ) w, B the resize of a patch as a matrix",
    fields=_PATCH_EMBED_FIELDS,
    infer=each_with_elements(_patch_embed_shape),
    fill=_patch_embed_fill,
    kernel=each(_patch_embed_kernel),
    moments=cannot_follow,
    offer=between(_patch_embed_offer),
    floats=True,
    source="Beyer et al. 2023 (arXiv:2212.08013)",
)
