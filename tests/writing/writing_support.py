"""Helpers of the tests of outputs: small checkpoints whose merge needs no torch, the real program, and the same under strace.

strace counts system calls, sends a signal at a certain one, or lets it fail; where it is not, or may not trace, its tests skip.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from ckptsurgeon.cli import main

PROGRAM = [sys.executable, "-m", "ckptsurgeon"]
TEMPORARY = re.compile(r"\..+\.ckptsurgeon-[0-9a-f]{12}\.tmp")


@dataclass(frozen=True)
class Ended:
    """How a run ended; a negative code is the signal that killed it."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Call:
    """A system call: of which thread, its name, the how manyth of that name in its thread, and strace's whole line."""

    thread: str
    name: str
    number: int
    line: str


def run(folder: Path, *words: object, before: Callable[[], None] | None = None) -> Ended:
    """The real program."""
    done = subprocess.run(
        [*PROGRAM, *map(str, words)], cwd=folder, capture_output=True, text=True, timeout=120, preexec_fn=before, env=environment()
    )
    return Ended(done.returncode, done.stdout, done.stderr)


def inside(patch: pytest.MonkeyPatch, folder: Path, *words: object) -> int:
    """The exit code of the program run in this process, which is quicker."""
    patch.chdir(folder)
    patch.setattr(sys, "argv", ["ckptsurgeon", *map(str, words)])
    return main._run(as_json=False)


def environment() -> dict[str, str]:
    """Without bytecode written, every run makes the same calls."""
    return {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}


@cache
def why_no_strace() -> str | None:
    """Why system calls can't be traced here; None when they can."""
    if shutil.which("strace") is None:
        return "strace is not here"
    seen = subprocess.run(["strace", "-f", "-o", "/dev/null", "-e", "inject=getppid:retval=1", "true"], capture_output=True)
    return None if seen.returncode == 0 else "strace may not trace here"


def strace(log: Path | str, inject: tuple[str, ...] = ()) -> list[str]:
    """The words before a command that trace it; the test is skipped where that can't be."""
    reason = why_no_strace()
    if reason is not None:
        pytest.skip(reason)
    rows = [word for row in inject for word in ("-e", f"inject={row}")]
    return ["strace", "-f", "-s", "64", "-o", str(log), *rows]


def under_strace(folder: Path, *words: object, inject: str | tuple[str, ...] = ()) -> Ended:
    """The real program, its system calls tampered with in strace's own words: `fsync:error=EIO:when=1`."""
    rows = (inject,) if isinstance(inject, str) else inject
    command = [*strace("/dev/null", rows), *PROGRAM, *map(str, words)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, env=environment())
    return Ended(done.returncode, done.stdout, done.stderr)


def calls(folder: Path, *words: object) -> list[Call]:
    """The system calls of an undisturbed run, in their order."""
    log = folder.parent / f"{folder.name}.strace"
    command = [*strace(log), *PROGRAM, *map(str, words)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120, env=environment())
    assert done.returncode == 0, done.stderr
    counts: Counter[tuple[str, str]] = Counter()
    found = []
    for line in log.read_text().splitlines():
        match = re.match(r"(\d+) +(\w+)\(", line)
        if match is not None:
            counts[match[1], match[2]] += 1
            found.append(Call(match[1], match[2], counts[match[1], match[2]], line))
    return found


def writing(found: list[Call]) -> list[Call]:
    """The calls from the making of the temporary file on."""
    start = next(
        place for place, call in enumerate(found) if call.name == "openat" and ".ckptsurgeon-" in call.line and "O_CREAT" in call.line
    )
    return found[start:]


def state(*names: str, seed: int = 0, size: int = 40) -> dict[str, torch.Tensor]:
    """Square tensors of certain names."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(size, size, generator=generator) for name in names}


def setting(folder: Path, size: int = 40) -> Path:
    """A folder with two checkpoints: `a.pt`, and `b.pt` with one key more, so that merging them needs no torch."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(state("first", "second", seed=1, size=size), folder / "a.pt")
    torch.save(state("first", "second", "third", seed=2, size=size), folder / "b.pt")
    return folder


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, hidden ones included."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def one_error(ended: Ended, *words: str, code: int = 2) -> None:
    """One clear message, the exit code, and no traceback."""
    assert ended.code == code, ended
    assert ended.out == "" and "Traceback" not in ended.err, ended
    assert ended.err.startswith("error: ") and ended.err.count("error: ") == 1, ended
    assert all(word in ended.err for word in words), ended


def loaded(path: Path) -> Mapping[str, Any]:
    """The file as torch reads it."""
    found: Mapping[str, Any] = torch.load(path, weights_only=True)
    return found
