"""`reshape` keeps the elements in row-major order and gives them another shape.

>>> import torch
>>> ADAPTER.kernel({"shape": [3, 2]}, [torch.tensor([[1, 2, 3], [4, 5, 6]])], None)[0].tolist()
[[1, 2], [3, 4], [5, 6]]
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from ckptsurgeon.adapters.op import Adapter, FillContext, Op, Shape, each, list_of, same_op, signed
from ckptsurgeon.adapters.shapes import bounded, from_front, need, refused, whole_ranges


def _shape(op: Op, shape: Shape) -> Shape:
    result = tuple(need(op, "shape"))
    if result.count(-1) == 1 and (rest := prod(size for size in result if size != -1)) and prod(shape) % rest == 0:
        result = tuple(prod(shape) // rest if size == -1 else size for size in result)
    if any(size < 0 for size in result) or prod(result) != prod(shape):
        raise refused(op, f"makes {str(result)[:60]} of {shape}: not the same number of elements")
    return bounded(op, result)


def _fill(op: Op, context: FillContext) -> Op:
    shape = op.get("shape", context.target)
    if shape is None:
        raise refused(op, "does not know the shape that must come out", "write reshape(shape=[...])")
    sizes = list(shape)
    if sizes.count(-1) > 1:
        raise refused(op, f"leaves more than one size open in {sizes[:8]}", "write -1 once at most")
    if -1 in sizes:
        totals, rest = {prod(shape) for shape in context.shapes} or {0}, prod(size for size in sizes if size != -1)
        total = next((total for total in totals if not rest or total % rest), None)
        if total is not None:
            raise refused(op, f"can't tell -1 in {sizes[:8]} for {total} elements")
        if len(totals) == 1:  # else -1 is another size for each
            sizes[sizes.index(-1)] = totals.pop() // rest
    return {"op": "reshape", "shape": sizes}


def fill_as_reshape(shape_of: Callable[[Op, Shape], Shape], added: int) -> Callable[[Op, FillContext], Op]:
    """The `fill` of an op that adds or removes dims of size 1: a `reshape`, unless the tensors differ in shape."""

    def fill(op: Op, context: FillContext) -> Op:
        with_dim = {**op, "dim": from_front(op, op["dim"], context.shapes, added)} if "dim" in op else op
        results = list(dict.fromkeys(shape_of(with_dim, shape) for shape in context.shapes))
        return {"op": "reshape", "shape": list(results[0])} if len(results) == 1 else with_dim

    return fill


def _offer(source: Shape, target: Shape) -> Op | None:
    """Only where dims of size 1 are removed or added: a (1, 5) that becomes (5, 1) may be a transpose."""
    short, long = sorted((source, target), key=len)
    sizes = iter(long)
    kept = len(short) < len(long) and all(any(size == longer for longer in sizes) for size in short)
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
    safe=True,  # it only offers to add and remove dims of size 1
)
