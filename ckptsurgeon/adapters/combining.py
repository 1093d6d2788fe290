"""Adapters between parts and wholes: a part of a tensor, a tensor with a part more, several tensors as one. No row or column is broken."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from ckptsurgeon.adapters.layout import bounded, each, from_front, need, part_of, refused, size_of
from ckptsurgeon.adapters.op import Adapter, Op, Place, Shape, one_of, signed, whole, wholes

_SLACK = 1e-6  # by which a plan's weights may miss a sum of 1


def _wanted(op: Op, place: Place, dim: int, field: str) -> int:
    """The target's size of a dim. RuleError, with how to write it, where it is not known."""
    if place.wanted is None or not 0 <= dim < len(place.wanted):
        raise refused(op, f"does not know {field!r}: no shape of a target to tell it by", f"write {op['op']}(dim={dim}, {field}=...)")
    return place.wanted[dim]


def _sliced(op: Op, shape: Shape) -> Shape:
    dim, start, stop = need(op, "dim"), need(op, "start"), need(op, "stop")
    size = size_of(op, dim, shape)
    if not 0 <= start <= stop <= size:
        raise refused(op, f"takes {start} to {stop} of dim {dim}, and {shape} has {size} there")
    return (*shape[:dim], stop - start, *shape[dim + 1 :])


def _filled_slice(op: Op, place: Place) -> Op:
    dim, start = from_front(op, op.get("dim", 0), place.shapes), op.get("start", 0)
    return {"op": "slice", "dim": dim, "start": start, "stop": op["stop"] if "stop" in op else start + _wanted(op, place, dim, "stop")}


_EXTRA = {"constant": "value", "init": "scheme"}  # what a fill needs beside its name


