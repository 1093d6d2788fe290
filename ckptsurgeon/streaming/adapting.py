"""Runs a step's adapters on values: a whole result by the kernels, or part by part where the adapter allows it.

The ops come complete from the plan. The result must have the plan's shape and the sources' dtype.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from ckptsurgeon.adapters.chain import made_dtype, needs_floats
from ckptsurgeon.adapters.op import Initial, Op
from ckptsurgeon.adapters.table import UserKernel, adapter_of, run
from ckptsurgeon.adapters.widening import rows_at_a_time
from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.errors import CastError, PlanError, RuleError
from ckptsurgeon.planning.plan_types import Step
from ckptsurgeon.report import Cast
from ckptsurgeon.storage.copying import BUFFER
from ckptsurgeon.streaming.reading import Reader
from ckptsurgeon.streaming.values import PIECE, Buffer, cast, memory_of, non_finite, tensor_from
from ckptsurgeon.tensors import TensorMeta

if TYPE_CHECKING:
    import torch

ROWS = 1 << 20  # bytes of rows that are made dense at a time


def adapted(step: Step, tensors: Sequence[torch.Tensor], initial: Initial, own: Mapping[str, UserKernel]) -> torch.Tensor:
    """The result of a step's adapters on its sources' tensors, in their dtype. The tensors are not changed.

    Raises PlanError where a kernel returns another shape or dtype than planned, as a user's own kernel may.
    """
    import torch

    sources, code = tensors, made_dtype(step.adapters, "")
    dtype = getattr(torch, BY_CODE[code].torch) if code else tensors[0].dtype
    try:
        with torch.no_grad():
            for op in step.adapters:
                tensors = run(op, tensors, initial, own)
    except RuleError as error:
        hint = error.hint or f"keep the target's own value there: keep={[step.target]!r}"
        raise RuleError(error.reason, key=step.target, hint=hint) from error
    except (RuntimeError, MemoryError) as error:  # torch's own words for what it can't do, or has no memory for
        raise PlanError(f"can't be adapted: {str(error).splitlines()[0][:200] if str(error) else 'no memory'}", key=step.target) from error
    if len(tensors) != 1 or tuple(tensors[0].shape) != step.shape or tensors[0].dtype != dtype:
        found = " and ".join(f"{str(one.dtype).removeprefix('torch.')} {tuple(one.shape)}" for one in tensors) or "nothing"
        reason = f"its adapters gave {found}, where the plan says {str(dtype).removeprefix('torch.')} {step.shape}"
        raise PlanError(reason, key=step.target)
    if needs_floats(step.adapters) or step.schemes or code:
        _refuse_overflow(step, sources, tensors[0])
    return tensors[0]


def adapted_and_cast(
    step: Step, tensors: list[torch.Tensor], dtype: str, initial: Initial, own: Mapping[str, UserKernel], casts: list[Cast]
) -> torch.Tensor:
    """The result of a step's adapters and its cast on tensors of `dtype` (safetensors' code); the cast's losses are added to `casts`.

    A cast to a wider dtype is done first, so that the values which the adapters compute need not fit the narrower one.
    """
    if step.cast is None:
        return adapted(step, tensors, initial, own)
    first, last, made = BY_CODE[dtype], BY_CODE[step.cast], made_dtype(step.adapters, "")
    if not made and last.kind == "float" and (first.kind != "float" or first.size < last.size):
        return adapted(step, [_cast(step, tensor, dtype, casts) for tensor in tensors], initial, own)
    return _cast(step, adapted(step, tensors, initial, own), made or dtype, casts)


def _cast(step: Step, tensor: torch.Tensor, dtype: str, casts: list[Cast]) -> torch.Tensor:
    assert step.cast is not None
    data = bytearray().join(cast(step.target, dense_parts(tensor), dtype, step.cast, casts))
    return tensor_from(data, step.cast).view(tensor.shape)


def _refuse_overflow(step: Step, tensors: Sequence[torch.Tensor], made: torch.Tensor) -> None:
    """Raises CastError where finite values came to be infinite, or none, in the dtype in which they are computed."""
    if made.is_floating_point() and non_finite(made) and not any(map(non_finite, tensors)):
        raise _overflow(step.target, made, "convert the source to a wider dtype first, by a merge with dtype='F32'")


def _overflow(key: str, made: torch.Tensor, hint: str) -> CastError:
    return CastError(f"its adapters give values that {str(made.dtype).removeprefix('torch.')} can't hold", key=key, hint=hint)


def dense_parts(tensor: torch.Tensor) -> Iterator[Buffer]:
    """A tensor's elements, densely in row-major order, a buffer at a time and without a second copy of a dense one."""
    rows = [tensor]
    if not tensor.is_contiguous() and tensor.dim():  # made dense some rows at a time, so that no second copy is held
        step = max(1, ROWS * len(tensor) // max(1, tensor.numel() * tensor.element_size()))
        rows = [tensor[start : start + step] for start in range(0, len(tensor), step)]
    for row in rows:
        memory = memory_of(row)
        for start in range(0, len(memory), BUFFER):
            yield memory[start : start + BUFFER]


def by_rows(reader: Reader, key: str, op: Op, first: TensorMeta, *others: TensorMeta) -> Iterator[Buffer]:
    """What an op makes of some rows of the first tensor at a time and the others whole. CastError where finite values give none."""
    make, wholes = adapter_of(op).by_rows, [tensor_from(reader.read(one), one.dtype) for one in others]
    assert make is not None
    step = rows_at_a_time(first.shape)
    for start in range(0, first.shape[0], step):
        stop = min(start + step, first.shape[0])
        given = tensor_from(reader.rows(first, start, stop), first.dtype).view(stop - start, *first.shape[1:])
        made = make(op, [given, *wholes], first.shape, start)
        if non_finite(made) and not any(map(non_finite, (given, *wholes))):
            raise _overflow(key, made, f"its scale may be damaged; leave it out: drop=[{key!r}]")
        yield memory_of(made)


def elementwise(sources: Sequence[Iterable[Buffer]], dtype: str, op: Op) -> Iterator[Buffer]:
    """What an op makes of tensors' bytes, element by element, of few at a time, since it may compute in a wider dtype."""
    import torch

    def initial() -> torch.Tensor:
        raise AssertionError("a target's initial value has no parts")

    for parts in zip(*sources, strict=True):
        given = [tensor_from(part, dtype) for part in parts]
        made = torch.empty_like(given[0])
        for start in range(0, len(made), PIECE):
            piece = slice(start, start + PIECE)
            (made[piece],) = adapter_of(op).kernel(op, [tensor[piece] for tensor in given], initial)
        yield memory_of(made)
