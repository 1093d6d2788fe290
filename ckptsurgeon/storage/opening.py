"""Opens a file wherever it lies: the one place that knows which kinds there are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ckptsurgeon.storage.files import OpenFile, changed
from ckptsurgeon.storage.local import open_path
from ckptsurgeon.storage.memory import MemoryFile
from ckptsurgeon.tensors import FileStamp

Source = str | FileStamp


@contextmanager
def open_regular(source: Source) -> Iterator[OpenFile]:
    """Open a path, or a file as it was seen, for reading, once.

    Raises:
        UnreadableError: it is missing, is no regular file, or may not be read.
        StaleError: it is no longer what was seen.
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
