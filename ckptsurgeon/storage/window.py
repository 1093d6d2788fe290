"""A range of an open file that is read like a file of its own."""

from __future__ import annotations

from ckptsurgeon.storage.files import OpenFile
from ckptsurgeon.tensors import FileStamp


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
