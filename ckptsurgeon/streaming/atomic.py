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
from ckptsurgeon.streaming.undisturbed import undisturbed

_MARK = ".ckptsurgeon-"
_HEAD = 50  # characters of the output's name in the temporary one: at most 200 bytes of the 255 that a name may have
_REASONS = {
    errno.ENOSPC: ("the disk is full", "free some space, or write to another disk"),
    errno.EDQUOT: ("your disk quota is used up", "free some space, or write to another disk"),
    errno.EFBIG: ("the file would be larger than this system allows", "raise the limit (ulimit -f), or write to another disk"),
    errno.EACCES: ("its folder may not be written to by you", "choose another folder"),
    errno.EPERM: ("it, or its folder, may not be changed by you", "choose another folder"),
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
    """The path that will really be written (a link is followed); what a killed run left beside it is taken away.

    OutputError when it is taken and may not be replaced.
    """
    real = os.path.realpath(path)
    folder, name = os.path.split(real)
    _sweep(folder, _head(name))
    try:
        status = os.stat(real)
    except FileNotFoundError:
        if not os.path.isdir(folder):
            raise OutputError("its folder does not exist", path=path, hint=f"mkdir -p {folder}") from None
        return real
    except OSError as error:
        raise output_error(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "not a regular file"
        raise OutputError(f"is {what}", path=path, hint="give the path of a file to write")
    if not overwrite:
        raise _taken(path)
    return real


@contextmanager
def new_file(path: str, overwrite: bool) -> Iterator[Temporary]:
    """A file that takes the name `path` when the block ends well, and otherwise leaves nothing behind.

    Raises OutputError when `path` is taken (unless `overwrite`), or when the system refuses a write.
    """
    real = check_free(path, overwrite)
    folder, name = os.path.split(real)
    temporary: Temporary | None = None
    tried: list[str] = []  # noted before they are made: an interrupt can come in between
    try:
        temporary = _create(os.path.join(folder, _head(name)), _mode(real), tried)
        yield temporary
        os.fsync(temporary.fd)
        with undisturbed():
            _take_name(temporary, real, path, overwrite)
    except OSError as error:
        raise output_error(path, error) from error
    finally:
        with undisturbed():
            for one in tried:
                with suppress(OSError):
                    os.unlink(one)
            if temporary is not None:
                with suppress(OSError):  # all is synced, or nothing is kept
                    os.close(temporary.fd)


def _head(name: str) -> str:
    return f".{name[:_HEAD]}{_MARK}"


def _mode(real: str) -> int:
    """Permissions to write with: nobody sees more of the new file, meanwhile, than of the one that it replaces."""
    try:
        return stat.S_IMODE(os.stat(real).st_mode) & 0o666 | stat.S_IRUSR | stat.S_IWUSR
    except FileNotFoundError:
        return 0o666


def _create(start: str, mode: int, tried: list[str]) -> Temporary:
    """A new file under a name of its own, locked for as long as somebody writes to it."""
    while True:
        path = f"{start}{secrets.token_hex(6)}.tmp"
        tried.append(path)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        try:
            _lock(fd)
            if os.path.exists(path):
                return Temporary(path, fd)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # another run swept it away in the moment before it was locked


def _lock(fd: int) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL):
            raise  # a file system without locks: nothing can be swept there, and nothing is


def _take_name(temporary: Temporary, real: str, path: str, overwrite: bool) -> None:
    if overwrite:
        with suppress(FileNotFoundError):
            _permit(temporary.fd, os.stat(real))
        os.replace(temporary.path, real)
    else:
        try:
            os.link(temporary.path, real)  # unlike rename, it never replaces what another run has just put there
            os.unlink(temporary.path)
        except FileExistsError:
            raise _taken(path) from None
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            if os.path.lexists(real):
                raise _taken(path) from None
            os.rename(temporary.path, real)  # a file system without hard links
    try:
        sync_folder(os.path.dirname(real))
    except OSError as error:
        reason = f"is written whole, but its folder could not be synced ({error.strerror}): a power cut may yet undo it"
        raise OutputError(reason, path=path, hint="check the disk") from error


def _permit(fd: int, old: os.stat_result) -> None:
    """Give a file the permissions of the one that it replaces, and its owner and group where we may."""
    mode, new = stat.S_IMODE(old.st_mode), os.fstat(fd)
    if old.st_uid != new.st_uid:
        with suppress(OSError):
            os.fchown(fd, old.st_uid, -1)
    if old.st_gid != new.st_gid:
        try:
            os.fchown(fd, -1, old.st_gid)
        except OSError:
            mode &= ~(stat.S_IRWXG | stat.S_ISGID)  # it was another group's to read
    os.fchmod(fd, mode)


def _taken(path: str) -> OutputError:
    return OutputError("exists already", path=path, hint="add --overwrite to replace it, or choose another path")


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


def _sweep(folder: str, head: str) -> None:
    """Take away what a killed run over the same output left: its lock is gone with it."""
    for stale in glob.glob(os.path.join(glob.escape(folder), f"{glob.escape(head)}*.tmp")):
        with suppress(OSError):
            fd = os.open(stale, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
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
