"""Several files at a time, the answers in the order of the files.

Headers are read by pure Python, where threads only take turns, so processes do that: forked, and only from a process of one thread
without torch, where a fork is sound. Else threads, which overlap where buffers are read, summed up (zlib) or looked through (torch).
A worker process that is killed costs its own file's answer and no other. An interrupt ends all of them at once.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextvars import copy_context
from typing import TYPE_CHECKING

from ckptsurgeon.progress import EVERY, Advance, beat, phase
from ckptsurgeon.report import Finding
from ckptsurgeon.storage import platform
from ckptsurgeon.streaming.signals import HELD, undisturbed

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.process import BaseProcess

Findings = tuple[Finding, ...]
Work = Callable[[int, Callable[[], None]], Findings]  # a file by its number, and what to call now and then
MOST_JOBS = 8  # unless more are asked for
_HELP_AFTER = 0.1  # seconds: what takes less needs no help
KILLED = Finding("CK100", "the process that checked it was killed (try: check it alone, with --jobs 1; was memory short?)")


def default_jobs() -> int:
    """As many as there are cores for this process, and not more than a disk serves well."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_JOBS)


def in_order(work: Work, count: int, jobs: int, *, values: bool, large: bool) -> list[Findings]:
    """The answers for the files 0 … count - 1. `values` says that torch will be needed, `large` that it will surely last."""
    with phase("checking", count, "files") as advance:
        return _in_order(work, count, jobs, values, large, advance)


def _in_order(work: Work, count: int, jobs: int, values: bool, large: bool, advance: Advance) -> list[Findings]:
    done: list[Findings] = []

    def alone(number: int) -> Findings:
        found = work(number, beat)
        advance(1)
        return found

    began = time.monotonic()
    while len(done) < count and (min(jobs, count) == 1 or not (values or large or time.monotonic() - began > _HELP_AFTER)):
        done.append(alone(len(done)))
    rest = range(len(done), count)
    jobs = min(jobs, len(rest))
    if jobs == 0:
        return done
    if jobs == 1:
        return done + [alone(number) for number in rest]
    several = _in_threads if values or not platform.may_fork() else _in_processes
    return done + several(work, rest, jobs, advance)


def _nobody_stops() -> None:
    """A worker process is killed where nobody waits for its answer."""


class _StoppedError(Exception):
    """Nobody waits for the answer any more."""


def _in_threads(work: Work, numbers: Sequence[int], jobs: int, advance: Advance) -> list[Findings]:
    stop = threading.Event()

    def alive() -> None:
        if stop.is_set():
            raise _StoppedError

    from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

    with ThreadPoolExecutor(jobs) as pool:
        try:
            waiting = [pool.submit(copy_context().run, work, number, alive) for number in numbers]
            left = set(waiting)
            while left:
                done, left = wait(left, EVERY, FIRST_COMPLETED)
                for future in done:
                    future.result()  # raises what ended one of them
                advance(len(done))
            return [future.result() for future in waiting]
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _in_processes(work: Work, numbers: Sequence[int], jobs: int, advance: Advance) -> list[Findings]:
    from multiprocessing.connection import wait

    context = platform.forking()
    left = list(reversed(numbers))
    answers: dict[int, Findings] = {}
    busy: dict[Connection, int] = {}  # a worker's line, and the number that it has
    workers: dict[Connection, BaseProcess] = {}

    def hire() -> None:
        ours, theirs = context.Pipe()
        worker = context.Process(target=_serve, args=(work, theirs, [*workers, ours]), daemon=True)
        # A signal between the fork and a worker's own first words would send it back up through all that called us.
        try:
            with platform.signals_blocked(HELD):
                worker.start()
                workers[ours] = worker
        except OSError:  # there may be no more processes; who is there already does the work
            ours.close()
        finally:
            theirs.close()
        if ours in workers:
            give(ours)

    def give(line: Connection) -> None:
        if left:
            busy[line] = left.pop()
            line.send_bytes(str(busy[line]).encode())

    try:
        for _ in range(jobs):
            hire()
        while busy:
            beat()
            for line in [line for line in wait(list(busy), EVERY) if line in busy]:
                number = busy.pop(line)
                try:
                    answers[number] = tuple(Finding(*row) for row in json.loads(line.recv_bytes()))
                except (EOFError, OSError):
                    workers[line].join()
                    if (workers[line].exitcode or 0) <= 0:  # a signal; what an error of ours ended is done again here, and ends the run
                        answers[number] = (KILLED,)
                    if left:
                        hire()
                else:
                    give(line)
                    advance(1)
    finally:
        with undisturbed():
            for worker in workers.values():
                worker.kill()
            for line, worker in workers.items():
                worker.join()
                line.close()
    return [answers[number] if number in answers else work(number, _nobody_stops) for number in numbers]


def _serve(work: Work, line: Connection, others: Sequence[Connection]) -> None:
    """A worker's life: numbers in, findings out, until the line is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the one who waits for us is told, and ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    platform.unblock_signals(HELD)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - for life; the traceback of an error of ours, which the caller meets again, goes there
    for other in others:
        other.close()
    while True:
        try:
            number = int(line.recv_bytes())
        except EOFError:
            return
        found = work(number, _nobody_stops)
        line.send_bytes(json.dumps([(one.code, one.message, one.key, one.level) for one in found]).encode())
