"""The only module that calls the user's code: imports, constructors, hooks, forward passes.

What that code raises becomes a `TargetError` that says what was raised and where; what it prints goes to stderr, since stdout is for data.
Only this module of `models/` may write `except Exception`. It must not catch KeyboardInterrupt, nor decide what follows from a failure.
"""

from __future__ import annotations

import contextlib
import os
import sys
import sysconfig
import traceback
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from ckptsurgeon.errors import CheckpointError, TargetError, no_memory

T = TypeVar("T")

LONGEST = 600  # characters of a message

_HINTS: tuple[tuple[type[BaseException], str], ...] = (
    (SystemExit, "put the script's own part under `if __name__ == '__main__':`"),
    (ModuleNotFoundError, "run ckptsurgeon in the environment in which your own code runs: python -m ckptsurgeon …"),
)


def call(what: str, function: Callable[..., T], /, *args: Any, **kwargs: Any) -> T:
    """Return `function(*args, **kwargs)`, with its stdout on stderr.

    Args:
        what: the path in the error: the spec, or the file that the code belongs to.

    Raises:
        TargetError: the function raised an Exception or SystemExit. The reason has its type and message, and the file and line
            of the innermost frame in the user's code; the original exception is the `__cause__`. Errors of ckptsurgeon and
            KeyboardInterrupt pass through unchanged.

    >>> call("int", int, "7")
    7
    """
    stdout = sys.stdout
    try:
        with contextlib.redirect_stdout(sys.stderr):
            return function(*args, **kwargs)
    except CheckpointError:
        raise
    except (Exception, SystemExit) as error:
        line = innermost_line(error)
        raise TargetError(f"{words(error)}{f' ({line})' if line else ''}", path=what, hint=_hint(error, line)) from error
    finally:
        sys.stdout = stdout  # an interrupt may have ended the redirection before it was undone


def words(error: BaseException) -> str:
    """The type and message of an exception on one line, cut after `LONGEST` characters; an empty message is left out.

    >>> words(ValueError("no such size"))
    'ValueError: no such size'
    """
    message = " ".join(str(traceback.TracebackException(type(error), error, None)).split())
    text = f"{type(error).__qualname__}: {message}" if message else type(error).__qualname__
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}…"


def innermost_line(error: BaseException) -> str | None:
    """`file:line` of the innermost frame in the user's code; without such a frame, of the innermost one outside of this package."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{error.filename}:{error.lineno}"
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    own = [frame for frame in frames if is_user_file(frame[0])]
    foreign = [frame for frame in frames if not _within(frame[0], _PACKAGE) and not frame[0].startswith("<")]
    chosen = (own or foreign)[-1:]
    return f"{chosen[0][0]}:{chosen[0][1]}" if chosen else None


@lru_cache(maxsize=8192)
def is_user_file(filename: str) -> bool:
    """Whether a source file is the user's: not of the standard library, an installed package or this package."""
    return not filename.startswith("<") and not any(_within(filename, folder) for folder in (_PACKAGE, *_INSTALLED))


def _within(filename: str, folder: str) -> bool:
    return os.path.realpath(filename).startswith(folder + os.sep)


def _hint(error: BaseException, line: str | None) -> str | None:
    if no_memory(error):
        return "use a target that needs less memory: a skeleton or another checkpoint"
    for kind, hint in _HINTS:
        if isinstance(error, kind):
            return hint
    return f"look at {line}" if line else None


_PACKAGE = os.path.realpath(Path(__file__).parents[2])
_INSTALLED = tuple(
    {os.path.realpath(folder) for name, folder in sysconfig.get_paths().items() if name in ("stdlib", "platstdlib", "purelib", "platlib")}
    | {os.path.realpath(Path(os.__file__).parent)}
)
