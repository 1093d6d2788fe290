"""Adapters that take parts of a dim, or join tensors along one.

`slice` takes a part of one dim.

>>> import torch
>>> SLICE.kernel({"dim": 0, "start": 1, "stop": 3}, [torch.tensor([10, 11, 12, 13])], None)[0].tolist()
[11, 12]

`chunk` cuts a dim into parts, one for each result of its rule.

>>> CHUNK.kernel({"dim": 0, "index": 1, "of": 3}, [torch.arange(6)], None)[0].tolist()
[2, 3]

`concat` joins tensors along an existing dim.

>>> CONCAT.kernel({"op": "concat", "dim": 0, "of": 2}, [torch.tensor([1, 2]), torch.tensor([3])], None)[0].tolist()
[1, 2, 3]

`unstack` takes one index of a dim, and removes the dim.

>>> UNSTACK.kernel({"dim": 0, "index": 1}, [torch.tensor([[1, 2], [3, 4]])], None)[0].tolist()
[3, 4]

`stack` joins tensors of one shape along a new dim.

>>> STACK.kernel({"op": "stack", "dim": 0, "of": 2}, [torch.tensor([1, 2]), torch.tensor([3, 4])], None)[0].tolist()
[[1, 2], [3, 4]]
"""

from __future__ import annotations

from collections.abc import Sequence

from ckptsurgeon.adapters.op import Adapter, FillContext, Initial, Op, Shape, Tensor, each, list_of, same_op, signed, whole
from ckptsurgeon.adapters.shapes import (
    bounded,
    from_front,
    groups,
    joined_ranges,
    need,
    part_of,
    part_ranges,
    refused,
    resized,
    size_of,
    target_size,
)


def _slice_shape(op: Op, shape: Shape) -> Shape:
    dim, start, stop = need(op, "dim"), need(op, "start"), need(op, "stop")
    size = size_of(op, dim, shape)
    if not 0 <= start <= stop <= size:
        raise refused(op, f"takes {start} to {stop} of dim {dim}, and {shape} has {size} there")
    return resized(shape, dim, stop - start)


def _slice_fill(op: Op, context: FillContext) -> Op:
    dim, start = from_front(op, op.get("dim", 0), context.shapes), op.get("start", 0)
    return {
        "op": "slice",
        "dim": dim,
        "start": start,
        "stop": op["stop"] if "stop" in op else start + target_size(op, context, dim, "stop"),
    }


SLICE = Adapter(
    words="elements `start` (0) to `stop` of dim `dim`, `stop` left out; without it as many as the target has",
    fields={"dim": signed, "start": whole, "stop": whole},
    infer=each(_slice_shape),
    fill=_slice_fill,
    kernel=each(lambda op, tensor: tensor.narrow(op["dim"], op["start"], op["stop"] - op["start"])),
    moments=same_op,
    ranges=part_ranges(lambda op, _slice_shape: (op["start"], op["stop"])),
)


def _chunk_shape(op: Op, shape: Shape) -> Shape:
    dim, index, of = need(op, "dim"), need(op, "index"), need(op, "of")
    part = part_of(op, dim, of, shape)
    if not 0 <= index < of:
        raise refused(op, f"takes part {index} of {of}: parts count from 0")
    return resized(shape, dim, part)


def _chunk_fill(op: Op, context: FillContext) -> Op:
    results = "one result" if context.of == 1 else f"{context.of} results"
    if "parts" in op:
        rest, parts = {name: value for name, value in op.items() if name != "parts"}, op["parts"]
        if "index" in op or len(parts) != context.of:
            raise refused(op, f"takes the parts {list(parts)[:8]}, and has {results}", "name each: a -> b + c, chunk(of=3, parts=[0, 2])")
        return _chunk_fill({**rest, "index": parts[context.index]}, context)
    dim = from_front(op, op.get("dim", 0), context.shapes)
    one_part_each = "index" not in op and op.get("of", context.of) == context.of  # each result is one part
    sizes = op.get("sizes", _sibling_sizes(context, dim) if one_part_each else None)
    of = op.get("of", context.of if sizes is None else len(sizes))
    if sizes is not None and len(sizes) != of:
        raise refused(op, f"has {len(sizes)} sizes for {of} parts")
    if "index" not in op and (of != context.of or (of == 1 and sizes is None)):
        raise refused(
            op, f"has {results} for {of} parts" if of > 1 else "has one result", "name each part (a -> b + c), or say index= and of="
        )
    index = op.get("index", context.index)
    if index >= of:
        raise refused(op, f"takes part {index} of {of}: parts count from 0")
    if sizes is None:
        return {"op": "chunk", "dim": dim, "index": index, "of": of}
    for shape in context.shapes:
        if size_of(op, dim, shape) != sum(sizes):
            raise refused(op, f"cuts dim {dim} into {list(sizes)[:8]}, {sum(sizes)} in all, and {shape} has {shape[dim]} there")
    if len(set(sizes)) == 1 and sizes[0]:
        return {"op": "chunk", "dim": dim, "index": index, "of": of}
    return {"op": "slice", "dim": dim, "start": sum(sizes[:index]), "stop": sum(sizes[: index + 1])}


def _sibling_sizes(context: FillContext, dim: int) -> list[int] | None:
    """The target's sizes of all results along `dim`, if they add up to the size that comes in; else None."""
    sizes = [shape[dim] for shape in context.siblings if shape is not None and dim < len(shape)]
    fit = all(dim < len(shape) and shape[dim] == sum(sizes) for shape in context.shapes)
    return sizes if fit and context.target is not None and len(sizes) == context.of > 1 else None


