"""Scores matching on a folder of pairs with verified mappings, and writes the table to RESULTS.md.

    python tests/bench/match.py FOLDER...            # a table
    python tests/bench/match.py FOLDER --write       # and into RESULTS.md

A pair is complete when each of its tensors is right and certain. `wrong` counts tensors that are wrong and not marked uncertain, targets
without a counterpart that got one included.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from pathlib import Path

from tabulate import tabulate

from ckptsurgeon.matching.matcher import match

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "matching"))

from pairs_support import Score, read_pair, score  # noqa: E402

HEADERS = ("pair", "tensors", "right", "wrong", "doubted", "uncertain", "missed", "seconds", "complete")
_SECTION = re.compile(r"\n## Matching\n.*?(?=\n#+ |\Z)", re.DOTALL)


def main() -> int:
    """Score every pair of the folders."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--write", action="store_true", help="write the table into RESULTS.md")
    arguments = parser.parse_args()
    rows, scores = [], []
    for path in sorted(path for folder in arguments.folders for path in folder.glob("*.json")):
        pair = read_pair(path)
        began = time.perf_counter()
        found = match(pair.source, pair.target)
        seconds = time.perf_counter() - began
        result = score(found, pair)
        scores.append(result)
        rows.append((pair.name, len(pair.truth), *_counts(result), f"{seconds:.2f}", "yes" if result.complete else "no"))
    if not rows:
        print("no pairs there", file=sys.stderr)
        return 2
    text = f"{tabulate(rows, HEADERS, tablefmt='github')}\n\n{_summary(scores)}\n"
    print(text)
    if arguments.write:
        results = HERE / "RESULTS.md"
        what = f"for a folder of {len(rows)} pairs of published implementations"
        head = f"\n## Matching\n\n`python tests/bench/match.py FOLDER --write`, {what}\n\n"
        results.write_text(_SECTION.sub("", results.read_text()).rstrip("\n") + "\n" + head + text)
    return 0


def _counts(result: Score) -> tuple[int, int, int, int, int]:
    return result.right, result.wrong, result.doubted, result.uncertain, result.missed


def _summary(scores: list[Score]) -> str:
    complete, clean = sum(one.complete for one in scores), sum(not one.wrong for one in scores)
    right, wrong, doubted, uncertain, missed = (sum(counts) for counts in zip(*map(_counts, scores), strict=True))
    return (
        f"{complete} of {len(scores)} pairs complete, {clean} without a wrong tensor; "
        f"{right} tensors right, {wrong} wrong, {doubted} in doubt for their layout, {uncertain} uncertain, {missed} missed."
    )


if __name__ == "__main__":
    sys.exit(main())
