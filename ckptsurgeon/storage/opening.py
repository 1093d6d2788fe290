"""Opens files for reading, on disk or in memory. No other module distinguishes these kinds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager

from ckptsurgeon.storage.files import OpenFile, changed
from ckptsurgeon.storage.local import open_path
from ckptsurgeon.storage.memory import MemoryFile
from ckptsurgeon.tensors import FileStamp

Source = str | FileStamp
MOST_OPEN = 64  # files that are open at once; the default limit of a process is 256 on macOS, 1,024 on Linux


@contextmanager
def open_regular(source: Source) -> Iterator[OpenFile]:
    """Open a path, or a file that was read before, for reading, once.

    Raises:
        UnreadableError: it is missing, is no regular file, or may not be read.
        StaleError: it has changed since it was read.
    """
    if not isinstance(source, FileStamp):
        with open_path(source) as file:
            yield file
    elif source.data is not None:
        yield MemoryFile(source)
    else:
        with open_path(source.path) as file:
            if file.stamp != source:
                raise changed(source.path)
            yield file


class ReopenedFile(OpenFile):
    """A file on disk that is opened again for every read. StaleError where it has changed since it was first opened."""

    def read_some(self, nbytes: int, offset: int) -> bytes:
        """As `OpenFile.read_some`."""
        with self.held_open() as file:
            return file.read_some(nbytes, offset)

    def read_some_into(self, view: memoryview, offset: int) -> int:
        """As `OpenFile.read_some_into`."""
        with self.held_open() as file:
            return file.read_some_into(view, offset)

    def now(self) -> FileStamp:
        """As `OpenFile.now`."""
        with open_path(self.path) as file:
            return file.stamp

    @contextmanager
    def held_open(self) -> Iterator[OpenFile]:
        """As `OpenFile.held_open`."""
        with open_regular(self.stamp) as file:
            yield file


class OpenFiles(ExitStack):
    """The files of a checkpoint, which may be more than a process may have open: after the first `MOST_OPEN`, each read opens its file."""

    count = 0

    def add(self, opening: AbstractContextManager[OpenFile]) -> OpenFile:
        """The file that the context manager `opening` gives, readable until this one is left."""
        self.count += 1
        if self.count <= MOST_OPEN:
            return self.enter_context(opening)
        with opening as file:
            return file if file.stamp.data is not None else ReopenedFile(file.path, file.stamp)
