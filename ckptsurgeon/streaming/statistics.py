"""Statistics of tensors, read a part at a time: mean, spread, and for a matrix how much of a bounded sample lies in one direction.

Rule: memory does not grow with a tensor's size, and a tensor with values that are not finite has no statistics.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.matching.evidence.value_evidence import Stats, noise_share
from ckptsurgeon.progress import Advance, phase
from ckptsurgeon.streaming.reading import Reader
from ckptsurgeon.streaming.values import PIECE, Buffer, floats, tensor_from
from ckptsurgeon.tensors import Checkpoint, TensorMeta

if TYPE_CHECKING:
    import torch

SIDE = 256  # rows and columns of a sample
LEAST = 8  # rows and columns below which a spectrum tells nothing


def of_file(checkpoint: Checkpoint, keys: Iterable[str]) -> Mapping[str, Stats]:
    """The statistics of a checkpoint's floating tensors; none of those with values that are not finite."""
    tensors = (checkpoint[key] for key in keys)
    floats = [tensor for tensor in tensors if tensor.place is not None and tensor.numel and BY_CODE[tensor.dtype].kind == "float"]
    with Reader([checkpoint]) as reader, phase("reading values", sum(tensor.nbytes for tensor in floats)) as advance:
        found = {tensor.name: _streamed(tensor, reader.parts(tensor), advance) for tensor in floats}
        reader.check_unchanged()
    return {key: stats for key, stats in found.items() if stats is not None}


def of_tensors(tensors: Mapping[str, torch.Tensor], keys: Iterable[str]) -> Mapping[str, Stats]:
    """The same of tensors in memory."""
    found = {key: _whole(tensors[key]) for key in keys if key in tensors and tensors[key].is_floating_point() and tensors[key].numel()}
    return {key: stats for key, stats in found.items() if stats is not None}


def _streamed(tensor: TensorMeta, parts: Iterable[Buffer], advance: Advance) -> Stats | None:
    import torch

    total = squares = 0.0
    columns = tensor.numel // tensor.shape[0] if tensor.shape else 1
    remaining = SIDE * columns if len(tensor.shape) > 1 else 0
    sample: list[torch.Tensor] = []
    for part in parts:
        values = tensor_from(part, tensor.dtype)
        if remaining > 0:
            sample.append(values[:remaining].clone())
            remaining -= len(sample[-1])
        total, squares = _sums(values, total, squares)
        advance(memoryview(part).nbytes)
    top = 0.0
    if sample:
        flat = torch.cat(sample)
        rows = len(flat) // columns
        top = _top(flat[: rows * columns].reshape(rows, columns), tensor.shape)
    return _stats(total, squares, tensor.numel, top)


def _whole(tensor: torch.Tensor) -> Stats | None:
    values = tensor.detach().cpu()
    top = _top(values.reshape(len(values), -1)[:SIDE], tuple(values.shape)) if values.dim() > 1 else 0.0
    return _stats(*_sums(values.reshape(-1)), values.numel(), top)


def _sums(values: torch.Tensor, total: float = 0.0, squares: float = 0.0) -> tuple[float, float]:
    """The sums of values and of their squares, added to those of values before; in float64, and alike however they come in parts."""
    import torch

    for piece in torch.split(values, PIECE):
        wide = floats(piece, torch.float64)
        total += float(wide.sum())
        squares += float(torch.mul(wide, wide).sum())
    return total, squares


def _stats(total: float, squares: float, count: int, top: float) -> Stats | None:
    mean = total / count
    spread = max(squares / count - mean * mean, 0.0) ** 0.5
    if not all(value == value and abs(value) < float("inf") for value in (mean, spread, top)):
        return None
    return Stats(mean, spread, top)


def _top(sample: torch.Tensor, shape: tuple[int, ...]) -> float:
    """How many times the energy of noise the first direction has; 0 for vectors in all but form, and for small matrices."""
    import torch

    sample = floats(sample[:, :SIDE].contiguous(), torch.float64)
    if sum(size > 1 for size in shape) < 2 or min(sample.shape) < LEAST or not bool(torch.isfinite(sample).all()):
        return 0.0
    centred = sample - sample.mean()
    energy = float(centred.square().sum())
    if not 0 < energy < float("inf"):
        return 0.0
    wide = centred if centred.shape[0] <= centred.shape[1] else centred.T
    first = float(torch.linalg.eigvalsh(wide @ wide.T)[-1])  # the square of the first singular value, in half the time
    return first / energy / noise_share(*sample.shape)
