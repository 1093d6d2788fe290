"""Writes a folder of torch.distributed.checkpoint by torch's own `save`, in this process alone and without a process group.

Each tensor is memory of its own on a private mapping of the file that holds it, so that torch, which copies views of one storage, copies
none, and no byte is held beside the page cache. Nothing that differs from run to run gets in: no path and no random name.
"""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.distributed.checkpoint import state_dict_saver as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import StorageMeta

from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.errors import OutputError, one_line
from ckptsurgeon.tensors import TensorMeta


class _Writer(FileSystemWriter):
    """Torch's writer, without the folder's path and a random name in `.metadata`."""

    def storage_meta(self) -> StorageMeta:
        """Nothing is said of this very save."""
        return StorageMeta()


def save(folder: str, tensors: Iterable[TensorMeta], entries: Mapping[str, Any]) -> None:
    """Write tensors, each dense and in one span of a file, and values that are none into an empty folder.

    Args:
        folder: the folder to write into.
        tensors: by name, shape and dtype, and where their bytes lie.
        entries: the values that are no tensors, by key.

    Raises:
        OutputError: this process is one of a group; or torch refuses, for another reason than the system's.
        OSError: the system refuses a read or a write.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        hint = "write it before init_process_group, or in a process of its own"
        raise OutputError("is written by one process, and this one is a rank of a process group", path=folder, hint=hint)
    with ExitStack() as stack, _quiet():
        state = {**dict(_mapped(tensors, stack)), **entries}
        try:
            dcp.save(state, storage_writer=_Writer(folder, single_file_per_rank=True, sync_files=True, thread_count=1))
        except CheckpointException as error:
            raise _own(error, folder) from error
        finally:
            state.clear()


def _mapped(tensors: Iterable[TensorMeta], stack: ExitStack) -> Iterator[tuple[str, torch.Tensor]]:
    maps: dict[str, mmap.mmap] = {}
    for meta in tensors:
        dtype, span = getattr(torch, BY_CODE[meta.dtype].torch), meta.span
        if span is None or not span.nbytes:
            yield meta.name, torch.empty(meta.shape, dtype=dtype)
            continue
        if span.file not in maps:
            with open(span.file, "rb") as file:
                maps[span.file] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        raw = torch.frombuffer(maps[span.file], dtype=torch.uint8, count=span.nbytes, offset=span.offset)
        yield meta.name, raw.view(dtype).view(meta.shape)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without torch's remark that there is no process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"torch\.distributed is disabled")
        yield


def _own(error: CheckpointException, folder: str) -> BaseException:
    """What made torch's engine fail; an interrupt and a refusal of the system's as they came."""
    causes = [failure[0] for failure in error.failures.values()]
    for cause in (each for first in causes for each in _chain(first)):  # torch's own writer fails after a refused write
        if isinstance(cause, OSError) or not isinstance(cause, Exception):
            return cause
    words = one_line(causes[0]) if causes else one_line(error)
    return OutputError(f"torch can't write it: {words}", path=folder, hint="write safetensors instead: -o OUT.safetensors")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
