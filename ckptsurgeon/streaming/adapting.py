"""Carries out a step's adapters on values: one result at a time, by the kernels, or, for an average, one chunk at a time.

It decides nothing: the ops come filled in from the plan. What comes out is held against the plan's shape and the sources' dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ckptsurgeon.errors import PlanError
from ckptsurgeon.streaming.copying import BUFFER
from ckptsurgeon.streaming.kernels.table import Initial, OwnKernel, run
from ckptsurgeon.streaming.values import PIECE, Buffer, memory_of, tensor_from
from ckptsurgeon.surgery.adapters.op import Op
from ckptsurgeon.surgery.planned import Step

if TYPE_CHECKING:
    import torch


def adapted(step: Step, tensors: list[torch.Tensor], initial: Initial, own: Mapping[str, OwnKernel]) -> torch.Tensor:
    """What a step's adapters make of its sources' tensors, which are not written to, in their dtype.

    Raises PlanError where a kernel gives another shape or dtype than planned: a person's own may.
    """
    import torch

    wanted = tensors[0].dtype
    with torch.no_grad():
        for op in step.adapters:
            tensors = run(op, tensors, initial, own)
    if len(tensors) != 1 or tuple(tensors[0].shape) != step.shape or tensors[0].dtype != wanted:
        found = " and ".join(f"{str(one.dtype).removeprefix('torch.')} {tuple(one.shape)}" for one in tensors) or "nothing"
        reason = f"its adapters gave {found}, where the plan says {str(wanted).removeprefix('torch.')} {step.shape}"
        raise PlanError(reason, key=step.target)
    return tensors[0]


def dense_parts(tensor: torch.Tensor) -> Iterator[Buffer]:
    """A tensor's elements, densely in row-major order, a buffer at a time and without a second copy of a dense one."""
    rows = [tensor]
    if not tensor.is_contiguous() and tensor.dim():  # made dense some rows at a time, so that no second copy is held
        step = max(1, BUFFER * len(tensor) // max(1, tensor.numel() * tensor.element_size()))
        rows = [tensor[start : start + step] for start in range(0, len(tensor), step)]
    for row in rows:
        memory = memory_of(row)
        for start in range(0, len(memory), BUFFER):
            yield memory[start : start + BUFFER]


def is_average(ops: Sequence[Op]) -> bool:
    """Whether a chain is an average and nothing else, which needs no more than a chunk of each source."""
    return [op["op"] for op in ops] == ["average"]


def averaged(sources: Sequence[Iterable[Buffer]], dtype: str, weights: Sequence[float]) -> Iterator[Buffer]:
    """The weighted mean of tensors' bytes, part by part, accumulated in float32 or wider."""
    import torch

    wide = torch.float64 if dtype == "F64" else torch.float32
    for parts in zip(*sources, strict=True):
        given = [tensor_from(part, dtype) for part in parts]
        mean = torch.empty_like(given[0])
        for start in range(0, len(mean), PIECE):
            piece = slice(start, start + PIECE)
            total = given[0][piece].to(wide) * weights[0]
            for tensor, weight in zip(given[1:], weights[1:], strict=True):
                total.add_(tensor[piece].to(wide), alpha=weight)
            mean[piece] = total
        yield memory_of(mean)
