"""An output file that is whole or not there: written beside its place under a recognisable name, synced, and only then named.

Nothing here knows what is written. Temporary files that a killed run left are taken away by the next run over the same output.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import os
import secrets
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from ckptsurgeon.errors import OutputError

_MARK = ".ckptsurgeon-"
_REASONS = {
    errno.ENOSPC: ("the disk is full", "free some space, or write to another disk"),
    errno.EDQUOT: ("your disk quota is used up", "free some space, or write to another disk"),
    errno.EFBIG: ("the file would be larger than this system allows", "raise the limit (ulimit -f), or write to another disk"),
    errno.EACCES: ("its folder may not be written to by you", "choose another folder"),
    errno.EPERM: ("its folder may not be written to by you", "choose another folder"),
    errno.EROFS: ("its file system is read-only", "choose another folder"),
    errno.ENOENT: ("its folder does not exist", "make it first: mkdir -p"),
    errno.ENOTDIR: ("a part of its path is a file", "choose another path"),
    errno.ENAMETOOLONG: ("its name is too long", "choose a shorter one"),
}


@dataclass(frozen=True)
class Temporary:
    """The open temporary file; `path` is good for readers until it takes its name."""

    path: str
    fd: int


def output_error(path: str, error: OSError) -> OutputError:
    """The error for an output that the system does not let us write."""
    reason, hint = _REASONS.get(error.errno or 0, (f"could not be written ({error.strerror})", "check the disk"))
    return OutputError(reason, path=path, hint=hint)


def check_free(path: str, overwrite: bool) -> str:
    """The path that will really be written (a link is followed). OutputError when it is taken and may not be replaced."""
    real = os.path.realpath(path)
    try:
        status = os.stat(real)
    except FileNotFoundError:
        folder = os.path.dirname(real)
        if not os.path.isdir(folder):
            raise OutputError("its folder does not exist", path=path, hint=f"mkdir -p {folder}") from None
        return real
    except OSError as error:
        raise output_error(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise OutputError("is not a regular file", path=path, hint="choose another path")
    if not overwrite:
        raise OutputError("exists already", path=path, hint="add --overwrite to replace it, or choose another path")
    return real


@contextmanager
def new_file(path: str, overwrite: bool) -> Iterator[Temporary]:
    """A file that takes the name `path` when the block ends well, and otherwise leaves nothing behind.

    Raises OutputError when `path` is taken (unless `overwrite`), or when the system refuses a write.
    """
    real = check_free(path, overwrite)
    folder, name = os.path.split(real)
    _sweep(folder, name)
    temporary = os.path.join(folder, f".{name[:100]}{_MARK}{secrets.token_hex(6)}.tmp")
    try:
        fd = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise output_error(path, error) from error
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)  # tells the next run that somebody still writes here
        yield Temporary(temporary, fd)
        os.fsync(fd)
        _take_name(temporary, real, path, overwrite, fd)
    except OSError as error:
        raise output_error(path, error) from error
    finally:
        os.close(fd)
        with suppress(FileNotFoundError):
            os.unlink(temporary)


def _take_name(temporary: str, real: str, path: str, overwrite: bool, fd: int) -> None:
    if overwrite and os.path.exists(real):
        os.fchmod(fd, stat.S_IMODE(os.stat(real).st_mode))
        os.replace(temporary, real)
    else:
        try:
            os.link(temporary, real)  # unlike rename, it never replaces what another run has just put there
        except FileExistsError:
            raise OutputError("exists already", path=path, hint="add --overwrite to replace it, or choose another path") from None
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            os.rename(temporary, real)  # a file system without hard links
    sync_folder(os.path.dirname(real))


def sync_folder(folder: str) -> None:
    """Make a new name in `folder` last through a power cut, where the file system can."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EROFS):
            raise
    finally:
        os.close(fd)


def _sweep(folder: str, name: str) -> None:
    """Take away what a killed run over the same output left: its lock is gone with it."""
    for stale in glob.glob(os.path.join(glob.escape(folder), f".{glob.escape(name[:100])}{_MARK}*.tmp")):
        with suppress(OSError):
            fd = os.open(stale, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(stale)
            finally:
                os.close(fd)


@contextmanager
def syncing(temporary: Temporary) -> Iterator[None]:
    """Sync the file's data in the background while the block reads it back; an error of either is raised."""
    failed: list[OSError] = []

    def sync() -> None:
        try:
            os.fsync(temporary.fd)
        except OSError as error:
            failed.append(error)

    thread = threading.Thread(target=sync, daemon=True)
    thread.start()
    try:
        yield
    finally:
        thread.join()
    if failed:
        raise failed[0]
