"""Detects memory that a constructor allocates and never writes to, so that no garbage gets into a file as an initial value.

Within `marked()`, every tensor of `torch.empty` and similar functions is filled with one special NaN, which `is_unset` recognises by its
bits, also in a copy; other NaNs have other bits. Dtypes without such a NaN, such as integers, are filled with 0. No random state changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_ALLOCATING = ("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided")
_MARKS: dict[torch.dtype, tuple[torch.dtype, int]] = {
    torch.float64: (torch.int64, 0x7FF8_0000_0000_5EED),
    torch.float32: (torch.int32, 0x7FC0_5EED),
    torch.float16: (torch.int16, 0x7E5D),
    torch.bfloat16: (torch.int16, 0x7FDD),
}


@contextmanager
def marked() -> Iterator[None]:
    """Within the block, fill tensors that are allocated without values with the special NaN.

    >>> with marked():
    ...     is_unset(torch.empty(2)), is_unset(torch.zeros(2)), is_unset(torch.full((2,), float("nan")))
    (True, False, False)
    """
    with _Marking():  # type: ignore[no-untyped-call]
        yield


def is_unset(tensor: torch.Tensor) -> bool:
    """Whether an element of the tensor still has the special NaN of `marked`."""
    if tensor.dtype not in _MARKS or tensor.is_meta or not tensor.numel() or tensor.layout != torch.strided:
        return False
    if tensor.is_neg():
        tensor = torch._neg_view(tensor)  # to see the stored bits, not their negation
    bits, mark = _MARKS[tensor.dtype]
    return bool((tensor.detach().view(bits) == mark).any())


class _Marking(TorchDispatchMode):  # type: ignore[no-untyped-call]
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler for it, which takes longer than building a model

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensor = func(*args, **(kwargs or {}))
        if (
            func.overloadpacket.__name__ in _ALLOCATING
            and type(tensor) is torch.Tensor
            and tensor.layout == torch.strided
            and not tensor.is_meta
        ):
            bits, mark = _MARKS.get(tensor.dtype, (None, 0))
            (tensor.fill_(mark) if bits is None else tensor.view(bits).fill_(mark))
        return tensor
