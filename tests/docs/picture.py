"""The picture of the README: what `diff` prints on a terminal, as an SVG. `python tests/docs/picture.py` draws it anew.

The command runs on a pseudoterminal of its own, in a copy of the fixtures; the colours that it asks for by escape codes become those of a
dark terminal.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from html import escape
from pathlib import Path

from pages import ROOT, copy_of_fixtures

PICTURE = ROOT / ".github" / "diff.svg"
WORDS = ("diff", "net_params.pkl", "variants:NetVariant")
COLUMNS = 110
WIDE, HIGH, AROUND = 8.43, 20, 16  # a character, a line, the margin, in pixels
BACK, TEXT = "#0d1117", "#e6edf3"
FONTS = "ui-monospace, SFMono-Regular, Menlo, Consolas, 'DejaVu Sans Mono', monospace"
COLOURS = {30: "#484f58", 31: "#ff7b72", 32: "#3fb950", 33: "#d29922", 34: "#58a6ff", 35: "#bc8cff", 36: "#39c5cf", 37: "#b1bac4"}
ESCAPE = re.compile(r"\x1b\[([0-9;]*)m")


def on_a_terminal(folder: Path) -> str:
    """What the command writes to a terminal, escape codes included."""
    import pty

    kept = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR")}
    environment = {**kept, "COLUMNS": str(COLUMNS), "TERM": "xterm-256color", "PYTHONDONTWRITEBYTECODE": "1"}
    ours, its = pty.openpty()
    command = [sys.executable, "-m", "ckptsurgeon", *WORDS]
    with subprocess.Popen(command, cwd=folder, stdin=subprocess.DEVNULL, stdout=its, stderr=subprocess.DEVNULL, env=environment):
        os.close(its)
        written = b""
        try:
            while part := os.read(ours, 65536):
                written += part
        except OSError:  # Linux' way to say that the other side is closed
            pass
    os.close(ours)
    return written.decode().replace("\r\n", "\n")


def styled(text: str) -> Iterator[tuple[str, str]]:
    """Parts of a text, each with the SVG attributes of its style.

    >>> list(styled("a\\x1b[1;32mb\\x1b[0mc"))
    [('a', ''), ('b', ' fill="#3fb950" font-weight="bold"'), ('c', '')]
    """
    fill = weight = opacity = ""
    for number, part in enumerate(ESCAPE.split(text)):
        if number % 2 == 0:
            if part:
                yield part, fill + weight + opacity
            continue
        for code in (int(word or 0) for word in part.split(";")):
            if code in (0, 39):
                fill = ""
            if code in (0, 22):
                weight = opacity = ""
            if code == 1:
                weight = ' font-weight="bold"'
            elif code == 2:
                opacity = ' opacity="0.6"'
            elif (colour := COLOURS.get(code - 60 if code >= 90 else code)) is not None:
                fill = f' fill="{colour}"'


def drawn(text: str) -> str:
    """A terminal's text as an SVG."""
    lines = text.rstrip("\n").split("\n")
    parts = list(styled("\n".join(lines)))
    rows: list[list[tuple[str, str]]] = [[]]
    for words, style in parts:
        first, *more = words.split("\n")
        rows[-1].append((first, style))
        rows += [[(line, style)] for line in more]
    width, height = round(COLUMNS * WIDE + 2 * AROUND), len(rows) * HIGH + 2 * AROUND
    texts = [
        f'<text x="{AROUND}" y="{AROUND + HIGH * (number + 1) - 6}">'
        + "".join(f"<tspan{style}>{escape(words, quote=False)}</tspan>" for words, style in row if words)
        + "</text>"
        for number, row in enumerate(rows)
        if any(words for words, _ in row)
    ]
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}"',
            f'  xml:space="preserve" fill="{TEXT}" font-size="14" font-family="{FONTS}">',
            f'<rect width="{width}" height="{height}" rx="8" fill="{BACK}"/>',
            *texts,
            "</svg>\n",
        ]
    )


def picture() -> str:
    """The picture as it is now."""
    with tempfile.TemporaryDirectory() as folder:
        prompt = f"\x1b[2m$\x1b[0m \x1b[1mckptsurgeon {' '.join(WORDS)}\x1b[0m\n"
        return drawn(prompt + on_a_terminal(copy_of_fixtures(Path(folder))))


if __name__ == "__main__":
    PICTURE.parent.mkdir(exist_ok=True)
    PICTURE.write_text(picture())
