"""Writes a folder of torch.distributed.checkpoint by torch's own `save`, in this process alone and without a process group.

Each tensor has its own storage on a private memory map of its file: torch copies views of a larger storage, and so copies none of these.
The written files do not differ from run to run: they contain no path and no random name.
"""

from __future__ import annotations

import mmap
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
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
        """Metadata without this save's path and random name."""
        return StorageMeta()


def save(folder: str, tensors: Iterable[TensorMeta], entries: Mapping[str, Any]) -> None:
    """Write tensors, each dense and in one span of a file, and values that are not tensors (`entries`) into an empty folder.

    Raises:
        OutputError: this process is a rank of a process group; or torch fails, not because of an OSError.
        OSError: a read or write fails.
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        hint = "write it before init_process_group, or in a process of its own"
        raise OutputError("is written by one process, and this one is a rank of a process group", path=folder, hint=hint)
    with ExitStack() as stack, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"torch\.distributed is disabled")  # there is no process group
        state = {**dict(_mapped(tensors, stack)), **entries}
        try:
            dcp.save(state, storage_writer=_Writer(folder, single_file_per_rank=True, sync_files=True, thread_count=1))
        except CheckpointException as error:
            raise _cause(error, folder) from error
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


def _cause(error: CheckpointException, folder: str) -> BaseException:
    """The error that made torch's `save` fail; an OSError or an interrupt unchanged."""
    causes = [failure[0] for failure in error.failures.values()]
    for cause in (error for first in causes for error in _chain(first)):  # torch's writer raises another error after a failed write
        if isinstance(cause, OSError) or not isinstance(cause, Exception):
            return cause
    words = one_line(causes[0]) if causes else one_line(error)
    return OutputError(f"torch can't write it: {words}", path=folder, hint="write safetensors instead: -o OUT.safetensors")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
