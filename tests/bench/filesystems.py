"""Measures merges that only rename on new file systems of several kinds: seconds beside a bare copy, bytes written, memory.

    python tests/bench/filesystems.py                     # as root, some 10 minutes, 6 GB of free disk and of memory
    python tests/bench/filesystems.py --write             # and puts the table into RESULTS.md
    python tests/bench/filesystems.py --gigabytes 0.2 --runs 1 --kinds xfs
    python tests/bench/filesystems.py --cold --write      # the same with sources that are not in the page cache: a section of its own

A file system is a loop mount of a sparse file (a tmpfs needs none), made for this and removed after it; one that can't be made is a row
with the reason. What was written is what `statvfs` says is used after a sync, less what was used before. torch is not imported here:
`ru_maxrss` of a process begins with the memory of the one that started it.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from results import write_section
from run import CLI, Sample, pair, python, run
from tabulate import tabulate

MAKE = """
import sys, torch
from safetensors.torch import save_file

def state(rows, layers):
    made = {}
    for i in range(layers):
        made[f"layers.{i}.weight"] = torch.randn(rows, 1023)  # no multiple of 4096 bytes
        made[f"layers.{i}.bias"] = torch.randn(1023)
        made[f"layers.{i}.scale"] = torch.randn(())
        made[f"layers.{i}.half"] = torch.randn(100_003).bfloat16()
        made[f"layers.{i}.mask"] = torch.ones(7 + i, dtype=torch.uint8)
    return made

torch.manual_seed(0)
for name, made in (("a", state(int(float(sys.argv[1]) * 1e9 / 4 / 1023 / 48), 48)), ("small", {"layers.0.weight": torch.randn(15, 17)})):
    torch.save(made, f"{name}.pt")
    save_file(made, f"{name}.safetensors", metadata={"format": "pt"})
"""
COPY = """
import os, subprocess, sys
subprocess.run(["cp", "--reflink=never", *sys.argv[1:]], check=True)
os.fsync(os.open(sys.argv[2], os.O_RDWR))
"""
RENAME = ["--rename", "layers.{i}.{**rest}", "blocks.{i}.{**rest}"]
MKFS = {"ext4": ["mkfs.ext4", "-q", "-F"], "xfs": ["mkfs.xfs", "-q", "-f"], "tmpfs": []}
TASKS = [(source, output) for output in ("safetensors", "pt") for source in ("safetensors", "pt")]
TIMES = {("safetensors", False): 1.3, ("safetensors", True): 2.2, ("pt", False): 1.3, ("pt", True): 1.8}  # of a bare copy, + 0.3 s
LEAST, MORE = 0.1, 0.3  # where the file system shares: of the bytes, and seconds more than for a file of 1 KB
HEADS = ("file system", "merge", "s", "copy, s", "ratio", "written", "beyond, s", "MB", "bound", "kept")


class Skipped(Exception):
    """A file system that can't be made here; the reason."""


@dataclass(frozen=True)
class Row:
    """A merge on a file system: beside a bare copy, its share of the bytes written, and seconds more than for a file of 1 KB."""

    kind: str
    task: str
    ours: Sample
    copy: Sample
    ratio: float
    written: float
    more: float
    bound: str
    kept: bool

    def cells(self) -> list[str]:
        """As the table shows it."""
        numbers = f"{self.ours.seconds:.2f}", f"{self.copy.seconds:.2f}", f"{self.ratio:.2f}", f"{self.written:.4f}", f"{self.more:+.2f}"
        return [self.kind, self.task, *numbers, f"{self.ours.megabytes:.0f}", self.bound, "yes" if self.kept else "**no**"]


def command(words: Sequence[str]) -> None:
    """Run a program; Skipped with its own words where it fails or is not installed."""
    try:
        done = subprocess.run(words, capture_output=True, text=True)
    except OSError as error:
        raise Skipped(f"{words[0]}: {error.strerror}") from error
    if done.returncode:
        raise Skipped(f"{words[0]}: {done.stderr.strip() or done.returncode}")


@contextmanager
def mounted(kind: str, folder: Path, nbytes: int) -> Iterator[Path]:
    """A new file system with room for `nbytes`, mounted while the block runs."""
    if os.name != "posix" or os.geteuid():
        raise Skipped("mounting takes root")
    place, image = folder / kind, folder / f"{kind}.image"
    place.mkdir()
    with ExitStack() as stack:
        what = ["-t", "tmpfs", "-o", f"size={nbytes}", "tmpfs"]
        if MKFS[kind]:
            stack.callback(image.unlink)
            with image.open("wb") as file:
                file.truncate(nbytes)
            command([*MKFS[kind], str(image)])
            what = ["-o", "loop", str(image)]
        command(["mount", *what, str(place)])
        stack.callback(subprocess.run, ["umount", str(place)], check=True)
        stack.callback(os.chdir, folder)
        os.chdir(place)
        yield place


