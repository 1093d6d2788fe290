"""Copies values from files to a CUDA device through two page-locked buffers: while one of them is copied, the other one is filled.

Rule: a buffer is filled again only when the copy out of it has ended, and all copies have ended when the block ends.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from types import TracebackType

import torch

from ckptsurgeon.storage.copying import BUFFER
from ckptsurgeon.streaming.values import Buffer, tensor_from

BUFFERS = 2


class Stage:
    """The buffers, in the order of their use, each with the event behind the last copy out of it. They are made when first needed."""

    def __init__(self) -> None:
        self._turns: deque[tuple[torch.Tensor, torch.cuda.Event | None]] = deque()

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        while self._turns:
            _wait(self._turns.popleft()[1])

    def copy(self, parts: Iterable[Buffer], tensor: torch.Tensor) -> None:
        """Fill a contiguous tensor on a CUDA device with its bytes, which come in parts."""
        if not self._turns:
            self._turns.extend((_page_locked(BUFFER), None) for _ in range(BUFFERS))
        done, flat = 0, tensor.view(-1).view(torch.uint8)
        for part in parts:
            for piece in torch.split(tensor_from(part, "U8"), BUFFER):
                buffer, copied = self._turns.popleft()
                _wait(copied)
                filled = buffer[: len(piece)].copy_(piece)
                self._turns.append((buffer, _handed_over(filled, flat[done : done + len(piece)])))
                done += len(piece)
        assert done == len(flat)


def _page_locked(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)


def _handed_over(filled: torch.Tensor, target: torch.Tensor) -> torch.cuda.Event:
    """The event behind a copy that the device does later."""
    target.copy_(filled, non_blocking=True)
    copied: torch.cuda.Event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record(torch.cuda.current_stream(target.device))
    return copied


def _wait(copied: torch.cuda.Event | None) -> None:
    if copied is not None:
        copied.synchronize()
