"""Adapters that give position embeddings and bias tables another grid.

`interpolate` gives an absolute position embedding another grid.

>>> import torch
>>> op = {"prefix": 1, "grid": [1, 1], "to": [1, 2], "mode": "bilinear", "antialias": False, "layout": "channels_last"}
>>> INTERPOLATE.kernel(op, [torch.tensor([[7.0], [3.0]])], None)[0].tolist()
[[7.0], [3.0], [3.0]]

`relative_position_bias` resizes a table of relative positions for another window.

>>> op = {"grid": [1, 1], "to": [1, 2], "extra": 0, "mode": "bilinear"}
>>> RELATIVE_POSITION_BIAS.kernel(op, [torch.tensor([[5.0]])], None)[0].tolist()
[[5.0], [5.0], [5.0]]
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from ckptsurgeon.adapters.op import Adapter, Check, FillContext, Op, Shape, Tensor, cannot_follow, each, flag, one_of, whole
from ckptsurgeon.adapters.shapes import checked, in_words
from ckptsurgeon.adapters.vision.sizes import (
    SMOOTH,
    between,
    each_with_elements,
    first_shape,
    pair,
    resize,
    resize_tokens,
    square_root,
    target_shape,
)
from ckptsurgeon.adapters.widening import widened
from ckptsurgeon.errors import RuleError

MOST_PREFIX = 8  # class and register tokens that are inferred; more have to be given
BEIT = 3  # rows below the window's: class to patch, patch to class, class to class
_BIAS_FIELDS: dict[str, Check] = {"grid": pair, "to": pair, "extra": whole, "mode": SMOOTH}
_INTERPOLATE_FIELDS: dict[str, Check] = {
    "prefix": whole,
    "grid": pair,
    "to": pair,
    "mode": one_of("bicubic", "bilinear", "nearest"),
    "antialias": flag,
    "layout": one_of("channels_last", "channels_first"),
}


def _plane(op: Op, shape: Shape) -> int | None:
    """The dimension of the grid's height; None where the tensor has tokens instead."""
    channels_first = op.get("layout", "channels_last") == "channels_first"
    if len(shape) not in ((3, 4) if channels_first else (2, 3, 4)):
        accepted = "(1, D, H, W) or (D, H, W)" if channels_first else "(1, N, D), (N, D) or (1, H, W, D)"
        raise RuleError(f"interpolate takes {accepted}, not {in_words(shape)}", hint="layout='channels_first' is for (1, D, H, W)")
    return len(shape) - 2 if channels_first else 1 if len(shape) == 4 else None


def _interpolate_shape(op: Op, shape: Shape) -> Shape:
    prefix, grid, to, mode, antialias, _ = checked(op, _INTERPOLATE_FIELDS)
    if mode == "nearest" and antialias:
        raise RuleError("interpolate with mode 'nearest' has no antialias", hint="give antialias=False")
    height_dim = _plane(op, shape)
    if height_dim is None:
        if shape[-2] != prefix + prod(grid):
            raise RuleError(f"interpolate: {shape[-2]} tokens are not {prefix} and a grid of {grid[0]} x {grid[1]}")
        return (*shape[:-2], prefix + prod(to), shape[-1])
    if prefix or shape[height_dim : height_dim + 2] != tuple(grid):
        raise RuleError(f"interpolate: {in_words(shape)} has not a grid of {grid[0]} x {grid[1]} alone")
    return (*shape[:height_dim], *to, *shape[height_dim + 2 :])


def _prefixes(count: int, target_count: int | None, op: Op) -> list[int]:
    """Every number of prefix tokens with which the rest, on both sides, is the grid that the op gives, or else a square."""
    grid, to = op.get("grid"), op.get("to")

    def fits(prefix: int) -> bool:
        source_fits = prod(grid) == count - prefix if grid else square_root(count - prefix) is not None
        if target_count is None:
            return source_fits
        return source_fits and (prod(to) == target_count - prefix if to else square_root(target_count - prefix) is not None)

    candidates = (
        [count - prod(grid)] if grid else [target_count - prod(to)] if to and target_count is not None else list(range(MOST_PREFIX + 1))
    )
    return [prefix for prefix in ([op["prefix"]] if "prefix" in op else candidates) if prefix >= 0 and fits(prefix)]


def _interpolate_fill(op: Op, context: FillContext) -> Op:
    shape = first_shape(context)
    height_dim = _plane(op, shape)
    to = op.get("to")
    target = (
        context.target
        if to and (context.target is None or len(context.target) != len(shape))
        else target_shape(context, len(shape), "to", "interpolate")
    )
    if height_dim is None:
        count, target_count = shape[-2], target[-2] if target is not None and len(target) == len(shape) else None
        prefixes = _prefixes(count, target_count, op)
        if len(prefixes) != 1:
            with_prefixes = (
                f"with {' or '.join(map(str, prefixes))} prefix tokens" if prefixes else "with no number of prefix tokens that fits"
            )
            into_target = f" into {target_count}" if target_count is not None else ""
            raise RuleError(
                f"interpolate can't tell the grid: {count} tokens{into_target} go {with_prefixes}",
                hint="give them: interpolate(prefix=1, grid=[14, 14], to=[24, 24])",
            )
        prefix = prefixes[0]
        grid = op.get("grid") or [square_root(count - prefix)] * 2
        to = to or [square_root((target_count or 0) - prefix)] * 2
    else:
        prefix, grid = op.get("prefix", 0), op.get("grid") or shape[height_dim : height_dim + 2]
        to = to or (target or ())[height_dim : height_dim + 2]
    mode = op.get("mode", "bicubic")
    return {
        "op": "interpolate",
        "prefix": prefix,
        "grid": list(grid),
        "to": list(to),
        "mode": mode,
        "antialias": op.get("antialias", mode != "nearest"),
        "layout": op.get("layout", "channels_last"),
    }


