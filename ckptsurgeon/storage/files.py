"""Opening a file once, and reading exactly the bytes asked for.

Only regular files: a FIFO or a device would hang a reader or never end. Reads never move a file position and never
return less than was asked for.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ckptsurgeon.errors import UnreadableError
from ckptsurgeon.storage import platform
from ckptsurgeon.tensors import FileStamp


@dataclass(frozen=True)
class OpenFile:
    """A regular file, opened for reading, as it was at that moment."""

    path: str
    fd: int
    stamp: FileStamp

    @property
    def size(self) -> int:
        """Its size in bytes."""
        return self.stamp.size

    def read(self, offset: int, nbytes: int) -> bytes:
        """Exactly `nbytes` bytes from `offset`; UnreadableError when the file ends before."""
        if offset < 0 or nbytes < 0 or offset + nbytes > self.size:
            raise self.truncated(offset + nbytes)
        try:
            data = platform.read(self.fd, nbytes, offset)
            while len(data) < nbytes:
                more = platform.read(self.fd, nbytes - len(data), offset + len(data))
                if not more:
                    raise self.truncated(offset + nbytes)
                data += more
        except OSError as error:
            raise unreadable(self.path, error) from error
        return data

    def truncated(self, needed: int) -> UnreadableError:
        """The error for a file that ends before byte `needed`."""
        return UnreadableError(
            f"is truncated: it has {self.size} bytes and its header asks for at least {needed}",
            path=self.path,
            hint="copy or download it again; an interrupted transfer leaves such files",
        )


def unreadable(path: str, error: OSError) -> UnreadableError:
    """The error for a file that the system does not let us read."""
    reasons = {
        errno.ENOENT: ("does not exist", "check the path; `ls` its folder"),
        errno.EACCES: ("may not be read by you", "check its permissions"),
        errno.ENXIO: ("is not a regular file", "give a checkpoint file on disk, not a pipe or a device"),
        errno.EISDIR: ("is a folder", "give a checkpoint file on disk, not a pipe or a device"),
        errno.ELOOP: ("is a link that leads back to itself", "give the file itself"),
        errno.ENOTDIR: ("does not exist: a part of its path is a file", "check the path"),
    }
    reason, hint = reasons.get(error.errno or 0, (f"could not be read ({error.strerror})", "check the path and the disk"))
    return UnreadableError(reason, path=path, hint=hint)


@contextmanager
def open_regular(path: str) -> Iterator[OpenFile]:
    """Open `path` for reading, once; UnreadableError for what is missing or is not a regular file."""
    try:
        fd = platform.open_to_read(path)
    except (OSError, ValueError) as error:
        raise unreadable(path, error if isinstance(error, OSError) else OSError(errno.ENOENT, "bad path")) from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            kind = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
            raise UnreadableError(f"is {kind}", path=path, hint="give a checkpoint file on disk, not a pipe or a device")
        yield OpenFile(path, fd, stamp(path, status))
    finally:
        os.close(fd)


def stamp(path: str, status: os.stat_result) -> FileStamp:
    """What tells within one run whether a file is still the same."""
    return FileStamp(path, status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev)
