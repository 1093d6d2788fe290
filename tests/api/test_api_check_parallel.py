"""Several files at a time: the same findings in the same order however many work, in processes or threads; nobody takes the others down."""

from __future__ import annotations

import json
from pathlib import Path

import api_support as support
import pytest
import torch

import ckptsurgeon as cs
from ckptsurgeon.api.checking import workers
from ckptsurgeon.errors import CheckpointError
from ckptsurgeon.report import Finding


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifteen files, a third good, a third with other shapes, a third of other bytes."""
    home = tmp_path_factory.mktemp("many")
    for number in range(15):
        path = home / f"{number:02}.pt"
        if number % 3 < 2:
            torch.save({f"w{number}": torch.ones(2 + number % 3), "nan": torch.tensor(float("nan"))}, path)
        else:
            path.write_bytes(b"\xff" * number)
    return home


# A program without torch, so that it may fork. It tells how it worked by Python's own audit events.
WORK = """
import json, sys, threading
forks = []
sys.addaudithook(lambda event, _: forks.append(event) if event == "os.fork" else None)
import ckptsurgeon as cs
from ckptsurgeon.api.checking import workers
workers._PARALLEL_AFTER = 0.0 if {help} else 1e9
with cs.limits({limits}):
    report = cs.check(sys.argv[1:], jobs={jobs}, max_size="1kB"{more})
rows = [[file.path, [[one.code, one.key, one.message] for one in file.findings]] for file in report.files]
print(json.dumps([len(forks), "torch" in sys.modules, rows]))
"""


def checked(folder: Path, jobs: int, *, help: bool = True, limits: str = "", more: str = "", first: str = "") -> tuple[int, bool, object]:
    code = first + WORK.format(jobs=jobs, help=help, limits=limits, more=more)
    done = support.python(code, *sorted(folder.iterdir(), reverse=True), folder=folder)
    assert done.returncode == 0 and not done.stderr, done.stderr
    forks, heavy, rows = json.loads(done.stdout)
    return forks, heavy, rows


def test_processes_and_threads_find_what_one_finds(folder: Path) -> None:
    forks, _, alone = checked(folder, 1)
    assert forks == 0 and [Path(row[0]).stem for row in alone] == [f"{number:02}" for number in reversed(range(15))]  # type: ignore[attr-defined]
    forks, _, one_after_another = checked(folder, 3, help=False)
    assert forks == 0 and one_after_another == alone  # soon done: no help is called
    forks, heavy, in_processes = checked(folder, 3)
    assert forks == 3 and not heavy and in_processes == alone
    threads = "import threading\nthreading.Thread(target=threading.Event().wait, daemon=True).start()\n"
    forks, heavy, in_threads = checked(folder, 3, first=threads)  # a second thread: a fork would not be sound
    assert forks == 0 and not heavy and in_threads == alone


def test_values_are_looked_at_in_threads(folder: Path) -> None:
    report = cs.check(sorted(folder.iterdir(), reverse=True), jobs=1, max_size="1kB", finite=True)
    alone = [[file.path, [[one.code, one.key, one.message] for one in file.findings]] for file in report.files]
    forks, heavy, in_threads = checked(folder, 4, more=", finite=True")
    assert forks == 0 and heavy and in_threads == alone and "CK401" in json.dumps(alone)


@pytest.mark.parametrize("first", ["", "import torch\n"], ids=["processes", "threads"])
def test_limits_hold_in_every_worker(first: str, folder: Path) -> None:
    forks, _, rows = checked(folder, 3, limits="tensors=1", first=first)
    assert (forks == 0) is bool(first)
    assert json.dumps(rows).count("CK103") == 10


KILLED = """
import os, signal, sys
from ckptsurgeon.api.checking import workers
from ckptsurgeon.report import Finding
def work(number, alive):
    if number in {dead}:
        os.kill(os.getpid(), signal.SIGKILL)
    return (Finding("CK102", str(number)),)
workers._PARALLEL_AFTER = 0
found = workers.in_order(work, 8, {jobs}, values=False, large=True)
print(*(one.code if one.code == "CK100" else one.message for each in found for one in each))
"""


@pytest.mark.parametrize("jobs", [2, 3, 8])
@pytest.mark.parametrize("dead", [{3}, {0, 1, 2}, set(range(8))])
def test_a_worker_that_is_killed_costs_its_own_file_alone(jobs: int, dead: set[int], tmp_path: Path) -> None:
    """As the kernel does when memory runs out."""
    done = support.python(KILLED.format(dead=dead, jobs=jobs), folder=tmp_path)
    assert done.stdout.split() == ["CK100" if number in dead else str(number) for number in range(8)], done.stderr


@pytest.mark.parametrize("allowed", [0, 1])
def test_where_no_more_processes_may_be_made(allowed: int, tmp_path: Path) -> None:
    refuse = f"""
import errno, os
fork, left = os.fork, [None] * {allowed}
def few():
    if not left:
        raise BlockingIOError(errno.EAGAIN, "no more processes")
    left.pop()
    return fork()
os.fork = few
"""
    done = support.python(refuse + KILLED.format(dead="{2}" if allowed else "()", jobs=3), folder=tmp_path)
    assert done.stdout.split() == ["CK100" if number == 2 and allowed else str(number) for number in range(8)], done.stderr


def test_memory_that_does_not_suffice_is_a_finding(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(_path: str) -> object:
        raise MemoryError

    monkeypatch.setattr("ckptsurgeon.api._opening.read", short)
    report = cs.check([folder / "00.pt", folder / "01.pt"])
    assert [[one.code for one in file.findings] for file in report.files] == [["CK100"], ["CK100"]]


def test_an_error_that_is_none_of_a_file_ends_all_in_threads(folder: Path) -> None:
    """A defect of ours is not hidden, and the others stop at their next buffer."""
    stopped = []

    def work(number: int, alive: object) -> tuple[Finding, ...]:
        if number == 0:
            raise ZeroDivisionError
        try:
            while True:
                alive()  # type: ignore[operator]
        except Exception:
            stopped.append(number)
            raise

    with pytest.raises(ZeroDivisionError):
        workers.in_order(work, 3, 3, values=True, large=True)
    assert set(stopped) <= {1, 2}


def test_as_many_as_there_are_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(3)), raising=False)
    assert workers.default_jobs() == 3
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert workers.default_jobs() == workers.MOST_JOBS
    with pytest.raises(CheckpointError):
        cs.check("a.pt", jobs=-1)
