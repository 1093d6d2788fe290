"""Values go through two buffers to a device that copies later: here one that copies when it is waited for, and not before."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptsurgeon.models.training import transfer as staging


@dataclass
class _Late:
    """A copy that is done when it is waited for."""

    filled: torch.Tensor
    target: torch.Tensor

    def synchronize(self) -> None:
        self.target.copy_(self.filled)


@settings(deadline=None)
@given(sizes=st.lists(st.integers(0, 50), max_size=8), tensors=st.integers(1, 3), buffer=st.integers(1, 17), seed=st.integers(0, 99))
def test_every_byte_arrives(sizes: list[int], tensors: int, buffer: int, seed: int) -> None:
    """However the bytes come in parts; a buffer that were filled too early would give others."""
    torch.manual_seed(seed)
    wanted = [[torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes] for _ in range(tensors)]
    targets = [torch.zeros(sum(sizes), dtype=torch.uint8) for _ in range(tensors)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(staging, "BUFFER", buffer)
        patch.setattr(staging, "_page_locked", lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))
        patch.setattr(staging, "_handed_over", _Late)
        with staging.Stage() as stage:
            for parts, target in zip(wanted, targets, strict=True):
                stage.copy((part.numpy().tobytes() for part in parts), target)
    for parts, target in zip(wanted, targets, strict=True):
        assert torch.equal(target, torch.cat([torch.empty(0, dtype=torch.uint8), *parts]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.bool, torch.complex64, torch.int64])
def test_any_dtype_and_shape(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are copied as they are."""
    monkeypatch.setattr(staging, "_page_locked", lambda nbytes: torch.empty(nbytes, dtype=torch.uint8))
    monkeypatch.setattr(staging, "_handed_over", _Late)
    for shape in ((), (3,), (2, 0), (4, 5)):
        value = torch.randn(shape).to(dtype)
        target = torch.zeros(shape, dtype=dtype)
        with staging.Stage() as stage:
            stage.copy([bytes(value.contiguous().view(-1).view(torch.uint8).tolist())], target)
        assert torch.equal(target.view(-1).view(torch.uint8), value.view(-1).view(torch.uint8))
