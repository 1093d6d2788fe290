"""Runs the program many times, each in a process of its own that is forked from one which has imported what it needs.

`python forked.py MODULE …` imports the modules, reads from stdin a JSON object a line (`words folder environment`), and answers each with
a line: exit code, stdout, stderr. What a run imports, what it costs, and what Python's own variables do is tested by a real start.
"""

from __future__ import annotations

import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 120  # for one run: one that hangs is ended by a signal, which its exit code then tells


@dataclass(frozen=True)
class Ended:
    """How a run ended; a negative code is the signal that killed it."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


class Forker:
    """A process that has imported `modules`, and forks a child of it for each run."""

    def __init__(self, modules: Iterable[str]) -> None:
        command = [sys.executable, __file__, *modules]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}
        )

    def __enter__(self) -> Forker:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        with self._process:  # its stdin is closed, which ends it
            pass

    def run(self, words: Sequence[object], folder: Path, **environment: str) -> Ended:
        """`python -m ckptsurgeon WORDS` with `folder` as the current one."""
        assert self._process.stdin is not None and self._process.stdout is not None
        asked = {"words": [*map(str, words)], "folder": str(folder), "environment": {**os.environ, **environment}}
        self._process.stdin.write(json.dumps(asked) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the process that forks has ended"
        return Ended(*json.loads(answer))


def _serve() -> dict[str, Any]:
    """In the parent, answer until stdin ends; return in each child, with what it was asked for and its streams in place."""
    for line in sys.stdin:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if not child:
                _streams(out, err)
                asked: dict[str, Any] = json.loads(line)
                return asked
            _, status = os.waitpid(child, 0)
            print(json.dumps([os.waitstatus_to_exitcode(status), _written(out), _written(err)]), flush=True)
    sys.exit()


def _streams(out: IO[bytes], err: IO[bytes]) -> None:
    with open(os.devnull) as nothing:
        for number, file in enumerate((nothing, out, err)):
            os.dup2(file.fileno(), number)


def _written(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode()


def _become(words: Sequence[str], folder: str, environment: dict[str, str]) -> None:
    """In the child: `python -m ckptsurgeon`, up to the taking down of the interpreter, which would write to all memory that is shared."""
    signal.alarm(SECONDS)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[0] = folder
    sys.argv = ["ckptsurgeon", *words]
    code: object = 99
    try:
        runpy.run_module("ckptsurgeon", run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as exit:
        code = exit.code or 0
    except BaseException:  # noqa: BLE001 - a person's code may raise any
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 1)


if __name__ == "__main__":
    for module in sys.argv[1:]:
        with suppress(ModuleNotFoundError):
            importlib.import_module(module)
    _become(**_serve())
