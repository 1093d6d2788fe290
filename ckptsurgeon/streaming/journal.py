"""The journal of a folder that is being written: which of its files are proven, so that `--resume` can go on with them.

A line of JSON for the work that is done, then one for each proven file, each synced. It lies beside the hidden folder, and is locked for as
long as somebody writes there. A run that resumes checks each file against the plan again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from ckptsurgeon.report import Cast
from ckptsurgeon.storage.copying import write_at

_VERSION = 1
_MOST = 100_000_000  # bytes; a row for each made tensor


@dataclass(frozen=True)
class Proven:
    """A file that was proven: the SHA-256 of each tensor in it that was made rather than copied, and what its casts lost."""

    made: Mapping[str, str] = field(default_factory=dict)
    casts: tuple[Cast, ...] = ()


@dataclass(frozen=True)
class Journal:
    """An open journal. `task` is the digest of what is written, `inode` the hidden folder's own, `rows` the proven files by name."""

    path: str
    fd: int
    task: str
    inode: int
    rows: dict[str, Proven] = field(default_factory=dict)

    def begin(self) -> None:
        """Write the first line over whatever is there."""
        os.ftruncate(self.fd, 0)
        self._append({"version": _VERSION, "task": self.task, "folder": self.inode})

    def add(self, name: str, proven: Proven) -> None:
        """Note a file as proven."""
        self.rows[name] = proven
        self._append({"file": name, "made": dict(proven.made), "casts": [asdict(cast) for cast in proven.casts]})

    def _append(self, row: Mapping[str, Any]) -> None:
        write_at(self.fd, json.dumps(row).encode() + b"\n", os.fstat(self.fd).st_size)
        os.fsync(self.fd)


def read(path: str, fd: int) -> Journal | None:
    """The journal in an open file; None where it is none, or has no first line. A last line that was cut off does not count."""
    size = os.fstat(fd).st_size
    if not 0 < size <= _MOST:
        return None
    with open(path, "rb") as file:
        lines = file.read(size).splitlines(keepends=True)
    rows: dict[str, Proven] = {}
    journal: Journal | None = None
    with suppress(ValueError, KeyError, TypeError, RecursionError):
        first = json.loads(lines[0])
        if first["version"] == _VERSION and isinstance(first["task"], str) and type(first["folder"]) is int:
            journal = Journal(path, fd, first["task"], first["folder"], rows)
        for line in lines[1:]:
            if line.endswith(b"\n"):
                row = json.loads(line)
                rows[row["file"]] = Proven(dict(row["made"]), tuple(_cast(one) for one in row["casts"]))
    return journal


def _cast(row: Mapping[str, Any]) -> Cast:
    kinds = {each.name: type(each.default) if each.default is not each.default_factory else str for each in fields(Cast)}
    if row.keys() != kinds.keys():
        raise ValueError("a cast with other fields")
    return Cast(**row)
