"""Adapters of vision models: position embeddings, bias tables, patch embeddings and convolutions of another size.

A size is told by the shapes only where they allow one answer; otherwise the rule has to give it. Sizes are height before width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isqrt, prod
from typing import Any

from ckptsurgeon.adapters.op import Adapter, Check, Op, Place, Shape, flag, one_of, signed, whole
from ckptsurgeon.errors import RuleError

MOST_PREFIX = 8  # class and register tokens that are looked for; more have to be given
MOST_SIDE = 1024  # of a patch: its resize matrix is inverted
MOST_ELEMENTS = 1 << 62


def positive(value: Any) -> bool:
    """A whole number from 1 up."""
    return whole(value) and value > 0


def pair(value: Any) -> bool:
    """A height and a width."""
    return type(value) in (list, tuple) and len(value) == 2 and all(map(positive, value))


_SMOOTH = one_of("bicubic", "bilinear")
_INTERPOLATE: dict[str, Check] = {
    "prefix": whole,
    "grid": pair,
    "to": pair,
    "mode": one_of("bicubic", "bilinear", "nearest"),
    "antialias": flag,
    "layout": one_of("channels_last", "channels_first"),
}
_TABLE: dict[str, Check] = {"grid": pair, "to": pair, "extra": whole, "mode": _SMOOTH}
_PATCH: dict[str, Check] = {"to": pair, "mode": _SMOOTH, "antialias": flag}
_CHANNELS: dict[str, Check] = {"dim": signed, "channels": positive}
_INFLATE: dict[str, Check] = {"dim": signed, "size": positive, "mode": one_of("mean", "center")}


def _values(op: Op, checks: Mapping[str, Check]) -> tuple[Any, ...]:
    """The fields of a filled op in the order of its checks; RuleError if it has others, or one that it can't have."""
    lacks = [name for name in checks if name not in op]
    wrong = [name for name, value in op.items() if name != "op" and not (name in checks and checks[name](value))]
    if lacks or wrong:
        raise RuleError(f"the op {op.get('op')} " + (f"lacks {lacks[0]!r}" if lacks else f"can't have {wrong[0]!r:.60} as it is"))
    return tuple(op[name] for name in checks)


