"""The colours of styles, as git and ruff use them, as a terminal's escape codes."""

from __future__ import annotations

from typing import Any

import click

from ckptsurgeon.shown import Style, spans_of

COLOURS: dict[Style, dict[str, Any]] = {
    "good": {"fg": "green"},
    "changed": {"fg": "yellow"},
    "missing": {"fg": "red"},
    "extra": {"fg": "cyan"},
    "bad": {"fg": "red", "bold": True},
    "strong": {"bold": True},
    "faint": {"dim": True},
}


def painted(text: str) -> str:
    """A text with escape codes for its styles; a style that spans lines is ended and begun anew on each."""
    parts, at = [], 0
    for start, stop, style in spans_of(text):
        lines = text[start:stop].split("\n")
        parts += [text[at:start], "\n".join(click.style(line, **COLOURS[style]) if line else "" for line in lines)]
        at = stop
    return "".join(parts) + text[at:]
