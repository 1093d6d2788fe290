"""Functions that only POSIX systems have, each with a fallback for systems without it (Windows, and for some of them macOS).

Rule: no other module uses these. A fallback gives the same bytes; where it protects less, its docstring says so.
"""

from __future__ import annotations

import errno
import os
import signal
import struct
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multiprocessing.context import ForkContext

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

BLOCK = 4096  # file systems share whole blocks of this size between files, so both offsets must be multiples of it
_POSITION = threading.Lock()  # a file has one position, and several threads may read it
_AT_ONCE = 1 << 30
# The kernel can't copy between these two files (another file system, an old kernel). EIO too: a read then shows which file failed.
_NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF, errno.ETXTBSY, errno.EIO}
_CLONE, _CLONED = getattr(fcntl, "FICLONERANGE", 0x4020940D), struct.Struct("qQQQ")  # Python names it from 3.12 on
_NO_SHARING = _NO_KERNEL_COPY | {errno.ENOTTY, errno.EPERM, errno.EISDIR}
_AT_FDCWD, _RENAME_EXCHANGE, _RENAME_SWAP = -100, 2, 2
_NO_EXCHANGE = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


def _flags(*names: str) -> int:
    """The flags of `os.open` of these names; 0 for those that the system does not have."""
    flags = 0
    for name in names:
        flags |= getattr(os, name, 0)
    return flags


def open_to_read(path: str) -> int:
    """A descriptor of the file at `path`, without waiting for a writer where it is a pipe.

    Without O_NONBLOCK a pipe or a folder is opened only to be refused, so it is not opened: OSError ENXIO or EISDIR.
    """
    if not hasattr(os, "O_NONBLOCK"):
        import stat

        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode):
            code = errno.EISDIR if stat.S_ISDIR(mode) else errno.ENXIO
            raise OSError(code, os.strerror(code), path)
    return os.open(path, os.O_RDONLY | _flags("O_CLOEXEC", "O_NONBLOCK", "O_BINARY"))


def create(path: str, mode: int) -> int:
    """A descriptor of a new file; FileExistsError where there is one."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | _flags("O_CLOEXEC", "O_BINARY"), mode)


def open_itself(path: str) -> int:
    """A descriptor of the file at `path`, without following a link or waiting for a pipe. On a system without these flags it does both."""
    return os.open(path, os.O_RDWR | _flags("O_CLOEXEC", "O_NOFOLLOW", "O_NONBLOCK", "O_BINARY"))


def read(fd: int, nbytes: int, offset: int) -> bytes:
    """Up to `nbytes` bytes from `offset`; none at the file's end."""
    if hasattr(os, "pread"):
        return os.pread(fd, nbytes, offset)
    with _POSITION:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.read(fd, nbytes)


def read_into(fd: int, view: memoryview, offset: int) -> int:
    """Fill `view` as far as one read goes, from `offset`; the number of bytes, 0 at the file's end."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [view], offset)
    data = read(fd, len(view), offset)
    view[: len(data)] = data
    return len(data)


def write(fd: int, view: memoryview, offset: int) -> int:
    """Write as much of `view` at `offset` as one write takes; the number of bytes."""
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, view, offset)
    with _POSITION:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, view)


def threads_may_share_files() -> bool:
    """Whether a thread may read or write a file at an offset while another one uses it otherwise: reads then don't move its position."""
    return hasattr(os, "preadv") and hasattr(os, "pwrite")


def copy_in_kernel(source: int, output: int, nbytes: int, source_offset: int, output_offset: int) -> int:
    """Copy up to `nbytes` bytes within the kernel; the number of bytes, 0 where the kernel can't copy between these files."""
    if not hasattr(os, "copy_file_range"):
        return 0
    try:
        return os.copy_file_range(source, output, min(nbytes, _AT_ONCE), source_offset, output_offset)
    except OSError as error:
        if error.errno not in _NO_KERNEL_COPY:
            raise
        return 0


def share(source: int, output: int, nbytes: int, source_offset: int, output_offset: int) -> bool:
    """Give the output the same blocks on disk that a range of the source has, as a reflink does: all of them, or none and False.

    Linux has it on XFS, btrfs and others, within one file system. `copy_file_range` shares too, but does not say whether it has.
    """
    if fcntl is None or sys.platform != "linux":
        return False
    try:
        fcntl.ioctl(output, _CLONE, _CLONED.pack(source, source_offset, nbytes, output_offset))
    except OSError as error:
        if error.errno not in _NO_SHARING:
            raise
        return False
    return True