def _chunk_bounds(op: Op, shape: Sequence[int]) -> tuple[int, int]:
    size = shape[op["dim"]] // op["of"]
    return op["index"] * size, (op["index"] + 1) * size


def _chunk_kernel(op: Op, tensor: Tensor) -> Tensor:
    start, stop = _chunk_bounds(op, tensor.shape)
    return tensor.narrow(op["dim"], start, stop - start)


CHUNK = Adapter(
    words="cuts dim `dim` into parts, one for each result: of `sizes`, else of the results' own sizes in the target, else equal ones; "
    "with `of` and `parts` some of them: [0, 2] are the first and the third",
    fields={"dim": signed, "sizes": list_of(whole), "index": whole, "of": whole, "parts": list_of(whole)},
    infer=each(_chunk_shape),
    fill=_chunk_fill,
    kernel=each(_chunk_kernel),
    moments=same_op,
    invert=lambda op: None if "index" in op or "parts" in op else {**op, "op": "concat"},
    ranges=part_ranges(_chunk_bounds),
)


def _concat_infer(op: Op, shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    dim, results = need(op, "dim"), []
    for group in groups(op, shapes):
        first, total = group[0], sum(size_of(op, dim, shape) for shape in group)
        different = next((shape for shape in group if resized(shape, dim, 0) != resized(first, dim, 0)), None)
        if different is not None:
            raise refused(op, f"joins dim {dim} of {first} and {different}, which differ in another dim too")
        results.append(bounded(op, resized(first, dim, total)))
    return tuple(results)


def _concat_fill(op: Op, context: FillContext) -> Op:
    dim, sizes = from_front(op, op.get("dim", 0), context.shapes), list(op.get("sizes", ()))
    filled = {"op": "concat", "dim": dim, "of": op.get("of", len(sizes) if "sizes" in op else len(context.shapes))}
    for group in groups(filled, context.shapes) if "sizes" in op else ():
        incoming = [size_of(op, dim, shape) for shape in group]
        if incoming != sizes:
            raise refused(op, f"is to join sizes {sizes[:8]} of dim {dim}, and {incoming[:8]} come in")
    return filled


def _concat_kernel(op: Op, tensors: Sequence[Tensor], _initial: Initial) -> list[Tensor]:
    import torch

    return [torch.cat(list(group), op["dim"]) for group in groups(op, tensors)]


CONCAT = Adapter(
    words="joins all tensors, or each `of` in a row, along dim `dim`; `sizes` are held against what comes in",
    fields={"dim": signed, "sizes": list_of(whole), "of": whole},
    infer=_concat_infer,
    fill=_concat_fill,
    kernel=_concat_kernel,
    moments=same_op,
    invert=lambda op: {**op, "op": "chunk"},
    ranges=joined_ranges,
    joins=True,
)


def _unstack_shape(op: Op, shape: Shape) -> Shape:
    dim, index = need(op, "dim"), need(op, "index")
    size = size_of(op, dim, shape)
    if not 0 <= index < size:
        raise refused(op, f"takes number {index} of dim {dim}, and {shape} has {size} there (they count from 0)")
    return shape[:dim] + shape[dim + 1 :]


def _unstack_fill(op: Op, context: FillContext) -> Op:
    dim = from_front(op, op.get("dim", 0), context.shapes)
    index = op.get("index", context.number)
    if index is None and context.of == 1:
        raise refused(op, "does not know which one to take", "number the results ('w -> w.{i}'), name every one, or say index=")
    if index is None:
        for shape in context.shapes:
            if size_of(op, dim, shape) != context.of:
                raise refused(op, f"has {context.of} results, and {shape} has {shape[dim]} in dim {dim}")
    return {"op": "unstack", "dim": dim, "index": context.index if index is None else index}


UNSTACK = Adapter(
    words="number `index` of dim `dim`, without that dim; the index is what the result's name says: out = in[index]",
    fields={"dim": signed, "index": whole},
    infer=each(_unstack_shape),
    fill=_unstack_fill,
    kernel=each(lambda op, tensor: tensor.select(op["dim"], op["index"])),
    moments=same_op,
    invert=lambda op: None if "index" in op else {**op, "op": "stack"},
    ranges=part_ranges(lambda op, _unstack_shape: (op["index"], op["index"] + 1)),
    counts_parts=True,
)


def _stack_infer(op: Op, shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    dim, results = need(op, "dim"), []
    for group in groups(op, shapes):
        first = group[0]
        different = next((shape for shape in group if shape != first), None)
        if different is not None:
            raise refused(op, f"stacks {first} and {different}, which differ")
        if not 0 <= dim <= len(first):
            raise refused(op, f"adds dim {dim}, and {first} has {len(first)} dims")
        results.append(bounded(op, (*first[:dim], len(group), *first[dim:])))
    return tuple(results)


def _stack_fill(op: Op, context: FillContext) -> Op:
    return {"op": "stack", "dim": from_front(op, op.get("dim", 0), context.shapes, 1), "of": op.get("of", len(context.shapes))}


def _stack_kernel(op: Op, tensors: Sequence[Tensor], _initial: Initial) -> list[Tensor]:
    import torch

    return [torch.stack(list(group), op["dim"]) for group in groups(op, tensors)]


STACK = Adapter(
    words="makes all tensors, or each `of` in a row, one along a new dim `dim`: out[i] = in_i",
    fields={"dim": signed, "of": whole},
    infer=_stack_infer,
    fill=_stack_fill,
    kernel=_stack_kernel,
    moments=same_op,
    invert=lambda op: None if "of" in op else {**op, "op": "unstack"},
    ranges=joined_ranges,
    joins=True,
)
