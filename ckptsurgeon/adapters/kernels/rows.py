"""The kernel of the adapter `rows`: runs of rows are copied bit by bit, the rows between them are filled.

Any dtype can be copied; a mean needs floating numbers. The mean is that of all of the source's rows, summed in float64, part by part.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from ckptsurgeon.adapters.op import Op
from ckptsurgeon.errors import RuleError

if TYPE_CHECKING:
    import torch

    Initial = Callable[[], torch.Tensor]

PIECE = 1 << 20  # elements summed at a time


def _rows(tensors: list[torch.Tensor], op: Op, initial: Initial) -> list[torch.Tensor]:
    holes = list(_holes(op["runs"], op["rows"]))
    first = initial() if holes and op["fill"] == "init" else None  # asked for once: it may build a model
    return [_one(tensor, op, holes, first) for tensor in tensors]


def _holes(runs: Sequence[Sequence[int]], rows: int) -> Iterator[tuple[int, int]]:
    """Where the rows without a run start, and how many they are.

    >>> list(_holes([[1, 0, 2], [3, 7, 1]], 6))
    [(0, 1), (4, 2)]
    """
    end = 0
    for start, _, count in (*runs, (rows, 0, 0)):
        if start > end:
            yield end, start - end
        end = start + count


def _one(tensor: torch.Tensor, op: Op, holes: Sequence[tuple[int, int]], initial: torch.Tensor | None) -> torch.Tensor:
    dim = op["dim"]
    found = _copied(tensor, dim, op["rows"], op["runs"])
    if not holes:
        return found
    if initial is not None and initial.shape != found.shape:
        raise RuleError(f"rows: the target's initial value has the shape {tuple(initial.shape)}, not {tuple(found.shape)}")
    mean = _mean(tensor, dim) if op["fill"] == "mean" else None
    for start, count in holes:
        hole = found.narrow(dim, start, count)
        if mean is not None:
            hole.copy_(mean)
        elif initial is not None:
            hole.copy_(initial.narrow(dim, start, count))
        else:
            hole.zero_()
    return found


def _copied(tensor: torch.Tensor, dim: int, rows: int, runs: Sequence[Sequence[int]]) -> torch.Tensor:
    """`rows` rows along `dim`, those of the runs with the source's bits; the others hold anything.

    One selection for all runs: they may be many and short.
    """
    import torch

    if not runs:
        return tensor.new_empty(*tensor.shape[:dim], rows, *tensor.shape[dim + 1 :])
    starts, sources, counts = torch.tensor(runs, dtype=torch.int64).unbind(1)
    place = torch.arange(int(counts.sum())) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
    index = torch.zeros(rows, dtype=torch.int64)
    index[place + torch.repeat_interleave(starts, counts)] = place + torch.repeat_interleave(sources, counts)
    if tensor.dtype == torch.complex128:
        return tensor.index_select(dim, index)
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]  # torch can select these, not all dtypes
    return tensor.view(whole).index_select(dim, index).view(tensor.dtype)


def _mean(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """The mean along `dim`, which stays with size 1, in the tensor's dtype."""
    import torch

    if not tensor.is_floating_point():
        raise RuleError(f"rows: there is no mean of {tensor.dtype} rows", hint="fill with zeros or init")
    rows = tensor.shape[dim]
    step = max(1, PIECE // max(1, tensor.numel() // rows))
    total = torch.zeros([1 if at == dim else size for at, size in enumerate(tensor.shape)], dtype=torch.float64)
    for start in range(0, rows, step):
        total += tensor.narrow(dim, start, min(step, rows - start)).to(torch.float64).sum(dim, keepdim=True)
    return (total / rows).to(tensor.dtype)


KERNELS = {"rows": _rows}
