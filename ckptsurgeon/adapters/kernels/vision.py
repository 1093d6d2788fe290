"""Kernels of the vision adapters: each tensor on its own, computed in float32 or wider, returned in its own dtype.

No input is written to. Every size stands in the op; the formulas' sources stand with the adapters of the same names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ckptsurgeon.adapters.op import Op

if TYPE_CHECKING:
    import torch

    Initial = Callable[[], torch.Tensor]


def _each(one: Callable[[torch.Tensor, Op], torch.Tensor]) -> Callable[[list[torch.Tensor], Op, Initial], list[torch.Tensor]]:
    return lambda tensors, op, _initial: [one(tensor, op) for tensor in tensors]


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor in a dtype to compute in: float32, or float64 as it is."""
    import torch

    return tensor if tensor.dtype == torch.float64 else tensor.to(torch.float32)


def _resize(planes: torch.Tensor, op: Op, size: tuple[int, int], antialias: bool) -> torch.Tensor:
    """(B, D, h, w) -> (B, D, *size), in the dtype of `planes`."""
    from torch.nn.functional import interpolate

    if antialias and size[1] == 1 < size[0]:  # torch's antialiasing is wrong there (2.13, CPU): every row comes out the same
        return _resize(planes.transpose(2, 3), op, (1, size[0]), antialias).transpose(2, 3)
    corners = None if op["mode"] == "nearest" else False
    found: torch.Tensor = interpolate(planes, size=size, mode=op["mode"], align_corners=corners, antialias=antialias)
    return found


def _resize_tokens(tokens: torch.Tensor, op: Op, grid: tuple[int, int], to: tuple[int, int], antialias: bool) -> torch.Tensor:
    """(B, h·w, D) -> (B, h'·w', D), float32 or wider."""
    planes = _wide(tokens).reshape(tokens.shape[0], *grid, -1).permute(0, 3, 1, 2)
    return _resize(planes, op, to, antialias).permute(0, 2, 3, 1).reshape(tokens.shape[0], to[0] * to[1], -1)


def _interpolate(tensor: torch.Tensor, op: Op) -> torch.Tensor:
    to = (op["to"][0], op["to"][1])
    if op["layout"] == "channels_first":
        planes = tensor if tensor.dim() == 4 else tensor.unsqueeze(0)
        return _resize(_wide(planes), op, to, op["antialias"]).to(tensor.dtype).reshape(*tensor.shape[:-2], *to)
    if tensor.dim() == 4:
        return _resize(_wide(tensor.permute(0, 3, 1, 2)), op, to, op["antialias"]).permute(0, 2, 3, 1).to(tensor.dtype).contiguous()
    prefix = op["prefix"]
    tokens = tensor if tensor.dim() == 3 else tensor.unsqueeze(0)
    found = tokens.new_empty(tokens.shape[0], prefix + to[0] * to[1], tokens.shape[2])
    found[:, :prefix].copy_(tokens[:, :prefix])
    found[:, prefix:].copy_(_resize_tokens(tokens[:, prefix:], op, (op["grid"][0], op["grid"][1]), to, op["antialias"]))
    return found if tensor.dim() == 3 else found.squeeze(0)


def _relative_position_bias(tensor: torch.Tensor, op: Op) -> torch.Tensor:
    (h, w), (to_h, to_w) = ((2 * one[0] - 1, 2 * one[1] - 1) for one in (op["grid"], op["to"]))
    found = tensor.new_empty(to_h * to_w + op["extra"], tensor.shape[1])
    found[: to_h * to_w].copy_(_resize_tokens(tensor[: h * w].unsqueeze(0), op, (h, w), (to_h, to_w), False).squeeze(0))
    found[to_h * to_w :].copy_(tensor[h * w :])
    return found


def _patch_embed(tensor: torch.Tensor, op: Op) -> torch.Tensor:
    """w' = pinv(Bᵀ) w. The resize is one of rows and one of columns, B = B_h ⊗ B_w, so each side has its own small pseudo-inverse."""
    import torch

    def inverse(size: int, to: int) -> torch.Tensor:
        """pinv(Bᵀ) of one side, (to, size); what the resize makes of the unit vectors are the rows of Bᵀ."""
        units = torch.eye(size, dtype=torch.float64).reshape(1, size, size, 1)
        inverted: torch.Tensor = torch.linalg.pinv(_resize(units, op, (to, 1), op["antialias"])[0, :, :, 0])
        return inverted

    kernel = _wide(tensor)
    rows, columns = (inverse(size, to).to(kernel.dtype) for size, to in zip(tensor.shape[2:], op["to"], strict=True))
    found: torch.Tensor = rows @ kernel @ columns.T
    return found.to(tensor.dtype)


def _in_channels(tensor: torch.Tensor, op: Op) -> torch.Tensor:
    dim, wanted = op["dim"], op["channels"]
    given = tensor.shape[dim]
    if wanted == 1:
        return _wide(tensor).sum(dim, keepdim=True).to(tensor.dtype)
    scaled = (_wide(tensor) * (given / wanted)).to(tensor.dtype)
    found = tensor.new_empty(*tensor.shape[:dim], wanted, *tensor.shape[dim + 1 :])
    for start in range(0, wanted, given):
        count = min(given, wanted - start)
        found.narrow(dim, start, count).copy_(scaled.narrow(dim, 0, count))
    return found


def _inflate(tensor: torch.Tensor, op: Op) -> torch.Tensor:
    dim, size = op["dim"], op["size"]
    found = tensor.new_zeros(*tensor.shape[:dim], size, *tensor.shape[dim:])
    if op["mode"] == "center":
        found.select(dim, size // 2).copy_(tensor)
    else:
        found.copy_((_wide(tensor) / size).to(tensor.dtype).unsqueeze(dim))
    return found


KERNELS = {
    "interpolate": _each(_interpolate),
    "relative_position_bias": _each(_relative_position_bias),
    "patch_embed": _each(_patch_embed),
    "in_channels": _each(_in_channels),
    "inflate": _each(_inflate),
}
