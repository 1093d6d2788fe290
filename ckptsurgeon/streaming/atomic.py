"""An output file that is whole or not there: written beside its place under a recognisable name, synced, and only then named.

Nothing here knows what is written. Temporary files that a killed run left are taken away by the next run over the same output. Errors
speak of the output, never of the temporary file.
"""

from __future__ import annotations

import errno
import glob
import os
import shlex
import stat
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from hashlib import sha256

from ckptsurgeon.errors import CheckpointError, OutputError
from ckptsurgeon.report import Finding
from ckptsurgeon.storage import platform
from ckptsurgeon.streaming.file_attributes import hand_over
from ckptsurgeon.streaming.signals import undisturbed

_MARK = ".ckptsurgeon-"
_HEAD = 50  # characters of the output's name in the temporary one: at most 200 bytes of the 255 that a name may have
_REASONS = {
    errno.ENOSPC: ("the disk is full", "free some space, or write to another disk"),
    errno.EDQUOT: ("your disk quota is used up", "free some space, or write to another disk"),
    errno.EFBIG: ("the file would be larger than this system allows", "raise the limit (ulimit -f), or write to another disk"),
    errno.EACCES: ("its folder may not be written to by you", "choose another folder"),
    errno.EPERM: ("it, or its folder, may not be changed by you", "choose another folder"),
    errno.EROFS: ("its file system is read-only", "choose another folder"),
    errno.ENOENT: ("no file can be made in its folder", "choose another folder"),
    errno.ENOTDIR: ("a part of its path is a file", "choose another path"),
    errno.ENAMETOOLONG: ("its name is too long", "choose a shorter one"),
}


@dataclass(frozen=True)
class Temporary:
    """The open temporary file; `path` is good for readers until it takes its name. After that `lost` says what could not be kept of what
    the file that was replaced had beside its bytes."""

    path: str
    fd: int
    lost: list[str] = field(default_factory=list)


def output_error(path: str, error: OSError) -> OutputError:
    """The error for an output that the system does not let us write."""
    reason, hint = _REASONS.get(error.errno or 0, (f"could not be written ({error.strerror})", "check the disk"))
    return OutputError(reason, path=path, hint=hint)


def refuse_no_file(path: str) -> None:
    """OutputError for no path at all, and for a folder."""
    if not path:
        raise OutputError("output='' is empty", hint="give the path of a file to write")
    if os.path.isdir(path):
        raise OutputError("is a folder", path=path, hint="give the path of a file to write")


