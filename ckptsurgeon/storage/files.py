"""A file that is open for reading: the one interface by which bytes are read, wherever they lie.

Rule: reads never move a file position, and never return less than was asked for. A new place for bytes is a subclass with three methods.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager

from ckptsurgeon.errors import StaleError, UnreadableError
from ckptsurgeon.tensors import FileStamp


class OpenFile(ABC):
    """A file, open for reading, as it was at that moment.

    `path` names it in spans and in messages. `fd` is its descriptor, where the system's kernel can copy from it.
    """

    fd: int | None = None

    def __init__(self, path: str, stamp: FileStamp) -> None:
        self.path = path
        self.stamp = stamp
        self.size = stamp.size

    @abstractmethod
    def some(self, nbytes: int, offset: int) -> bytes:
        """Up to `nbytes` bytes from `offset`; none at the file's end. UnreadableError where the system can't read them."""

    @abstractmethod
    def some_into(self, view: memoryview, offset: int) -> int:
        """Like `some`, into memory; the number of bytes."""

    @abstractmethod
    def now(self) -> FileStamp:
        """The file as it is now."""

    @contextmanager
    def held_open(self) -> Iterator[OpenFile]:
        """This file, open for several reads in a row."""
        yield self

    def read(self, offset: int, nbytes: int) -> bytes:
        """Exactly `nbytes` bytes from `offset`; UnreadableError when the file ends before."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise self.truncated(offset + nbytes)
        data = self.some(nbytes, offset)
        while len(data) < nbytes:
            more = self.some(nbytes - len(data), offset + len(data))
            if not more:
                raise self.truncated(offset + nbytes)
            data += more
        return data

    def fill(self, memory: bytearray | memoryview, offset: int) -> bool:
        """Fill memory from `offset`; False where the file ends before."""
        view = memoryview(memory)
        while len(view):
            got = self.some_into(view, offset)
            if not got:
                return False
            view, offset = view[got:], offset + got
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
    """The error for a file that is another one than it was."""
    return StaleError("changed while it was read", path=path, hint="run it again when nothing writes to it")