def _interpolate_offer(source: Shape, target: Shape) -> Op | None:
    if len(source) != len(target) or source[-1:] != target[-1:] or len(source) not in (2, 3, 4):
        return None
    if len(source) > 2 and not source[0] == target[0] == 1:
        return None
    if len(source) == 4:
        return {"op": "interpolate"} if source[1] == source[2] > 1 and target[1] == target[2] > 1 else None
    prefixes = _prefixes(source[-2], target[-2], {}) if source[-2] != target[-2] else []
    return {"op": "interpolate", "prefix": prefixes[0]} if len(prefixes) == 1 else None


def _interpolate_kernel(op: Op, tensor: Tensor) -> Tensor:
    to = (op["to"][0], op["to"][1])
    if op["layout"] == "channels_first":
        planes = tensor if tensor.dim() == 4 else tensor.unsqueeze(0)
        return resize(widened(planes), op, to, op["antialias"]).to(tensor.dtype).reshape(*tensor.shape[:-2], *to)
    if tensor.dim() == 4:
        return resize(widened(tensor.permute(0, 3, 1, 2)), op, to, op["antialias"]).permute(0, 2, 3, 1).to(tensor.dtype).contiguous()
    prefix = op["prefix"]
    tokens = tensor if tensor.dim() == 3 else tensor.unsqueeze(0)
    result = tokens.new_empty(tokens.shape[0], prefix + to[0] * to[1], tokens.shape[2])
    result[:, :prefix].copy_(tokens[:, :prefix])
    result[:, prefix:].copy_(resize_tokens(tokens[:, prefix:], op, (op["grid"][0], op["grid"][1]), to, op["antialias"]))
    return result if tensor.dim() == 3 else result.squeeze(0)


INTERPOLATE = Adapter(
    words="an absolute position embedding for another grid: its first `prefix` tokens stay, the grid's are interpolated",
    fields=_INTERPOLATE_FIELDS,
    infer=each_with_elements(_interpolate_shape),
    fill=_interpolate_fill,
    kernel=each(_interpolate_kernel),
    moments=cannot_follow,
    offer=between(_interpolate_offer),
    floats=True,
    source="torch.nn.functional.interpolate, align_corners=False",
)


def _entries(window: Sequence[int]) -> int:
    return (2 * window[0] - 1) * (2 * window[1] - 1)


def _window(entries: int) -> int | None:
    """The side of the square window whose table has that many entries."""
    side = square_root(entries)
    return (side + 1) // 2 if side is not None and side % 2 else None


def _bias_shape(op: Op, shape: Shape) -> Shape:
    grid, to, extra, _ = checked(op, _BIAS_FIELDS)
    if len(shape) != 2 or shape[0] != _entries(grid) + extra:
        rows = f"{_entries(grid)} + {extra} rows, which a window of {grid[0]} x {grid[1]} needs"
        raise RuleError(f"relative_position_bias: {in_words(shape)} is no table of {rows}")
    return (_entries(to) + extra, shape[1])


def _bias_fill(op: Op, context: FillContext) -> Op:
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


def _bias_offer(source: Shape, target: Shape) -> Op | None:
    if len(source) != 2 or len(target) != 2 or source[1] != target[1]:
        return None
    for extra in (0, BEIT):
        if min(source[0], target[0]) > extra and _window(source[0] - extra) and _window(target[0] - extra):
            return {"op": "relative_position_bias", **({"extra": extra} if extra else {})}
    return None


def _bias_kernel(op: Op, tensor: Tensor) -> Tensor:
    (h, w), (to_h, to_w) = ((2 * window[0] - 1, 2 * window[1] - 1) for window in (op["grid"], op["to"]))
    result = tensor.new_empty(to_h * to_w + op["extra"], tensor.shape[1])
    result[: to_h * to_w].copy_(resize_tokens(tensor[: h * w].unsqueeze(0), op, (h, w), (to_h, to_w), False).squeeze(0))
    result[to_h * to_w :].copy_(tensor[h * w :])
    return result


RELATIVE_POSITION_BIAS = Adapter(
    words="a table of (2h-1)(2w-1) relative positions for another window h x w: interpolated, its last `extra` rows stay",
    fields=_BIAS_FIELDS,
    infer=each_with_elements(_bias_shape),
    fill=_bias_fill,
    kernel=each(_bias_kernel),
    moments=cannot_follow,
    offer=between(_bias_offer),
    floats=True,
    source="Liu et al. 2021 (arXiv:2103.14030); Bao et al. 2021 (arXiv:2106.08254)",
)
