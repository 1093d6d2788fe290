"""Printing: data to stdout, notes and errors to stderr, text or JSON, colour only where a terminal wants it."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Any, TextIO

import click

from ckptsurgeon.errors import CheckpointError, OutputError, printable
from ckptsurgeon.hints import Unmissable
from ckptsurgeon.shown import Result, json_parts


@dataclass(frozen=True)
class Show:
    """How a person wants the answer: as JSON, with everything (`verbose`), without notes (`quiet`)."""

    json: bool = False
    verbose: bool = False
    quiet: bool = False

    @property
    def width(self) -> int | None:
        """The terminal's columns, or None when the answer goes to a file or a program."""
        if not sys.stdout.isatty():
            return None
        from shutil import get_terminal_size

        return get_terminal_size().columns

    def result(self, found: Result) -> None:
        """Print a result of the library on stdout."""
        put(found.json_parts() if self.json else [found.to_text(verbose=self.verbose, width=self.width)])

    def answer(self, text: Callable[[], str], value: Callable[[], dict[str, Any]]) -> None:
        """Print another answer on stdout: its text, or its value as JSON."""
        put(json_parts(value()) if self.json else [text()])

    def page(self, text: Callable[[], str], value: Callable[[], dict[str, Any]]) -> None:
        """Show a long text by the person's pager where stdout is a terminal; else as any other answer."""
        if self.json or self.width is None:
            self.answer(text, value)
        else:
            click.echo_via_pager(text())

    def note(self) -> Callable[[str], None]:
        """A listener for notes that says each once, on stderr."""
        said: set[str] = set()

        def listen(words: str) -> None:
            if words not in said and (not self.quiet or isinstance(words, Unmissable)):
                said.add(words)
                tell(f"note: {printable(words)}")

        return listen


def put(parts: Iterable[str]) -> None:
    """Write a line, part by part, to stdout, and flush it. A reader that has gone (`| head`) is no error.

    Raises:
        StdoutError: it can't be written: its disk is full, say.
    """

    def write() -> None:
        for part in chain(parts, "\n"):
            click.echo(part, nl=False)

    try:
        _print(write)
    except OSError as error:
        raise StdoutError(f"the answer can't be written: {error.strerror or error}", path="stdout") from error


def tell(words: str) -> None:
    """Write to stderr, if anybody reads it: that nobody does must stop nothing."""
    try:
        click.echo(words, err=True)
    except OSError:
        _lose(sys.stderr, 2)


def flush() -> None:
    """Write what stands in stdout's buffer. A reader that has gone is no error. OSError where it can't be written."""
    _print(sys.stdout.flush)


def _print(write: Callable[[], None]) -> None:
    try:
        write()
    except BrokenPipeError:
        lose_stdout()
    except OSError:
        lose_stdout()
        raise


def lose_stdout() -> None:
    """Send what is still in stdout's buffer nowhere, so that Python's own end does not fail at it."""
    _lose(sys.stdout, 1)


def _lose(stream: TextIO, number: int) -> None:
    with contextlib.suppress(OSError, ValueError):
        number = stream.fileno()
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def open_streams() -> bool:
    """Open the null device for each standard stream that is closed, so that no file gets its number; whether stdout can be written.

    What an encoding lacks is written as an escape.
    """
    can_write = sys.stdout is not None
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    return can_write


def _coloured(word: str) -> str:
    return word if os.environ.get("NO_COLOR") else click.style(word, fg="red", bold=True)


def show_error(error: CheckpointError, as_json: bool) -> None:
    """A refusal: on stdout as JSON, else, or where stdout can't be written, on stderr as what, where, why, and what to try."""
    if as_json and not isinstance(error, StdoutError):
        try:
            from ckptsurgeon.views.json import error as as_value

            return put(json_parts(as_value(error)))
        except StdoutError as full:
            tell(f"{_coloured('error:')} {full}")
    tell(f"{_coloured('error:')} {error}")


def show_usage_error(error: click.ClickException, as_json: bool) -> None:
    """A command line that is not well formed."""
    from ckptsurgeon.cli.slips import meant

    message, command = meant(error, sys.argv[1:])
    context = getattr(error, "ctx", None)
    hint = f"{context.command_path} --help" if context is not None else "ckptsurgeon --help"
    show_error(UsageError(message, hint=command or hint), as_json)


class UsageError(CheckpointError):
    """The command line itself is not well formed."""


class StdoutError(OutputError):
    """The answer could not be written to stdout."""
