"""Kernels of the adapters between parts and wholes. Parts are views, a whole is one new tensor, and inputs are never written.

Means are computed in float32, or in float64 where the values are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import prod
from typing import TYPE_CHECKING, Any

from ckptsurgeon.adapters.kernels.layout import each
from ckptsurgeon.adapters.op import Op
from ckptsurgeon.errors import RuleError

if TYPE_CHECKING:
    import torch

    from ckptsurgeon.adapters.kernels.layout import Kernel

PIECE = 1 << 20  # elements averaged at a time, so that what is wider needs little memory


def _chunked(tensor: torch.Tensor, op: Op) -> torch.Tensor:
    part = tensor.shape[op["dim"]] // op["of"]
    return tensor.narrow(op["dim"], op["index"] * part, part)


def _groups(tensors: list[torch.Tensor], op: Op) -> Iterator[list[torch.Tensor]]:
    return (tensors[start : start + op["of"]] for start in range(0, len(tensors), op["of"]))


def _concatenated(tensors: list[torch.Tensor], op: Op, _initial: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    import torch

    return [torch.cat(group, op["dim"]) for group in _groups(tensors, op)]


def _stacked(tensors: list[torch.Tensor], op: Op, _initial: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    import torch

    return [torch.stack(group, op["dim"]) for group in _groups(tensors, op)]


def _padded(tensors: list[torch.Tensor], op: Op, initial: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    return [_padded_one(tensor, op, initial) for tensor in tensors]


def _padded_one(tensor: torch.Tensor, op: Op, initial: Callable[[], torch.Tensor]) -> torch.Tensor:
    dim, size, have = op["dim"], op["size"], tensor.shape[op["dim"]]
    out = tensor.new_empty((*tensor.shape[:dim], size, *tensor.shape[dim + 1 :]))
    given, rest = (0, have) if op["at"] == "end" else (size - have, 0)
    out.narrow(dim, given, have).copy_(tensor)
    if size > have:
        room = out.narrow(dim, rest, size - have)
        if op["fill"] == "mean":
            _fill_by_mean(room, tensor, dim)
        elif op["fill"] == "init":
            room.copy_(_initial_part(initial(), out, op).narrow(dim, rest, size - have))
        else:
            room.fill_(_constant(op.get("value", 0) if op["fill"] == "constant" else 0, tensor.dtype))
    return out


def _fill_by_mean(room: torch.Tensor, tensor: torch.Tensor, dim: int) -> None:
    if not tensor.is_floating_point():
        raise RuleError(f"pad fills up with a mean, and the tensor is {_word(tensor.dtype)}", hint="fill it with zeros or a value")
    wide = _wide([tensor])
    for piece in _pieces(tuple(tensor.shape), whole=dim):
        room[piece] = tensor[piece].to(wide).mean(dim, keepdim=True).to(room.dtype)


def _initial_part(value: torch.Tensor, out: torch.Tensor, op: Op) -> torch.Tensor:
    if value.shape != out.shape:
        raise RuleError(f"pad makes {tuple(out.shape)} and fills up with an initial value of {tuple(value.shape)}")
    if value.is_floating_point() and not (out.is_floating_point() or out.is_complex()):
        raise RuleError(f"pad fills {_word(out.dtype)} up with an initial {_word(value.dtype)}", hint="fill it with zeros or a value")
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
        raise RuleError(f"pad fills up with {value!r}, which {_word(dtype)} can't hold")
    return value if dtype.is_floating_point or dtype.is_complex else int(value)


def _averaged(tensors: list[torch.Tensor], op: Op, _initial: Callable[[], torch.Tensor]) -> list[torch.Tensor]:
    wrong = next((tensor.dtype for tensor in tensors if not (tensor.is_floating_point() or tensor.is_complex())), None)
    if wrong is not None:
        raise RuleError(f"average goes over floats, and a tensor is {_word(wrong)}")
    wide, weights = _wide(tensors), op["weights"]
    out = tensors[0].new_empty(tensors[0].shape)
    for piece in _pieces(tuple(out.shape)):
        total = tensors[0][piece].to(wide) * weights[0]
        for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
            total.add_(tensor[piece].to(wide), alpha=weight)
        out[piece] = total.to(out.dtype)
    return [out]


def _pieces(shape: tuple[int, ...], whole: int | None = None) -> Iterator[tuple[slice, ...]]:
    """The parts of a tensor along its longest dim, but for `whole`, each of about PIECE elements."""
    dims = [dim for dim in range(len(shape)) if dim != whole]
    if not dims:
        yield ()
        return
    longest = max(dims, key=shape.__getitem__)
    step = max(1, PIECE * shape[longest] // max(prod(shape), 1))
    for start in range(0, shape[longest], step):
        yield (*(slice(None),) * longest, slice(start, start + step))


def _wide(tensors: Sequence[torch.Tensor]) -> torch.dtype:
    import torch

    double = any(tensor.dtype in (torch.float64, torch.complex128) for tensor in tensors)
    if any(tensor.is_complex() for tensor in tensors):
        return torch.complex128 if double else torch.complex64
    return torch.float64 if double else torch.float32


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


KERNELS: dict[str, Kernel] = {
    "slice": each(lambda tensor, op: tensor.narrow(op["dim"], op["start"], op["stop"] - op["start"])),
    "pad": _padded,
    "concat": _concatenated,
    "chunk": each(_chunked),
    "stack": _stacked,
    "unstack": each(lambda tensor, op: tensor.select(op["dim"], op["index"])),
    "average": _averaged,
}
