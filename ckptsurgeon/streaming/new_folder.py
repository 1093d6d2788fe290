"""An output folder that exists only when it is whole: written under a hidden name in the same folder, synced, and then renamed.

It does for a folder what `atomic` does for a file. A folder that is replaced is exchanged with the new one in one step where the system
can do that, else by two renames; if the second is missing, the next run undoes the first. Only folders that hold nothing but a checkpoint's
files are replaced. A later run can resume with the files that an interrupted run has proven.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field

from ckptsurgeon.errors import CheckpointError, OutOfMemoryError, OutputError, StaleError, UnreadableError
from ckptsurgeon.formats.folders.shards import is_checkpoint_file
from ckptsurgeon.hints import shortened
from ckptsurgeon.report import Cast
from ckptsurgeon.storage import platform
from ckptsurgeon.streaming import journal as journals
from ckptsurgeon.streaming.atomic import (
    Temporary,
    create_locked,
    head_of,
    hidden_ones,
    is_ours,
    no_folder,
    output_error,
    real_path,
    reword,
    sync_home,
    taken,
)
from ckptsurgeon.streaming.file_attributes import hand_over
from ckptsurgeon.streaming.journal import Journal, Proven
from ckptsurgeon.streaming.signals import undisturbed

_JOURNAL, _NEW, _OLD = ".log", ".tmp", ".old"


@dataclass(frozen=True)
class NewFolder:
    """A folder that is being written. Readers can open `path` until it is renamed; `mode` has the permissions of its files; `lost` is as in
    `Temporary`."""

    path: str
    journal: Journal
    mode: int
    lost: list[str] = field(default_factory=list)

    @contextmanager
    def opened(self, name: str) -> Iterator[Temporary]:
        """The open file of this name in the folder; it is created where it does not exist."""
        path = os.path.join(self.path, name)
        fd = platform.open_itself(path) if os.path.lexists(path) else platform.create(path, self.mode)
        try:
            yield Temporary(path, fd, self.lost)
        finally:
            os.close(fd)

    def proven(self, name: str) -> Proven | None:
        """The journal's row for a file that an interrupted run has proven; None for any other."""
        return self.journal.rows.get(name)

    def keep(self, name: str, made: Mapping[str, str], casts: Sequence[Cast]) -> None:
        """Add a file that is proven and synced to the journal, with the digests of its computed tensors and the losses of its casts."""
        self.journal.add(name, Proven(made, tuple(casts)))


def check_folder(path: str, overwrite: bool, resume: bool = False) -> str:
    """The folder that will really be written (a link is followed). What a killed run left beside it is deleted, unless `resume`.

    OutputError where a file has this path, or a folder that may not be replaced.
    """
    real = real_path(path)
    if not path:
        raise OutputError("output='' is empty", hint="give the path of a folder to write")
    home = os.path.dirname(real)
    for journal in hidden_ones(_start(real), _JOURNAL):
        with _locked(journal) as fd:
            if fd is not None:
                _take_back(journal, real)
                if not resume:
                    _clear(journal, real)
    try:
        names = sorted(os.listdir(real))
    except FileNotFoundError:
        if not os.path.isdir(home):
            raise no_folder(path, home) from None
        return real
    except NotADirectoryError:
        raise OutputError("is a file, and several files need a folder", path=path, hint="give the path of a folder") from None
    except OSError as error:
        raise output_error(path, error) from error
    _refuse_others(path, real, names)
    if names and not overwrite:
        raise taken(path)
    return real


def _refuse_others(path: str, real: str, names: Sequence[str]) -> None:
    others = [name for name in names if not is_checkpoint_file(name) or not stat.S_ISREG(os.lstat(os.path.join(real, name)).st_mode)]
    if others:
        words = "is a folder that would be replaced whole, and it holds what is no file of a checkpoint written there"
        raise OutputError(words, path=path, problems=shortened(others), hint="choose a new folder, or move these elsewhere first")


