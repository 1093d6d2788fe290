"""`reshape` keeps the elements in row-major order and gives them another shape.

>>> import torch
>>> ADAPTER.kernel({"shape": [3, 2]}, [torch.tensor([[1, 2, 3], [4, 5, 6]])], None)[0].tolist()
[[1, 2], [3, 4], [5, 6]]
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from ckptsurgeon.adapters.op import Adapter, Op, Place, Shape, each, list_of, same_op, signed
from ckptsurgeon.adapters.shapes import bounded, from_front, need, refused, whole_ranges


def _shape(op: Op, shape: Shape) -> Shape:
    found = tuple(need(op, "shape"))
    if found.count(-1) == 1 and (rest := prod(size for size in found if size != -1)) and prod(shape) % rest == 0:
        found = tuple(prod(shape) // rest if size == -1 else size for size in found)
    if any(size < 0 for size in found) or prod(found) != prod(shape):
        raise refused(op, f"makes {str(found)[:60]} of {shape}: not the same number of elements")
    return bounded(op, found)


def _fill(op: Op, place: Place) -> Op:
    shape = op.get("shape", place.wanted)
    if shape is None:
        raise refused(op, "does not know the shape that must come out", "write reshape(shape=[...])")
    sizes = list(shape)
    if sizes.count(-1) > 1:
        raise refused(op, f"leaves more than one size open in {sizes[:8]}", "write -1 once at most")
    if -1 in sizes:
        totals, rest = {prod(shape) for shape in place.shapes} or {0}, prod(size for size in sizes if size != -1)
        total = next((total for total in totals if not rest or total % rest), None)
        if total is not None:
            raise refused(op, f"can't tell -1 in {sizes[:8]} for {total} elements")
        if len(totals) == 1:  # else it is another size for each
            sizes[sizes.index(-1)] = totals.pop() // rest
    return {"op": "reshape", "shape": sizes}


def fill_as_reshape(one: Callable[[Op, Shape], Shape], more: int) -> Callable[[Op, Place], Op]:
    """The `fill` of an op that adds or takes out dims of size 1: a `reshape` does the same, unless tensors of several shapes come in."""

    def fill(op: Op, place: Place) -> Op:
        named = {**op, "dim": from_front(op, op["dim"], place.shapes, more)} if "dim" in op else op
        found = list(dict.fromkeys(one(named, shape) for shape in place.shapes))
        return {"op": "reshape", "shape": list(found[0])} if len(found) == 1 else named

    return fill


def _offer(source: Shape, target: Shape) -> Op | None:
    """Only where dims of size 1 are taken out, or put in: a (1, 5) that becomes (5, 1) may be a transpose."""
    short, long = sorted((source, target), key=len)
    rest = iter(long)
    kept = len(short) < len(long) and all(any(size == other for other in rest) for size in short)
    return {"op": "reshape"} if kept and prod(short) == prod(long) else None


def _size(value: Any) -> bool:
    return signed(value) and value >= -1


ADAPTER = Adapter(
    words="the same elements in row-major order under `shape` (-1 once for what is left), without it the target's",
    fields={"shape": list_of(_size)},
    infer=each(_shape),
    fill=_fill,
    kernel=each(lambda op, tensor: tensor.reshape(tuple(op["shape"]))),
    moments=same_op,
    invert=lambda op: None if "shape" in op else op,
    offer=_offer,
    ranges=whole_ranges,
    safe=True,  # it offers to add and take out dims of size 1 alone
)
