"""Runs regular expressions of users and of files in a child process, so that none can hang this process.

Rule: no `/…/` is compiled or matched in this process. The child is a bare Python (`-I -S`) that imports only `re` and what answering needs.
It exits by itself when the time of a request is over, even if nobody waits for it, and ends with the last expression that uses it. A child
whose time is used up serves only the call that it stopped; the next call gets a new child. Its answers are those of `re.fullmatch`. Nothing
is started, nor `subprocess` imported, before there is an expression.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

from ckptsurgeon.errors import RuleError

if TYPE_CHECKING:
    import subprocess

Groups = tuple[str | None, ...]
MOST_GROUPS = 100  # of one expression
_SHOWN = 80  # characters of an expression in a message
# A request is a line of JSON: seconds, expression, flags, keys. So is the answer: seconds used, then an error, or the names of the groups,
# their number, and for each key its groups or null. The watchdog is a thread in C, which an expression can't block.
_CHILD = """
import faulthandler, json, re, sys, time
try:
    import resource
    resource.setrlimit(resource.RLIMIT_AS, (2 * 10**9, 2 * 10**9))
except (ImportError, ValueError, OSError):
    pass
def answer(body, flags, keys):
    try:
        regex = re.compile(body, flags)
        matches = map(regex.fullmatch, keys)
        return [dict(regex.groupindex), regex.groups, [None if match is None else match.groups() for match in matches]]
    except (re.error, RecursionError, OverflowError, ValueError) as error:
        return [str(error)]
    except MemoryError:
        return ["it needs more than 2 GB of memory"]
for line in sys.stdin.buffer:
    seconds, *request = json.loads(line.decode("utf-8", "surrogatepass"))
    began = time.perf_counter()
    faulthandler.dump_traceback_later(seconds, exit=True)
    result = answer(*request)
    faulthandler.cancel_dump_traceback_later()
    used = time.perf_counter() - began
    text = json.dumps([used, *result], ensure_ascii=False, separators=(",", ":"))
    sys.stdout.buffer.write(text.encode("utf-8", "surrogatepass") + b"\\n")
    sys.stdout.buffer.flush()
"""


class _Child:
    """The process, started by the first request, and again after it has exited. `used` are the seconds of all expressions."""

    def __init__(self) -> None:
        self.used = 0.0
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._end: Callable[[], object] = lambda: None

    def ask(self, request: bytes) -> bytes:
        """The line that answers a request; empty where the process has ended."""
        with self._lock:
            process = self._process = self._process or self._started()
            assert process.stdin is not None
            assert process.stdout is not None
            answer = b""
            try:
                process.stdin.write(request)
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:
                pass
            finally:  # after an interrupt its answer would be taken for that of the next request
                if not answer.endswith(b"\n"):
                    self._end()
                    self._process = None
            return answer

    def _started(self) -> subprocess.Popen[bytes]:
        from subprocess import DEVNULL, PIPE, Popen

        if not sys.executable or getattr(sys, "frozen", False):
            raise RuleError("regular expressions need a Python interpreter beside this program", hint="use {p} and {**rest} instead")
        try:
            process = Popen([sys.executable, "-I", "-S", "-c", _CHILD], stdin=PIPE, stdout=PIPE, stderr=DEVNULL, creationflags=_NO_WINDOW)
        except OSError as error:
            raise RuleError(f"regular expressions need a process of their own, and none can be started: {error.strerror}") from error
        self._end = weakref.finalize(self, _end, process, os.getpid())
        return process


_NO_WINDOW = 0x08000000 if sys.platform == "win32" else 0
_current: weakref.ref[_Child] | None = None  # alive while an expression uses it
_owner = 0  # the process that started it: a forked process starts a child of its own


def _end(process: subprocess.Popen[bytes], owner: int) -> None:
    if os.getpid() == owner:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout):
        try:
            if pipe is not None:
                pipe.close()
        except OSError:  # the rest of a request has no reader
            pass


def one_child() -> _Child:
    """The process that all expressions share while an expression, or the caller, keeps a reference to it. It isn't started here."""
    global _current, _owner
    child = _current() if _current is not None and _owner == os.getpid() else None
    if child is None:
        child = _Child()
        _current, _owner = weakref.ref(child), os.getpid()
    return child


