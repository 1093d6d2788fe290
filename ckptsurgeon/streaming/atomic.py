"""An output file that exists only when it is whole: written to a temporary file in the same folder, synced, and then renamed.

The next run with the same output deletes temporary files of a killed run. Errors name the output, never the temporary file.
"""

from __future__ import annotations

import errno
import glob
import os
import shlex
import stat
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from hashlib import sha256

from ckptsurgeon.errors import CheckpointError, OutputError
from ckptsurgeon.progress import phase, wait_for
from ckptsurgeon.report import Cast, Finding
from ckptsurgeon.storage import platform
from ckptsurgeon.streaming.file_attributes import hand_over
from ckptsurgeon.streaming.signals import undisturbed

_MARK = ".ckptsurgeon-"
EARLY = 256 << 20  # bytes more that are written, from which on they are synced while more are written
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
    errno.EBUSY: ("it is in use, or another file system is mounted there", "choose another path"),
    errno.ENAMETOOLONG: ("its name is too long", "choose a shorter one"),
}


@dataclass(frozen=True)
class Temporary:
    """The open temporary file; readers can open `path` until it is renamed. After that `lost` lists the attributes of the replaced file
    that could not be kept."""

    path: str
    fd: int
    lost: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class NewFile:
    """An output that is one file, with the interface of `NewFolder`. It can't be resumed."""

    temporary: Temporary

    @property
    def path(self) -> str:
        """The temporary file's path, until it is renamed."""
        return self.temporary.path

    @property
    def lost(self) -> list[str]:
        """As a `Temporary` has it."""
        return self.temporary.lost

    def opened(self, _name: str) -> AbstractContextManager[Temporary]:
        """The file itself."""
        return nullcontext(self.temporary)

    def proven(self, _name: str) -> None:
        """None: there is no earlier run to resume."""

    def keep(self, _name: str, _made: Mapping[str, str], _casts: Sequence[Cast]) -> None:
        """Do nothing: one file can't be resumed."""


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


def real_path(path: str) -> str:
    """The path with its links resolved. OutputError for a path that no file can have."""
    try:
        return os.path.realpath(path)
    except ValueError as error:  # a null character, or one that no file system encodes
        raise OutputError(f"is no path that a file can have ({error})", path=path, hint="choose another path") from error


def no_folder(path: str, folder: str) -> OutputError:
    """The error for an output in a folder that is not there."""
    return OutputError("its folder does not exist", path=path, hint=f"mkdir -p {shlex.quote(folder)}")


def check_free(path: str, overwrite: bool) -> str:
    """The path that will be written, its links resolved; temporary files that a killed run left there are deleted.

    OutputError where a file exists and may not be replaced.
    """
    real = real_path(path)
    refuse_no_file(path)
    folder, name = os.path.split(real)
    _sweep(folder, head_of(name), real)
    try:
        status = os.stat(real)
    except FileNotFoundError:
        if not os.path.isdir(folder):
            raise no_folder(path, folder) from None
        return real
    except OSError as error:
        raise output_error(path, error) from error
    if not stat.S_ISREG(status.st_mode):
        raise OutputError("is not a regular file", path=path, hint="give the path of a file to write")
    if not overwrite:
        raise taken(path)
    return real


@contextmanager
def new_file(path: str, overwrite: bool) -> Iterator[Temporary]:
    """A file that takes the name `path` when the block ends well, and otherwise leaves nothing behind.

    Raises OutputError when `path` is taken (unless `overwrite`), or when the system refuses a write.
    """
    real = check_free(path, overwrite)
    folder, name = os.path.split(real)
    opened = ExitStack()
    tried: list[str] = []  # added before they are created: an interrupt can come in between
    try:
        temporary = create_locked(os.path.join(folder, head_of(name)), _mode(real), tried)
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
            for path_tried in tried:
                with suppress(OSError):
                    os.unlink(path_tried)


def lost(what: Sequence[str], folder: bool = False) -> list[Finding]:
    """A warning where the replaced file had attributes that the new one could not get; `what` lists them."""
    words = f"the {'folder' if folder else 'file'} that was replaced had what could not be kept: {', '.join(what)}"
    return [Finding("attributes", words, level="warning")] if what else []


def named(text: str, temporary: str, path: str) -> str:
    """The text with the output's path instead of the temporary file's."""
    return text.replace(temporary, path).replace(os.path.basename(temporary), os.path.basename(path))


def reword(error: CheckpointError, temporary: str, path: str) -> None:
    """Replace the temporary file's path by the output's in all texts of an error."""
    for name in ("reason", "path", "key", "hint"):
        value = getattr(error, name)
        setattr(error, name, value and named(value, temporary, path))
    error.problems = tuple(named(problem, temporary, path) for problem in error.problems)
    error.args = (error.message,)


