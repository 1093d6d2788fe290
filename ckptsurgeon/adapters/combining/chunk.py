"""`chunk` cuts a dim into parts, one for each result of its rule.

>>> import torch
>>> ADAPTER.kernel({"dim": 0, "index": 1, "of": 3}, [torch.arange(6)], None)[0].tolist()
[2, 3]
"""

from __future__ import annotations

from collections.abc import Sequence

from ckptsurgeon.adapters.op import Adapter, FillContext, Op, Shape, Tensor, each, list_of, same_op, signed, whole
from ckptsurgeon.adapters.shapes import from_front, need, part_of, part_ranges, refused, resized, size_of


def _shape(op: Op, shape: Shape) -> Shape:
    dim, index, of = need(op, "dim"), need(op, "index"), need(op, "of")
    part = part_of(op, dim, of, shape)
    if not 0 <= index < of:
        raise refused(op, f"takes part {index} of {of}: parts count from 0")
    return resized(shape, dim, part)


def _fill(op: Op, context: FillContext) -> Op:
    if "parts" in op:
        rest, parts = {name: value for name, value in op.items() if name != "parts"}, op["parts"]
        if "index" in op or len(parts) != context.of:
            results = "one result" if context.of == 1 else f"{context.of} results"
            raise refused(op, f"takes the parts {list(parts)[:8]}, and has {results}", "name each: a -> b + c, chunk(of=3, parts=[0, 2])")
        return _fill({**rest, "index": parts[context.index]}, context)
    dim = from_front(op, op.get("dim", 0), context.shapes)
    one_part_each = "index" not in op and op.get("of", context.of) == context.of  # each result is one part
    sizes = op.get("sizes", _sibling_sizes(context, dim) if one_part_each else None)
    of = op.get("of", context.of if sizes is None else len(sizes))
    if sizes is not None and len(sizes) != of:
        raise refused(op, f"has {len(sizes)} sizes for {of} parts")
    if "index" not in op and (of != context.of or (of == 1 and sizes is None)):
        results = "one result" if context.of == 1 else f"{context.of} results"
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


def _bounds(op: Op, shape: Sequence[int]) -> tuple[int, int]:
    size = shape[op["dim"]] // op["of"]
    return op["index"] * size, (op["index"] + 1) * size


def _kernel(op: Op, tensor: Tensor) -> Tensor:
    start, stop = _bounds(op, tensor.shape)
    return tensor.narrow(op["dim"], start, stop - start)


ADAPTER = Adapter(
    words="cuts dim `dim` into parts, one for each result: of `sizes`, else of the results' own sizes in the target, else equal ones; "
    "with `of` and `parts` some of them: [0, 2] are the first and the third",
    fields={"dim": signed, "sizes": list_of(whole), "index": whole, "of": whole, "parts": list_of(whole)},
    infer=each(_shape),
    fill=_fill,
    kernel=each(_kernel),
    moments=same_op,
    invert=lambda op: None if "index" in op or "parts" in op else {**op, "op": "concat"},
    ranges=part_ranges(_bounds),
)
