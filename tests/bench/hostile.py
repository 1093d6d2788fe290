"""What becomes of hostile files, by the real program in processes of its own, and what they cost, written to RESULTS.md.

python tests/bench/hostile.py            # two tables, in about ten minutes
python tests/bench/hostile.py --write    # and into RESULTS.md

Seconds are the processor's, the start of Python included (which the first row tells); memory is the kernel's figure (`ru_maxrss`).
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from results import write_section
from tabulate import tabulate

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "hostile"))

import make  # noqa: E402
from hostile_costs import BOUND, COMMANDS, COSTS, PAIRS, Cost, cost, write  # noqa: E402

Row = tuple[str, ...]


def families() -> Iterator[Row]:
    """For each family of the stories: how reading ends, what `check` says, and the worst that one `inspect` took."""
    names: dict[str, list[str]] = {}
    for row in make.stories():
        names.setdefault(row[0].partition("/")[0], []).append(row[0])
    with tempfile.TemporaryDirectory() as folder:
        for family, members in names.items():
            paths = []
            for name in members:
                place = Path(folder) / make.slug(name)
                place.mkdir()
                paths.append(str(make.make(name, place)))
            costs = [cost(["inspect", path]) for path in paths]
            command = [sys.executable, "-m", "ckptsurgeon", "check", "--json", *paths]
            done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
            told: Counter[str] = Counter()
            for file in json.loads(done.stdout)["files"]:
                told.update({finding["code"] for finding in file["findings"] if finding["level"] == "error"} or {"good"})
            read = sum(found.code == 0 for found in costs)
            ends = f"{read} read, {sum(found.code == 2 for found in costs)} refused"
            assert read + sum(found.code == 2 for found in costs) == len(members), family
            yield family, str(len(members)), ends, ", ".join(f"{code} {count}" for code, count in sorted(told.items())), *_figures(costs)
        if Path(folder, make.MARKER).exists() or Path(make.MARKER).exists():
            raise SystemExit("a payload ran")


def costly() -> Iterator[Row]:
    """For each kind of costly megabyte: how many, and the worst of all commands; two megabytes where a source meets a target."""
    kinds: dict[str, list[str]] = {}
    for name in COSTS:
        kinds.setdefault(name.partition(":")[0], []).append(name)
    with tempfile.TemporaryDirectory() as folder:
        yield "(nothing there)", "1", "inspect", *_figures([cost(["inspect", f"{folder}/nothing"])]), ""
        for kind, names in kinds.items():
            found = []
            for number, name in enumerate(names):
                place = Path(folder) / f"{kind}-{number}"
                place.mkdir()
                path = str(write(name, place))
                for label, words in COMMANDS.items():
                    found.append((f"{name.partition(': ')[2]} ({label})", cost([word.replace("FILE", path) for word in words])))
            yield _worst(kind, len(names), found)
        found = []
        for name, makers in PAIRS.items():
            paths = [Path(folder) / part for part in ("source", "target")]
            for path, maker in zip(paths, makers, strict=True):
                path.write_bytes(maker())
            found.append((name, cost(["diff", *map(str, paths)])))
        yield _worst("diff of two", len(PAIRS), found)


def _worst(kind: str, count: int, found: Sequence[tuple[str, Cost]]) -> Row:
    slowest = max(found, key=lambda row: row[1].seconds)
    costs = [one for _, one in found]
    kept = all(one.seconds <= BOUND.seconds and one.megabytes <= BOUND.megabytes for one in costs)
    return kind, str(count), slowest[0], *_figures(costs), "yes" if kept else "**no**"


def _figures(costs: Sequence[Cost]) -> tuple[str, str]:
    return f"{max(one.seconds for one in costs):.2f}", f"{max(one.megabytes for one in costs):.0f}"


def main() -> int:
    """Make every file, measure, and show."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help="write the tables into RESULTS.md")
    arguments = parser.parse_args()
    told = tabulate(
        list(families()),
        ("family", "files", "inspect", "check says, in how many files", "worst s", "worst MB"),
        tablefmt="github",
        disable_numparse=True,
    )
    bound = f"≤ {BOUND.seconds:g} s, ≤ {BOUND.megabytes:g} MB"
    cost_table = tabulate(
        list(costly()), ("kind", "files", "the slowest", "worst s", "worst MB", bound), tablefmt="github", disable_numparse=True
    )
    text = (
        "\n## Hostile files\n\n`python tests/bench/hostile.py --write`; the story of each file stands in `tests/hostile/stories.tsv`. "
        f"No payload ran.\n\n{told}\n\n"
        f"Files of up to one megabyte that are made to cost much (`tests/hostile/hostile_costs.py`), by {', '.join(COMMANDS)}:\n\n"
        f"{cost_table}\n\n"
        "Seconds are the processor's, of whole processes; the machine is shared, and the first row tells what Python's start took.\n"
    )
    print(text)
    if arguments.write:
        write_section(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
