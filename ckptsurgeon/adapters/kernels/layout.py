"""Kernels of the adapters that lay one tensor out anew: views where torch has one, else one new tensor. Inputs are never written."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ckptsurgeon.adapters.op import Op

if TYPE_CHECKING:
    import torch

    # The tensors, the op as the plan has it, and what gives the target's initial value -> the tensors that come out.
    Kernel = Callable[[list[torch.Tensor], Op, Callable[[], torch.Tensor]], list[torch.Tensor]]


def each(one: Callable[[torch.Tensor, Op], torch.Tensor]) -> Kernel:
    """The kernel of an op that takes every tensor by itself, from that of one."""
    return lambda tensors, op, _initial: [one(tensor, op) for tensor in tensors]


def _regroup(tensor: torch.Tensor, dim: int, sizes: tuple[int, ...]) -> torch.Tensor:
    """Dim `dim` under the shape `sizes`, whose last two dims are swapped, flat again."""
    last = dim + len(sizes) - 1
    parts = tensor.reshape((*tensor.shape[:dim], *sizes, *tensor.shape[dim + 1 :]))
    return parts.transpose(last - 1, last).reshape(tensor.shape)


def _interleaved(tensor: torch.Tensor, op: Op) -> torch.Tensor:
    return _regroup(tensor, op["dim"], (op["parts"], tensor.shape[op["dim"]] // op["parts"]))


def _deinterleaved(tensor: torch.Tensor, op: Op) -> torch.Tensor:
    return _regroup(tensor, op["dim"], (tensor.shape[op["dim"]] // op["parts"], op["parts"]))


def _rotary(tensor: torch.Tensor, op: Op) -> torch.Tensor:
    half = tensor.shape[op["dim"]] // op["heads"] // 2
    return _regroup(tensor, op["dim"], (op["heads"], *((half, 2) if op["to"] == "halves" else (2, half))))


KERNELS: dict[str, Kernel] = {
    "transpose": each(lambda tensor, op: tensor.transpose(*op["dims"])),
    "permute": each(lambda tensor, op: tensor.permute(tuple(op["dims"]))),
    "reshape": each(lambda tensor, op: tensor.reshape(tuple(op["shape"]))),
    "squeeze": each(lambda tensor, op: tensor.squeeze(op["dim"]) if "dim" in op else tensor.squeeze()),
    "unsqueeze": each(lambda tensor, op: tensor.unsqueeze(op["dim"])),
    "interleave": each(_interleaved),
    "deinterleave": each(_deinterleaved),
    "permute_rope": each(_rotary),
}