def _leave(child: _Child) -> None:
    """Let later expressions use a new process: an error may keep this one alive, as a notebook keeps the last error."""
    global _current
    if _current is not None and _current() is child:
        _current = None


class Expression:
    """A regular expression that is matched with whole keys in the child process. It remembers the answers."""

    def __init__(self, body: str, flags: int = 0, whose: str = "") -> None:
        """Errors say with `whose` where it is written. No request is sent yet."""
        self._child = one_child()
        self._request = (body, flags)
        text = body if len(body) <= _SHOWN else f"{body[: _SHOWN - 1]}…"
        self._words = f"{whose}: " if whose else ""
        self._text = f"the regular expression /{text}/"
        self._used = 0.0
        self._known: dict[str, Groups | None] = {}

    @cached_property
    def _compiled(self) -> tuple[Mapping[str, int], int]:
        groupindex, groups, _ = self._answer(())
        if groups > MOST_GROUPS:
            raise RuleError(f"{self._text} has {groups} groups; at most {MOST_GROUPS} are", hint="write (?:…) where no group is used")
        return groupindex, groups

    @property
    def groupindex(self) -> Mapping[str, int]:
        """Names of groups to their numbers. RuleError for an invalid expression, LimitError where compiling it takes too long."""
        return self._compiled[0]

    @property
    def groups(self) -> int:
        """How many groups it has."""
        return self._compiled[1]

    def learn(self, keys: Iterable[str]) -> None:
        """Match all `keys` at once: one request instead of many."""
        new = list(dict.fromkeys(key for key in keys if key not in self._known))
        if new:
            answers = self._answer(new)[2]
            self._known.update(zip(new, (None if groups is None else tuple(groups) for groups in answers), strict=True))

    def fullmatch(self, key: str) -> Groups | None:
        """The groups of a key that matches as a whole, else None."""
        if key not in self._known:
            self.learn((key,))
        return self._known[key]

    def _answer(self, keys: Sequence[str]) -> tuple[Mapping[str, int], int, Sequence[Sequence[str | None] | None]]:
        from ckptsurgeon.limit_table import allowed, exceeded

        per_expression, per_call = (allowed(name) for name in ("regex-seconds", "all-regex-seconds"))
        seconds = min(per_expression - self._used, per_call - self._child.used)
        if seconds > 0:
            import json

            text = json.dumps([seconds, *self._request, keys], ensure_ascii=False, separators=(",", ":"))
            began = time.monotonic()
            answer = self._child.ask(text.encode("utf-8", "surrogatepass") + b"\n")
            if not answer and time.monotonic() - began < seconds / 2:
                raise RuleError(f"{self._words}{self._text} can't be held against keys: its process was killed", hint="was memory short?")
            used, *result = json.loads(answer.decode("utf-8", "surrogatepass")) if answer else (seconds,)
            self._used += used
            self._child.used += used
            if len(result) == 1:
                raise RuleError(f"{self._text} can't be used: {result[0]}")
            if result:
                return result[0], result[1], result[2]
        _leave(self._child)
        if self._child.used >= per_call:
            raise exceeded(
                "all-regex-seconds", f"{self._words}up to {self._text}, regular expressions took more than {per_call} s together"
            )
        raise exceeded("regex-seconds", f"{self._words}{self._text} takes more than {per_expression} s{_over(keys)}")


def _over(keys: Sequence[str]) -> str:
    return f", here for {keys[0][:_SHOWN]!r}" if len(keys) == 1 else f" for {len(keys)} keys" if keys else " to be compiled"
