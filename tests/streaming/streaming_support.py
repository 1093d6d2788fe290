"""Helpers of the tests of the floor where bytes move."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def opened(path: Path, flags: int = os.O_RDWR | os.O_CREAT) -> Iterator[int]:
    """An open file's descriptor."""
    fd = os.open(path, flags, 0o666)
    try:
        yield fd
    finally:
        os.close(fd)


def names(folder: Path) -> list[str]:
    """What is in a folder, hidden files included."""
    return sorted(os.listdir(folder))
