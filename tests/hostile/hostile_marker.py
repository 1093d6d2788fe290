"""What a payload calls: it makes a marker file, and stands for os.system. Only Python's own unpickler imports it, as a test of payloads."""

from __future__ import annotations

import copyreg
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

EXTENSIONS = {240: "mark", 241: "mark241", 242: "mark242"}


def mark(path: str) -> str:
    """What a payload calls; stands for os.system."""
    Path(path).write_text("ran")
    return "ran"


class Marker:
    """A class whose construction, state or items run something."""

    path: str

    def __new__(cls, path: str = "", **more: str) -> Marker:
        for each in (path, *more.values()):
            if each:
                mark(each)
        return super().__new__(cls)

    def __setstate__(self, state: str) -> None:
        mark(state)

    def append(self, item: str) -> None:
        mark(item)

    def __setitem__(self, key: str, value: str) -> None:
        mark(value)


mark241 = mark242 = mark


@contextmanager
def extensions() -> Iterator[None]:
    """The codes by which EXT1, EXT2 and EXT4 reach `mark`, for the time of a test."""
    for code, name in EXTENSIONS.items():
        copyreg.add_extension(__name__, name, code)
    yield
    for code, name in EXTENSIONS.items():
        copyreg.remove_extension(__name__, name, code)