def stored(fd: int, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The parts of a range of a file that are stored; the others are holes, which read as zeros. All of it where the system can't tell.

    It moves the file's position, which only reads and writes without an offset look at. A file with as many blocks as its size needs is not
    looked through: tmpfs would go through all the pages that follow, for every range anew.
    """
    status = os.fstat(fd)
    if start < stop and getattr(status, "st_blocks", 0) * 512 >= status.st_size:
        yield start, stop
        return
    while start < stop:
        begin, end = start, stop
        if hasattr(os, "SEEK_DATA"):
            try:
                begin = min(os.lseek(fd, start, os.SEEK_DATA), stop)
                end = min(os.lseek(fd, begin, os.SEEK_HOLE), stop)
            except OSError as error:
                if error.errno == errno.ENXIO:  # nothing is stored from here to the file's end
                    return
        if begin < end:
            yield begin, end
        start = end


def locks() -> bool:
    """Whether files can be locked: then the file of a running process can be told from one that a killed process left."""
    return fcntl is not None


def lock(fd: int) -> None:
    """Lock a file for as long as it is open, where there are locks."""
    if fcntl is not None:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise


def lock_at_once(fd: int) -> None:
    """Lock a file without waiting; OSError where another process has locked it, or there are no locks."""
    if fcntl is None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))
    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def is_mine(status: os.stat_result) -> bool:
    """Whether a file is this user's; True where files have no owners."""
    return not hasattr(os, "geteuid") or status.st_uid == os.geteuid()


def sync_folder(folder: str) -> None:
    """Sync a folder, so that a new name in it survives a power cut, where that can be done."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | _flags("O_CLOEXEC"))
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EROFS):
            raise
    finally:
        os.close(fd)


def open_folder(folder: str) -> int | None:
    """A descriptor of a folder, to set its permissions; None where folders have none (Windows)."""
    return os.open(folder, os.O_RDONLY | os.O_DIRECTORY | _flags("O_CLOEXEC", "O_NOFOLLOW")) if hasattr(os, "O_DIRECTORY") else None


def rename_folder(folder: str, path: str) -> None:
    """Rename a folder to `path`, where an empty folder may be; OSError where there is a file, or a folder that is not empty."""
    if os.name == "nt" and os.path.isdir(path):
        os.rmdir(path)  # Windows never renames onto an existing folder
    os.rename(folder, path)


def exchange(first: str, second: str) -> bool:
    """Exchange two paths in one step, so that neither is ever missing; False where the system or the file system can't.

    Linux has `renameat2` for it, macOS `renamex_np`; Python has neither.
    """
    import ctypes

    try:
        libc = ctypes.CDLL(None, use_errno=True)
        paths = os.fsencode(first), os.fsencode(second)
        if sys.platform == "darwin":
            failed = libc.renamex_np(*paths, _RENAME_SWAP)
        else:
            failed = libc.renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE)
    except (OSError, TypeError, AttributeError):  # no such C library (Windows), or one without the function
        return False
    if failed and (code := ctypes.get_errno()) not in _NO_EXCHANGE:
        raise OSError(code, os.strerror(code), second)
    return not failed


def set_mode(fd: int, path: str, mode: int) -> None:
    """Set the permissions of an open file."""
    if hasattr(os, "fchmod"):
        os.fchmod(fd, mode)
    else:
        os.chmod(path, mode)


def set_owner(fd: int, user: int, group: int) -> None:
    """Change the user and group that own an open file; -1 keeps one as it is. OSError where the system can't, or doesn't permit it."""
    if not hasattr(os, "fchown"):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    os.fchown(fd, user, group)


def may_fork() -> bool:
    """Whether this process can be forked safely: it has only one thread (torch and BLAS start others), and signals can be blocked."""
    if not (hasattr(os, "fork") and hasattr(signal, "pthread_sigmask")):
        return False
    try:
        return "torch" not in sys.modules and len(os.listdir("/proc/self/task")) == 1
    except OSError:  # no Linux
        return False


def forking() -> ForkContext:
    """The context of multiprocessing that forks workers; use it only where `may_fork` is true."""
    from multiprocessing import get_context

    return get_context("fork")


@contextmanager
def signals_blocked(numbers: Iterable[int]) -> Iterator[None]:
    """Block signals while the block runs, where the system can block a thread's signals."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def unblock_signals(numbers: Iterable[int]) -> None:
    """Unblock signals in this thread."""
    if hasattr(signal, "pthread_sigmask"):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, numbers)
