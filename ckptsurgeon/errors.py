"""All errors of the package: each says what, where, why, and what to try next.

Every error that a user can see is one of these. This module imports nothing of the package and prints nothing.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager


def printable(text: object) -> str:
    """Return `text`, one line of it, with control characters, terminal escapes and lone surrogates shown as escapes.

    >>> printable("a\\x1b[31mb")
    'a\\\\x1b[31mb'
    """
    value = str(text)
    if value.isprintable():
        return value
    return "".join(c if c.isprintable() else _escape(c) for c in value)


_WORD = re.compile(r"""(?<!\w)(?:'[^']*'|"[^"]*")""")


def pasteable(text: object) -> str:
    """`printable`, with words in a shell's quotes so that bash reads their escapes.

    >>> print(pasteable("inspect 'a\\tb' c"))
    inspect $'a\\tb' c
    """
    return printable(_WORD.sub(_in_bash, str(text)))


def _in_bash(match: re.Match[str]) -> str:
    word = match[0]
    inner = word[1:-1].replace("\\", r"\\").replace("'", r"\'")
    return word if word.isprintable() else f"$'{printable(inner)}'"


_SHORT = {"\n": "\\n", "\t": "\\t", "\r": "\\r"}


def _escape(character: str) -> str:
    if character in _SHORT:
        return _SHORT[character]
    code = ord(character)
    if code < 0x80 or 0xDC80 <= code <= 0xDCFF:  # a byte of a name that is not UTF-8
        return f"\\x{code % 0x100:02x}"
    return f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


ADVICE = "try:"  # the word before a hint


class CheckpointError(Exception):
    """Something about a checkpoint, a target, a rule or an output that stops the work.

    Attributes:
        reason: one sentence without the path.
        path: the file or target concerned, or None.
        key: the state_dict key concerned, or None.
        hint: what to try next, or None.
        problems: each problem, where there are several.
        globals: the globals that a pickle names beyond the allow-list, where the error is about a pickle.
        exit_code: the exit code of the command line.
    """

    exit_code = 2

    def __init__(
        self,
        reason: str,
        *,
        path: object = None,
        key: str | None = None,
        hint: str | None = None,
        problems: tuple[str, ...] = (),
    ) -> None:
        self.reason = reason
        self.path = None if path is None else str(path)
        self.key = key
        self.hint = hint
        self.problems = problems
        self.globals: tuple[str, ...] = ()
        super().__init__(self.message)

    @property
    def message(self) -> str:
        """What and where and why, on one line, plus one line per problem; the hint is apart."""
        where = f"{self.path}: " if self.path else ""
        key = f"{self.key}: " if self.key else ""
        lines = [f"{where}{key}{self.reason}", *(f"  {problem}" for problem in self.problems)]
        return "\n".join(map(printable, lines))

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\n  {ADVICE} {pasteable(self.hint)}"


class UnreadableError(CheckpointError):
    """The file is missing, not a regular file, not permitted, or shorter than it says."""


class FormatError(CheckpointError):
    """The bytes are not a checkpoint of a known format, or contradict themselves."""


class PointerError(FormatError):
    """The file is a Git LFS pointer: a note of where the checkpoint is."""


class UnsafeError(CheckpointError):
    """The weights can't be read without running code that the file names."""


class PartError(CheckpointError):
    """The file is one rank's part of a checkpoint, or the checkpoint is in pieces: its tensors may not be whole."""


class LimitError(CheckpointError):
    """Reading would cost more than a header may cost."""


class RootError(CheckpointError):
    """It is not clear which nested dict holds the state_dict, or the named dict is not there."""


class SettingsError(CheckpointError):
    """An option or a setting names something that is not there, or has a wrong type."""


class TargetError(CheckpointError):
    """A target could not be parsed, imported or built."""


class RuleError(CheckpointError):
    """Rules that match nothing, collide, or are not well formed."""


class PlanError(CheckpointError):
    """A plan can't be made, contradicts itself or its files, or is of another version."""


class StaleError(CheckpointError):
    """A source or target has changed since the plan was made, or while it was read."""


class CastError(CheckpointError):
    """A change of dtype would overflow or truncate."""


