"""`pad` makes a dim longer and fills the new part.

>>> import torch
>>> PAD.kernel({"dim": 0, "size": 4, "at": "end", "fill": "zeros"}, [torch.tensor([1, 2])], None)[0].tolist()
[1, 2, 0, 0]
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ckptsurgeon.adapters import widening
from ckptsurgeon.adapters.op import (
    Adapter,
    FillContext,
    Initial,
    Op,
    Shape,
    Tensor,
    list_of,
    number,
    one_of,
    signed,
    whole,
    zeros_where_filled,
)
from ckptsurgeon.adapters.shapes import bounded, from_front, need, refused, resized, size_of, target_size
from ckptsurgeon.errors import RuleError

if TYPE_CHECKING:
    import torch

_EXTRA = {"constant": "value", "init": "scheme"}  # the field that such a fill needs


def _infer(op: Op, shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
    dim, size, fill = need(op, "dim"), need(op, "size"), need(op, "fill")
    if need(op, "at") not in ("start", "end") or fill not in ("zeros", "mean", "init", "constant"):
        raise refused(op, f"has fill={str(fill)[:20]!r} and at={str(op['at'])[:20]!r}")
    if fill in _EXTRA:
        need(op, _EXTRA[fill])
    if fill == "init" and len(shapes) != 1:
        raise refused(op, f"fills {len(shapes)} tensors up with one target's initial value", "pad after they are joined")
    sizes = [size_of(op, dim, shape) for shape in shapes]
    if list(need(op, "given")) != sizes:
        raise refused(op, f"is for {op['given']} at dim {dim}, and {sizes} come in")
    return tuple(_shape(op, shape, dim, size) for shape in shapes)


def _shape(op: Op, shape: Shape, dim: int, size: int) -> Shape:
    old_size = shape[dim]
    if size < old_size:
        raise refused(op, f"makes dim {dim} {size} long, and {shape} has {old_size} there already", "slice takes a part")
    if op["fill"] == "mean" and size > old_size == 0:
        raise refused(op, f"has no mean: dim {dim} of {shape} is empty")
    return bounded(op, resized(shape, dim, size))


def _fill(op: Op, context: FillContext) -> Op:
    dim = from_front(op, op.get("dim", 0), context.shapes)
    fill = op.get("fill", "constant" if "value" in op else "zeros")
    for needing, field in _EXTRA.items():
        if field in op and fill != needing:
            raise refused(op, f"has {field}={op[field]!r} beside fill={fill!r}", f"write fill={needing!r} with it, or leave it out")
    size = op["size"] if "size" in op else target_size(op, context, dim, "size")
    # The plan has the old sizes, so that it says how much of the result comes from no source.
    sizes = [size_of(op, dim, shape) for shape in context.shapes]
    filled = {"op": "pad", "dim": dim, "size": size, "given": sizes, "fill": fill, "at": op.get("at", "end")}
    if fill == "constant":
        return {**filled, "value": op["value"]} if "value" in op else filled
    if fill == "init" and context.target is None:
        raise refused(op, "fills up with a target's initial value, and here is none", "put it last in a chain for a target")
    return {**filled, "scheme": op.get("scheme", "model")} if fill == "init" else filled


def _share(op: Op) -> float:
    total = op["size"] * len(op["given"])
    return sum(op["given"]) / total if total else 1.0


def _padded(op: Op, tensor: Tensor, initial: Initial) -> Tensor:
    dim, size, old_size = op["dim"], op["size"], tensor.shape[op["dim"]]
    out = tensor.new_empty(resized(tuple(tensor.shape), dim, size))
    start, new_start = (0, old_size) if op["at"] == "end" else (size - old_size, 0)
    out.narrow(dim, start, old_size).copy_(tensor)
    if size > old_size:
        new_part = out.narrow(dim, new_start, size - old_size)
        if op["fill"] == "mean":
            _fill_by_mean(new_part, tensor, dim)
        elif op["fill"] == "init":
            new_part.copy_(_checked(initial(), out).narrow(dim, new_start, size - old_size))
        else:
            new_part.fill_(_constant(op.get("value", 0) if op["fill"] == "constant" else 0, tensor.dtype))
    return out


def _fill_by_mean(new_part: Tensor, tensor: Tensor, dim: int) -> None:
    if not tensor.is_floating_point():
        words = widening.in_words(tensor.dtype)
        raise RuleError(f"pad fills up with a mean, and the tensor is {words}", hint="fill it with zeros or a value")
    wide = widening.wide(tensor)
    for block in widening.blocks(tensor.shape, whole=dim):
        new_part[block] = tensor[block].to(wide).mean(dim, keepdim=True).to(new_part.dtype)


def _checked(value: Tensor, out: Tensor) -> Tensor:
    """The target's initial value, if it can fill `out` up."""
    if value.shape != out.shape:
        raise RuleError(f"pad makes {tuple(out.shape)} and fills up with an initial value of {tuple(value.shape)}")
    if value.is_floating_point() and not (out.is_floating_point() or out.is_complex()):
        words = f"pad fills {widening.in_words(out.dtype)} up with an initial {widening.in_words(value.dtype)}"
        raise RuleError(words, hint="fill it with zeros or a value")
    return value


def _constant(value: float, dtype: torch.dtype) -> Any:
    """`value`, if the dtype can hold it (as near as its precision goes)."""
    import torch

    if dtype.is_floating_point:
        stored = float(torch.tensor(value, dtype=torch.float64).to(dtype).double())
        fits = abs(stored) != float("inf") and stored == stored and (value != 0 or stored == 0)
    elif dtype == torch.bool:
        fits = value in (0, 1)
    elif dtype.is_complex:
        fits = True
    else:
        limits = torch.iinfo(dtype)
        fits = value == int(value) and limits.min <= value <= limits.max
    if not fits:
        raise RuleError(f"pad fills up with {value!r}, which {widening.in_words(dtype)} can't hold")
    return value if dtype.is_floating_point or dtype.is_complex else int(value)


def _name(value: Any) -> bool:
    return type(value) is str and 0 < len(value) <= 200


PAD = Adapter(
    words="makes dim `dim` `size` long (the target's) by zeros, a `value`, the mean over that dim, or the target's initial value",
    fields={
        "dim": signed,
        "size": whole,
        "fill": one_of("zeros", "mean", "init", "constant"),
        "at": one_of("end", "start"),
        "value": number,
        "scheme": _name,
        "given": list_of(whole),
    },
    infer=_infer,
    fill=_fill,
    kernel=lambda op, tensors, initial: [_padded(op, tensor, initial) for tensor in tensors],
    moments=zeros_where_filled,
    share=_share,
    plan_only=("given",),
)
