"""What vision kernels share: planes and tokens of another size, by torch's interpolation."""

from __future__ import annotations

from ckptsurgeon.adapters.op import Op, Tensor
from ckptsurgeon.adapters.widening import widened


def resize(planes: Tensor, op: Op, size: tuple[int, int], antialias: bool) -> Tensor:
    """(B, D, h, w) -> (B, D, *size), in the dtype of `planes`."""
    from torch.nn.functional import interpolate

    if antialias and size[1] == 1 < size[0]:  # torch's antialiasing is wrong there (2.13, CPU): every row comes out the same
        return resize(planes.transpose(2, 3), op, (1, size[0]), antialias).transpose(2, 3)
    corners = None if op["mode"] == "nearest" else False
    resized: Tensor = interpolate(planes, size=size, mode=op["mode"], align_corners=corners, antialias=antialias)
    return resized


def resize_tokens(tokens: Tensor, op: Op, grid: tuple[int, int], to: tuple[int, int], antialias: bool) -> Tensor:
    """(B, h·w, D) -> (B, h'·w', D), float32 or wider."""
    planes = widened(tokens).reshape(tokens.shape[0], *grid, -1).permute(0, 3, 1, 2)
    return resize(planes, op, to, antialias).permute(0, 2, 3, 1).reshape(tokens.shape[0], to[0] * to[1], -1)