def used() -> int:
    """The bytes that are used of the current folder's file system, all of them written."""
    last, now = -1, -2
    while last != now:  # XFS frees what a removed file had a moment later
        subprocess.run(["sync", "-f", "."], check=True)
        time.sleep(0.2)
        status = os.statvfs(".")
        last, now = now, (status.f_blocks - status.f_bfree) * status.f_frsize
    return now


def written(merge: Sequence[str], output: Path) -> int:
    """How many more bytes are used after a merge."""
    before = used()
    run(merge, lambda: None)
    more = used() - before
    output.unlink()
    return more


def rows(kind: str, sources: Path, runs: int, image: Path | None) -> Iterator[Row]:
    """The rows of the file system that the current folder is on; where its `image` is given, the page cache forgets it and the source."""
    for path in sources.iterdir():
        shutil.copyfile(path, path.name)
    shares = subprocess.run(["cp", "--reflink=always", "small.pt", "shared"], capture_output=True).returncode == 0
    for source, output in TASKS:
        for proof in (False, True):
            options = ["-o", f"out.{output}", *RENAME, *([] if proof else ["--no-verify"])]
            merge = [*CLI, "merge", f"a.{source}", *options]
            out, copy = Path(f"out.{output}"), Path("copy.bin")
            cold = [] if image is None else [Path(f"a.{source}"), image]
            ours, theirs, ratio = pair(merge, python(COPY, f"a.{source}", copy.name), runs, [out, copy], cold)
            small = [run([*CLI, "merge", f"small.{source}", *options], lambda out=out: out.unlink(missing_ok=True)) for _ in range(runs)]
            out.unlink()
            share = written(merge, out) / os.path.getsize(f"a.{source}")
            more = ours.seconds - statistics.median(sample.seconds for sample in small)
            times = TIMES[output, proof]
            bound, kept = f"≤ {times} × + 0.3 s", ours.seconds <= times * theirs.seconds + 0.3
            if shares and source == output and not proof:
                bound, kept = f"≤ {LEAST} of the bytes, ≤ + {MORE} s", share <= LEAST and more <= MORE
            task = f"{source} → {output}, {'proven' if proof else '--no-verify'}"
            yield Row(kind, task, ours, theirs, ratio, share, more, bound, kept and ours.megabytes <= 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--kinds", nargs="+", default=list(MKFS), choices=list(MKFS))
    parser.add_argument("--cold", action="store_true", help="the sources are not in the page cache; not for tmpfs, which lies there")
    parser.add_argument("--write", action="store_true", help="write the table into RESULTS.md")
    choices = parser.parse_args()
    folder, found = Path(tempfile.mkdtemp(prefix="ckptsurgeon-bench-")), list[list[str]]()
    load = os.getloadavg()[0]
    try:
        sources = folder / "sources"
        sources.mkdir()
        subprocess.run(python(MAKE, str(choices.gigabytes)), cwd=sources, check=True)
        size = os.path.getsize(sources / "a.pt")
        for kind in choices.kinds:
            if choices.cold and not MKFS[kind]:
                continue
            try:
                with mounted(kind, folder, 5 * size + (1 << 30)):  # two sources, an output, its temporary file and a copy
                    for row in rows(kind, sources, choices.runs, folder / f"{kind}.image" if choices.cold else None):
                        found.append(row.cells())
                        print(*found[-1], sep="  ", flush=True)
            except Skipped as reason:
                found.append([kind, f"skipped: {reason}"])
    finally:
        shutil.rmtree(folder)
    table = tabulate([row + [""] * (len(HEADS) - len(row)) for row in found], HEADS, tablefmt="github", disable_numparse=True)
    heading, cold = (", nothing in the page cache", " --cold") if choices.cold else ("", "")
    text = (
        f"\n## File systems{heading}\n\n`python tests/bench/filesystems.py --gigabytes {choices.gigabytes:g} --runs {choices.runs}{cold} "
        "--write`: merges "
        f"that rename every key, of {size / 1e9:.2f} GB in 240 tensors, small and odd-sized ones among them, on new file systems (loop "
        f"mounts). The copy is `cp --reflink=never`, synced. Linux {platform.release().partition('-')[0]}, Python "
        f"{platform.python_version()}, torch {version('torch')}, {os.cpu_count()} cores, load {load:.1f} at the start:\n\n{table}\n\n"
        "Written: what `statvfs` says is used after a sync, less what was used before, as a share of the source. Beyond: seconds more than "
        "the same merge of a file of 1 KB takes. Every row is also held to 64 MB.\n"
    )
    print(text)
    if choices.write:
        write_section(text)


if __name__ == "__main__":
    main()
