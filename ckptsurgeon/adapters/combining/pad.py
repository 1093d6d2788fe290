"""`pad` makes a dim longer, and fills up what is new.

>>> import torch
>>> ADAPTER.kernel({"dim": 0, "size": 4, "at": "end", "fill": "zeros"}, [torch.tensor([1, 2])], None)[0].tolist()
[1, 2, 0, 0]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ckptsurgeon.adapters import widening
from ckptsurgeon.adapters.op import Adapter, Initial, Op, Place, Shape, Tensor, list_of, number, one_of, signed, whole, zeros_where_filled
from ckptsurgeon.adapters.shapes import bounded, from_front, need, refused, resized, size_of, wanted_size
from ckptsurgeon.errors import RuleError

if TYPE_CHECKING:
    import torch

_EXTRA = {"constant": "value", "init": "scheme"}  # what a fill needs beside its name


def _infer(op: Op, shapes: tuple[Shape, ...]) -> tuple[Shape, ...]:
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
    return tuple(_shape(op, shape, dim, size) for shape in shapes)


def _shape(op: Op, shape: Shape, dim: int, size: int) -> Shape:
    have = shape[dim]
    if size < have:
        raise refused(op, f"makes dim {dim} {size} long, and {shape} has {have} there already", "slice takes a part")
    if op["fill"] == "mean" and size > have == 0:
        raise refused(op, f"has no mean: dim {dim} of {shape} is empty")
    return bounded(op, resized(shape, dim, size))


def _fill(op: Op, place: Place) -> Op:
    dim = from_front(op, op.get("dim", 0), place.shapes)
    fill = op.get("fill", "constant" if "value" in op else "zeros")
    for kind, field in _EXTRA.items():
        if field in op and fill != kind:
            raise refused(op, f"has {field}={op[field]!r} beside fill={fill!r}", f"write fill={kind!r} with it, or leave it out")
    size = op["size"] if "size" in op else wanted_size(op, place, dim, "size")
    # Written down, so that a plan says how much of the result no source gives.
    given = [size_of(op, dim, shape) for shape in place.shapes]
    filled = {"op": "pad", "dim": dim, "size": size, "given": given, "fill": fill, "at": op.get("at", "end")}
    if fill == "constant":
        return {**filled, "value": op["value"]} if "value" in op else filled
    if fill == "init" and place.wanted is None:
        raise refused(op, "fills up with a target's initial value, and here is none", "put it last in a chain for a target")
    return {**filled, "scheme": op.get("scheme", "model")} if fill == "init" else filled


def _share(op: Op) -> float:
    whole = op["size"] * len(op["given"])
    return sum(op["given"]) / whole if whole else 1.0


def _kernel(op: Op, tensors: Sequence[Tensor], initial: Initial) -> list[Tensor]:
    return [_padded(op, tensor, initial) for tensor in tensors]


def _padded(op: Op, tensor: Tensor, initial: Initial) -> Tensor:
    dim, size, have = op["dim"], op["size"], tensor.shape[op["dim"]]
    out = tensor.new_empty(resized(tuple(tensor.shape), dim, size))
    given, rest = (0, have) if op["at"] == "end" else (size - have, 0)
    out.narrow(dim, given, have).copy_(tensor)
    if size > have:
        room = out.narrow(dim, rest, size - have)
        if op["fill"] == "mean":
            _fill_by_mean(room, tensor, dim)
        elif op["fill"] == "init":
            room.copy_(_checked(initial(), out).narrow(dim, rest, size - have))
        else:
            room.fill_(_constant(op.get("value", 0) if op["fill"] == "constant" else 0, tensor.dtype))
    return out


def _fill_by_mean(room: Tensor, tensor: Tensor, dim: int) -> None:
    if not tensor.is_floating_point():
        words = widening.in_words(tensor.dtype)
        raise RuleError(f"pad fills up with a mean, and the tensor is {words}", hint="fill it with zeros or a value")
    wide = widening.wide(tensor)
    for piece in widening.pieces(tensor.shape, whole=dim):
        room[piece] = tensor[piece].to(wide).mean(dim, keepdim=True).to(room.dtype)


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
        held = float(torch.tensor(value, dtype=torch.float64).to(dtype).double())
        fits = abs(held) != float("inf") and held == held and (value != 0 or held == 0)
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


ADAPTER = Adapter(
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
    kernel=_kernel,
    moments=zeros_where_filled,
    share=_share,
    planned=("given",),
)
