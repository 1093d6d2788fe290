"""Printing: data to stdout, notes and errors to stderr, text or JSON, colour only where a terminal wants it."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click

from ckptsurgeon.errors import CheckpointError, printable
from ckptsurgeon.views import json as views_json


@dataclass(frozen=True)
class Show:
    """How a person wants the answer: as JSON, with everything (`verbose`), without notes (`quiet`)."""

    json: bool = False
    verbose: bool = False
    quiet: bool = False

    @property
    def width(self) -> int | None:
        """The terminal's columns, or None when the answer goes to a file or a program."""
        return shutil.get_terminal_size().columns if sys.stdout.isatty() else None

    def answer(self, text: Callable[[], str], value: Callable[[], dict[str, Any]]) -> None:
        """Print the answer on stdout. A reader that has gone (`| head`) is no error."""
        words = _json(value()) if self.json else text()
        try:
            click.echo(words)
        except BrokenPipeError:
            lose_stdout()

    def note(self) -> Callable[[str], None]:
        """A listener for notes that says each once, on stderr."""
        said: set[str] = set()

        def listen(words: str) -> None:
            if not self.quiet and words not in said:
                said.add(words)
                click.echo(f"note: {printable(words)}", err=True)

        return listen


def lose_stdout() -> None:
    """Send what is still to be printed nowhere: its reader has gone, or its disk is full."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=True)


def _coloured(word: str) -> str:
    return word if os.environ.get("NO_COLOR") else click.style(word, fg="red", bold=True)


def show_error(error: CheckpointError, as_json: bool) -> None:
    """A refusal: on stdout as JSON, else on stderr as what, where, why, and what to try."""
    if as_json:
        click.echo(_json(views_json.error(error)))
        return
    click.echo(f"{_coloured('error:')} {error}", err=True)


def show_usage_error(error: click.ClickException, as_json: bool) -> None:
    """A command line that is not well formed."""
    message = " ".join(error.format_message().split())
    context = getattr(error, "ctx", None)
    hint = f"{context.command_path} --help" if context is not None else "ckptsurgeon --help"
    show_error(UsageError(message, hint=hint), as_json)


class UsageError(CheckpointError):
    """The command line itself is not well formed."""