def _each(one: Callable[[Op, Shape], Shape]) -> Callable[[Op, tuple[Shape, ...]], tuple[Shape, ...]]:
    """`infer` of an op that maps over every tensor; one without elements, or with too many, is refused."""

    def infer(op: Op, shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
        found = tuple(one(op, shape) for shape in shapes)
        for shape in (*shapes, *found):
            if not 0 < prod(shape) < MOST_ELEMENTS:
                raise RuleError(f"{op['op']} can't compute with {_text(shape)}")
        return found

    return infer


def _between(one: Callable[[Shape, Shape], Op | None]) -> Callable[[Shape, Shape], Op | None]:
    """`offer` of an op that makes a shape another one, both with elements."""
    return lambda source, target: one(source, target) if source != target and 0 not in (*source, *target) else None


def _text(shape: Sequence[int]) -> str:
    return f"the shape ({', '.join(map(str, shape))})"


def _first(place: Place) -> Shape:
    if not place.shapes:
        raise RuleError("has no tensor to work on")
    return place.shapes[0]


def _root(number: int) -> int | None:
    """The side of a square of at least 2 x 2."""
    side = isqrt(max(number, 0))
    return side if side > 1 and side * side == number else None


def _axis(dim: int, dims: int) -> int:
    return dim + dims if dim < 0 else dim


def _wanted(place: Place, dims: int, field: str, name: str) -> Shape:
    """The wanted shape, where a field has to be told from it."""
    if place.wanted is None or len(place.wanted) != dims:
        found = "the target's shape is not known" if place.wanted is None else f"{_text(place.wanted)} has not {dims} dimensions"
        raise RuleError(f"{name} can't tell {field}: {found}", hint=f"give {field}=, as in {name}({field}=...)")
    return place.wanted


# --- absolute position embeddings


def _plane(op: Op, shape: Shape) -> int | None:
    """The dimension where the grid's height stands; None where the tensor has tokens instead."""
    first = op.get("layout", "channels_last") == "channels_first"
    if len(shape) not in ((3, 4) if first else (2, 3, 4)):
        form = "(1, D, H, W) or (D, H, W)" if first else "(1, N, D), (N, D) or (1, H, W, D)"
        raise RuleError(f"interpolate takes {form}, not {_text(shape)}", hint="layout='channels_first' is for (1, D, H, W)")
    return len(shape) - 2 if first else 1 if len(shape) == 4 else None


def _interpolate_shape(op: Op, shape: Shape) -> Shape:
    prefix, grid, to, mode, antialias, _ = _values(op, _INTERPOLATE)
    if mode == "nearest" and antialias:
        raise RuleError("interpolate with mode 'nearest' has no antialias", hint="give antialias=False")
    at = _plane(op, shape)
    if at is None:
        if shape[-2] != prefix + prod(grid):
            raise RuleError(f"interpolate: {shape[-2]} tokens are not {prefix} and a grid of {grid[0]} x {grid[1]}")
        return (*shape[:-2], prefix + prod(to), shape[-1])
    if prefix or shape[at : at + 2] != tuple(grid):
        raise RuleError(f"interpolate: {_text(shape)} has not a grid of {grid[0]} x {grid[1]} alone")
    return (*shape[:at], *to, *shape[at + 2 :])


def _prefixes(count: int, wanted: int | None, op: Op) -> list[int]:
    """Every number of prefix tokens with which the rest, on both sides, is the grid that the op gives, or else a square."""
    grid, to = op.get("grid"), op.get("to")

    def fits(prefix: int) -> bool:
        source = prod(grid) == count - prefix if grid else _root(count - prefix) is not None
        if wanted is None:
            return source
        return source and (prod(to) == wanted - prefix if to else _root(wanted - prefix) is not None)

    known = [count - prod(grid)] if grid else [wanted - prod(to)] if to and wanted is not None else list(range(MOST_PREFIX + 1))
    return [prefix for prefix in ([op["prefix"]] if "prefix" in op else known) if prefix >= 0 and fits(prefix)]


def _interpolate_fill(op: Op, place: Place) -> Op:
    shape = _first(place)
    at = _plane(op, shape)
    to = op.get("to")
    wanted = (
        place.wanted
        if to and (place.wanted is None or len(place.wanted) != len(shape))
        else _wanted(place, len(shape), "to", "interpolate")
    )
    if at is None:
        count, goal = shape[-2], wanted[-2] if wanted is not None and len(wanted) == len(shape) else None
        found = _prefixes(count, goal, op)
        if len(found) != 1:
            several = f"with {' or '.join(map(str, found))} prefix tokens" if found else "with no number of prefix tokens that fits"
            into = f" into {goal}" if goal is not None else ""
            raise RuleError(
                f"interpolate can't tell the grid: {count} tokens{into} go {several}",
                hint="give them: interpolate(prefix=1, grid=[14, 14], to=[24, 24])",
            )
        prefix = found[0]
        grid = op.get("grid") or [_root(count - prefix)] * 2
        to = to or [_root((goal or 0) - prefix)] * 2
    else:
        prefix, grid = op.get("prefix", 0), op.get("grid") or shape[at : at + 2]
        to = to or (wanted or ())[at : at + 2]
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
    found = _prefixes(source[-2], target[-2], {}) if source[-2] != target[-2] else []
    return {"op": "interpolate", "prefix": found[0]} if len(found) == 1 else None


# --- relative position bias tables


def _entries(window: Sequence[int]) -> int:
    return (2 * window[0] - 1) * (2 * window[1] - 1)


def _window(entries: int) -> int | None:
    """The side of the square window whose table has that many entries."""
    side = _root(entries)
    return (side + 1) // 2 if side is not None and side % 2 else None


def _table_shape(op: Op, shape: Shape) -> Shape:
    grid, to, extra, _ = _values(op, _TABLE)
    if len(shape) != 2 or shape[0] != _entries(grid) + extra:
        rows = f"{_entries(grid)} + {extra} rows, which a window of {grid[0]} x {grid[1]} needs"
        raise RuleError(f"relative_position_bias: {_text(shape)} is no table of {rows}")
    return (_entries(to) + extra, shape[1])


def _table_fill(op: Op, place: Place) -> Op:
    shape, extra = _first(place), op.get("extra", 0)
    goal = () if "to" in op else _wanted(place, 2, "to", "relative_position_bias")
    windows: list[list[int]] = []
    for field, rows in (("grid", shape), ("to", goal)):
        side = _window(rows[0] - extra) if rows and field not in op else None
        if field not in op and side is None:
            raise RuleError(
                f"relative_position_bias can't tell a window from {_text(rows)} with {extra} extra rows",
                hint="BEiT's tables have extra=3; give other windows than squares: relative_position_bias(grid=[7, 7], to=[8, 12])",
            )
        windows.append(list(op.get(field, (side, side))))
    return {"op": "relative_position_bias", "grid": windows[0], "to": windows[1], "extra": extra, "mode": op.get("mode", "bicubic")}


def _table_offer(source: Shape, target: Shape) -> Op | None:
    if len(source) != 2 or len(target) != 2 or source[1] != target[1]:
        return None
    return {"op": "relative_position_bias"} if _window(source[0]) and _window(target[0]) else None


# --- patch embeddings and convolutions


def _patch_shape(op: Op, shape: Shape) -> Shape:
    to, _, _ = _values(op, _PATCH)
    if len(shape) != 4 or max(*shape[2:], *to) > MOST_SIDE:
        raise RuleError(f"patch_embed takes (D, C, h, w) of sides up to {MOST_SIDE}, not {_text(shape)} to {to[0]} x {to[1]}")
    return (*shape[:2], *to)


def _patch_fill(op: Op, place: Place) -> Op:
    to = op["to"] if "to" in op else _wanted(place, 4, "to", "patch_embed")[2:]
    return {"op": "patch_embed", "to": list(to), "mode": op.get("mode", "bicubic"), "antialias": op.get("antialias", True)}


def _patch_offer(source: Shape, target: Shape) -> Op | None:
    if len(source) != 4 or len(target) != 4 or source[:2] != target[:2]:
        return None
    square = source[2] == source[3] >= 4 and target[2] == target[3] >= 4  # a smaller one may be any convolution
    return {"op": "patch_embed"} if square else None


def _channels_shape(op: Op, shape: Shape) -> Shape:
    dim, channels = _values(op, _CHANNELS)
    if dim not in range(len(shape)):
        raise RuleError(f"in_channels: {_text(shape)} has no dimension {dim}")
    if 1 < channels < shape[dim]:
        raise RuleError(
            f"in_channels can't tell how {shape[dim]} channels become {channels}",
            hint="it sums to 1 or repeats to more; choose channels with slice or rows(index=[...], dim=1)",
        )
    return (*shape[:dim], channels, *shape[dim + 1 :])


def _channels_fill(op: Op, place: Place) -> Op:
    dims = len(_first(place))
    dim = _axis(op.get("dim", 1), dims)
    if "channels" in op:
        return {"op": "in_channels", "dim": dim, "channels": op["channels"]}
    wanted = _wanted(place, dims, "channels", "in_channels")
    if dim not in range(dims):
        raise RuleError(f"in_channels: {_text(wanted)} has no dimension {dim}")
    return {"op": "in_channels", "dim": dim, "channels": wanted[dim]}


def _channels_offer(source: Shape, target: Shape) -> Op | None:
    if len(source) not in (3, 4, 5) or len(source) != len(target):
        return None
    same = (source[0], *source[2:]) == (target[0], *target[2:])
    known = target[1] == 1 or (source[1] in (1, 3) and target[1] > source[1])
    return {"op": "in_channels"} if same and known and {source[1], target[1]} & {1, 3} else None


def _inflate_shape(op: Op, shape: Shape) -> Shape:
    dim, size, _ = _values(op, _INFLATE)
    if len(shape) not in (3, 4) or not 2 <= dim <= len(shape):
        raise RuleError(f"inflate takes a kernel such as (O, I, h, w) and a dim from 2 on, not {_text(shape)} and dim {dim}")
    return (*shape[:dim], size, *shape[dim:])


def _inflate_fill(op: Op, place: Place) -> Op:
    dims = len(_first(place)) + 1
    dim, size = _axis(op.get("dim", 2), dims), op.get("size")
    if size is None:
        wanted = _wanted(place, dims, "size", "inflate")
        if dim not in range(dims):
            raise RuleError(f"inflate: {_text(wanted)} has no dimension {dim}")
        size = wanted[dim]
    return {"op": "inflate", "dim": dim, "size": size, "mode": op.get("mode", "mean")}


def _inflate_offer(source: Shape, target: Shape) -> Op | None:
    inserted = len(source) == 4 and len(target) == 5 and (*target[:2], *target[3:]) == source
    return {"op": "inflate"} if inserted and target[2] > 1 else None  # a size of 1 needs a reshape only


VISION: dict[str, Adapter] = {
    "interpolate": Adapter(
        "an absolute position embedding for another grid: its first `prefix` tokens stay, the grid's are interpolated",
        _INTERPOLATE,
        _each(_interpolate_shape),
        _interpolate_fill,
        offer=_between(_interpolate_offer),
        floats=True,
        source="torch.nn.functional.interpolate, align_corners=False",
    ),
    "relative_position_bias": Adapter(
        "a table of (2h-1)(2w-1) relative positions for another window h x w: interpolated, its last `extra` rows stay",
        _TABLE,
        _each(_table_shape),
        _table_fill,
        offer=_between(_table_offer),
        floats=True,
        source="Liu et al. 2021 (arXiv:2103.14030); Bao et al. 2021 (arXiv:2106.08254)",
    ),
    "patch_embed": Adapter(
        "a patch embedding for another patch size: w' = pinv(Bᵀ) w, B the resize of a patch as a matrix",
        _PATCH,
        _each(_patch_shape),
        _patch_fill,
        offer=_between(_patch_offer),
        floats=True,
        source="Beyer et al. 2023 (arXiv:2212.08013)",
    ),
    "in_channels": Adapter(
        "a kernel for another number N of input channels: their sum for 1, else its C repeated in turn and multiplied by C / N",
        _CHANNELS,
        _each(_channels_shape),
        _channels_fill,
        offer=_between(_channels_offer),
        floats=True,
        source="",
    ),
    "inflate": Adapter(
        "a kernel with one dimension more: repeated and divided by its size (mean), or at its middle with zeros around (center)",
        _INFLATE,
        _each(_inflate_shape),
        _inflate_fill,
        offer=_between(_inflate_offer),
        floats=True,
        source="Carreira & Zisserman 2017 (arXiv:1705.07750)",
    ),
}
