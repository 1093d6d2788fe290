"""A folder with the fixtures in it, and two ways to run the program there: in this process, and as a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import forked
import pytest
from cli_support import PROGRAM, ROOT
from forked import Ended

from ckptsurgeon.cli import main

Run = Callable[..., Ended]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder for the time of a test: a copy of the fixtures."""
    for path in (ROOT / "fixtures").iterdir():
        if path.is_file():
            shutil.copy(path, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command line in this process (torch is imported once): all of `main` but the exit."""

    def call(*words: object) -> Ended:
        monkeypatch.setattr(sys, "argv", ["ckptsurgeon", *map(str, words)])
        capfd.readouterr()
        code = main._run("--json" in sys.argv)
        return Ended(code, *capfd.readouterr())

    return call


@pytest.fixture
def program(place: Path) -> Run:
    """Run a command line as a process of its own, its standard streams captured; with options of `subprocess.run`, one that starts anew."""

    def call(*words: object, **options: Any) -> Ended:
        if not options:
            return forked.program(*words)
        done = subprocess.run([*PROGRAM, *map(str, words)], capture_output=True, text=True, timeout=120, **options)
        return Ended(done.returncode, done.stdout, done.stderr)

    return call


@pytest.fixture
def files(place: Path) -> Callable[[], dict[str, bytes | None]]:
    """What stands in the folder, byte for byte, the bytecode of imported modules aside."""

    def look() -> dict[str, bytes | None]:
        found: dict[str, bytes | None] = {}
        for folder, folders, names in os.walk(place):
            folders[:] = [name for name in folders if name != "__pycache__"]
            for name in names:
                path = Path(folder, name)
                found[str(path.relative_to(place))] = path.read_bytes() if path.is_file() else None
        return found

    return look