def check_free(path: str, overwrite: bool) -> str:
    """The path that will really be written (a link is followed); what a killed run left beside it is taken away.

    OutputError when it is taken and may not be replaced.
    """
    try:
        refuse_no_file(path)
        real = os.path.realpath(path)
    except ValueError as error:  # a null character, or one that no file system encodes
        raise OutputError(f"is no path that a file can have ({error})", path=path, hint="choose another path") from error
    folder, name = os.path.split(real)
    _sweep(folder, _head(name), real)
    try:
        status = os.stat(real)
    except FileNotFoundError:
        if not os.path.isdir(folder):
            raise OutputError("its folder does not exist", path=path, hint=f"mkdir -p {shlex.quote(folder)}") from None
        return real
    except OSError as error:
        raise output_error(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise OutputError("is not a regular file", path=path, hint="give the path of a file to write")
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
    opened = ExitStack()
    tried: list[str] = []  # noted before they are made: an interrupt can come in between
    try:
        temporary = _create(os.path.join(folder, _head(name)), _mode(real), tried)
        opened.callback(os.close, temporary.fd)
        try:
            yield temporary
        except CheckpointError as error:
            reword(error, temporary.path, path)
            raise
        os.fsync(temporary.fd)
        with undisturbed():
            _take_name(temporary, real, path, overwrite, opened.close)
    except OSError as error:
        raise output_error(path, error) from error
    finally:
        with undisturbed():
            with suppress(OSError):  # all is synced, or nothing is kept
                opened.close()
            for one in tried:
                with suppress(OSError):
                    os.unlink(one)


def lost(temporary: Temporary) -> list[Finding]:
    """A warning, where the file that was replaced had something beside its bytes that the new one could not get."""
    words = f"the file that was replaced had what could not be kept: {', '.join(temporary.lost)}"
    return [Finding("attributes", words, level="warning")] if temporary.lost else []


def named(text: str, temporary: str, path: str) -> str:
    """A text that speaks of the output, where it spoke of the temporary file."""
    return text.replace(temporary, path).replace(os.path.basename(temporary), os.path.basename(path))


def reword(error: CheckpointError, temporary: str, path: str) -> None:
    """Let an error speak of the output, where it spoke of the temporary file."""
    for name in ("reason", "path", "key", "hint"):
        value = getattr(error, name)
        setattr(error, name, value and named(value, temporary, path))
    error.problems = tuple(named(problem, temporary, path) for problem in error.problems)
    error.args = (error.message,)


def _head(name: str) -> str:
    return f".{name[:_HEAD]}{_MARK}"


def _mode(real: str) -> int:
    """Permissions to write with: nobody but us sees, meanwhile, a file that replaces another, which may be less open than its mode says."""
    return 0o600 if os.path.exists(real) else 0o666


def _create(start: str, mode: int, tried: list[str]) -> Temporary:
    """A new file under a name of its own, locked for as long as somebody writes to it."""
    while True:
        path = _name(start, os.urandom(4).hex())
        tried.append(path)
        try:
            fd = platform.create(path, mode)
        except FileExistsError:
            tried.remove(path)
            continue
        try:
            platform.lock(fd)
            if os.path.exists(path):
                return Temporary(path, fd)
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # another run swept it away in the moment before it was locked


def _name(start: str, chance: str) -> str:
    """A temporary file's path: its last digits are made of the others, so that a name of ours can be told from one that looks like it."""
    check = sha256(os.fsencode(os.path.basename(start)) + chance.encode()).hexdigest()[:4]
    return f"{start}{chance}{check}.tmp"


def _take_name(temporary: Temporary, real: str, path: str, overwrite: bool, close: Callable[[], None]) -> None:
    if overwrite:
        with suppress(FileNotFoundError):
            temporary.lost.extend(hand_over(temporary.fd, temporary.path, real))
    if not platform.locks():
        close()  # Windows renames no open file; elsewhere the lock is held until the file has its name
    if overwrite:
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
        platform.sync_folder(os.path.dirname(real))
    except OSError as error:
        reason = f"is written whole, but its folder could not be synced ({error.strerror}): a power cut may yet undo it"
        raise OutputError(reason, path=path, hint="check the disk") from error


def _taken(path: str) -> OutputError:
    return OutputError("exists already", path=path, hint="give overwrite=True to replace it, or choose another path")


def _sweep(folder: str, head: str, output: str = "") -> None:
    """Take away what a killed run over the same output left: its lock is gone with it. Where there are no locks it stays."""
    start = os.path.join(folder, head)
    for stale in glob.glob(f"{glob.escape(start)}*.tmp"):
        if stale != _name(start, stale[len(start) : len(start) + 8]):
            continue  # somebody else's
        with suppress(OSError):
            fd = platform.open_itself(stale)
            try:
                if _own(os.fstat(fd), output):
                    platform.lock_at_once(fd)
                    os.unlink(stale)
            finally:
                os.close(fd)


def _own(found: os.stat_result, output: str) -> bool:
    """Whether a file under a name of ours is one that we left: regular, this user's, and of no other name but that of the output."""
    if not stat.S_ISREG(found.st_mode) or not platform.is_mine(found):
        return False
    try:
        return found.st_nlink == 1 or (found.st_nlink == 2 and os.path.samestat(found, os.stat(output)))
    except OSError:
        return False


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
