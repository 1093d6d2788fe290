"""RESULTS.md: each program writes its own section, in the place where it stands, and leaves the others alone."""

from __future__ import annotations

import re
from pathlib import Path

RESULTS = Path(__file__).with_name("RESULTS.md")


def write_section(text: str) -> None:
    """Put a section, which begins with its heading, in place of the one with this heading; at the end where there is none."""
    text = f"{text.strip()}\n\n"
    heading = re.escape(text.partition("\n")[0])
    section = re.compile(rf"^{heading}\n.*?(?=^#{{1,3}} |\Z)", re.DOTALL | re.MULTILINE)
    page = RESULTS.read_text()
    new = section.sub(lambda _: text, page, count=1) if section.search(page) else f"{page.rstrip()}\n\n{text}"
    RESULTS.write_text(f"{new.rstrip()}\n")
