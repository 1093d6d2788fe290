"""What ended a run, as one error that a person can read: a row for each kind of exception, and for all others a request to report it.

What a missing library or a failed allocation looks like, `errors` knows. Nothing here prints.
"""

from __future__ import annotations

import os
import sys
import traceback
from pathlib import Path

import click

from ckptsurgeon.errors import CheckpointError, InternalError, OutputError, missing_library, no_memory, one_line, out_of_memory

_PACKAGE = str(Path(__file__).parents[1])

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
    if isinstance(error, ImportError) and (missing := missing_library(error)) is not None:
        return missing
    if isinstance(error, OSError):
        return OutputError(error.strerror or str(error), path=error.filename)
    return _unforeseen(error)


def _unforeseen(error: BaseException) -> CheckpointError:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(_PACKAGE + os.sep)]
    place = f", at {os.path.relpath(frames[-1].filename, os.path.dirname(_PACKAGE))}:{frames[-1].lineno}" if frames else ""
    words = f"{type(error).__name__}{f': {line}' if (line := one_line(error)) else ''}"
    return InternalError(f"this is an error in ckptsurgeon itself, please report it to its authors ({words}{place})")
