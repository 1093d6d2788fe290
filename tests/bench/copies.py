"""Compares ways to copy a file with a bare `copy_file_range` + fsync, pair by pair; what they gave stands in RESULTS.md.

python tests/bench/copies.py FOLDER --megabytes 300 --rounds 11                 # all ways, warm, on the folder's file system
python tests/bench/copies.py FOLDER --cold --ways willneed sequential threads
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import threading
import time
from collections.abc import Callable
from pathlib import Path

MB = 1 << 20
Way = Callable[[int, int, int], None]  # gets the source's descriptor, the output's, and the size


def kernel(source: int, output: int, offset: int, nbytes: int, step: int = 64 * MB) -> None:
    end = offset + nbytes
    while offset < end:
        offset += os.copy_file_range(source, output, min(step, end - offset), offset, offset)


def bare(source: int, output: int, size: int) -> None:
    kernel(source, output, 0, size)


def short_calls(source: int, output: int, size: int) -> None:
    kernel(source, output, 0, size, 16 * MB)


def together(works: list[Callable[[], None]]) -> None:
    threads = [threading.Thread(target=work) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def halves(source: int, output: int, size: int) -> None:
    half = size // 2
    together([lambda: kernel(source, output, 0, half), lambda: kernel(source, output, half, size - half)])


def threads(source: int, output: int, size: int) -> None:
    def work(first: int) -> None:
        for offset in range(first, size, 32 * MB):
            kernel(source, output, offset, min(16 * MB, size - offset))

    together([lambda: work(0), lambda: work(16 * MB)])


def sequential(source: int, output: int, size: int) -> None:
    os.posix_fadvise(source, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    bare(source, output, size)


def willneed(source: int, output: int, size: int) -> None:
    for offset in range(0, size, 16 * MB):
        os.posix_fadvise(source, offset, 64 * MB, os.POSIX_FADV_WILLNEED)
        kernel(source, output, offset, min(16 * MB, size - offset))


def dontneed(source: int, output: int, size: int) -> None:
    for offset in range(0, size, 64 * MB):
        kernel(source, output, offset, min(64 * MB, size - offset))
        os.posix_fadvise(output, offset, 64 * MB, os.POSIX_FADV_DONTNEED)


def early_sync(source: int, output: int, size: int) -> None:
    stop = threading.Event()

    def sync() -> None:
        while not stop.wait(0.03):
            os.fdatasync(output)

    def copy() -> None:
        bare(source, output, size)
        stop.set()

    together([sync, copy])


def in_steps(source: int, output: int, size: int, step: int) -> None:
    """A sync beside the copy whenever `step` bytes more are written and the last one has ended, as a merge does it."""
    running: threading.Thread | None = None
    unsynced = 0
    for offset in range(0, size, 64 * MB):
        nbytes = min(64 * MB, size - offset)
        kernel(source, output, offset, nbytes)
        unsynced += nbytes
        if unsynced >= step and not (running is not None and running.is_alive()):
            unsynced, running = 0, threading.Thread(target=os.fsync, args=(output,))
            running.start()
    if running is not None:
        running.join()


def sync_64(source: int, output: int, size: int) -> None:
    in_steps(source, output, size, 64 * MB)


def sync_256(source: int, output: int, size: int) -> None:
    in_steps(source, output, size, 256 * MB)


def allocated(source: int, output: int, size: int) -> None:
    os.posix_fallocate(output, 0, size)
    bare(source, output, size)


def buffered(source: int, output: int, size: int) -> None:
    buffer = memoryview(bytearray(MB))
    for offset in range(0, size, MB):
        got = os.preadv(source, [buffer[: min(MB, size - offset)]], offset)
        os.pwrite(output, buffer[:got], offset)


WAYS: dict[str, Way] = {
    way.__name__: way
    for way in (
        short_calls,
        halves,
        threads,
        sequential,
        willneed,
        dontneed,
        early_sync,
        sync_64,
        sync_256,
        allocated,
        buffered,
    )
}


def processor_time() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def once(way: Way, path: Path, cold: bool) -> tuple[float, float]:
    """Wall seconds and the processor's seconds of one copy, synced."""
    output = path.with_suffix(".out")
    source, target, size = os.open(path, os.O_RDONLY), os.open(output, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600), path.stat().st_size
    if cold:
        os.posix_fadvise(source, 0, 0, os.POSIX_FADV_DONTNEED)
    began, used = time.perf_counter(), processor_time()
    way(source, target, size)
    os.fsync(target)
    result = time.perf_counter() - began, processor_time() - used
    os.close(source)
    os.close(target)
    output.unlink()
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--megabytes", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--cold", action="store_true", help="the source is dropped from the page cache before each copy")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    choices = parser.parse_args()
    path = choices.folder / "copies.in"
    with path.open("wb") as file:
        for _ in range(choices.megabytes):
            file.write(os.urandom(MB))
        os.fsync(file.fileno())
    try:
        for name in choices.ways:
            walls, processor = [], []
            for number in range(choices.rounds):
                order = [bare, WAYS[name]] if number % 2 else [WAYS[name], bare]
                took = {way: once(way, path, choices.cold) for way in order}
                walls.append(took[WAYS[name]][0] / took[bare][0])
                processor.append(took[WAYS[name]][1] / took[bare][1])
            least, most = min(walls), max(walls)
            figures = f"wall x {statistics.median(walls):.2f} ({least:.2f} to {most:.2f}), processor x {statistics.median(processor):.2f}"
            print(f"{name:12} {figures}", flush=True)
    finally:
        path.unlink()


if __name__ == "__main__":
    main()
