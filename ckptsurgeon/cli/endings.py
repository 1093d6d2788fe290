"""What ended a run, as one error that a person can read: a row for each kind of exception, and for all others a request to report it.

What a missing library or a failed allocation looks like, `errors` knows. A hint that is written for Python gets the command line's words.
Nothing here prints.
"""

from __future__ import annotations

import ast
import os
import re
import shlex
import sys
import traceback
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ckptsurgeon.errors import CheckpointError, InternalError, OutputError, missing_library, no_memory, one_line, out_of_memory

if TYPE_CHECKING:
    from ckptsurgeon.report import CheckReport, Finding

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


# A parameter as Python has it: with a value, or by its name alone, which then has an underscore. Not within a call, a path or quotes.
_TEXT = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_PYTHON = re.compile(
    rf"""\w\((?:{_TEXT}|[^()'"])*\)"""
    rf"""|(?<![\w(./'"-])([a-z]+(?:_[a-z]+)*)=(\[(?:{_TEXT}|[^]'"])*\]|\{{(?:{_TEXT}|[^}}'"])*\}}|{_TEXT}|True\b|[0-9][0-9.e-]*|…)"""
    r"""|(?<![\w(./'"-])([a-z]+(?:_[a-z]+)+)(?![\w/'"=(-]|\.\w)"""
)


def as_options(words: str, options: Mapping[str, str]) -> str:
    """A sentence that names parameters, in the words of a command line; `options` are its options, by the names of their parameters.

    >>> known = {name: f"--{name.replace('_', '-')}" for name in ("optimizer_root", "layers", "layer_decay", "grid")}
    >>> as_options("choose one: optimizer_root='optim', or layers=['a.{i}', 'b']", known)
    "choose one: --optimizer-root optim, or --layers 'a.{i}' --layers b"
    >>> as_options("no layer_decay is given: give layer_decay=0.75; interpolate(grid=[7, 7])", known)
    'no --layer-decay is given: give --layer-decay 0.75; interpolate(grid=[7, 7])'
    >>> as_options("overwrite=True, or init={'a.{i}': 'zeros'}", {"overwrite": "--overwrite", "init": "--init"})
    "--overwrite, or --init 'a.{i}' zeros"
    """

    def written(found: re.Match[str]) -> str:
        option = options.get(found[1] or found[3] or "")
        if option is None or found[3]:
            return option or found[0]
        try:
            value = "NAME" if found[2] == "…" else ast.literal_eval(found[2])
        except (ValueError, SyntaxError):  # an expression, not a value
            return found[0]
        if value is True:
            return option
        if option == "--set" and isinstance(value, dict):
            return " ".join(f"{option} {name}={number}" for name, number in value.items())
        rows = value.items() if isinstance(value, dict) else [(one,) for one in (value if isinstance(value, list) else [value])]
        return " ".join(shlex.join([option, *map(str, row)]) for row in rows)

    return _PYTHON.sub(written, words)


def say_options(error: CheckpointError, *commands: click.Command | None) -> None:
    """Put an error of the library into the words of the command that ran, the last; an option that it has not is another's."""
    options = _names(commands)
    error.reason = as_options(error.reason, options)
    error.hint = None if error.hint is None else as_options(error.hint, options)


def tries_options(found: CheckReport, command: click.Command) -> CheckReport:
    """A report of `check` whose findings say what to try in the words of its command."""
    options = _names([command])

    def said(row: Finding) -> Finding:
        message, begins, hint = row.message.partition(" (try: ")
        return replace(row, message=message + begins + as_options(hint, options)) if hint else row

    return replace(found, files=tuple(replace(file, findings=tuple(map(said, file.findings))) for file in found.files))


def _names(commands: Iterable[click.Command | None]) -> dict[str, str]:
    """Options by the names of their parameters."""
    given = [one for command in commands if command is not None for one in command.params]
    return {one.name: one.opts[-1] for one in given if isinstance(one, click.Option) and one.name}


def _unforeseen(error: BaseException) -> CheckpointError:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(_PACKAGE + os.sep)]
    place = f", at {os.path.relpath(frames[-1].filename, os.path.dirname(_PACKAGE))}:{frames[-1].lineno}" if frames else ""
    words = f"{type(error).__name__}{f': {line}' if (line := one_line(error)) else ''}"
    return InternalError(f"this is an error in ckptsurgeon itself, please report it to its authors ({words}{place})")
