"""Measures the promises about speed and memory as whole processes, and writes them to RESULTS.md as ratios of one run.

    python tests/bench/run.py              # about 15 minutes, 16 GB of free disk
    python tests/bench/run.py --gigabytes 0.2 --runs 3 --no-write

Each row runs a command and its yardstick in turn (A B A B …) after one warm-up of both, and quotes medians, the ratio pair by pair. Peak
memory is the kernel's own figure for the process (`ru_maxrss` of `wait4`).
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from results import write_section

Command = Sequence[str]
CLI = [sys.executable, "-m", "ckptsurgeon"]
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # an installed program has its bytecode; without, each run would compile all of it


@dataclass(frozen=True)
class Sample:
    """One run of a process: wall seconds and peak memory in MB."""

    seconds: float
    megabytes: float


@dataclass(frozen=True)
class Row:
    """A command beside its yardstick: medians, and the bound that it should keep in words and as a yes or no."""

    name: str
    yardstick: str
    ours: Sample
    theirs: Sample
    ratio: float
    bound: str
    kept: bool


def run(command: Command, clean: Callable[[], None]) -> Sample:
    clean()
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    error = process.stderr.read().decode() if process.stderr else ""
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} exited with {process.returncode}: {error}")
    return Sample(seconds, usage.ru_maxrss / 1024)


def median(samples: Sequence[Sample]) -> Sample:
    return Sample(statistics.median(s.seconds for s in samples), statistics.median(s.megabytes for s in samples))


def pair(
    ours: Command, theirs: Command, runs: int, outputs: Sequence[Path] = (), cold: Sequence[Path] = ()
) -> tuple[Sample, Sample, float]:
    def clean() -> None:
        for path in outputs:
            path.unlink(missing_ok=True)
        if outputs:
            os.sync()  # nobody pays for what the run before wrote
        for path in cold:  # what is read must come from the disk
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    mine, yours = [], []
    for number in range(runs + 1):
        one, other = run(ours, clean), run(theirs, clean)
        if number:
            mine.append(one)
            yours.append(other)
    clean()
    return median(mine), median(yours), statistics.median(a.seconds / b.seconds for a, b in zip(mine, yours, strict=True))


# --- what is measured on ------------------------------------------------------------------------------------------------------------

MODEL = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

class Net(nn.Module):
    def __init__(self, width={width}, depth=32):
        super().__init__()
        self.embed = nn.Embedding(8000, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

if __name__ == "__main__":
    with torch.device("meta"):
        Net()
"""

MAKE = """
import sys, torch
from safetensors.torch import save_file
from bench_model import Net
torch.manual_seed(0)
state = Net().state_dict()
torch.save(state, "a.pt")
for name in ("b.pt", "c.pt"):
    torch.save({key: value + 1 for key, value in state.items()}, name)
save_file(state, "a.safetensors", metadata={"format": "pt"})
"""

MANY = """
import torch
from safetensors.torch import save_file
state = {f"layers.{i // 10}.part{i % 10}.weight": torch.zeros(4) for i in range(100_000)}
torch.save(state, "many.pt")
save_file(state, "many.safetensors")
"""

TEN = """
import os, torch
os.mkdir("gate")
for number in range(10):
    torch.save({f"layers.{i // 10}.part{i % 10}.weight": torch.zeros(4) for i in range(300)}, f"gate/{number}.pt")
"""

COPY = """
import os, sys
source, output = os.open(sys.argv[1], os.O_RDONLY), os.open(sys.argv[2], os.O_RDWR | os.O_CREAT | os.O_TRUNC)
size, done = os.fstat(source).st_size, 0
while done < size:
    done += os.copy_file_range(source, output, size - done, done, done)
os.fsync(output)
"""

TORCH = "import sys, torch; torch.save(torch.load(sys.argv[1], weights_only=True), sys.argv[2])"
TORCH_MMAP = "import sys, torch; torch.save(torch.load(sys.argv[1], weights_only=True, mmap=True), sys.argv[2])"
SAFETENSORS = """
import sys
from safetensors.torch import load_file, save_file
save_file(load_file(sys.argv[1]), sys.argv[2], metadata={"format": "pt"})
"""


AVERAGE = """
import sys, torch
loaded = [torch.load(path, weights_only=True) for path in sys.argv[1:]]
soup = {key: sum(state[key] for state in loaded) / len(loaded) for key in loaded[0]}
"""


