"""What all tests share: hypothesis' profile, one thread for torch, an interrupt that interrupts, a word on slow tests without the mark."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import profiles
import pytest

SLOW = 5.0  # seconds, from which on a test is marked `slow`

profiles.load()

# The tensors of tests are small: torch's threads would only wait for each other, most of all beside another worker of pytest. And with one
# thread the same sum has the same bits twice.
os.environ["OMP_NUM_THREADS"] = "1"

# In a background job of a shell SIGINT is ignored, and every program that is started from there would ignore it too.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# transformers shows bars of tqdm, whose monitor is a thread that stays; beside a thread `check` forks no workers.
with contextlib.suppress(ImportError):
    from tqdm import tqdm

    tqdm.monitor_interval = 0


@pytest.fixture(scope="session")
def xfs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder on a new XFS file system, where files can share blocks; the test is skipped where none can be made."""
    make = shutil.which("mkfs.xfs", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if make is None or not hasattr(os, "geteuid") or os.geteuid() != 0:
        pytest.skip("needs mkfs.xfs, and root to mount a file system")
    home = tmp_path_factory.mktemp("xfs")
    image, folder = home / "image", home / "mounted"
    folder.mkdir()
    with open(image, "wb") as file:
        file.truncate(320 << 20)  # the least that mkfs.xfs takes is 300 MB; nearly all of it is a hole
    for command in ([make, "-q", "-m", "reflink=1", str(image)], ["mount", "-o", "loop", str(image), str(folder)]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no XFS here: {done.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)
    image.unlink()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """With `--durations`: the tests that took longer than `SLOW` seconds and are not marked so."""
    if config.getoption("durations") is None:
        return
    seconds: dict[str, float] = {}
    for report in (report for reports in terminalreporter.stats.values() for report in reports):
        if isinstance(report, pytest.TestReport) and "slow" not in report.keywords:
            seconds[report.nodeid] = seconds.get(report.nodeid, 0.0) + report.duration
    rows = sorted(((spent, name) for name, spent in seconds.items() if spent > SLOW), reverse=True)
    if rows:
        terminalreporter.section(f"over {SLOW:.0f} s and not marked slow")
        for spent, name in rows:
            terminalreporter.write_line(f"{spent:6.1f}s  {name}")
