"""Opens the files behind checkpoints, each once and as it was when its header was read, and gives tensors' bytes.

Deflated entries are inflated into one unnamed temporary file, so that memory stays flat. torch is imported only for a tensor that does not
lie densely.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import prod
from types import TracebackType
from typing import BinaryIO

from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.errors import FormatError, OutputError
from ckptsurgeon.formats.inflate import inflated
from ckptsurgeon.storage import copying
from ckptsurgeon.storage.copying import BUFFER
from ckptsurgeon.storage.files import OpenFile, changed
from ckptsurgeon.storage.local import LocalFile
from ckptsurgeon.storage.opening import OpenFiles, open_regular
from ckptsurgeon.storage.pieces import Block, meeting, runs, scatter, stretches
from ckptsurgeon.streaming.bands import bands, side_by_side
from ckptsurgeon.streaming.values import Buffer, densify
from ckptsurgeon.tensors import Checkpoint, FileStamp, Packed, Span, TensorMeta, contiguous_stride


@dataclass(frozen=True, slots=True)
class Read:
    """Memory that is to be filled from a place in a file."""

    file: OpenFile
    offset: int
    memory: memoryview

    @property
    def nbytes(self) -> int:
        """How much memory it is."""
        return len(self.memory)

    def do(self) -> None:
        """Fill the memory; in any thread."""
        copying.read_at(self.file, self.memory, self.offset)


class Reader:
    """Opens the files of some checkpoints and reads tensors from them; a context manager."""

    def __init__(self, checkpoints: Iterable[Checkpoint]) -> None:
        self._stamps: dict[str, FileStamp] = {}
        for stamp in (stamp for checkpoint in checkpoints for stamp in checkpoint.files):
            if self._stamps.setdefault(stamp.path, stamp) != stamp:
                raise changed(stamp.path)  # between the reading of two headers
        self._files: dict[str, OpenFile] = {}
        self._inflated: dict[tuple[str, int], tuple[LocalFile, int]] = {}
        self._entries: dict[tuple[str, int], Span] = {}
        self._open = OpenFiles()
        self._unpacked: BinaryIO | None = None
        self._unpacked_size = 0

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._open.close()

    def open(self, path: str) -> OpenFile:
        """The open file at a path. StaleError where it has changed since its header was read."""
        file = self._files.get(path)
        if file is None:
            file = self._files[path] = self._open.add(open_regular(self._stamps.get(path, path)))
        return file

    def locate(self, span: Span) -> tuple[OpenFile, int]:
        """The open file and the offset at which a span's bytes begin."""
        file = self.open(span.file)
        entry = span.packed or span.record
        if entry is not None:
            self._entries.setdefault((span.file, entry.offset), span)
        if span.packed is None:
            return file, span.offset
        place = span.file, span.packed.offset
        if place not in self._inflated:
            with _unpacking(file.path):
                if self._unpacked is None:
                    from tempfile import TemporaryFile

                    self._unpacked = self._open.enter_context(TemporaryFile())  # noqa: SIM115
                start, output = self._unpacked_size, self._unpacked.fileno()
                _inflate(file, span, span.packed, output, start)
                self._inflated[place] = LocalFile(file.path, output), start
                self._unpacked_size += span.packed.size
        unpacked, start = self._inflated[place]
        return unpacked, start + span.offset

    def chunks(self, ranges: Iterable[Span], nbytes: int) -> Iterator[memoryview]:
        """The bytes of ranges, `nbytes` in all, a buffer at a time; each view is valid until the next one."""
        return copying.gathered(((*self.locate(each), each.nbytes) for each in ranges), nbytes, copying.BUFFER)

    def read(self, tensor: TensorMeta) -> bytearray:
        """A tensor's elements, densely in row-major order."""
        if not tensor.as_stored:
            return self._densified(tensor)
        data = bytearray(tensor.nbytes)
        self._read(runs(tensor), memoryview(data))
        return data

    def block(self, tensor: TensorMeta, block: Block) -> bytearray:
        """The elements of a block of a tensor, densely in row-major order."""
        data = bytearray(prod(stop - start for start, stop in block) * BY_CODE[tensor.dtype].size)
        self.block_into(tensor, block, memoryview(data))
        return data

    def block_into(self, tensor: TensorMeta, block: Block, memory: memoryview) -> None:
        """A block's elements like `block`, into memory of their size. Nothing but the block is read where it lies densely; else the tensor,
        or those of its pieces that the block is in."""
        if tensor.as_stored:
            self._read(runs(tensor, block), memory)
            return
        whole, size, done = self._densified(replace(tensor, pieces=meeting(tensor, block))), BY_CODE[tensor.dtype].size, 0
        for start, count in stretches(contiguous_stride(tensor.shape), block):
            memory[done : done + count * size] = whole[start * size : (start + count) * size]
            done += count * size

    def rows(self, tensor: TensorMeta, start: int, stop: int) -> bytearray:
        """Some rows of a tensor whose stored bytes are its own, like `read`."""
        data = bytearray((stop - start) * tensor.nbytes // max(tensor.shape[0], 1))
        self._read(runs(tensor, ((start, stop), *((0, size) for size in tensor.shape[1:]))), memoryview(data))
        return data

    def reads(self, tensor: TensorMeta, memory: memoryview) -> Iterator[Read]:
        """The reads that fill memory with a tensor's elements like `read`, to be done in any order. There are none where its elements don't
        lie densely: then the memory is filled here."""
        done = 0
        if side_by_side(tensor):
            for band in bands(tensor, self._read_one):
                memory[done : done + len(band)] = band
                done += len(band)
        elif tensor.as_stored:
            for each in runs(tensor):
                file, start = self.locate(each)
                for offset, nbytes in copying.parts(start, each.nbytes):
                    yield Read(file, offset, memory[done : done + nbytes])
                    done += nbytes
        else:
            memory[:] = self._densified(tensor)

    def _read(self, ranges: Iterable[Span], memory: memoryview) -> None:
        done = 0
        for each in ranges:
            self._read_one(each, memory[done : done + each.nbytes])
            done += each.nbytes

    def _read_one(self, each: Span, memory: memoryview) -> None:
        file, offset = self.locate(each)
        copying.read_at(file, memory, offset)

    def _densified(self, tensor: TensorMeta) -> bytearray:
        """The elements of a tensor that lie with a stride, or are lazily changed; of one in pieces, piece after piece."""
        if tensor.span is not None:
            data = bytearray(tensor.span.nbytes)
            self._read([tensor.span], memoryview(data))
            return densify(tensor, data)
        whole = bytearray(tensor.nbytes)
        for piece in tensor.pieces:
            part = self.read(TensorMeta(tensor.name, tensor.dtype, piece.sizes, piece.stride, piece.span))
            scatter(part, whole, tensor, piece)
        return whole

    def parts(self, tensor: TensorMeta) -> Iterable[Buffer]:
        """A tensor's elements like `read`, in parts of whole elements; memory is flat where they lie densely."""
        if side_by_side(tensor):
            return bands(tensor, self._read_one)
        if not tensor.as_stored:
            dense = memoryview(self.read(tensor))
            return (dense[start : start + BUFFER] for start in range(0, len(dense), BUFFER))
        return self.chunks(runs(tensor), tensor.nbytes)

    def entries(self) -> dict[tuple[str, int], Span]:
        """A span of each zip entry that anything was read of, by file and the entry's offset, in the order of reading."""
        return dict(self._entries)

    def check_unchanged(self) -> None:
        """Raises StaleError when a file that was read is no longer what it was."""
        for file in self._files.values():
            file.check_unchanged()


@contextmanager
def _unpacking(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        from tempfile import gettempdir

        words = f"{path} has deflated entries, which could not be unpacked here ({error.strerror})"
        raise OutputError(words, path=gettempdir(), hint="set TMPDIR to a folder with more space") from error


def _inflate(file: OpenFile, span: Span, packed: Packed, output: int, position: int) -> None:
    crc = 0
    for part in inflated(copying.chunks(file, packed.offset, packed.nbytes), packed.size, file.path, span.entry):
        crc = zlib.crc32(part, crc)
        copying.write_at(output, part, position)
        position += len(part)
    if packed.crc and crc != packed.crc:
        words = f"has the deflated entry {span.entry!r}, which is not what its checksum says"
        raise FormatError(words, path=file.path, hint="copy or download it again")