def head_of(name: str) -> str:
    """The beginning of the names of hidden files for an output of this name."""
    return f".{name[:_HEAD]}{_MARK}"


def _mode(real: str) -> int:
    """The permissions of the temporary file: only for us where it replaces a file, which an access control list may protect further."""
    return 0o600 if os.path.exists(real) else 0o666


def create_locked(start: str, mode: int, tried: list[str], end: str = ".tmp") -> Temporary:
    """A new file under an unused name, locked until it is closed."""
    while True:
        path = hidden_name(start, os.urandom(4).hex(), end)
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
        os.close(fd)  # another run deleted it before it was locked


def hidden_name(start: str, chance: str, end: str = ".tmp") -> str:
    """A temporary file's path. Its last digits are a checksum of the rest, so that other files are not taken for temporary ones."""
    check = sha256(os.fsencode(os.path.basename(start)) + chance.encode()).hexdigest()[:4]
    return f"{start}{chance}{check}{end}"


def hidden_ones(start: str, end: str = ".tmp") -> Iterator[str]:
    """The paths of temporary files that begin with `start` and end with `end`."""
    paths = glob.glob(f"{glob.escape(start)}*{end}")
    yield from (path for path in paths if path == hidden_name(start, path[len(start) : len(start) + 8], end))


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
            raise taken(path) from None
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
                raise
            if os.path.lexists(real):
                raise taken(path) from None
            os.rename(temporary.path, real)  # a file system without hard links
    sync_home(real, path)


def sync_home(real: str, path: str) -> None:
    """Sync an output's folder, so that its new name survives a power cut; OutputError, which says that it is whole, where that fails."""
    try:
        platform.sync_folder(os.path.dirname(real))
    except OSError as error:
        reason = f"is written whole, but its folder could not be synced ({error.strerror}): a power cut may yet undo it"
        raise OutputError(reason, path=path, hint="check the disk") from error


def taken(path: str) -> OutputError:
    """The error for a path that exists and may not be replaced."""
    return OutputError("exists already", path=path, hint="give overwrite=True to replace it, or choose another path")


def _sweep(folder: str, head: str, output: str = "") -> None:
    """Delete temporary files that a killed run with the same output left: those that nobody locks. Without locks none is deleted."""
    for stale in hidden_ones(os.path.join(folder, head)):
        with suppress(OSError):
            fd = platform.open_itself(stale)
            try:
                if is_ours(os.fstat(fd), output):
                    platform.lock_at_once(fd)
                    os.unlink(stale)
            finally:
                os.close(fd)


def is_ours(status: os.stat_result, output: str) -> bool:
    """Whether a file with a temporary name is a regular file of this user, with no other link than the output's."""
    if not stat.S_ISREG(status.st_mode) or not platform.is_mine(status):
        return False
    try:
        return status.st_nlink == 1 or (status.st_nlink == 2 and os.path.samestat(status, os.stat(output)))
    except OSError:
        return False


class Syncs:
    """Syncs of a file in the background. An error is kept, since the system tells it once: a later sync would say that all is well."""

    def __init__(self, fd: int) -> None:
        self._fd, self._unsynced = fd, 0
        self._threads: list[threading.Thread] = []
        self._failed: list[OSError] = []

    def wrote(self, nbytes: int) -> None:
        """Say that so many bytes more are written; many of them are synced while more are written. Raises the error of an earlier sync."""
        self.raise_failed()
        self._unsynced += nbytes
        if self._unsynced >= EARLY and not self.running():
            self.start()

    def start(self) -> None:
        """Start a sync of all that is written so far."""
        self._unsynced, thread = 0, threading.Thread(target=self._sync, daemon=True)
        with undisturbed():
            thread.start()
            self._threads = [*self.running(), thread]

    def _sync(self) -> None:
        try:
            os.fsync(self._fd)
        except OSError as error:
            self._failed.append(error)

    def running(self) -> list[threading.Thread]:
        """The threads that have not ended."""
        return [thread for thread in self._threads if thread.is_alive()]

    def raise_failed(self) -> None:
        """Raise the first error of a sync, if there is one."""
        if self._failed:
            raise self._failed[0]


@contextmanager
def syncing(temporary: Temporary) -> Iterator[Syncs]:
    """While the block runs, sync the file in the background as it says; an error of either is raised, and no sync is left running."""
    syncs = Syncs(temporary.fd)
    try:
        yield syncs
        if syncs.running():
            with phase("waiting for the disk"):
                for thread in syncs.running():
                    wait_for(thread)
    finally:
        for thread in syncs.running():
            thread.join()
    syncs.raise_failed()
