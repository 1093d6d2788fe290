"""What all tests share: hypothesis' profile, an interrupt that interrupts, and a word on slow tests that are not marked."""

from __future__ import annotations

import contextlib
import signal

import profiles
import pytest

SLOW = 5.0  # seconds, from which on a test is marked `slow`

profiles.load()

# In a background job of a shell SIGINT is ignored, and every program that is started from there would ignore it too.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# transformers shows bars of tqdm, whose monitor is a thread that stays; beside a thread `check` forks no workers.
with contextlib.suppress(ImportError):
    from tqdm import tqdm

    tqdm.monitor_interval = 0


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
