"""Opens the files behind checkpoints, each once and as it was when its header was read, and gives tensors' bytes.

A deflated entry is inflated into an unnamed temporary file, so that memory stays flat. torch is imported only for a tensor that does not
lie densely.
"""

from __future__ import annotations

import mmap
import os
import tempfile
import zlib
from collections.abc import Iterable
from contextlib import ExitStack
from types import TracebackType
from typing import BinaryIO

from ckptsurgeon.errors import FormatError, StaleError
from ckptsurgeon.formats.files import OpenFile, open_regular, stamp
from ckptsurgeon.streaming.copying import BUFFER, chunks
from ckptsurgeon.streaming.values import Buffer, densify
from ckptsurgeon.tensors import Checkpoint, FileStamp, Packed, Span, TensorMeta


class Reader:
    """The open files of some checkpoints; a context manager."""

    def __init__(self, checkpoints: Iterable[Checkpoint]) -> None:
        self._stamps: dict[str, FileStamp] = {}
        for seen in (seen for found in checkpoints for seen in found.files):
            if self._stamps.setdefault(seen.path, seen) != seen:
                raise _changed(seen.path)  # between the reading of two headers
        self._files: dict[str, OpenFile] = {}
        self._inflated: dict[tuple[str, int], BinaryIO] = {}
        self._maps: dict[int, mmap.mmap] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def _open(self, path: str) -> OpenFile:
        file = self._files.get(path)
        if file is None:
            file = self._files[path] = self._stack.enter_context(open_regular(path))
            if file.stamp != self._stamps.get(path, file.stamp):
                raise _changed(path)
        return file

    def locate(self, span: Span) -> tuple[int, int]:
        """The open file and the offset at which a span's bytes begin."""
        file = self._open(span.file)
        if span.packed is None:
            return file.fd, span.offset
        place = span.file, span.packed.offset
        if place not in self._inflated:
            self._inflated[place] = self._stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
            _inflate(file, span.packed, self._inflated[place])
        return self._inflated[place].fileno(), span.offset

    def read(self, tensor: TensorMeta) -> bytearray:
        """A tensor's elements, densely in row-major order."""
        assert tensor.span is not None
        fd, offset = self.locate(tensor.span)
        data = bytearray(tensor.span.nbytes)
        position = 0
        for chunk in chunks(fd, offset, tensor.span.nbytes):
            data[position : position + len(chunk)] = chunk
            position += len(chunk)
        return data if tensor.contiguous else densify(tensor, data)

    def parts(self, tensor: TensorMeta) -> Iterable[Buffer]:
        """A tensor's elements like `read`, in parts of whole elements; memory is flat where they lie densely."""
        assert tensor.span is not None
        if not tensor.contiguous:
            dense = memoryview(self.read(tensor))
            return (dense[start : start + BUFFER] for start in range(0, len(dense), BUFFER))
        fd, offset = self.locate(tensor.span)
        return chunks(fd, offset, tensor.span.nbytes)

    def view(self, tensor: TensorMeta) -> memoryview:
        """A tensor's elements like `read`, mapped from the file rather than read where they lie densely."""
        assert tensor.span is not None
        if not tensor.contiguous or not tensor.span.nbytes:
            return memoryview(self.read(tensor))
        fd, offset = self.locate(tensor.span)
        if fd not in self._maps:
            # Private: torch wants writable memory, and nothing that it writes must reach the file.
            self._maps[fd] = mmap.mmap(fd, 0, access=mmap.ACCESS_COPY)
        return memoryview(self._maps[fd])[offset : offset + tensor.span.nbytes]

    def check_unchanged(self) -> None:
        """Raises StaleError when a file that was read is no longer what it was."""
        # A file that was replaced or taken away since it was opened is still whole for us.
        for path, file in self._files.items():
            if stamp(path, os.fstat(file.fd)) != file.stamp:
                raise _changed(path)


def _changed(path: str) -> StaleError:
    return StaleError("changed while it was read", path=path, hint="run it again when nothing writes to it")


def _inflate(file: OpenFile, packed: Packed, output: BinaryIO) -> None:
    inflate = zlib.decompressobj(-15)
    total = 0
    for chunk in chunks(file.fd, packed.offset, packed.nbytes):
        data: bytes | memoryview = chunk
        more = True
        while more:
            try:
                part = inflate.decompress(data, BUFFER)
            except zlib.error as error:
                raise FormatError("has a damaged deflated entry", path=file.path, hint="copy or download it again") from error
            total += len(part)
            if total > packed.size:
                break
            output.write(part)
            data = inflate.unconsumed_tail
            more = bool(data) or len(part) == BUFFER
    if total != packed.size or not inflate.eof or inflate.unused_data:
        raise FormatError("has a deflated entry of another length than it says", path=file.path, hint="copy or download it again")
    output.flush()