class DeviceError(CheckpointError):
    """The device is not on this machine."""


class OutputError(CheckpointError):
    """The output exists already, can't be written, or its format can't hold a value."""


class ModelError(CheckpointError):
    """A model, report or parameter does not match the others (groups, forward, initialisation)."""


class CoverageError(CheckpointError):
    """A true no: nothing was transferred, or less than required."""

    exit_code = 1


class StrictError(CheckpointError):
    """A true no: under `strict`, keys that no rule names are missing, extra or mismatched."""

    exit_code = 1


class VerificationError(CheckpointError):
    """A true no: the written or loaded values differ from the plan."""

    exit_code = 1


class ArgumentError(CheckpointError, TypeError):
    """An argument has a type that the parameter does not take; `key` names the parameter."""


class MissingError(CheckpointError, ImportError):
    """A library that is needed is not installed, or can't be loaded."""


class OutOfMemoryError(CheckpointError):
    """The machine lacks memory, threads or processes for this."""


class InternalError(CheckpointError):
    """An error in ckptsurgeon itself; please report it to its authors."""


class NoRecordError(CheckpointError):
    """A true no: the checkpoint does not record what is fresh."""

    exit_code = 1


# The messages of torch's allocators, the kernel and the linker when memory, or the number of threads, is too small.
_NO_MEMORY = re.compile(
    r"allocate (memory|storage)|not enough memory|out of memory|bad_alloc|start new thread|failed to map segment", re.IGNORECASE
)
_AMOUNT = re.compile(r"tried to allocate (\d+) bytes|Tried to allocate ([\d.]+ \w+)|Unable to allocate ([\d.]+ \w+)")


def no_memory(error: BaseException) -> bool:
    """Whether an exception says that memory is short: a MemoryError, or torch's or the system's own words for it.

    >>> no_memory(MemoryError()), no_memory(RuntimeError("DefaultCPUAllocator: can't allocate memory")), no_memory(RuntimeError("no"))
    (True, True, False)
    """
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError | OSError | ImportError) and bool(_NO_MEMORY.search(str(error)))
    )


def out_of_memory(error: BaseException, key: str | None = None) -> OutOfMemoryError:
    """The error that memory is short, with the size of the allocation that failed, where `error` says it."""
    match = _AMOUNT.search(str(error))
    amount = next(filter(None, match.groups()), "") if match else ""
    from ckptsurgeon.sizes import parsed, rounded

    nbytes = parsed(amount)
    words = f": {amount if nbytes is None else rounded(nbytes)} are asked for at once" if amount else ""
    return OutOfMemoryError(f"there is not enough memory for this{words}", key=key, hint="close other programs, or use a larger machine")


_LIBRARIES = ("torch", "safetensors", "click", "tabulate")  # the package's dependencies, by their import names
_LONGEST = 300


@contextmanager
def libraries() -> Iterator[None]:
    """A context in which a missing or broken dependency is a MissingError."""
    try:
        yield
    except ImportError as error:
        missing = None if no_memory(error) else missing_library(error)
        if missing is None or missing is error:
            raise
        raise missing from error


def missing_library(error: ImportError) -> MissingError | None:
    """Which library an import lacks and how to install it; None where the import is of something else.

    >>> missing_library(ImportError("no such name", name="ckptsurgeon.api")) is None
    True
    """
    if isinstance(error, MissingError):
        return error
    module = (error.name or "").partition(".")[0]
    # Any other module that is missing while torch is not loaded is one that torch needs.
    name = module if module in _LIBRARIES else "torch" if module != "ckptsurgeon" and sys.modules.get("torch") is None else None
    if name is None:
        return None
    if isinstance(error, ModuleNotFoundError) and module == name and sys.modules.get(name) is None:
        return MissingError(f"this needs {name}, which is not installed here", hint=f"pip install {name}")
    return MissingError(f"this needs {name}, which can't be loaded here: {one_line(error)}", hint=f"python -c 'import {name}' shows why")


def one_line(error: BaseException) -> str:
    """What an exception says, on one line that is not too long."""
    words = " ".join(str(error).split())
    return words if len(words) <= _LONGEST else f"{words[:_LONGEST]}…"
