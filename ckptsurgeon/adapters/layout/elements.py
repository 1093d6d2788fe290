"""Adapters that reorder the elements along one dim.

`interleave` takes turns between equal parts of a dim.

>>> import torch
>>> INTERLEAVE.kernel({"dim": 0, "parts": 2}, [torch.tensor([1, 2, 3, 10, 20, 30])], None)[0].tolist()
[1, 10, 2, 20, 3, 30]

`deinterleave` groups every second element of a dim, or every third and so on.

>>> DEINTERLEAVE.kernel({"dim": 0, "parts": 2}, [torch.tensor([1, 10, 2, 20, 3, 30])], None)[0].tolist()
[1, 2, 3, 10, 20, 30]

`permute_rope` reorders the rows of rotary queries and keys between Meta's layout (pairs) and Hugging Face's (halves).

>>> PERMUTE_ROPE.kernel({"heads": 1, "to": "halves", "dim": 0}, [torch.tensor([1, 10, 2, 20, 3, 30])], None)[0].tolist()
[1, 2, 3, 10, 20, 30]

`roll` shifts the elements of a dim cyclically.

>>> ROLL.kernel({"dim": 0, "by": 2}, [torch.tensor([1, 2, 10, 20])], None)[0].tolist()
[10, 20, 1, 2]
"""

from __future__ import annotations

from ckptsurgeon.adapters.op import Adapter, FillContext, Op, Shape, Tensor, each, one_of, same_op, signed, whole
from ckptsurgeon.adapters.shapes import from_front, need, part_of, refused, size_of


def regrouped(tensor: Tensor, dim: int, *sizes: int) -> Tensor:
    """The tensor with `dim` split into `sizes`, the last two of them swapped, and flattened again."""
    last = dim + len(sizes) - 1
    parts = tensor.reshape((*tensor.shape[:dim], *sizes, *tensor.shape[dim + 1 :]))
    return parts.transpose(last - 1, last).reshape(tensor.shape)


def parted_shape(op: Op, shape: Shape) -> Shape:
    """`shape` itself. RuleError where its dim has no `parts` equal parts."""
    part_of(op, need(op, "dim"), need(op, "parts"), shape)
    return shape


def fill_parted(op: Op, context: FillContext) -> Op:
    """The op with its dim, 0 if left out, and the number of its parts, 2 if left out."""
    return {"op": op["op"], "dim": from_front(op, op.get("dim", 0), context.shapes), "parts": op.get("parts", 2)}


INTERLEAVE = Adapter(
    words="takes turns between `parts` equal parts of dim `dim`, p parts of n: out[i * p + j] = in[j * n + i]",
    fields={"dim": signed, "parts": whole},
    infer=each(parted_shape),
    fill=fill_parted,
    kernel=each(lambda op, tensor: regrouped(tensor, op["dim"], op["parts"], tensor.shape[op["dim"]] // op["parts"])),
    moments=same_op,
    invert=lambda op: {**op, "op": "deinterleave"},
)


DEINTERLEAVE = Adapter(
    words="every `parts`-th element of dim `dim` together, p parts of n: out[j * n + i] = in[i * p + j]",
    fields={"dim": signed, "parts": whole},
    infer=each(parted_shape),
    fill=fill_parted,
    kernel=each(lambda op, tensor: regrouped(tensor, op["dim"], tensor.shape[op["dim"]] // op["parts"], op["parts"])),
    moments=same_op,
    invert=lambda op: {**op, "op": "interleave"},
)


def _permute_rope_shape(op: Op, shape: Shape) -> Shape:
    dim, heads = need(op, "dim"), need(op, "heads")
    if need(op, "to") not in ("halves", "pairs"):
        raise refused(op, f"goes to 'halves' or 'pairs', not {str(op['to'])[:20]!r}")
    if part_of(op, dim, heads, shape) % 2:
        raise refused(op, f"needs heads of an even size, and {heads} heads of {shape} have {shape[dim] // heads}")
    return shape


def _permute_rope_fill(op: Op, context: FillContext) -> Op:
    if "heads" not in op:
        raise refused(op, "needs the number of heads", "query heads for q, key-value heads for k: permute_rope(heads=32, to='halves')")
    if "to" not in op:
        raise refused(op, "needs its direction", "to='halves' is Hugging Face's layout, to='pairs' is Meta's")
    return {"op": op["op"], "heads": op["heads"], "to": op["to"], "dim": from_front(op, op.get("dim", 0), context.shapes)}


def _permute_rope_kernel(op: Op, tensor: Tensor) -> Tensor:
    half = tensor.shape[op["dim"]] // op["heads"] // 2
    return regrouped(tensor, op["dim"], op["heads"], *((half, 2) if op["to"] == "halves" else (2, half)))


PERMUTE_ROPE = Adapter(
    words="rows of rotary queries or keys, in each of `heads` heads: rotated pairs side by side (to='pairs', Meta's Llama), "
    "or their first halves before their second (to='halves', Hugging Face): halves[j * n + i] = pairs[2 * i + j], n half a head",
    fields={"heads": whole, "to": one_of("halves", "pairs"), "dim": signed},
    infer=each(_permute_rope_shape),
    fill=_permute_rope_fill,
    kernel=each(_permute_rope_kernel),
    moments=same_op,
    invert=lambda op: {**op, "to": "pairs" if op["to"] == "halves" else "halves"} if "to" in op else None,
    source="Su et al. 2021, RoFormer, arXiv:2104.09864",
)


def _roll_shape(op: Op, shape: Shape) -> Shape:
    size_of(op, need(op, "dim"), shape)
    need(op, "by")
    return shape


def _roll_fill(op: Op, context: FillContext) -> Op:
    return {"op": op["op"], "dim": from_front(op, op.get("dim", 0), context.shapes), "by": need(op, "by")}


def _roll_kernel(op: Op, tensor: Tensor) -> Tensor:
    import torch

    return torch.roll(tensor, op["by"], op["dim"])


ROLL = Adapter(
    words="moves the elements of dim `dim` on by `by` places, round its end: out[(i + by) mod n] = in[i]; by half of n it swaps the halves",
    fields={"dim": signed, "by": signed},
    infer=each(_roll_shape),
    fill=_roll_fill,
    kernel=each(_roll_kernel),
    moments=same_op,
    invert=lambda op: {**op, "by": -op["by"]} if "by" in op else None,
)
