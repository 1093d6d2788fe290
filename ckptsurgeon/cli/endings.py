"""Turns the exception that ended a run into a `CheckpointError` with a readable message; any unforeseen one is a request to report it.

`errors` recognises missing libraries and failed allocations. Hints that name Python parameters are rewritten to options of the command
line. Nothing is printed here.
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
    """Whether to show the traceback: with `--debug`, or if CKPTSURGEON_DEBUG is set in the environment."""
    return "--debug" in sys.argv or bool(os.environ.get("CKPTSURGEON_DEBUG"))


def as_checkpoint_error(error: BaseException) -> CheckpointError:
    """The exception as a `CheckpointError`; one that is a `CheckpointError` already as it is."""
    if isinstance(error, CheckpointError):
        return error
    if no_memory(error):
        return out_of_memory(error)
    if isinstance(error, ImportError) and (missing := missing_library(error)) is not None:
        return missing
    if isinstance(error, OSError):
        return OutputError(error.strerror or str(error), path=error.filename)
    return _unforeseen(error)


# A Python parameter: with a value, or its name alone if that has an underscore. Not within a call, a path or quotes.
_TEXT = r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""
_PYTHON = re.compile(
    rf"""\w\((?:{_TEXT}|[^()'"])*\)"""
    rf"""|(?<![\w(./'"-])([a-z]+(?:_[a-z]+)*)=(\[(?:{_TEXT}|[^]'"])*\]|\{{(?:{_TEXT}|[^}}'"])*\}}|{_TEXT}|True\b|[0-9][0-9.e-]*|…)"""
    r"""|(?<![\w(./'"-])([a-z]+(?:_[a-z]+)+)(?![\w/'"=(-]|\.\w)"""
)


def as_options(words: str, options: Mapping[str, str]) -> str:
    """A sentence with its Python parameters replaced by options of the command line; `options` maps parameters' names to options.

    >>> known = {name: f"--{name.replace('_', '-')}" for name in ("optimizer_root", "layers", "layer_decay", "grid")}
    >>> as_options("choose one: optimizer_root='optim', or layers=['a.{i}', 'b']", known)
    "choose one: --optimizer-root optim, or --layers 'a.{i}' --layers b"
    >>> as_options("no layer_decay is given: give layer_decay=0.75; interpolate(grid=[7, 7])", known)
    'no --layer-decay is given: give --layer-decay 0.75; interpolate(grid=[7, 7])'
    >>> as_options("overwrite=True, or init={'a.{i}': 'zeros'}", {"overwrite": "--overwrite", "init": "--init"})
    "--overwrite, or --init 'a.{i}' zeros"
    """

    def written(match: re.Match[str]) -> str:
        option = options.get(match[1] or match[3] or "")
        if option is None or match[3]:
            return option or match[0]
        try:
            value = "NAME" if match[2] == "…" else ast.literal_eval(match[2])
        except (ValueError, SyntaxError):  # an expression, not a value
            return match[0]
        if value is True:
            return option
        if option == "--set" and isinstance(value, dict):
            return " ".join(f"{option} {name}={number}" for name, number in value.items())
        value_rows = value.items() if isinstance(value, dict) else [(item,) for item in (value if isinstance(value, list) else [value])]
        return " ".join(shlex.join([option, *map(str, row)]) for row in value_rows)

    return _PYTHON.sub(written, words)


def say_options(error: CheckpointError, *commands: click.Command | None) -> None:
    """Rewrite an error's parameters as options of the command that ran, the last of `commands`; the others serve for options it lacks."""
    options = _names(commands)
    error.reason = as_options(error.reason, options)
    error.hint = None if error.hint is None else as_options(error.hint, options)


def tries_options(report: CheckReport, command: click.Command) -> CheckReport:
    """A report of `check` with the parameters in its findings' hints rewritten as options of its command."""
    options = _names([command])

    def rewritten(row: Finding) -> Finding:
        message, separator, hint = row.message.partition(" (try: ")
        return replace(row, message=message + separator + as_options(hint, options)) if hint else row

    return replace(report, files=tuple(replace(file, findings=tuple(map(rewritten, file.findings))) for file in report.files))


def _names(commands: Iterable[click.Command | None]) -> dict[str, str]:
    """The commands' options, by the names of their parameters."""
    params = [param for command in commands if command is not None for param in command.params]
    return {param.name: param.opts[-1] for param in params if isinstance(param, click.Option) and param.name}


def _unforeseen(error: BaseException) -> CheckpointError:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(_PACKAGE + os.sep)]
    where = f", at {os.path.relpath(frames[-1].filename, os.path.dirname(_PACKAGE))}:{frames[-1].lineno}" if frames else ""
    words = f"{type(error).__name__}{f': {line}' if (line := one_line(error)) else ''}"
    return InternalError(f"this is an error in ckptsurgeon itself, please report it to its authors ({words}{where})")