def _padded(op: Op, shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    dim, size, fill = need(op, "dim"), need(op, "size"), need(op, "fill")
    if need(op, "at") not in ("start", "end") or fill not in ("zeros", "mean", "init", "constant"):
        raise refused(op, f"has fill={str(fill)[:20]!r} and at={str(op['at'])[:20]!r}")
    if fill in _EXTRA:
        need(op, _EXTRA[fill])
    if fill == "init" and len(shapes) != 1:
        raise refused(op, f"fills {len(shapes)} tensors up with one target's initial value", "pad after they are joined")
    have = [size_of(op, dim, shape) for shape in shapes]
    if list(need(op, "given")) != have:
        raise refused(op, f"is for {op['given']} at dim {dim}, and {have} come in")
    return tuple(_padded_one(op, shape, dim, size) for shape in shapes)


def _padded_one(op: Op, shape: Shape, dim: int, size: int) -> Shape:
    have = size_of(op, dim, shape)
    if size < have:
        raise refused(op, f"makes dim {dim} {size} long, and {shape} has {have} there already", "slice takes a part")
    if op["fill"] == "mean" and size > have == 0:
        raise refused(op, f"has no mean: dim {dim} of {shape} is empty")
    return bounded(op, (*shape[:dim], size, *shape[dim + 1 :]))


def _filled_pad(op: Op, place: Place) -> Op:
    dim = from_front(op, op.get("dim", 0), place.shapes)
    fill = op.get("fill", "constant" if "value" in op else "zeros")
    for kind, field in _EXTRA.items():
        if field in op and fill != kind:
            raise refused(op, f"has {field}={op[field]!r} beside fill={fill!r}", f"write fill={kind!r} with it, or leave it out")
    size = op["size"] if "size" in op else _wanted(op, place, dim, "size")
    # Written down, so that a plan says how much of the result no source gives.
    given = [size_of(op, dim, shape) for shape in place.shapes]
    filled = {"op": "pad", "dim": dim, "size": size, "given": given, "fill": fill, "at": op.get("at", "end")}
    if fill == "constant":
        return {**filled, "value": op["value"]} if "value" in op else filled
    if fill == "init" and place.wanted is None:
        raise refused(op, "fills up with a target's initial value, and here is none", "put it last in a chain for a target")
    return {**filled, "scheme": op.get("scheme", "model")} if fill == "init" else filled


def groups(op: Op, shapes: tuple[Shape, ...]) -> Iterator[tuple[Shape, ...]]:
    """The shapes that one result is made of, result by result: each `of` in a row. RuleError where some are left."""
    of = need(op, "of")
    if of < 1 or len(shapes) % of or not shapes:
        raise refused(op, f"joins {of} tensors at a time, and {len(shapes)} come in")
    return (shapes[start : start + of] for start in range(0, len(shapes), of))


def _concatenated(op: Op, shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    dim, found = need(op, "dim"), []
    for group in groups(op, shapes):
        first, total = group[0], sum(size_of(op, dim, shape) for shape in group)
        other = next((shape for shape in group if shape[:dim] + shape[dim + 1 :] != first[:dim] + first[dim + 1 :]), None)
        if other is not None:
            raise refused(op, f"joins dim {dim} of {first} and {other}, which differ in another dim too")
        found.append(bounded(op, (*first[:dim], total, *first[dim + 1 :])))
    return tuple(found)


def _filled_concat(op: Op, place: Place) -> Op:
    dim, sizes = from_front(op, op.get("dim", 0), place.shapes), list(op.get("sizes", ()))
    filled = {"op": "concat", "dim": dim, "of": op.get("of", len(sizes) if "sizes" in op else len(place.shapes))}
    for group in groups(filled, place.shapes) if "sizes" in op else ():
        have = [size_of(op, dim, shape) for shape in group]
        if have != sizes:
            raise refused(op, f"is to join sizes {sizes[:8]} of dim {dim}, and {have[:8]} come in")
    return filled


def _chunked(op: Op, shape: Shape) -> Shape:
    dim, index, of = need(op, "dim"), need(op, "index"), need(op, "of")
    part = part_of(op, dim, of, shape)
    if not 0 <= index < of:
        raise refused(op, f"takes part {index} of {of}: parts count from 0")
    return (*shape[:dim], part, *shape[dim + 1 :])


def _filled_chunk(op: Op, place: Place) -> Op:
    dim = from_front(op, op.get("dim", 0), place.shapes)
    own = "index" not in op and op.get("of", place.of) == place.of  # each result is one part
    sizes = op.get("sizes", _sibling_sizes(place, dim) if own else None)
    of = op.get("of", place.of if sizes is None else len(sizes))
    if sizes is not None and len(sizes) != of:
        raise refused(op, f"has {len(sizes)} sizes for {of} parts")
    if "index" not in op and (of != place.of or (of == 1 and sizes is None)):
        results = "one result" if place.of == 1 else f"{place.of} results"
        raise refused(
            op, f"has {results} for {of} parts" if of > 1 else "has one result", "name each part (a -> b + c), or say index= and of="
        )
    index = op.get("index", place.index)
    if index >= of:
        raise refused(op, f"takes part {index} of {of}: parts count from 0")
    if sizes is None:
        return {"op": "chunk", "dim": dim, "index": index, "of": of}
    for shape in place.shapes:
        if size_of(op, dim, shape) != sum(sizes):
            raise refused(op, f"cuts dim {dim} into {list(sizes)[:8]}, {sum(sizes)} in all, and {shape} has {shape[dim]} there")
    if len(set(sizes)) == 1 and sizes[0]:
        return {"op": "chunk", "dim": dim, "index": index, "of": of}
    return {"op": "slice", "dim": dim, "start": sum(sizes[:index]), "stop": sum(sizes[: index + 1])}


def _sibling_sizes(place: Place, dim: int) -> list[int] | None:
    """The sizes of all results along `dim` as the target has them, if they are what comes in."""
    known = [shape[dim] for shape in place.siblings if shape is not None and dim < len(shape)]
    whole = all(dim < len(shape) and shape[dim] == sum(known) for shape in place.shapes)
    return known if whole and place.wanted is not None and len(known) == place.of > 1 else None


def _stacked(op: Op, shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    dim, found = need(op, "dim"), []
    for group in groups(op, shapes):
        first = group[0]
        other = next((shape for shape in group if shape != first), None)
        if other is not None:
            raise refused(op, f"stacks {first} and {other}, which differ")
        if not 0 <= dim <= len(first):
            raise refused(op, f"adds dim {dim}, and {first} has {len(first)} dims")
        found.append(bounded(op, (*first[:dim], len(group), *first[dim:])))
    return tuple(found)


def _filled_stack(op: Op, place: Place) -> Op:
    return {"op": "stack", "dim": from_front(op, op.get("dim", 0), place.shapes, 1), "of": op.get("of", len(place.shapes))}


def _unstacked(op: Op, shape: Shape) -> Shape:
    dim, index = need(op, "dim"), need(op, "index")
    size = size_of(op, dim, shape)
    if not 0 <= index < size:
        raise refused(op, f"takes number {index} of dim {dim}, and {shape} has {size} there (they count from 0)")
    return shape[:dim] + shape[dim + 1 :]


def _filled_unstack(op: Op, place: Place) -> Op:
    dim = from_front(op, op.get("dim", 0), place.shapes)
    index = op.get("index", place.number)
    if index is None and place.of == 1:
        raise refused(op, "does not know which one to take", "number the results ('w -> w.{i}'), name every one, or say index=")
    if index is None:
        for shape in place.shapes:
            if size_of(op, dim, shape) != place.of:
                raise refused(op, f"has {place.of} results, and {shape} has {shape[dim]} in dim {dim}")
    return {"op": "unstack", "dim": dim, "index": place.index if index is None else index}


def _averaged(op: Op, shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    weights = need(op, "weights")
    other = next((shape for shape in shapes if shape != shapes[0]), None)
    if other is not None:
        raise refused(op, f"goes over {shapes[0]} and {other}, which differ")
    if not shapes or len(weights) != len(shapes):
        raise refused(op, f"has {len(weights)} weights for {len(shapes)} tensors")
    if not all(0 <= weight <= 1 + _SLACK for weight in weights) or abs(math.fsum(weights) - 1) > _SLACK:
        raise refused(op, "has weights in the plan that do not sum to 1")
    return (shapes[0],)


def _filled_average(op: Op, place: Place) -> Op:
    weights = op.get("weights", [1] * len(place.shapes))
    largest = max(weights, default=0)
    if largest <= 0 or min(weights) < 0:
        raise refused(op, f"has weights {list(weights)[:8]}", "weights are not negative, and one at least is more than 0")
    scaled = [weight / largest for weight in weights]  # first, so that no sum overflows
    return {"op": "average", "weights": [weight / math.fsum(scaled) for weight in scaled]}


def _number(value: Any) -> bool:
    return (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) < 1 << 62)


def _numbers(value: Any) -> bool:
    return type(value) in (list, tuple) and all(map(_number, value))


def _name(value: Any) -> bool:
    return type(value) is str and 0 < len(value) <= 200


COMBINING: dict[str, Adapter] = {
    "slice": Adapter(
        "elements `start` (0) to `stop` of dim `dim`, `stop` left out; without it as many as the target has",
        {"dim": signed, "start": whole, "stop": whole},
        each(_sliced),
        _filled_slice,
    ),
    "pad": Adapter(
        "makes dim `dim` `size` long (the target's) by zeros, a `value`, the mean over that dim, or the target's initial value",
        {
            "dim": signed,
            "size": whole,
            "fill": one_of("zeros", "mean", "init", "constant"),
            "at": one_of("end", "start"),
            "value": _number,
            "scheme": _name,
            "given": wholes,
        },
        _padded,
        _filled_pad,
        planned=("given",),
    ),
    "concat": Adapter(
        "joins all tensors, or each `of` in a row, along dim `dim`; `sizes` are held against what comes in",
        {"dim": signed, "sizes": wholes, "of": whole},
        _concatenated,
        _filled_concat,
        lambda op: {**op, "op": "chunk"},
    ),
    "chunk": Adapter(
        "cuts dim `dim` into parts, one for each result: of `sizes`, else of the results' own sizes in the target, else equal ones",
        {"dim": signed, "sizes": wholes, "index": whole, "of": whole},
        each(_chunked),
        _filled_chunk,
        lambda op: None if "index" in op else {**op, "op": "concat"},
    ),
    "stack": Adapter(
        "makes all tensors, or each `of` in a row, one along a new dim `dim`: out[i] = in_i",
        {"dim": signed, "of": whole},
        _stacked,
        _filled_stack,
        lambda op: None if "of" in op else {**op, "op": "unstack"},
    ),
    "unstack": Adapter(
        "number `index` of dim `dim`, without that dim; the index is what the result's name says: out = in[index]",
        {"dim": signed, "index": whole},
        each(_unstacked),
        _filled_unstack,
        lambda op: None if "index" in op else {**op, "op": "stack"},
    ),
    "average": Adapter(
        "the mean of all tensors, by `weights` if given: out = sum of w_i * in_i, where the sum of w_i is 1",
        {"weights": _numbers},
        _averaged,
        _filled_average,
        floats=True,
        complexes=True,
        source="Wortsman et al. 2022, Model soups, arXiv:2203.05482",
    ),
}
