"""`dequantize` computes values from quantised codes: value = code × scale ÷ divisor, a scale for each block of the codes.

>>> import torch
>>> op = {"block": [1, 0], "divisor": 1}
>>> DEQUANTIZE.kernel(op, [torch.tensor([[1, 2], [3, 4]], dtype=torch.int8), torch.tensor([0.5, 10.0])], None)[0].tolist()
[[0.5, 1.0], [30.0, 40.0]]
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from ckptsurgeon.adapters.op import Adapter, FillContext, Op, Shape, Tensor, cannot_follow, list_of, whole
from ckptsurgeon.adapters.shapes import need, refused
from ckptsurgeon.adapters.widening import rows_at_a_time
from ckptsurgeon.errors import RuleError

BLOCK = 128  # the size that fp8 checkpoints with block scales use; the file does not state it


def block_of(codes: Shape, scale: Shape) -> tuple[int, ...] | None:
    """The block of codes that has one scale, a size for each dim (0 for the whole dim); None where the shapes do not determine it.

    >>> block_of((256, 200), (2, 2)), block_of((4, 6), (4,)), block_of((4, 6), (4, 1)), block_of((4, 6), ()), block_of((4, 6), (3,))
    ((128, 128), (1, 0), (1, 0), (0, 0), None)
    """
    if prod(scale) == 1:
        return (0,) * len(codes)
    if len(scale) > len(codes) or not prod(codes):
        return None
    if len(scale) < len(codes):
        return (*(1 for _ in scale), *(0 for _ in codes[len(scale) :])) if scale == codes[: len(scale)] else None
    sizes = [_size(size, count) for size, count in zip(codes, scale, strict=True)]
    return None if None in sizes else tuple(size for size in sizes if size is not None)


def _size(size: int, count: int) -> int | None:
    if count in (1, size):
        return 0 if count == 1 else 1
    if count and -(-size // BLOCK) == count:
        return BLOCK
    return size // count if count and size % count == 0 else None


def grid(codes: Shape, block: Sequence[int]) -> Shape:
    """How many scales there are along each dim.

    >>> grid((256, 200), (128, 0))
    (2, 1)
    """
    return tuple(-(-size // part) if part else 1 for size, part in zip(codes, block, strict=True))


def _pairs(op: Op, shapes: tuple[Shape, ...]) -> list[tuple[Shape, Shape]]:
    if not shapes or len(shapes) % 2:
        raise refused(op, f"takes codes and their scale by turns, and {len(shapes)} tensors come in")
    return list(zip(shapes[::2], shapes[1::2], strict=True))


def _infer(op: Op, shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    block, divisor = need(op, "block"), need(op, "divisor")
    for codes, scale in _pairs(op, shapes):
        if divisor < 1 or len(block) != len(codes) or prod(grid(codes, block)) != prod(scale):
            raise refused(op, f"has blocks {list(block)[:8]} and divisor {divisor}, which codes {codes} and scales {scale} do not have")
    return shapes[::2]


def _fill(op: Op, context: FillContext) -> Op:
    blocks = {block_of(codes, scale) for codes, scale in _pairs(op, context.shapes)}
    block = op.get("block", next(iter(blocks)) if len(blocks) == 1 else None)
    if block is None:
        raise RuleError("dequantize can't tell the blocks by the shapes", hint="write dequantize(block=[128, 128])")
    return {"op": "dequantize", "block": list(block), "divisor": op.get("divisor", 1)}


def _rows(op: Op, tensors: Sequence[Tensor], shape: Shape, start: int) -> Tensor:
    """The values of some rows of codes, those from `start` of codes of `shape`; their scale is whole."""
    import torch

    (codes, scale), block = tensors, op["block"]
    factor = (scale.view(torch.float8_e8m0fnu) if scale.dtype == torch.uint8 else scale).float().reshape(grid(shape, block))
    for dim, part in enumerate(block):
        first_index = start if dim == 0 else 0
        if part:
            factor = factor.index_select(dim, torch.arange(first_index, first_index + codes.shape[dim]) // part)
    values = codes.float() * factor
    return values * (1 / op["divisor"]) if op["divisor"] != 1 else values  # rounded as bitsandbytes does it


def _values(op: Op, codes: Tensor, scale: Tensor) -> Tensor:
    import torch

    shape = tuple(codes.shape)
    if not shape:
        return _rows(op, [codes, scale], shape, 0)
    out, step = torch.empty(shape, dtype=torch.float32), rows_at_a_time(shape)
    for start in range(0, shape[0], step):
        out[start : start + step] = _rows(op, [codes[start : start + step], scale], shape, start)
    return out


DEQUANTIZE = Adapter(
    words="float32 values of codes and their scale, by turns: "
    "out = code * scale / divisor (1), a scale for each `block` (0 is a whole dim)",
    fields={"block": list_of(whole), "divisor": whole},
    infer=_infer,
    fill=_fill,
    kernel=lambda op, tensors, _initial: [_values(op, *pair) for pair in zip(tensors[::2], tensors[1::2], strict=True)],
    moments=cannot_follow,
    output_dtype="F32",
    decodes=True,
    by_rows=_rows,
)
