"""What vision adapters share about shapes: checks of their fields, sides of squares, and what is refused without elements."""

from __future__ import annotations

from collections.abc import Callable
from math import isqrt, prod
from typing import Any

from ckptsurgeon.adapters.op import Op, Place, Shape, one_of, whole
from ckptsurgeon.adapters.shapes import MOST_ELEMENTS, in_words
from ckptsurgeon.errors import RuleError

SMOOTH = one_of("bicubic", "bilinear")


def positive(value: Any) -> bool:
    """A whole number from 1 up."""
    return whole(value) and value > 0


def pair(value: Any) -> bool:
    """A height and a width."""
    return type(value) in (list, tuple) and len(value) == 2 and all(map(positive, value))


def each_with_elements(one: Callable[[Op, Shape], Shape]) -> Callable[[Op, tuple[Shape, ...]], tuple[Shape, ...]]:
    """`infer` of an op that takes every tensor by itself; one without elements, or with too many, is refused."""

    def infer(op: Op, shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
        found = tuple(one(op, shape) for shape in shapes)
        for shape in (*shapes, *found):
            if not 0 < prod(shape) < MOST_ELEMENTS:
                raise RuleError(f"{op['op']} can't compute with {in_words(shape)}")
        return found

    return infer


def between(one: Callable[[Shape, Shape], Op | None]) -> Callable[[Shape, Shape], Op | None]:
    """`offer` of an op that makes a shape another one, both with elements."""
    return lambda source, target: one(source, target) if source != target and 0 not in (*source, *target) else None


def first_shape(place: Place) -> Shape:
    """The shape of the first tensor that comes in."""
    if not place.shapes:
        raise RuleError("has no tensor to work on")
    return place.shapes[0]


def square_root(number: int) -> int | None:
    """The side of a square of at least 2 x 2."""
    side = isqrt(max(number, 0))
    return side if side > 1 and side * side == number else None


def axis(dim: int, dims: int) -> int:
    """A dim of a rule, from the front."""
    return dim + dims if dim < 0 else dim


def wanted_shape(place: Place, dims: int, field: str, name: str) -> Shape:
    """The wanted shape, where a field has to be told from it."""
    if place.wanted is None or len(place.wanted) != dims:
        found = "the target's shape is not known" if place.wanted is None else f"{in_words(place.wanted)} has not {dims} dimensions"
        raise RuleError(f"{name} can't tell {field}: {found}", hint=f"give {field}=, as in {name}({field}=...)")
    return place.wanted