def python(code: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", code, *arguments]


def sparse_terabyte(path: Path) -> None:
    """A valid safetensors file of 1 TB that takes no room on the disk."""
    import json

    count, each = 400, (1 << 40) // 400 // 4096 * 4096
    header = {f"layers.{i}.weight": {"dtype": "U8", "shape": [each], "data_offsets": [i * each, (i + 1) * each]} for i in range(count)}
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        file.truncate(8 + len(raw) + count * each)


def prepare(gigabytes: float) -> None:
    # 32 blocks of 12 * width**2 floats and an embedding: about gigabytes * 1e9 bytes in about 390 tensors.
    width = max(64, round((gigabytes * 1e9 / 4 / (32 * 12)) ** 0.5) // 64 * 64)
    Path("bench_model.py").write_text(MODEL.replace("{width}", str(width)))
    for code in (MAKE, MANY):
        subprocess.run(python(code), check=True)
    sparse_terabyte(Path("tera.safetensors"))
    rename = ["--rename", "layers.{i}.{**rest}", "blocks.{i}.{**rest}"]
    subprocess.run([*CLI, "merge", "a.pt", "-o", "target.safetensors", *rename, "--no-verify"], check=True, stdout=subprocess.DEVNULL)


# --- the rows -----------------------------------------------------------------------------------------------------------------------


def reading(runs: int) -> list[Row]:
    rows = []
    importing = python("import torch")
    for name, words, megabytes, share in (
        ("inspect a.pt", ["inspect", "a.pt"], 40, 0.25),
        ("inspect a.safetensors", ["inspect", "a.safetensors"], 40, 0.25),
        ("diff a.pt target.safetensors", ["diff", "a.pt", "target.safetensors"], 40, 0.25),
        ("inspect, sparse 1 TB", ["inspect", "tera.safetensors"], 40, 0.25),
        ("diff, sparse 1 TB with itself", ["diff", "tera.safetensors", "tera.safetensors"], 40, 0.25),
    ):
        ours, theirs, ratio = pair([*CLI, *words], importing, runs)
        kept = ratio <= share and ours.megabytes <= megabytes
        rows.append(Row(name, "import torch", ours, theirs, ratio, f"≤ {share} ×, ≤ {megabytes} MB", kept))
    for name, seconds in (("many.safetensors", 2), ("many.pt", 5)):
        ours, theirs, ratio = pair([*CLI, "inspect", name], importing, runs)
        kept = ours.seconds <= seconds and ours.megabytes <= 300
        rows.append(Row(f"inspect {name}, 100,000 tensors", "import torch", ours, theirs, ratio, f"≤ {seconds} s, ≤ 300 MB", kept))
    building = python("import runpy; runpy.run_path('bench_model.py', run_name='__main__')")
    ours, theirs, ratio = pair([*CLI, "diff", "a.pt", "bench_model:Net"], building, runs)
    kept = ours.seconds - theirs.seconds <= 0.3
    rows.append(Row("diff a.pt bench_model:Net", "import torch, build on meta", ours, theirs, ratio, "≤ + 0.3 s", kept))
    return rows


def gate(runs: int) -> list[Row]:
    """What a commit waits for: ten files of 300 tensors against a skeleton; and many, one at a time and on every core."""
    subprocess.run(python(TEN), check=True)
    subprocess.run([*CLI, "skeleton", "gate/0.pt", "-o", "gate.json"], check=True, stdout=subprocess.DEVNULL)
    ours, theirs, ratio = pair([*CLI, "check", "gate", "--against", "gate.json"], python("import torch"), runs)
    kept = ratio <= 0.5 and ours.seconds <= 1 and ours.megabytes <= 60
    rows = [Row("check, ten files, --against a skeleton", "import torch", ours, theirs, ratio, "≤ 0.5 ×, ≤ 1 s, ≤ 60 MB", kept)]
    many = [*CLI, "check", *["gate"] * 20]
    ours, theirs, ratio = pair(many, [*many, "--jobs", "1"], runs)
    return [*rows, Row("check, two hundred files", "the same, --jobs 1", ours, theirs, ratio, "for comparison", True)]


def merging(runs: int) -> list[Row]:
    rows = []
    rename = ["--rename", "layers.{i}.{**rest}", "blocks.{i}.{**rest}"]
    for source in ("a.pt", "a.safetensors"):
        for output in ("out.pt", "out.safetensors"):
            for proof in (False, True):
                words = ["merge", source, "target.safetensors", "-o", output, *rename, *([] if proof else ["--no-verify"])]
                copying = python(COPY, source, "copy.bin")
                ours, theirs, ratio = pair([*CLI, *words], copying, runs, [Path(output), Path("copy.bin")])
                times = (1.8 if output.endswith(".pt") else 2.2) if proof else 1.3
                kept = ours.seconds <= times * theirs.seconds + 0.3 and ours.megabytes <= 64
                name = f"merge {source} → {output}" + (", proven" if proof else ", --no-verify")
                rows.append(Row(name, "copy_file_range, fsync", ours, theirs, ratio, f"≤ {times} × + 0.3 s, ≤ 64 MB", kept))
    copying = python(COPY, "a.pt", "copy.bin")
    for name, command, output in (
        ("torch.load + torch.save", python(TORCH, "a.pt", "out.pt"), "out.pt"),
        ("the same, mmap=True", python(TORCH_MMAP, "a.pt", "out.pt"), "out.pt"),
        ("load_file + save_file", python(SAFETENSORS, "a.safetensors", "out.safetensors"), "out.safetensors"),
    ):
        ours, theirs, ratio = pair(command, copying, runs, [Path(output), Path("copy.bin")])
        rows.append(Row(f"({name}, not synced)", "copy_file_range, fsync", ours, theirs, ratio, "for comparison", True))
    return rows


def surgery(runs: int) -> list[Row]:
    rows = []
    split = ["--adapt", "layers.{i}.attn.{p} -> layers.{i}.q.{p} + layers.{i}.k.{p} + layers.{i}.v.{p}", "chunk"]
    for proof in (False, True):
        words = ["merge", "a.pt", "-o", "out.safetensors", *split, *([] if proof else ["--no-verify"])]
        ours, theirs, ratio = pair([*CLI, *words], python(COPY, "a.pt", "copy.bin"), runs, [Path("out.safetensors"), Path("copy.bin")])
        times = 2.2 if proof else 1.3
        kept = ours.seconds <= times * theirs.seconds + 0.3 and ours.megabytes <= 64
        name = f"merge, attn split to q, k, v{', proven' if proof else ', --no-verify'}"
        rows.append(Row(name, "copy_file_range, fsync", ours, theirs, ratio, f"≤ {times} × + 0.3 s, ≤ 64 MB", kept))
    largest = largest_tensor()
    turn = ["--adapt", "layers.*.fc*.weight", "transpose"]
    ours, theirs, ratio = pair([*CLI, "merge", "a.pt", "-o", "out.pt", *turn], python(TORCH, "a.pt", "copy.bin"), runs, [Path("out.pt")])
    most = 220 + 2 * largest
    kept = ours.megabytes <= most
    rows.append(Row("merge, fc weights transposed, proven", "torch.load + torch.save", ours, theirs, ratio, f"≤ {most:.0f} MB", kept))
    for proof in (False, True):
        words = ["merge", "a.pt", "b.pt", "c.pt", "-o", "out.safetensors", "--average", *([] if proof else ["--no-verify"])]
        ours, theirs, ratio = pair([*CLI, *words], python(AVERAGE, "a.pt", "b.pt", "c.pt"), runs, [Path("out.safetensors")])
        kept = ours.megabytes <= most and (proof or ratio <= 1.5)
        bound = f"≤ {most:.0f} MB" if proof else f"≤ 1.5 ×, ≤ {most:.0f} MB"
        name = f"average of three{', proven' if proof else ', --no-verify'}"
        rows.append(Row(name, "torch: load three, sum (nothing written)", ours, theirs, ratio, bound, kept))
    return rows


def largest_tensor() -> float:
    """In MB."""
    from ckptsurgeon import open as read

    return max(tensor.nbytes for tensor in read("a.pt").values()) / 1e6


def table(rows: Sequence[Row]) -> str:
    lines = ["| command | seconds | MB | yardstick | seconds | ratio | bound | kept |", "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        figures = f"{row.ours.seconds:.2f} | {row.ours.megabytes:.0f} | {row.yardstick} | {row.theirs.seconds:.2f} | {row.ratio:.2f}"
        lines.append(f"| {row.name} | {figures} | {row.bound} | {'yes' if row.kept else '**no**'} |")
    return "\n".join(lines)


PARTS = {"reading": reading, "gate": gate, "merging": merging, "surgery": surgery}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.5)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--parts", nargs="+", default=list(PARTS), help="which rows; others than all are not written")
    parser.add_argument("--no-write", action="store_true")
    choices = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ckptsurgeon-bench-"))
    os.environ["PYTHONPATH"] = str(folder)
    os.chdir(folder)
    try:
        prepare(choices.gigabytes)
        size = os.path.getsize("a.pt") / 1e9
        rows = [row for name in choices.parts for row in PARTS[name](choices.runs)]
    finally:
        shutil.rmtree(folder)
    words = (
        f"# Speed and memory\n\n`python tests/bench/run.py --gigabytes {choices.gigabytes} --runs {choices.runs}` gave, on a checkpoint of "
        f"{size:.2f} GB in the page cache, Python {platform.python_version()}, {os.cpu_count()} cores:\n\n{table(rows)}\n\n"
        "Medians of whole processes; each command ran in turn with its yardstick, and the ratio is the median of the pairs. The machine is "
        "shared and noisy: read ratios, not seconds. `merge` syncs file and folder before it says done; the libraries in brackets do not.\n"
    )
    print(words)
    if not choices.no_write and len(choices.parts) == len(PARTS):
        write_section(words)


if __name__ == "__main__":
    main()
