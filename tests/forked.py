"""Runs the program many times, each in a process of its own that is forked from one which has imported what it needs.

`python forked.py MODULE …` imports the modules, reads from stdin a JSON object a line (`words folder environment`), and answers each with
a line: exit code, stdout, stderr. What a run imports, what it costs, and what Python's own variables do is tested by a real start.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
MODULES = ("torch", "safetensors.torch", "ckptsurgeon.cli.main")
SECONDS = 300  # for one run: one that hangs is ended by a signal, which its exit code then tells


@dataclass(frozen=True)
class Ended:
    """How a run ended; a negative code is the signal that killed it."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


def program(*words: object, folder: str | Path | None = None, modules: Sequence[str] = MODULES, **environment: str) -> Ended:
    """`python -m ckptsurgeon WORDS` with `folder` as the current one, in a process that has imported `modules` already."""
    asked = [*map(str, words)]
    if sys.platform != "linux":  # elsewhere a process that has imported torch should not be forked
        done = subprocess.run(
            [sys.executable, "-m", "ckptsurgeon", *asked], cwd=folder, env={**os.environ, **environment}, capture_output=True, text=True
        )
        return Ended(done.returncode, done.stdout, done.stderr)
    process = _forker(tuple(modules))
    assert process.stdin is not None and process.stdout is not None
    place = str(Path.cwd() if folder is None else folder)
    process.stdin.write(json.dumps({"words": asked, "folder": place, "environment": {**os.environ, **environment}}) + "\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    assert answer, "the process that forks has ended"
    return Ended(*json.loads(answer))


@cache
def _forker(modules: tuple[str, ...]) -> subprocess.Popen[str]:
    """The process that forks, started once; it ends with this one."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, __file__, *modules]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
    atexit.register(process.__exit__, None, None, None)  # closes its stdin, and waits
    return process


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
    sys.path[:1] = [folder, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
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
    gc.freeze()  # a collection in a child would write to all memory that is shared
    _become(**_serve())
