"""Measures how fast bytes of the page cache come into a model's memory, in several ways, and nothing else: what a transfer can't be below.

    python tests/bench/into_memory.py --tensors 60
    GLIBC_TUNABLES=glibc.cpu.x86_non_temporal_threshold=0x40000 python tests/bench/into_memory.py --tensors 60   # memcpy past the caches

Each way fills the same tensors from one file; seconds are medians of rounds in turn. As root, `chrt -r 1` before it keeps others away.
"""

from __future__ import annotations

import argparse
import ctypes
import mmap
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import torch
from tabulate import tabulate

THREADS = 2


def ways(path: str, tensors: list[torch.Tensor]) -> dict[str, Callable[[], object]]:
    """By name, what fills the tensors with a file's bytes, one behind the other."""
    file, size = os.open(path, os.O_RDONLY), tensors[0].nbytes
    views = [memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B") for tensor in tensors]
    libc = ctypes.CDLL(None)
    libc.memcpy.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t]

    def shared_out(work: Callable[[int], object]) -> None:
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(work, range(len(tensors))))

    def by_torch() -> None:
        stored = torch.UntypedStorage.from_file(path, False, size * len(tensors))
        for number, tensor in enumerate(tensors):
            tensor.copy_(torch.tensor([], dtype=tensor.dtype).set_(stored, number * tensor.numel(), (tensor.numel(),)))

    def by_memcpy() -> None:
        with mmap.mmap(file, 0, flags=mmap.MAP_PRIVATE) as mapped:
            start = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
            shared_out(lambda number: libc.memcpy(tensors[number].data_ptr(), start + number * size, size))

    return {
        f"preadv, {THREADS} threads": lambda: shared_out(lambda number: os.preadv(file, [views[number]], number * size)),
        "preadv, one thread": lambda: [os.preadv(file, [view], number * size) for number, view in enumerate(views)],
        "mapped, torch's copy_": by_torch,
        f"mapped, memcpy, {THREADS} threads": by_memcpy,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.2)
    parser.add_argument("--tensors", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=9)
    choices = parser.parse_args()
    tensors = [torch.zeros(int(choices.gigabytes * 1e9) // 4 // choices.tensors) for _ in range(choices.tensors)]
    with tempfile.NamedTemporaryFile() as file:
        for tensor in tensors:
            file.write(torch.rand(tensor.shape).numpy().data)
        file.flush()
        found: dict[str, list[float]] = {}
        for _ in range(choices.rounds):
            for name, work in ways(file.name, tensors).items():
                began = time.perf_counter()
                work()
                found.setdefault(name, []).append(time.perf_counter() - began)
    print(tabulate([(name, f"{median(seconds):.4f}") for name, seconds in found.items()], ("way", "s"), tablefmt="github"))


if __name__ == "__main__":
    main()
