"""A hostile megabyte never costs more than 200 MB of memory, and never more than seconds of the processor, whichever way it tries."""

from __future__ import annotations

from pathlib import Path

import pytest
from hostile_costs import BOUND, COMMANDS, COSTS, PAIRS, cost, write
from hostile_pickles import BOMBS

pytestmark = pytest.mark.slow  # with its like

# Memory is bounded exactly. The 2 s are promised for a quiet machine, and bench/hostile.py measures them; this finds a power of the size.
SECONDS = 10
MEGABYTE = 1 << 20
NAMES = sorted(name for name in COSTS if name.removeprefix("pickle: ") not in BOMBS)  # those have a test of their own


# `diff` reads it twice, and shows all of it; what `inspect` makes of all of them takes half a minute.
@pytest.mark.parametrize("label", ["diff -v --json", "inspect -v"])
@pytest.mark.parametrize("name", NAMES)
def test_a_megabyte_costs_little(name: str, label: str, tmp_path: Path) -> None:
    path = write(name, tmp_path)
    assert path.stat().st_size <= MEGABYTE
    found = cost([word.replace("FILE", str(path)) for word in COMMANDS[label]])
    assert found.code in (0, 2)
    assert found.megabytes < BOUND.megabytes
    assert found.seconds < SECONDS


@pytest.mark.parametrize("name", PAIRS)
def test_two_megabytes_held_against_each_other_cost_little(name: str, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(PAIRS[name][0]())
    target.write_bytes(PAIRS[name][1]())
    found = cost(["diff", str(source), str(target)])
    assert found.code in (0, 2) and found.megabytes < BOUND.megabytes and found.seconds < 2 * SECONDS


def test_the_measure_itself(tmp_path: Path) -> None:
    """It sees what a process takes: one that refuses at once takes little, and not what the tests' own process has."""
    found = cost(["inspect", str(tmp_path / "nothing")])
    assert found.code == 2 and 0 < found.seconds < SECONDS and 10 < found.megabytes < 60
