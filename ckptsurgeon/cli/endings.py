"""What ended a run, as one error that a person can read: a row for each kind of exception, and for all others a request to report it.

The only place that knows what a missing library or a failed allocation looks like. Nothing here prints.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import click

from ckptsurgeon.errors import CheckpointError, InternalError, MissingError, OutputError, no_memory, out_of_memory

_PACKAGE = str(Path(__file__).parents[1])
_DISTRIBUTIONS = ("torch", "safetensors", "tabulate", "click")  # what the package depends on, each by the name that is imported
_LONGEST = 300

debug = click.option("--debug", is_flag=True, expose_value=False, help="Show the traceback of what ends the run.")


def with_traceback() -> bool:
    """Whether the traceback is asked for: by `--debug`, or by CKPTSURGEON_DEBUG in the environment."""
    return "--debug" in sys.argv or bool(os.environ.get("CKPTSURGEON_DEBUG"))


def told(error: BaseException) -> CheckpointError:
    """What ended the run, as an error of ours; one of ours as it is."""
    if isinstance(error, CheckpointError):
        return error
    if no_memory(error):
        return out_of_memory(error)
    if isinstance(error, ImportError) and (name := _library(error)) is not None:
        return _missing(name, error)
    if isinstance(error, OSError):
        return OutputError(error.strerror or str(error), path=error.filename)
    return _unforeseen(error)


def _library(error: ImportError) -> str | None:
    """Which library is meant: one that we depend on, or torch, which alone has others to import, where it is not loaded now."""
    name = (error.name or "").partition(".")[0]
    if name in _DISTRIBUTIONS:
        return name
    return "torch" if name != "ckptsurgeon" and sys.modules.get("torch") is None else None


def _missing(name: str, error: ImportError) -> CheckpointError:
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == name and sys.modules.get(name) is None:
        return MissingError(f"this needs {name}, which is not installed here", hint=f"pip install {name}")
    return MissingError(f"this needs {name}, which can't be loaded here: {_line(error)}", hint=f"python -c 'import {name}' shows why")


def _unforeseen(error: BaseException) -> CheckpointError:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(_PACKAGE + os.sep)]
    place = f", at {os.path.relpath(frames[-1].filename, os.path.dirname(_PACKAGE))}:{frames[-1].lineno}" if frames else ""
    words = f"{type(error).__name__}{f': {line}' if (line := _line(error)) else ''}"
    return InternalError(f"this is an error in ckptsurgeon itself, please report it to its authors ({words}{place})")


def _line(error: BaseException) -> str:
    words = " ".join(str(error).split())
    return words if len(words) <= _LONGEST else f"{words[:_LONGEST]}…"
