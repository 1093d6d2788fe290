"""Checks several files at a time; the findings come in the order of the files.

Headers are read by pure Python, which threads can't do in parallel, so processes do: forked, and only from a process of one thread
without torch, where forking is safe. Else threads, which run in parallel while data is read, checksummed (zlib) or computed on (torch).
If a worker process is killed, only its current file has no findings. An interrupt ends all workers at once.
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
Work = Callable[[int, Callable[[], None]], Findings]  # checks a file by its number; calls the function now and then
MOST_JOBS = 8  # the most by default
_PARALLEL_AFTER = 0.1  # seconds; a shorter run starts no workers
KILLED = Finding("CK100", "the process that checked it was killed (try: check it alone, with --jobs 1; was memory short?)")


def default_jobs() -> int:
    """The number of cores of this process, at most `MOST_JOBS`: more readers make a disk slower."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, MOST_JOBS)


def in_order(work: Work, count: int, jobs: int, *, values: bool, large: bool) -> list[Findings]:
    """The findings of the files 0 … count - 1. `values` says that torch is needed, `large` that the files take long."""
    with phase("checking", count, "files") as advance:
        return _in_order(work, count, jobs, values, large, advance)


def _in_order(work: Work, count: int, jobs: int, values: bool, large: bool, advance: Advance) -> list[Findings]:
    done: list[Findings] = []

    def alone(number: int) -> Findings:
        findings = work(number, beat)
        advance(1)
        return findings

    began = time.monotonic()
    while len(done) < count and (min(jobs, count) == 1 or not (values or large or time.monotonic() - began > _PARALLEL_AFTER)):
        done.append(alone(len(done)))
    rest = range(len(done), count)
    jobs = min(jobs, len(rest))
    if jobs == 0:
        return done
    if jobs == 1:
        return done + [alone(number) for number in rest]
    several = _in_threads if values or not platform.may_fork() else _in_processes
    return done + several(work, rest, jobs, advance)


def _never_stops() -> None:
    """The `alive` function of a worker process, which is killed instead."""


class _StoppedError(Exception):
    """The run was stopped."""


def _in_threads(work: Work, numbers: Sequence[int], jobs: int, advance: Advance) -> list[Findings]:
    stop = threading.Event()

    def alive() -> None:
        if stop.is_set():
            raise _StoppedError

    from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait

    with ThreadPoolExecutor(jobs) as pool:
        try:
            futures = [pool.submit(copy_context().run, work, number, alive) for number in numbers]
            unfinished = set(futures)
            while unfinished:
                done, unfinished = wait(unfinished, EVERY, FIRST_COMPLETED)
                for future in done:
                    future.result()  # raises the error of a file's check, if any
                advance(len(done))
            return [future.result() for future in futures]
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _in_processes(work: Work, numbers: Sequence[int], jobs: int, advance: Advance) -> list[Findings]:
    from multiprocessing.connection import wait

    context = platform.forking()
    pending = list(reversed(numbers))
    answers: dict[int, Findings] = {}
    busy: dict[Connection, int] = {}  # the number of the file that each worker checks
    workers: dict[Connection, BaseProcess] = {}

    def start_worker() -> None:
        parent_end, child_end = context.Pipe()
        worker = context.Process(target=_serve, args=(work, child_end, [*workers, parent_end]), daemon=True)
        # A signal right after the fork would raise in the child process, which would then run its callers' handlers.
        try:
            with platform.signals_blocked(HELD):
                worker.start()
                workers[parent_end] = worker
        except OSError:  # no more processes can be started; the others do the work
            parent_end.close()
        finally:
            child_end.close()
        if parent_end in workers:
            send_next(parent_end)

    def send_next(connection: Connection) -> None:
        if pending:
            busy[connection] = pending.pop()
            connection.send_bytes(str(busy[connection]).encode())

    try:
        for _ in range(jobs):
            start_worker()
        while busy:
            beat()
            for connection in [connection for connection in wait(list(busy), EVERY) if connection in busy]:
                number = busy.pop(connection)
                try:
                    answers[number] = tuple(Finding(*row) for row in json.loads(connection.recv_bytes()))
                except (EOFError, OSError):
                    workers[connection].join()
                    if (
                        workers[connection].exitcode or 0
                    ) <= 0:  # a signal killed it; after an internal error the file is checked again here, which raises it
                        answers[number] = (KILLED,)
                    if pending:
                        start_worker()
                else:
                    send_next(connection)
                    advance(1)
    finally:
        with undisturbed():
            for worker in workers.values():
                worker.kill()
            for connection, worker in workers.items():
                worker.join()
                connection.close()
    return [answers[number] if number in answers else work(number, _never_stops) for number in numbers]


def _serve(work: Work, connection: Connection, other_connections: Sequence[Connection]) -> None:
    """The loop of a worker process: receives file numbers and sends findings, until the connection is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process gets it too, and kills the workers
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    platform.unblock_signals(HELD)
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - never closed; hides the traceback of an internal error, which the parent raises again
    for other_connection in other_connections:
        other_connection.close()
    while True:
        try:
            number = int(connection.recv_bytes())
        except EOFError:
            return
        findings = work(number, _never_stops)
        connection.send_bytes(json.dumps([(finding.code, finding.message, finding.key, finding.level) for finding in findings]).encode())
