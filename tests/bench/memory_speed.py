"""Measures what reads values beside torch: NaN checks, casts and statistics beside `torch.isfinite`, and `transfer` beside torch's load.

    python tests/bench/memory_speed.py            # prints two tables
    python tests/bench/memory_speed.py --write    # and puts them into RESULTS.md
    python tests/bench/memory_speed.py --first    # as root on Linux: transfers run before all other processes, as if there were none

One process, files in the page cache. Each function runs in turn with its yardstick; a ratio is the median of the pairs. Values are
measured by the processor's time, with one thread of torch's; transfers by the clock. Ours also read the file; `isfinite` has its bytes in
memory. It has no kernel for 8-bit floats, which are made float32 for it.
"""

from __future__ import annotations

import argparse
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from statistics import median

import torch
from results import write_section
from safetensors.torch import load_file, save_file
from tabulate import tabulate
from torch import nn

import ckptsurgeon as cs
from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.report import Cast
from ckptsurgeon.streaming import in_threads, statistics
from ckptsurgeon.streaming.reading import Reader
from ckptsurgeon.streaming.values import cast, count_non_finite
from ckptsurgeon.tensors import Checkpoint

CASTS = {"F32": ("BF16", "F16", "F8_E4M3", "F64"), "BF16": ("F32", "F16"), "F16": ("F32", "BF16"), "F64": ("F32",), "F8_E4M3": ("BF16",)}
LEAST, MOST = 0.7, 0.9  # of isfinite's speed, and of the time of torch's load
Work = Callable[[], object]


@contextmanager
def first(wanted: bool) -> Iterator[None]:
    """While the block runs, this process's threads come before those of other processes; a few seconds, as nothing else gets a turn."""

    def schedule(policy: int, priority: int) -> None:
        for thread in os.listdir("/proc/self/task"):
            os.sched_setscheduler(int(thread), policy, os.sched_param(priority))

    if not wanted:
        yield
        return
    schedule(os.SCHED_RR, 1)
    try:
        yield
    finally:
        schedule(os.SCHED_OTHER, 0)


def pairs(ours: Sequence[Work], theirs: Work, runs: int, clock: Callable[[], float], alone: bool = False) -> list[tuple[float, float]]:
    """The median seconds of each of `ours`, and the median of its quotient by the yardstick that ran before it."""

    def seconds(work: Work) -> float:
        began = clock()
        work()
        return clock() - began

    found: list[list[tuple[float, float]]] = [[] for _ in ours]
    for number in range(runs + 1):
        for work, times in zip(ours, found, strict=True):
            with first(alone):
                yardstick, own = seconds(theirs), seconds(work)
            if number:
                times.append((own, own / yardstick))
    return [(median(own for own, _ in times), median(ratio for _, ratio in times)) for times in found]


def checked(source: Checkpoint) -> None:
    with Reader([source]) as reader:
        for tensor in source.values():
            assert count_non_finite(reader.parts(tensor), tensor.dtype) == 0


def converted(source: Checkpoint, target: str) -> None:
    casts = list[Cast]()
    with Reader([source]) as reader:
        for tensor in source.values():
            for _ in cast(tensor.name, reader.parts(tensor), tensor.dtype, target, casts):
                pass


def measured(source: Checkpoint) -> None:
    assert len(statistics.of_file(source, source)) == len(source)