@contextmanager
def new_folder(path: str, overwrite: bool, task: str, names: Sequence[str], resume: bool = False) -> Iterator[NewFolder]:
    """A folder that is renamed to `path` when the block ends without an error. Otherwise nothing is left, except that an interrupt or an
    error of the system leaves the proven files, hidden, for `resume`.

    Args:
        task: the digest of everything that determines the output.
        names: the files that the folder will hold.

    Raises:
        OutputError: as `check_folder`, or the system refuses a write.
        StaleError: an interrupted run left files of another task.
    """
    real = check_folder(path, overwrite, resume)
    opened = ExitStack()
    journals_of_ours: list[str] = []  # noted before they are made: an interrupt can come in between
    folder, named = None, False
    try:
        try:
            folder = _left(path, real, task, opened) if resume else None
            folder = folder or _create(real, task, opened, journals_of_ours)
            journals_of_ours = [folder.journal.path]
            _remove_all_but(folder.path, folder.journal.rows)
            yield folder
            _remove_all_but(folder.path, names)
            _hand_over(folder, real)
            platform.sync_folder(folder.path)
            with undisturbed():
                _take_name(folder, real, path, overwrite)
                named = True
            sync_home(real, path)
        except BaseException as error:
            if isinstance(error, CheckpointError) and folder is not None:
                reword(error, folder.path, path)
            if folder is not None and folder.journal.rows and not named and _goes_on(error):
                with undisturbed():
                    _remove_all_but(folder.path, folder.journal.rows)
                journals_of_ours = []
                proven = len(folder.journal.rows)
                kept = "one of its files is" if proven == 1 else f"{proven} of its files are"
                _say(error, f"{kept} proven and kept: the same with resume=True goes on from there")
            raise
    except OSError as error:
        refused = output_error(path, error)
        for words in getattr(error, "__notes__", ()):
            _say(refused, words)
        raise refused from error
    finally:
        with undisturbed():
            if not platform.locks():
                opened.close()  # Windows deletes no open file; elsewhere the lock is held until the journal is deleted
            for journal in journals_of_ours:
                with suppress(OSError):
                    _clear(journal, real)
            with suppress(OSError):
                opened.close()


def _goes_on(error: BaseException) -> bool:
    """Whether a later run may resume after this error: an interrupt or an error of the system. Without locks no run can: it could not tell
    whether this one has ended."""
    return platform.locks() and (not isinstance(error, CheckpointError) or isinstance(error, (UnreadableError, OutOfMemoryError)))


def _say(error: BaseException, words: str) -> None:
    if isinstance(error, CheckpointError):
        error.hint = f"{error.hint}; {words}" if error.hint else words
    else:
        error.add_note(words)


def _start(real: str) -> str:
    home, name = os.path.split(real)
    return os.path.join(home, head_of(name))


def _beside(journal: str) -> tuple[str, str]:
    """The paths of a journal's hidden folder, and of the replaced folder between the two renames."""
    base = journal.removesuffix(_JOURNAL)
    return base + _NEW, base + _OLD


@contextmanager
def _locked(journal: str) -> Iterator[int | None]:
    """The locked descriptor of a journal whose run has ended; None where the run goes on, or the file is not a journal of ours."""
    try:
        fd = platform.open_itself(journal)
    except OSError:
        yield None
        return
    try:
        try:
            ours = is_ours(os.fstat(fd), journal)
            if ours:
                platform.lock_at_once(fd)
        except OSError:
            ours = False
        yield fd if ours else None
    finally:
        os.close(fd)


def _take_back(journal: str, real: str) -> None:
    """Undo the first of the two renames where the second is missing."""
    new, old = _beside(journal)
    if os.path.lexists(old) and os.path.lexists(new) and not os.path.lexists(real):
        with suppress(OSError):
            os.rename(old, real)


