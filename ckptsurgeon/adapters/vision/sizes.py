"""What vision adapters share: checks of fields, sides of squares, errors for empty tensors, and torch's interpolation."""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt, prod
from typing import Any

from ckptsurgeon.adapters.op import FillContext, Op, Shape, Tensor, one_of, whole
from ckptsurgeon.adapters.shapes import MOST_ELEMENTS, in_words
from ckptsurgeon.adapters.widening import widened
from ckptsurgeon.errors import RuleError

SMOOTH = one_of("bicubic", "bilinear")


def positive(value: Any) -> bool:
    """A whole number from 1 up."""
    return whole(value) and value > 0


def pair(value: Any) -> bool:
    """A height and a width."""
    return type(value) in (list, tuple) and len(value) == 2 and all(map(positive, value))


def each_with_elements(shape_of: Callable[[Op, Shape], Shape]) -> Callable[[Op, tuple[Shape, ...]], tuple[Shape, ...]]:
    """`infer` of an op that treats each tensor separately. RuleError for a tensor without elements, or with too many."""

    def infer(op: Op, shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
        results = tuple(shape_of(op, shape) for shape in shapes)
        for shape in (*shapes, *results):
            if not 0 < prod(shape) < MOST_ELEMENTS:
                raise RuleError(f"{op['op']} can't compute with {in_words(shape)}")
        return results

    return infer


def between(offer: Callable[[Shape, Shape], Op | None]) -> Callable[[Shape, Shape], Op | None]:
    """`offer` of an op, called only for two different shapes without a dim of size 0."""
    return lambda source, target: offer(source, target) if source != target and 0 not in (*source, *target) else None


def first_shape(context: FillContext) -> Shape:
    """The shape of the first tensor that comes in."""
    if not context.shapes:
        raise RuleError("has no tensor to work on")
    return context.shapes[0]


def square_root(number: int) -> int | None:
    """The side of a square of at least 2 x 2."""
    side = isqrt(max(number, 0))
    return side if side > 1 and side * side == number else None


def axis(dim: int, dims: int) -> int:
    """A rule's dim, which may be negative, counted from the front."""
    return dim + dims if dim < 0 else dim


def target_shape(context: FillContext, dims: int, field: str, name: str) -> Shape:
    """The target's shape, from which a field is inferred. RuleError where it is not known or has another number of dims."""
    if context.target is None or len(context.target) != dims:
        reason = "the target's shape is not known" if context.target is None else f"{in_words(context.target)} has not {dims} dimensions"
        raise RuleError(f"{name} can't tell {field}: {reason}", hint=f"give {field}=, as in {name}({field}=...)")
    return context.target


def resize(planes: Tensor, op: Op, size: tuple[int, int], antialias: bool) -> Tensor:
    """(B, D, h, w) -> (B, D, *size), in the dtype of `planes`."""
    from torch.nn.functional import interpolate

    if antialias and size[1] == 1 < size[0]:  # torch's antialiasing is wrong there (2.13, CPU): every row comes out the same
        return resize(planes.transpose(2, 3), op, (1, size[0]), antialias).transpose(2, 3)
    corners = None if op["mode"] == "nearest" else False
    resized: Tensor = interpolate(planes, size=size, mode=op["mode"], align_corners=corners, antialias=antialias)
    return resized


def resize_tokens(tokens: Tensor, op: Op, grid: tuple[int, int], to: tuple[int, int], antialias: bool) -> Tensor:
    """(B, h·w, D) -> (B, h'·w', D), float32 or wider."""
    planes = widened(tokens).reshape(tokens.shape[0], *grid, -1).permute(0, 3, 1, 2)
    return resize(planes, op, to, antialias).permute(0, 2, 3, 1).reshape(tokens.shape[0], to[0] * to[1], -1)
