"""Adapters that change the dims of one tensor.

`transpose` swaps two dims.

>>> import torch
>>> TRANSPOSE.kernel({"dims": [0, 1]}, [torch.tensor([[1, 2, 3], [4, 5, 6]])], None)[0].tolist()
[[1, 4], [2, 5], [3, 6]]

`permute` puts all dims in another order.

>>> PERMUTE.kernel({"dims": [2, 0, 1]}, [torch.zeros(2, 3, 4)], None)[0].shape
torch.Size([4, 2, 3])

`reshape` keeps the elements in row-major order and gives them another shape.

>>> RESHAPE.kernel({"shape": [3, 2]}, [torch.tensor([[1, 2, 3], [4, 5, 6]])], None)[0].tolist()
[[1, 2], [3, 4], [5, 6]]

`squeeze` removes a dim of size 1, or all of them.

>>> SQUEEZE.kernel({"dim": 0}, [torch.zeros(1, 3, 1)], None)[0].shape
torch.Size([3, 1])

`unsqueeze` adds a dim of size 1.

>>> UNSQUEEZE.kernel({"dim": 1}, [torch.zeros(4, 3)], None)[0].shape
torch.Size([4, 1, 3])
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

from ckptsurgeon.adapters.op import Adapter, FillContext, Op, Shape, each, list_of, same_op, signed
from ckptsurgeon.adapters.shapes import bounded, from_front, need, refused, size_of, whole_ranges


def _transpose_shape(op: Op, shape: Shape) -> Shape:
    dims = need(op, "dims")
    if len(dims) != 2 or dims[0] == dims[1]:
        raise refused(op, f"swaps two dims, not {list(dims)[:4]}")
    swapped = list(shape)
    swapped[dims[0]], swapped[dims[1]] = size_of(op, dims[1], shape), size_of(op, dims[0], shape)
    return tuple(swapped)


def _transpose_fill(op: Op, context: FillContext) -> Op:
    short = next((shape for shape in context.shapes if len(shape) < 2), None)
    if short is not None:
        raise refused(op, f"needs two dims, and {short} has {len(short)}", "name only the weights: '**.weight'")
    return {"op": op["op"], "dims": [from_front(op, dim, context.shapes) for dim in op.get("dims", (-2, -1))]}


def _transpose_offer(source: Shape, target: Shape) -> Op | None:
    fits = len(source) == 2 and source == target[::-1] and source[0] != source[1] and 1 not in source  # reshape offers those with 1
    return {"op": "transpose"} if fits else None


TRANSPOSE = Adapter(
    words="swaps two dims, without `dims` the last two: out[j, i] = in[i, j]",
    fields={"dims": list_of(signed)},
    infer=each(_transpose_shape),
    fill=_transpose_fill,
    kernel=each(lambda op, tensor: tensor.transpose(*op["dims"])),
    moments=same_op,
    invert=lambda op: op,
    offer=_transpose_offer,
)


def _permute_shape(op: Op, shape: Shape) -> Shape:
    dims = need(op, "dims")
    if sorted(dims) != list(range(len(shape))):
        raise refused(op, f"orders dims {list(dims)[:8]}, and {shape} has {len(shape)} dims", "name each dim once")
    return tuple(shape[dim] for dim in dims)


def _permute_fill(op: Op, context: FillContext) -> Op:
    return {"op": op["op"], "dims": [from_front(op, dim, context.shapes) for dim in need(op, "dims")]}


def _permute_invert(op: Op) -> Op | None:
    dims = op.get("dims", ())
    order = [dim + len(dims) * (dim < 0) for dim in dims]
    complete = bool(order) and sorted(order) == list(range(len(order)))
    return {"op": "permute", "dims": [order.index(dim) for dim in range(len(order))]} if complete else None


PERMUTE = Adapter(
    words="puts the dims in the order `dims`: out's dim i is in's dim dims[i]",
    fields={"dims": list_of(signed)},
    infer=each(_permute_shape),
    fill=_permute_fill,
    kernel=each(lambda op, tensor: tensor.permute(tuple(op["dims"]))),
    moments=same_op,
    invert=_permute_invert,
)


def _reshape_shape(op: Op, shape: Shape) -> Shape:
    result = tuple(need(op, "shape"))
    if result.count(-1) == 1 and (rest := prod(size for size in result if size != -1)) and prod(shape) % rest == 0:
        result = tuple(prod(shape) // rest if size == -1 else size for size in result)
    if any(size < 0 for size in result) or prod(result) != prod(shape):
        raise refused(op, f"makes {str(result)[:60]} of {shape}: not the same number of elements")
    return bounded(op, result)


def _reshape_fill(op: Op, context: FillContext) -> Op:
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


def _reshape_offer(source: Shape, target: Shape) -> Op | None:
    """Only where dims of size 1 are removed or added: a (1, 5) that becomes (5, 1) may be a transpose."""
    short, long = sorted((source, target), key=len)
    sizes = iter(long)
    kept = len(short) < len(long) and all(any(size == longer for longer in sizes) for size in short)
    return {"op": "reshape"} if kept and prod(short) == prod(long) else None


def _size(value: Any) -> bool:
    return signed(value) and value >= -1


RESHAPE = Adapter(
    words="the same elements in row-major order under `shape` (-1 once for what is left), without it the target's",
    fields={"shape": list_of(_size)},
    infer=each(_reshape_shape),
    fill=_reshape_fill,
    kernel=each(lambda op, tensor: tensor.reshape(tuple(op["shape"]))),
    moments=same_op,
    invert=lambda op: None if "shape" in op else op,
    offer=_reshape_offer,
    ranges=whole_ranges,
    safe=True,  # it only offers to add and remove dims of size 1
)


def _squeeze_shape(op: Op, shape: Shape) -> Shape:
    if "dim" not in op:
        return tuple(size for size in shape if size != 1)
    dim = op["dim"]
    if size_of(op, dim, shape) != 1:
        raise refused(op, f"takes out dim {dim}, and {shape} has {shape[dim]} there, not 1")
    return shape[:dim] + shape[dim + 1 :]


SQUEEZE = Adapter(
    words="takes out dim `dim`, which has size 1; without it all dims of size 1",
    fields={"dim": signed},
    infer=each(_squeeze_shape),
    fill=fill_as_reshape(_squeeze_shape, 0),
    kernel=each(lambda op, tensor: tensor.squeeze(op["dim"]) if "dim" in op else tensor.squeeze()),
    moments=same_op,
    invert=lambda op: {"op": "unsqueeze", "dim": op["dim"]} if "dim" in op else {"op": "reshape"},
    ranges=whole_ranges,
)


def _unsqueeze_shape(op: Op, shape: Shape) -> Shape:
    dim = need(op, "dim")
    if not 0 <= dim <= len(shape):
        raise refused(op, f"adds dim {dim}, and {shape} has {len(shape)} dims")
    return bounded(op, (*shape[:dim], 1, *shape[dim:]))


UNSQUEEZE = Adapter(
    words="adds a dim of size 1 as dim `dim`",
    fields={"dim": signed},
    infer=each(_unsqueeze_shape),
    fill=fill_as_reshape(_unsqueeze_shape, 1),
    kernel=each(lambda op, tensor: tensor.unsqueeze(op["dim"])),
    moments=same_op,
    invert=lambda op: {**op, "op": "squeeze"},
    ranges=whole_ranges,
)
