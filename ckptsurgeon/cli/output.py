"""Printing: data to stdout, notes and errors to stderr, as text or JSON, with or without colour.

Colour follows git, ruff and no-color.org: `--color` beats NO_COLOR, which beats FORCE_COLOR; without any of them a terminal gets colour,
unless TERM is "dumb". An empty variable counts as not set.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any, TextIO

import click

from ckptsurgeon.errors import ADVICE, CheckpointError, OutputError, pasteable
from ckptsurgeon.hints import Unmissable
from ckptsurgeon.shown import Result, Style, Styled, json_parts, spans_of, styled, styled_text

COLOURS: dict[Style, dict[str, Any]] = {
    "good": {"fg": "green"},
    "changed": {"fg": "yellow"},
    "missing": {"fg": "red"},
    "extra": {"fg": "cyan"},
    "bad": {"fg": "red", "bold": True},
    "strong": {"bold": True},
    "faint": {"dim": True},
}

color = click.option(
    "--color",
    type=click.Choice(["auto", "always", "never"]),
    show_default="auto",
    expose_value=False,
    help="Colour the output: auto is on a terminal, and obeys NO_COLOR and FORCE_COLOR.",
)


@dataclass(frozen=True)
class Show:
    """The form of the output: JSON, all rows (`verbose`), no notes and summaries (`quiet`), or a `table` of this format.

    A summary (what was written, or that all is well) is printed with `asked=False`, so that `quiet` drops it; JSON is always printed.
    """

    json: bool = False
    verbose: bool = False
    quiet: bool = False
    table: str | None = None

    @property
    def width(self) -> int | None:
        """The terminal's columns, or None when the answer goes to a file or a program."""
        if not sys.stdout.isatty():
            return None
        from shutil import get_terminal_size

        return get_terminal_size().columns

    def result(self, value: Result, asked: bool = True, **how: Any) -> None:
        """Print a result of the library on stdout; its views get `how`."""
        if self.table is not None:
            return put([value.to_table(self.table, verbose=self.verbose, **how).removesuffix("\n")])
        if self.quiet and not asked and not self.json:
            return
        put(value.json_parts(**how) if self.json else [styled_text(value, self.verbose, self.width, **how)])

    def answer(
        self,
        text: Callable[[], str],
        value: Callable[[], dict[str, Any]],
        asked: bool = True,
        table: Callable[[str], str] | None = None,
    ) -> None:
        """Print any other output on stdout: its text, its value as JSON, or, with `--table`, its `table` in that format."""
        if self.table is not None and table is not None:
            return put([table(self.table).removesuffix("\n")])
        if self.quiet and not asked and not self.json:
            return
        put(json_parts(value()) if self.json else [text()])

    def page(self, text: Callable[[], str], value: Callable[[], dict[str, Any]]) -> None:
        """Show a long text in the user's pager if stdout is a terminal; else print it."""
        if self.json or self.width is None:
            self.answer(text, value)
        else:
            colour = None if wanted(sys.stdout) else False  # click knows which pagers can show it
            click.echo_via_pager(painted(text()), colour)

    @contextlib.contextmanager
    def progress(self) -> Iterator[None]:
        """A context that shows progress on stderr if that is a terminal, unless `quiet`."""
        if self.quiet or not sys.stderr.isatty():
            yield
            return
        from ckptsurgeon.cli.progress_line import ProgressLine
        from ckptsurgeon.progress import listening

        try:
            with listening(ProgressLine(status).show):
                yield
        finally:
            status("")

    def note(self) -> Callable[[str], None]:
        """A `note` callback that prints each note once, on stderr."""
        printed: set[str] = set()

        def listen(words: str) -> None:
            if words not in printed and (not self.quiet or isinstance(words, Unmissable)):
                printed.add(words)
                line = f"note: {pasteable(words)}"
                tell(line if isinstance(words, Unmissable) else styled(line, "faint"))

        return listen


