"""`relative_position_bias` resizes a table of relative positions for another window.

>>> import torch
>>> op = {"grid": [1, 1], "to": [1, 2], "extra": 0, "mode": "bilinear"}
>>> ADAPTER.kernel(op, [torch.tensor([[5.0]])], None)[0].tolist()
[[5.0], [5.0], [5.0]]
"""

from __future__ import annotations

from collections.abc import Sequence

from ckptsurgeon.adapters.op import Adapter, Check, FillContext, Op, Shape, Tensor, cannot_follow, each, whole
from ckptsurgeon.adapters.shapes import checked, in_words
from ckptsurgeon.adapters.vision.resize import resize_tokens
from ckptsurgeon.adapters.vision.sizes import SMOOTH, between, each_with_elements, first_shape, pair, square_root, target_shape
from ckptsurgeon.errors import RuleError

BEIT = 3  # rows below the window's: class to patch, patch to class, class to class
_FIELDS: dict[str, Check] = {"grid": pair, "to": pair, "extra": whole, "mode": SMOOTH}


def _entries(window: Sequence[int]) -> int:
    return (2 * window[0] - 1) * (2 * window[1] - 1)


def _window(entries: int) -> int | None:
    """The side of the square window whose table has that many entries."""
    side = square_root(entries)
    return (side + 1) // 2 if side is not None and side % 2 else None


def _shape(op: Op, shape: Shape) -> Shape:
    grid, to, extra, _ = checked(op, _FIELDS)
    if len(shape) != 2 or shape[0] != _entries(grid) + extra:
        rows = f"{_entries(grid)} + {extra} rows, which a window of {grid[0]} x {grid[1]} needs"
        raise RuleError(f"relative_position_bias: {in_words(shape)} is no table of {rows}")
    return (_entries(to) + extra, shape[1])


def _fill(op: Op, context: FillContext) -> Op:
    shape, extra = first_shape(context), op.get("extra", 0)
    target = () if "to" in op else target_shape(context, 2, "to", "relative_position_bias")
    windows: list[list[int]] = []
    for field, table in (("grid", shape), ("to", target)):
        side = _window(table[0] - extra) if table and field not in op else None
        if field not in op and side is None:
            raise RuleError(
                f"relative_position_bias can't tell a window from {in_words(table)} with {extra} extra rows",
                hint="BEiT's tables have extra=3; give other windows than squares: relative_position_bias(grid=[7, 7], to=[8, 12])",
            )
        windows.append(list(op.get(field, (side, side))))
    return {"op": "relative_position_bias", "grid": windows[0], "to": windows[1], "extra": extra, "mode": op.get("mode", "bicubic")}


def _offer(source: Shape, target: Shape) -> Op | None:
    if len(source) != 2 or len(target) != 2 or source[1] != target[1]:
        return None
    for extra in (0, BEIT):
        if min(source[0], target[0]) > extra and _window(source[0] - extra) and _window(target[0] - extra):
            return {"op": "relative_position_bias", **({"extra": extra} if extra else {})}
    return None


def _kernel(op: Op, tensor: Tensor) -> Tensor:
    (h, w), (to_h, to_w) = ((2 * window[0] - 1, 2 * window[1] - 1) for window in (op["grid"], op["to"]))
    result = tensor.new_empty(to_h * to_w + op["extra"], tensor.shape[1])
    result[: to_h * to_w].copy_(resize_tokens(tensor[: h * w].unsqueeze(0), op, (h, w), (to_h, to_w), False).squeeze(0))
    result[to_h * to_w :].copy_(tensor[h * w :])
    return result


ADAPTER = Adapter(
    words="a table of (2h-1)(2w-1) relative positions for another window h x w: interpolated, its last `extra` rows stay",
    fields=_FIELDS,
    infer=each_with_elements(_shape),
    fill=_fill,
    kernel=each(_kernel),
    moments=cannot_follow,
    offer=between(_offer),
    floats=True,
    source="Liu et al. 2021 (arXiv:2103.14030); Bao et al. 2021 (arXiv:2106.08254)",
)
