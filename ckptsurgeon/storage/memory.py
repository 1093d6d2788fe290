"""Files in memory: the content of an `io.BytesIO`.

Rule: the bytes never change, even if the buffer does: `getvalue` shares them until the buffer is written to. They are in the `FileStamp`.
Such a file is named `<BytesIO 1>`, `<BytesIO 2>` … in spans and messages, which is no path.
"""

from __future__ import annotations

import io
from itertools import count

from ckptsurgeon.errors import UnreadableError
from ckptsurgeon.storage.files import OpenFile
from ckptsurgeon.tensors import FileStamp

_NUMBERS = count(1)


def file_in_memory(buffer: io.BytesIO) -> FileStamp:
    """The whole content of a buffer as a file, whatever the buffer's position, which doesn't change. Nothing is copied.

    Raises:
        UnreadableError: the buffer is closed.

    >>> seen = file_in_memory(io.BytesIO(b"abc"))
    >>> seen.size, MemoryFile(seen).read(1, 2)
    (3, b'bc')
    """
    if buffer.closed:
        raise UnreadableError("is closed, and holds nothing any more", path="<BytesIO>", hint="give it before it is closed")
    data = buffer.getvalue()
    return FileStamp(f"<BytesIO {next(_NUMBERS)}>", len(data), 0, 0, 0, data)


class MemoryFile(OpenFile):
    """A file in memory, by the stamp that holds its bytes."""

    def __init__(self, seen: FileStamp) -> None:
        assert seen.data is not None
        super().__init__(seen.path, seen)
        self._view = memoryview(seen.data)

    def read_some(self, nbytes: int, offset: int) -> bytes:
        """As `OpenFile.read_some`."""
        return bytes(self._view[offset : offset + nbytes])

    def read_some_into(self, view: memoryview, offset: int) -> int:
        """As `OpenFile.read_some_into`."""
        part = self._view[offset : offset + len(view)]
        view[: len(part)] = part
        return len(part)

    def now(self) -> FileStamp:
        """As `OpenFile.now`: it never changes."""
        return self.stamp
