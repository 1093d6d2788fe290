"""Reports the progress of long work to a listener and to the logger `ckptsurgeon`. Nothing is printed here.

Rule: the listener is called in the caller's thread, between two steps, so it may raise to stop the run, and nothing is left half done.
There are at most ten events a second, so that they slow nothing down. The code that does the work opens a `phase` and calls the function
that it yields; `listening` sets the listener.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from time import monotonic
from typing import TYPE_CHECKING, Any

from ckptsurgeon.sizes import rounded

if TYPE_CHECKING:
    from threading import Thread

EVERY = 0.1  # seconds between two events, at least


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a phase of the work is. Printed, it is one line: `writing 1.4 GB of 2.8 GB`.

    The first event of a phase has `done` 0, the last event `done` equal to `total`; a phase that fails has no last event. A phase may begin
    within another phase, which continues afterwards. Where several files are written, phases alternate, and each continues where it
    stopped.

    Attributes:
        phase: what is being done: `matching`, `converting`, `writing`, `computing checksums`, `proving`, `waiting for the disk`, `loading`,
            `comparing`, `transferring`, `checking`, `reading values`.
        done: how much of it is done, in `unit`.
        total: how much there is to do, or None where it is not known.
        unit: `bytes`, `files` or `tensors`.
    """

    phase: str
    done: int
    total: int | None
    unit: str

    def __str__(self) -> str:
        if self.total is None:
            return f"{self.phase} {_amount(self.done, self.unit)}" if self.done else self.phase
        if not self.done:
            return f"{self.phase} {_amount(self.total, self.unit)}"
        if self.unit == "bytes":
            return f"{self.phase} {rounded(self.done)} of {rounded(self.total)}"
        return f"{self.phase} {self.done:,} of {_amount(self.total, self.unit)}"


Listener = Callable[[Progress], None]


@dataclass(frozen=True, slots=True)
class Share:
    """A part of a phase's work: how much of the whole was done before it, and how much the whole is."""

    before: int
    whole: int

    def after(self, more: int) -> Share:
        """The share that follows once `more` is done."""
        return Share(self.before + more, self.whole)


Held = list[BaseException] | None
Advance = Callable[[int], None]  # gets how much more is done; 0 says that the work goes on

_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)
_phase: ContextVar[_Phase | None] = ContextVar("phase", default=None)


@contextmanager
def listening(listener: Listener | None) -> Iterator[None]:
    """While the block runs, report every phase to this listener instead of the outer one; with None the outer listener stays."""
    if listener is None:
        yield
        return
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


@contextmanager
def phase(name: str, total: int | None = None, unit: str = "bytes", *, share: Share | None = None, held: Held = None) -> Iterator[Advance]:
    """While the block runs, report its progress.

    Args:
        name: what is being done, as `Progress.phase`.
        total: how much there is to do, or None.
        unit: of `total`, and of what the block says is done.
        share: where the block's `total` is a part of the whole, such as one file of several.
        held: for a block that must not be interrupted: the list of `raising_later`, which gets what a listener raises.

    Yields:
        A function that the block calls with how much more is done.

    >>> with listening(print), phase("checking", 2, "files") as advance:
    ...     advance(1)
    checking 2 files
    checking 2 of 2 files
    """
    began, log = monotonic(), _logger()
    if log is not None:
        log.info("%s", Progress(name, 0, total, unit))
    first, last, whole = (0, total, total) if share is None else (share.before, share.before + (total or 0), share.whole)
    listener, ended = _listener.get(), "stopped"
    try:
        if listener is None:
            yield nobody
        else:
            running = _Phase(listener, Progress(name, first, whole, unit), last, held)
            token = _phase.set(running)
            try:
                running.tell()
                yield running.advance
                running.end()
            finally:
                _phase.reset(token)
        ended = "done"
    finally:
        if log is not None:
            log.debug("%s: %s after %.1f s", name, ended, monotonic() - began)


@contextmanager
def raising_later() -> Iterator[list[BaseException]]:
    """What a listener raises in phases that must not be cut in two is collected while the block runs, and raised at its end."""
    held: list[BaseException] = []
    yield held
    if held:
        raise held[0]


def beat() -> None:
    """Say that the work of the innermost phase goes on, from where how much of it is done isn't known."""
    innermost = _phase.get()
    if innermost is not None:
        innermost.advance(0)


def wait_for(thread: Thread) -> None:
    """Wait for a thread's end, and say meanwhile that the work goes on."""
    while thread.is_alive():
        thread.join(EVERY)
        beat()


def _amount(number: int, unit: str) -> str:
    return rounded(number) if unit == "bytes" else f"{number:,} {unit if number != 1 else unit.removesuffix('s')}"


def nobody(_more: int) -> None:
    """Nobody listens."""


class _Phase:
    """How far one phase is, and who is told."""

    __slots__ = ("_done", "_first", "_held", "_last", "_listener", "_next")

    def __init__(self, listener: Listener, first: Progress, last: int | None, held: Held) -> None:
        self._listener, self._first, self._last, self._held = listener, first, last, held
        self._done = first.done
        self._next = 0.0

    def advance(self, more: int) -> None:
        self._done += more
        if monotonic() >= self._next and (self._last is None or self._done < self._last):
            self.tell()

    def end(self) -> None:
        self._done = self._done if self._last is None else self._last
        self.tell()

    def tell(self) -> None:
        if self._held:
            return
        try:
            self._listener(replace(self._first, done=self._done))
        except BaseException as error:
            if self._held is None:
                raise
            self._held.append(error)
        self._next = monotonic() + EVERY


def _logger() -> Any:
    """The logger `ckptsurgeon`, where it is to be told so much. Who has not imported `logging` does not ask, and is spared its import."""
    logging = sys.modules.get("logging")
    if logging is None:
        return None
    logger = logging.getLogger("ckptsurgeon")
    if not logger.handlers:
        logger.addHandler(logging.NullHandler())
    return logger if logger.isEnabledFor(logging.INFO) else None
