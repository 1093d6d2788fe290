"""Progress on one line of a terminal's stderr: `writing 1.4 GB of 2.8 GB, 160 MB/s, 9 s left`."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable
from math import ceil
from time import monotonic

from ckptsurgeon.progress import Progress
from ckptsurgeon.sizes import rounded

DELAY = 1.0  # seconds before the first line
SAMPLES = 32  # of the latest events, over which the speed is measured: about three seconds


class ProgressLine:
    """Passes a line for each event to `write`, once the command has run for longer than `DELAY`."""

    def __init__(self, write: Callable[[str], None]) -> None:
        self._write = write
        self._began = self._phase_began = monotonic()
        self._phase = ""
        self._latest: deque[tuple[float, int]] = deque(maxlen=SAMPLES)

    def show(self, event: Progress) -> None:
        """Show an event in place of the one before."""
        now = monotonic()
        if event.phase != self._phase or (self._latest and event.done < self._latest[-1][1]):
            self._phase, self._phase_began = event.phase, now
            self._latest.clear()
        self._latest.append((now, event.done))
        if now - self._began >= DELAY:
            self._write(self._words(event, now)[: _columns() - 1])

    def _words(self, event: Progress, now: float) -> str:
        words, (then, before) = str(event), self._latest[0]
        speed = (event.done - before) / (now - then) if now > then else 0.0
        if not event.done or event.total is None or speed <= 0:
            elapsed = now - self._phase_began
            return f"{words}, {duration(elapsed)}" if elapsed >= 1 else words
        left = (event.total - event.done) / speed
        rate = f", {rounded(speed)}/s" if event.unit == "bytes" else ""
        return f"{words}{rate}, {duration(left)} left"


def duration(seconds: float) -> str:
    """Seconds as a person reads them, rounded up.

    >>> duration(8.4), duration(125), duration(3 * 3600 + 120)
    ('9 s', '2 min 5 s', '3 h 2 min')
    """
    minutes, whole = divmod(ceil(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {whole} s" if minutes else f"{whole} s"


def _columns() -> int:
    try:
        return os.get_terminal_size(sys.stderr.fileno()).columns or 80
    except (OSError, ValueError):
        return 80
