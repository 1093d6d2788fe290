"""The one table of kernels, by the adapters' names; a person's own are handed in."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ckptsurgeon.adapters.kernels.combining import KERNELS as COMBINING
from ckptsurgeon.adapters.kernels.layout import KERNELS as LAYOUT
from ckptsurgeon.adapters.kernels.rows import KERNELS as ROWS
from ckptsurgeon.adapters.kernels.scales import KERNELS as SCALES
from ckptsurgeon.adapters.kernels.vision import KERNELS as VISION
from ckptsurgeon.adapters.op import Op
from ckptsurgeon.adapters.table import is_own
from ckptsurgeon.errors import PlanError

if TYPE_CHECKING:
    import torch

Initial = Callable[[], "torch.Tensor"]
Kernel = Callable[[list["torch.Tensor"], Op, Initial], list["torch.Tensor"]]
OwnKernel = Callable[..., "torch.Tensor"]  # (tensors, **arguments) -> tensor

KERNELS: Mapping[str, Kernel] = {**LAYOUT, **COMBINING, **VISION, **ROWS, **SCALES}


def run(op: Op, tensors: list[torch.Tensor], initial: Initial, own: Mapping[str, OwnKernel]) -> list[torch.Tensor]:
    """What one filled op makes of tensors. PlanError for a person's own that was not handed in."""
    if not is_own(op):
        return KERNELS[op["op"]](tensors, op, initial)
    if op["op"] not in own:
        raise PlanError(f"{op['op']!r} was not imported")
    return [own[op["op"]](tensors, **op["arguments"])]
