"""What a command costs where there is next to nothing to do: whole processes, by the processor's time, as a share of `import torch`.

    python tests/bench/start.py            # prints a table
    python tests/bench/start.py --write    # and puts it into RESULTS.md

Each round runs every command and `import torch` one after another, so that what else the machine does bears on all of them alike; a
share is the median of the rounds' shares. A first round, which writes bytecode, does not count.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import torch
from results import write_section
from tabulate import tabulate

PROGRAM = [sys.executable, "-m", "ckptsurgeon"]
YARDSTICK = [sys.executable, "-c", "import torch"]
# What is run, its command line, and the most that it may take, as a share.
RUNS: dict[str, tuple[list[str], float | None]] = {
    "python -c pass": ([sys.executable, "-c", "pass"], None),
    "python -c 'import click'": ([sys.executable, "-c", "import click"], None),
    "--version": ([*PROGRAM, "--version"], 0.05),
    "--help": ([*PROGRAM, "--help"], 0.055),
    "inspect a.pt": ([*PROGRAM, "inspect", "a.pt"], 0.09),
    "inspect a.safetensors": ([*PROGRAM, "inspect", "a.safetensors"], 0.09),
    "diff a.pt b.pt": ([*PROGRAM, "diff", "a.pt", "b.pt"], None),
    "check a.pt": ([*PROGRAM, "check", "a.pt"], None),
    "merge a.pt b.pt -o out.pt": ([*PROGRAM, "merge", "a.pt", "b.pt", "-o", "out.pt", "--overwrite"], None),
}


def seconds(command: list[str], folder: Path) -> float:
    """The processor's time that one process took, its own and the system's."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return usage.ru_utime + usage.ru_stime


def measure(rounds: int, folder: Path) -> tuple[float, dict[str, tuple[float, float]]]:
    """Seconds of `import torch`, and by run its seconds and its share, each the median."""
    state = {f"layers.{number}.weight": torch.zeros(4, 4) for number in range(6)}
    for name in ("a.pt", "b.pt"):
        torch.save(state, folder / name)
    subprocess.run([*PROGRAM, "merge", "a.pt", "-o", "a.safetensors"], cwd=folder, check=True, capture_output=True)
    yardstick: list[float] = []
    found: dict[str, list[float]] = {name: [] for name in RUNS}
    for number in range(rounds + 1):
        taken = {name: seconds(command, folder) for name, (command, _) in RUNS.items()}
        whole = seconds(YARDSTICK, folder)
        if number:
            yardstick.append(whole)
            for name, one in taken.items():
                found[name].append(one)
    shares = {name: median(one / whole for one, whole in zip(times, yardstick, strict=True)) for name, times in found.items()}
    return median(yardstick), {name: (median(times), shares[name]) for name, times in found.items()}


def main() -> int:
    """Measure, and show."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--write", action="store_true", help="write the table into RESULTS.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        whole, found = measure(arguments.rounds, Path(folder))
    rows = []
    for name, (_, bound) in RUNS.items():
        taken, share = found[name]
        kept = "" if bound is None else "yes" if share <= bound else "**no**"
        rows.append((name, f"{taken * 1000:.0f}", f"{share:.3f}", "" if bound is None else f"≤ {bound:g}", kept))
    table = tabulate(rows, ("run", "ms", "share", "bound", "kept"), tablefmt="github", disable_numparse=True)
    version = sys.version.split()[0]
    text = (
        f"\n## Start\n\n`python tests/bench/start.py --rounds {arguments.rounds} --write`: whole processes on files of six small tensors, "
        f"by the processor's time, as a share of `import torch` ({whole * 1000:.0f} ms), Python {version}, torch {torch.__version__}:\n\n"
        f"{table}\n"
    )
    print(text)
    if arguments.write:
        write_section(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
