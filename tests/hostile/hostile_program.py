"""Runs many command lines of the program, each in a process of its own that is forked from one which has imported it already.

`python hostile_program.py` reads JSON from stdin, a list of lists of words, and answers with how each ended: exit code, stdout, stderr.
It must not be used to measure: the processes share what was imported.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

ROOT = Path(__file__).parents[2]
SECONDS = 60  # for one command: one that hangs is ended by a signal, which its exit code then tells


@dataclass(frozen=True)
class Ended:
    """How a command line ended."""

    code: int
    out: str
    err: str


def run_all(lines: Sequence[Sequence[str]], folder: Path) -> list[Ended]:
    """Run command lines with `folder` as the current folder."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}
    command = [sys.executable, __file__]
    done = subprocess.run(command, input=json.dumps(lines), capture_output=True, text=True, cwd=folder, env=environment, timeout=600)
    if done.returncode:
        raise AssertionError(done.stderr[-3000:])
    return [Ended(*row) for row in json.loads(done.stdout)]


def _run(words: list[str], out: BinaryIO, err: BinaryIO) -> None:
    """In the child: the whole program, its exit included."""
    from ckptsurgeon.cli.main import main

    os.dup2(out.fileno(), 1)
    os.dup2(err.fileno(), 2)
    signal.alarm(SECONDS)
    sys.argv = ["ckptsurgeon", *words]
    main()


def _import_all() -> None:
    """All that the commands import, so that each child need not."""
    for floor in ("adapters", "rules", "formats", "planning", "views"):
        for found in pkgutil.walk_packages([str(ROOT / "ckptsurgeon" / floor)], f"ckptsurgeon.{floor}."):
            importlib.import_module(found.name)
    for name in (
        "api.looking",
        "api.comparing",
        "api.verifying",
        *(f"cli.commands.{name}" for name in ("check", "diff", "inspect", "verify")),
    ):
        importlib.import_module(f"ckptsurgeon.{name}")
    assert "torch" not in sys.modules


def _ended(words: list[str]) -> tuple[int, str, str]:
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = os.fork()
        if not child:
            try:
                _run(words, out, err)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                exception = sys.exc_info()[1]
                os._exit(exception.code if isinstance(exception, SystemExit) and isinstance(exception.code, int) else 99)
        _, status = os.waitpid(child, 0)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read().decode())
        return os.waitstatus_to_exitcode(status), texts[0], texts[1]


if __name__ == "__main__":
    _import_all()
    json.dump([_ended(words) for words in json.load(sys.stdin)], sys.stdout)
