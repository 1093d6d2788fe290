"""Does work on large parts in a few threads beside the caller's, and gives the results in the parts' order.

Rule: the caller's thread makes the parts (it opens files, and writes), tells progress and raises errors; a thread does nothing but the work
on one part, which ends soon. No thread is left when the block ends, however it ends.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from queue import Empty, SimpleQueue
from typing import Generic, Protocol, TypeVar

from ckptsurgeon.progress import EVERY, beat
from ckptsurgeon.storage import platform
from ckptsurgeon.streaming.signals import undisturbed

THREADS = 2
SMALL = 1 << 20  # bytes; smaller parts take less time than handing them over
_AHEAD = 8  # parts that wait for their results; then the caller's thread helps


class Part(Protocol):
    """Something to work on, of so many bytes."""

    @property
    def nbytes(self) -> int:
        """Its size."""


P = TypeVar("P", bound=Part)
R = TypeVar("R")


class _Job(Generic[P, R]):
    """The work on one part: its result or its error, once `done` is set."""

    __slots__ = ("_error", "_result", "done", "part")

    def __init__(self, part: P) -> None:
        self.part, self.done = part, threading.Event()
        self._result: R | None = None
        self._error: BaseException | None = None

    def run(self, work: Callable[[P], R]) -> None:
        try:
            self._result = work(self.part)
        except BaseException as error:  # noqa: BLE001
            self._error = error
        self.done.set()

    def result(self) -> R:
        if self._error is not None:
            raise self._error
        return self._result  # type: ignore[return-value]


@contextmanager
def in_threads(work: Callable[[P], R], parts: Iterable[P]) -> Iterator[Iterator[tuple[P, R]]]:
    """While the block runs, each part with its result, in the order of the parts; they are asked for a few parts ahead.

    Parts may share nothing that `work` changes. Its error is raised in place of its result.
    """
    waiting: SimpleQueue[_Job[P, R] | None] = SimpleQueue()
    threads: list[threading.Thread] = []

    def run() -> None:
        while (job := waiting.get()) is not None:
            job.run(work)

    def finish(job: _Job[P, R]) -> tuple[P, R]:
        while not job.done.is_set():
            try:
                next_job = waiting.get_nowait()
            except Empty:
                if not job.done.wait(EVERY):
                    beat()
            else:
                assert next_job is not None
                next_job.run(work)
        return job.part, job.result()

    def results() -> Iterator[tuple[P, R]]:
        jobs: deque[_Job[P, R]] = deque()
        for part in parts:
            if not platform.threads_may_share_files() or (part.nbytes < SMALL and not jobs):
                yield part, work(part)
                continue
            jobs.append(_Job(part))
            if part.nbytes < SMALL:
                jobs[-1].run(work)
            else:
                waiting.put(jobs[-1])
                if not threads:
                    _start(run, threads)
            while jobs and (len(jobs) > _AHEAD or jobs[0].done.is_set()):
                yield finish(jobs.popleft())
        while jobs:
            yield finish(jobs.popleft())

    try:
        yield results()
    finally:
        with undisturbed():
            with suppress(Empty):
                while True:
                    waiting.get_nowait()
            for _ in threads:
                waiting.put(None)
            for thread in threads:
                thread.join()


def _start(run: Callable[[], None], threads: list[threading.Thread]) -> None:
    with undisturbed():
        for _ in range(THREADS):
            thread = threading.Thread(target=run, daemon=True)
            thread.start()
            threads.append(thread)
