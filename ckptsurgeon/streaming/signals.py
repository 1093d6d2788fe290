"""Delays Ctrl-C and SIGTERM while a few lines run that must not be interrupted; they are handled right after these lines.

Use it only for code that ends soon, since nothing can stop it.
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import FrameType
from typing import Any

HELD = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Run a block whole: a signal that Python would turn into an exception waits until its end."""
    if threading.current_thread() is not threading.main_thread():
        yield  # Python runs handlers in the main thread alone
        return
    came: list[int] = []
    handlers = {number: signal.getsignal(number) for number in HELD}
    with ExitStack() as stack:
        for number, handler in handlers.items():
            if callable(handler):
                stack.callback(_again, came, number, handler)
                stack.callback(signal.signal, number, handler)
                signal.signal(number, lambda found, _frame: came.append(found))
        yield


def _again(came: list[int], number: int, handler: Callable[[int, FrameType | None], Any]) -> None:
    if number in came:
        handler(number, None)
