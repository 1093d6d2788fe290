"""The interface of a file that is open for reading, on disk or in memory.

Rule: reads never move a file position, and never return fewer bytes than requested. Another kind of file is a subclass with three methods.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

from ckptsurgeon.errors import StaleError, UnreadableError
from ckptsurgeon.tensors import FileStamp


class OpenFile(ABC):
    """A file that is open for reading.

    `path` names it in spans and in messages. `stamp` is the file as it was when it was opened. `fd` is its descriptor, from which the
    kernel can copy; None for a file that has none.
    """

    fd: int | None = None

    def __init__(self, path: str, stamp: FileStamp) -> None:
        self.path = path
        self.stamp = stamp
        self.size = stamp.size

    @abstractmethod
    def read_some(self, nbytes: int, offset: int) -> bytes:
        """Up to `nbytes` bytes from `offset`; no bytes at the file's end. UnreadableError where the system can't read them."""

    @abstractmethod
    def read_some_into(self, view: memoryview, offset: int) -> int:
        """Like `read_some`, but into `view`; returns the number of bytes."""

    @abstractmethod
    def now(self) -> FileStamp:
        """The stamp of the file as it is now."""

    @contextmanager
    def held_open(self) -> Iterator[OpenFile]:
        """This file, open for several reads in a row."""
        yield self

    def read(self, offset: int, nbytes: int) -> bytes:
        """Exactly `nbytes` bytes from `offset`; UnreadableError when the file ends before."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise self.truncated(offset + nbytes)
        data = self.read_some(nbytes, offset)
        while len(data) < nbytes:
            more = self.read_some(nbytes - len(data), offset + len(data))
            if not more:
                raise self.truncated(offset + nbytes)
            data += more
        return data

    def fill(self, memory: bytearray | memoryview, offset: int) -> bool:
        """Fill memory from `offset`; False where the file ends before."""
        view = memoryview(memory)
        while len(view):
            count = self.read_some_into(view, offset)
            if not count:
                return False
            view, offset = view[count:], offset + count
        return True

    def truncated(self, needed: int) -> UnreadableError:
        """The error for a file that ends before byte `needed`."""
        return UnreadableError(
            f"is truncated: it has {self.size:,} bytes and its header asks for at least {needed:,}",
            path=self.path,
            hint="copy or download it again; an interrupted transfer leaves such files",
        )

    def check_unchanged(self) -> None:
        """Raises StaleError when the file is no longer what it was."""
        if self.now() != self.stamp:
            raise changed(self.path)


def changed(path: str) -> StaleError:
    """The error for a file that is no longer as it was read."""
    return StaleError("changed while it was read", path=path, hint="run it again when nothing writes to it")


class Window(OpenFile):
    """The `size` bytes of an open file from `start` on. Offsets count from `start`.

    The caller makes sure that the file has these bytes, and closes the file.
    """

    def __init__(self, file: OpenFile, start: int, size: int) -> None:
        super().__init__(file.path, file.stamp)
        self._file = file
        self.start = start
        self.size = size

    def read_some(self, nbytes: int, offset: int) -> bytes:
        """As `OpenFile.read_some`."""
        return self._file.read_some(max(min(nbytes, self.size - offset), 0), self.start + offset)

    def read_some_into(self, view: memoryview, offset: int) -> int:
        """As `OpenFile.read_some_into`."""
        return self._file.read_some_into(view[: max(self.size - offset, 0)], self.start + offset)

    def now(self) -> FileStamp:
        """As `OpenFile.now`, of the whole file."""
        return self._file.now()