def values(megabytes: float, runs: int, path: str) -> list[list[str]]:
    """The rows of what reads values, for each dtype."""
    torch.set_num_threads(1)
    rows = []
    for code, targets in CASTS.items():
        dtype: torch.dtype = getattr(torch, BY_CODE[code].torch)
        state = {f"{i}.weight": torch.randn(int(megabytes * 1e6 / 8 / BY_CODE[code].size) // 1000, 1000).to(dtype) for i in range(8)}
        save_file(state, path)
        source = cs.open(path)

        def finite(tensors: Sequence[torch.Tensor] = tuple(state.values())) -> None:
            assert all(bool(torch.isfinite(tensor if tensor.element_size() > 1 else tensor.float()).all()) for tensor in tensors)

        works = {"NaN and infinity": partial(checked, source)}
        works |= {f"cast to {target}": partial(converted, source, target) for target in targets}
        works["statistics"] = partial(measured, source)
        for name, (own, ratio) in zip(works, pairs(list(works.values()), finite, runs, time.process_time), strict=True):
            speed = source.nbytes / own / 1e9
            rows.append([code, name, f"{speed:.2f}", f"{1 / ratio:.2f}", f"≥ {LEAST}", "yes" if 1 / ratio >= LEAST else "**no**"])
            print(*rows[-1], sep="  ", flush=True)
    return rows


class Block(nn.Module):
    """A transformer's block, without a forward."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.attn, self.proj = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)


def transfers(gigabytes: float, runs: int, folder: Path, alone: bool) -> list[list[str]]:
    """The rows of loading into a model that exists."""
    torch.set_num_threads(os.cpu_count() or 1)
    rows = []
    for layers in (32, 6):
        width = int((gigabytes * 1e9 / 4 / 12 / layers) ** 0.5) // 32 * 32
        model = nn.ModuleList(Block(width) for _ in range(layers))
        pt, plain = folder / "a.pt", folder / "a.safetensors"
        torch.save(model.state_dict(), pt)
        save_file(model.state_dict(), plain)
        works: dict[str, Work] = {
            "transfer, torch zip": partial(cs.transfer, pt, model),
            "transfer, safetensors": partial(cs.transfer, plain, model),
            "load_file + load_state_dict": lambda model=model, plain=plain: model.load_state_dict(load_file(plain)),
        }

        def theirs(model: nn.Module = model, pt: Path = pt) -> None:
            model.load_state_dict(torch.load(pt, mmap=True, weights_only=True))

        for name, (own, ratio) in zip(works, pairs(list(works.values()), theirs, runs, time.perf_counter, alone), strict=True):
            bound, kept = (f"≤ {MOST}", "yes" if ratio <= MOST else "**no**") if name.startswith("transfer") else ("for comparison", "")
            size = f"{pt.stat().st_size / 1e9:.2f} GB, {len(model.state_dict())}"
            rows.append([size, name, f"{own:.2f}", f"{ratio:.2f}", bound, kept])
            print(*rows[-1], sep="  ", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.2, help="of a file that is transferred")
    parser.add_argument("--megabytes", type=float, default=128, help="of each dtype's values")
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("--first", action="store_true", help="run transfers before all other processes")
    parser.add_argument("--write", action="store_true", help="write the tables into RESULTS.md")
    choices = parser.parse_args()
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="ckptsurgeon-bench-") as folder:
        read = values(choices.megabytes, choices.runs, f"{folder}/values.safetensors")
        loaded = transfers(choices.gigabytes, choices.runs, Path(folder), choices.first)
    tables = [
        tabulate(rows, heads, tablefmt="github", disable_numparse=True)
        for rows, heads in (
            (read, ("values", "work", "GB/s", "of isfinite's speed", "bound", "kept")),
            (loaded, ("file, tensors", "work", "s", "of torch.load's time", "bound", "kept")),
        )
    ]
    options = f"--gigabytes {choices.gigabytes:g} --megabytes {choices.megabytes:g} --runs {choices.runs}{' --first' * choices.first}"
    text = (
        f"\n## Values at memory speed\n\n`python tests/bench/memory_speed.py {options} --write`, files in the page cache, Python "
        f"{platform.python_version()}, torch {torch.__version__}, {os.cpu_count()} cores, load {load:.1f} at the start. By the processor's "
        f"time, one thread, beside `torch.isfinite(t).all()` on the same bytes in memory (8-bit floats made float32 for it):\n\n{tables[0]}"
        f"\n\nBy the clock{', before all other processes' * choices.first}, into a model on the CPU, beside `torch.load(mmap=True)` + "
        f"`load_state_dict`; threads read tensors of {in_threads.SMALL >> 20} MiB or more:\n\n{tables[1]}\n"
    )
    print(text)
    if choices.write:
        write_section(text)


if __name__ == "__main__":
    main()