def wanted(stream: TextIO, words: Sequence[str] | None = None, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether a stream gets colour.

    Args:
        stream: stdout or stderr.
        words: the words of the command line; None for this process's. They are read here, since a command line that is not well formed
            is told in colour too.
        environment: the variables.
    """
    choice = _asked(sys.argv[1:] if words is None else words)
    if choice in ("always", "never"):
        return choice == "always"
    if environment.get("NO_COLOR"):
        return False
    if environment.get("FORCE_COLOR"):
        return True
    return environment.get("TERM") != "dumb" and stream.isatty()


def _asked(words: Sequence[str]) -> str | None:
    """The last value of `--color`.

    >>> _asked(["diff", "--color", "never", "a.pt", "--color=always"])
    'always'
    """
    values = [
        following if word == "--color" else word.partition("=")[2]
        for word, following in pairwise([*words, ""])
        if word.partition("=")[0] == "--color"
    ]
    return values[-1] if values else None


_status: list[str] = []  # the text on the last line of the terminal, to be overwritten


def status(words: str) -> None:
    """Show a line on stderr's terminal in place of the one before; an empty text removes it."""
    shown = _status[0] if _status else ""
    if words:  # recorded first: an interrupt may come right after the line is written
        _status[:] = [words.ljust(len(shown))]
    with contextlib.suppress(OSError):
        if words or shown:
            click.echo(f"\r{words.ljust(len(shown))}{'' if words else chr(13)}", sys.stderr, nl=False)
    if not words:
        _status.clear()


def _write(text: str, stream: TextIO, nl: bool = True) -> None:
    status("")
    colour = wanted(stream)
    if colour and isinstance(text, Styled):
        text = painted(text)
    click.echo(text, stream, nl, color=colour)


def put(parts: Iterable[str]) -> None:
    """Write a line, part by part, to stdout, and flush it. A closed pipe (`| head`) is no error.

    Raises:
        StdoutError: stdout can't be written, as when the disk is full.
    """

    def write() -> None:
        for part in chain(parts, "\n"):
            _write(part, sys.stdout, nl=False)

    try:
        _print(write)
    except OSError as error:
        raise StdoutError(f"the answer can't be written: {error.strerror or error}", path="stdout") from error


def tell(words: str) -> None:
    """Write to stderr; errors in writing there are ignored."""
    try:
        _write(words, sys.stderr)
    except OSError:
        _lose(sys.stderr, 2)


def flush() -> None:
    """Flush stdout. A closed pipe is no error. Raises OSError if it can't be written."""
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
    """Discard what is left in stdout's buffer, so that Python does not fail to flush it at exit."""
    _lose(sys.stdout, 1)


def _lose(stream: TextIO, number: int) -> None:
    with contextlib.suppress(OSError, ValueError):
        number = stream.fileno()
    os.dup2(os.open(os.devnull, os.O_WRONLY), number)


def open_streams() -> bool:
    """Open the null device in place of each closed standard stream, so that no file gets its number. Returns whether stdout was open.

    Characters that the stream's encoding lacks are written as escapes.
    """
    can_write = sys.stdout is not None
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode, encoding="utf-8"))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    return can_write


def show_error(error: CheckpointError, as_json: bool) -> None:
    """Print an error: on stdout as JSON; else, or if stdout can't be written, on stderr with its path, key, reason and hint."""
    if as_json and not isinstance(error, StdoutError):
        try:
            from ckptsurgeon.views.json import error as as_value

            return put(json_parts(as_value(error)))
        except StdoutError as full:
            tell(_refusal(full))
    tell(_refusal(error))


def _refusal(error: CheckpointError) -> str:
    words = styled("error:", "bad") + f" {error.message}"
    return words if error.hint is None else words + "\n  " + styled(ADVICE, "strong") + f" {pasteable(error.hint)}"


def show_usage_error(error: click.ClickException, as_json: bool) -> None:
    """Print the error of a malformed command line."""
    from ckptsurgeon.cli.slips import meant

    message, command = meant(error, sys.argv[1:])
    context = getattr(error, "ctx", None)
    hint = f"{context.command_path} --help" if context is not None else "ckptsurgeon --help"
    show_error(UsageError(message, hint=command or hint), as_json)


class UsageError(CheckpointError):
    """The command line is malformed."""


class StdoutError(OutputError):
    """The output could not be written to stdout."""


def painted(text: str) -> str:
    """A text with escape codes for its styles; a style that spans lines is ended and begun anew on each."""
    parts, at = [], 0
    for start, stop, style in spans_of(text):
        lines = text[start:stop].split("\n")
        parts += [text[at:start], "\n".join(click.style(line, **COLOURS[style]) if line else "" for line in lines)]
        at = stop
    return "".join(parts) + text[at:]