def _clear(journal: str, real: str) -> None:
    """Delete a journal and its folders. The replaced folder is deleted only where the new one has its name."""
    _take_back(journal, real)
    new, old = _beside(journal)
    if os.path.lexists(old) and os.path.lexists(new):
        return  # another program has put a folder there meanwhile: the replaced one is kept
    for hidden in (new, old):
        _remove_all_but(hidden, ())
        with suppress(OSError):
            os.rmdir(hidden)
    if not os.path.lexists(new) and not os.path.lexists(old):
        with suppress(OSError):
            os.unlink(journal)


def _remove_all_but(folder: str, names: Container[str]) -> None:
    """Delete all files of a hidden folder but these; it has no folders in it."""
    with suppress(OSError):
        status = os.lstat(folder)
        if not stat.S_ISDIR(status.st_mode) or not platform.is_mine(status):
            return
        for name in os.listdir(folder):
            if name not in names:
                with suppress(OSError):
                    os.unlink(os.path.join(folder, name))


def _left(path: str, real: str, task: str, opened: ExitStack) -> NewFolder | None:
    """The hidden folder that an interrupted run of the same task left, with its journal. Those without a usable journal are deleted."""
    for journal_path in hidden_ones(_start(real), _JOURNAL):
        with ExitStack() as stack:
            fd = stack.enter_context(_locked(journal_path))
            if fd is None:
                continue
            journal, (hidden, _) = journals.read(journal_path, fd), _beside(journal_path)
            if journal is None or not os.path.isdir(hidden) or os.lstat(hidden).st_ino != journal.inode:
                _clear(journal_path, real)
                continue
            if journal.task != task:
                words = "has beside it what an interrupted run left that wrote something else, by other inputs or options"
                raise StaleError(words, path=path, hint="leave out resume=True to begin anew")
            opened.push(stack.pop_all())
            return NewFolder(hidden, journal, _mode(real))
    return None


def _create(real: str, task: str, opened: ExitStack, tried: list[str]) -> NewFolder:
    temporary = create_locked(_start(real), 0o600, tried, _JOURNAL)
    opened.callback(os.close, temporary.fd)
    hidden, _ = _beside(temporary.path)
    mode = _mode(real)
    os.mkdir(hidden, 0o777 if mode == 0o666 else 0o700)
    journal = Journal(temporary.path, temporary.fd, task, os.lstat(hidden).st_ino)
    journal.begin()
    return NewFolder(hidden, journal, mode)


def _mode(real: str) -> int:
    """The permissions of new files: only for us where they replace files, which an access control list may protect further."""
    return 0o600 if os.path.isdir(real) and os.listdir(real) else 0o666


def _hand_over(folder: NewFolder, real: str) -> None:
    """Give the new folder the attributes of the old one, and each new file those of the old file with the fewest permissions."""
    if not os.path.isdir(real):
        return
    old = [os.path.join(real, name) for name in sorted(os.listdir(real))]
    lost: list[str] = []
    if old:
        least = min(old, key=lambda path: stat.S_IMODE(os.stat(path).st_mode).bit_count())
        for name in sorted(os.listdir(folder.path)):
            with folder.opened(name) as file:
                lost += hand_over(file.fd, file.path, least)
    fd = platform.open_folder(folder.path)
    if fd is not None:
        try:
            lost += hand_over(fd, folder.path, real)
        finally:
            os.close(fd)
    folder.lost.extend(dict.fromkeys(lost))


def _take_name(folder: NewFolder, real: str, path: str, overwrite: bool) -> None:
    names = os.listdir(real) if os.path.isdir(real) else []
    if not names or not overwrite:
        try:
            platform.rename_folder(folder.path, real)  # never over a folder that holds anything, nor over a file
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise taken(path) from error
        return
    _refuse_others(path, real, names)
    if platform.exchange(folder.path, real):
        return
    _, old = _beside(folder.journal.path)
    os.rename(real, old)
    try:
        os.rename(folder.path, real)
    except BaseException:
        os.rename(old, real)
        raise
