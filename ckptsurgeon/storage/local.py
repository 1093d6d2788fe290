"""Files on disk. Only regular files are opened: a pipe or a device could block, or never end."""

from __future__ import annotations

import errno
import os
import shlex
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

from ckptsurgeon.errors import UnreadableError
from ckptsurgeon.hints import without_slip
from ckptsurgeon.storage import platform
from ckptsurgeon.storage.files import OpenFile
from ckptsurgeon.tensors import FileStamp

_MOST_NAMES = 2_000  # names of a folder that are compared to find a similar one


class LocalFile(OpenFile):
    """A file on disk, by an open descriptor, which the caller closes."""

    fd: int

    def __init__(self, path: str, fd: int) -> None:
        super().__init__(path, _stamp(path, os.fstat(fd)))
        self.fd = fd

    def read_some(self, nbytes: int, offset: int) -> bytes:
        """As `OpenFile.read_some`."""
        try:
            return platform.read(self.fd, nbytes, offset)
        except OSError as error:
            raise unreadable(self.path, error) from error

    def read_some_into(self, view: memoryview, offset: int) -> int:
        """As `OpenFile.read_some_into`."""
        try:
            return platform.read_into(self.fd, view, offset)
        except OSError as error:
            raise UnreadableError(f"could not be read ({error.strerror})", path=self.path, hint="check the disk") from error

    def now(self) -> FileStamp:
        """As `OpenFile.now`. A file that was replaced or deleted since it was opened can still be read whole."""
        return _stamp(self.path, os.fstat(self.fd))


@contextmanager
def open_path(path: str) -> Iterator[LocalFile]:
    """Open `path` for reading, once; UnreadableError for what is missing or is not a regular file."""
    try:
        fd = platform.open_to_read(path)
    except (OSError, ValueError) as error:
        raise unreadable(path, error if isinstance(error, OSError) else OSError(errno.ENOENT, "bad path")) from error
    try:
        mode = os.fstat(fd).st_mode
        if not stat.S_ISREG(mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise UnreadableError(f"is {kind}", path=path, hint="give a checkpoint file on disk, not a pipe or a device")
        yield LocalFile(path, fd)
    finally:
        os.close(fd)


def _stamp(path: str, status: os.stat_result) -> FileStamp:
    return FileStamp(path, status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev)


def unreadable(path: str, error: OSError) -> UnreadableError:
    """The error for a file that the system can't read, or doesn't permit to read."""
    if error.errno == errno.ENOENT:
        return UnreadableError("does not exist", path=path or "''", hint=_other_path(path))
    reasons = {
        errno.EACCES: ("may not be read by you", "check its permissions"),
        errno.ENXIO: ("is not a regular file", "give a checkpoint file on disk, not a pipe or a device"),
        errno.EISDIR: ("is a folder", "give a checkpoint file on disk, not a pipe or a device"),
        errno.ELOOP: ("is a link that leads back to itself", "give the file itself"),
        errno.EMFILE: ("can't be opened: this process has as many files open as it may", "raise the limit: ulimit -n $(ulimit -Hn)"),
        errno.ENOTDIR: ("does not exist: a part of its path is a file", "check the path"),
    }
    reason, hint = reasons.get(error.errno or 0, (f"could not be read ({error.strerror})", "check the path and the disk"))
    return UnreadableError(reason, path=path, hint=hint)


def _other_path(path: str) -> str:
    """A hint for a path that doesn't exist: a similar name in its folder, or a file of its name elsewhere."""
    folder, name = os.path.split(path)
    close = without_slip(name, _names(folder or "."))
    if close:
        similar: str | None = os.path.join(folder, close)
    else:
        straight = path.replace("\\", "/")
        similar = straight if straight != path and os.path.exists(straight) else _elsewhere(path)
    return f"is it {shlex.quote(similar)}?" if similar else "check the path; `ls` its folder"


def _elsewhere(path: str) -> str | None:
    """The only file of this name in the current folder or a folder within it; None where there is none, or several."""
    name = os.path.basename(path)
    if not name or os.path.isabs(path):
        return None
    below = [os.path.join(folder, name) for folder in _names(".") if not folder.startswith(".") and os.path.isdir(folder)]
    files = [file for file in [name, *below] if os.path.isfile(file)]
    return files[0] if len(files) == 1 else None


def _names(folder: str) -> list[str]:
    """The names in a folder; none where it can't be read."""
    try:
        with os.scandir(folder) as rows:
            return [row.name for row in islice(rows, _MOST_NAMES)]
    except (OSError, ValueError):
        return []
