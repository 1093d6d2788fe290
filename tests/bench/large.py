"""Measures `diff` where there is very much to read of: 1 TB over 200 shards (sparse files), and a million tensors on each side.

    python tests/bench/large.py --write    # about 3 minutes, 300 MB of free disk; into RESULTS.md

Whole processes, CPU seconds of the process and its children, median of the runs.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from results import write_section
from run import CLI

HEADING = "## Very large checkpoints"
SHARDS, PER_SHARD, TERABYTE = 200, 7, 10**12


@dataclass(frozen=True)
class Row:
    """One measured command: CPU seconds, peak megabytes, and the bounds of both."""

    name: str
    seconds: float
    megabytes: float
    most_seconds: float
    most_megabytes: float


def write_sparse(path: Path, shapes: dict[str, list[int]]) -> None:
    """A valid safetensors file of float32 matrices that takes no room on the disk."""
    header, end = {}, 0
    for key, shape in shapes.items():
        size = 4 * shape[0] * shape[1]
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + end)


def make_shards(folder: Path) -> None:
    """A folder as transformers writes it, of 1 TB in 200 shards."""
    folder.mkdir()
    rows = TERABYTE // SHARDS // PER_SHARD // 8192 // 4
    weight_map = {}
    for shard in range(SHARDS):
        name = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        shapes = {f"model.layers.{shard}.part{part}.weight": [rows, 8192] for part in range(PER_SHARD)}
        write_sparse(folder / name, shapes)
        weight_map.update(dict.fromkeys(shapes, name))
    index = {"metadata": {"total_size": SHARDS * PER_SHARD * rows * 8192 * 4}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def make_million(path: Path, last: str) -> None:
    """A million small tensors; the keys of every tenth end in `last`."""
    write_sparse(path, {f"layers.{i // 100}.part{i % 100}.{last if i % 10 == 0 else 'weight'}": [2, 2] for i in range(1_000_000)})


def measure(words: list[str], runs: int) -> tuple[float, float]:
    """Median CPU seconds and peak megabytes of a command."""
    samples = []
    for _ in range(runs):
        process = subprocess.Popen([*CLI, *words], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode not in (0, 1):
            raise SystemExit(f"{words} exited with {process.returncode}")
        samples.append((usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024))
    return statistics.median(seconds for seconds, _ in samples), max(megabytes for _, megabytes in samples)


def rows(runs: int) -> Iterator[Row]:
    """The table; the bounds are those that the project has set itself."""
    make_shards(Path("tera"))
    yield Row("diff of 1 TB over 200 shards with itself", *measure(["diff", "tera", "tera"], runs), 1, 100)
    shutil.rmtree("tera")
    make_million(Path("a.safetensors"), "weight")
    make_million(Path("b.safetensors"), "bias")
    yield Row("diff of a million tensors a side with itself", *measure(["diff", "a.safetensors", "a.safetensors"], runs), 30, 2000)
    yield Row("the same, a tenth of the names differ", *measure(["diff", "a.safetensors", "b.safetensors"], runs), 30, 2000)


def table(measured: list[Row]) -> str:
    """The rows as Markdown."""
    lines = ["| what | CPU s | peak MB | bound | kept |", "|---|---|---|---|---|"]
    for row in measured:
        kept = row.seconds <= row.most_seconds and row.megabytes <= row.most_megabytes
        bound = f"≤ {row.most_seconds:g} s, ≤ {row.most_megabytes:,} MB"
        lines.append(f"| {row.name} | {row.seconds:.2f} | {row.megabytes:.0f} | {bound} | {'yes' if kept else 'no'} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write the table into RESULTS.md")
    choices = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ckptsurgeon-bench-"))
    os.chdir(folder)
    try:
        measured = list(rows(choices.runs))
    finally:
        shutil.rmtree(folder)
    words = (
        f"{HEADING}\n\n`python tests/bench/large.py --runs {choices.runs}` gave, Python {platform.python_version()}, "
        f"{os.cpu_count()} cores:\n\n{table(measured)}\n"
    )
    print(words)
    if choices.write:
        write_section(words)


if __name__ == "__main__":
    main()
