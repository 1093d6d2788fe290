"""The README and the guide, and how their blocks are run: in order, in a copy of the fixtures, a folder for each page.

| block | what becomes of it |
|---|---|
| `console` | each `$ command` is run; what follows it is its output, both streams |
| `python` | run; a `text` block right below it is what it printed |
| any kind, with a file name (`toml rules.toml`) | written to that file |

A block within an HTML comment counts too: it makes what a page needs and no reader wants to see. After a change of output,
`python tests/docs/pages.py` writes all pages anew, and `python tests/docs/pages.py match gate` these alone; read the difference before
you commit it.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from textwrap import fill

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
GUIDE = ROOT / "ckptsurgeon" / "guide"
PAGES = {"README": README, **{path.stem: path for path in sorted(GUIDE.glob("*.md"))}}
WIDTH = 80  # of what is printed by `ckptsurgeon guide`
BLOCK = re.compile(r"^```(?P<kind>\w+)(?: (?P<file>\S+))?\n(?P<body>.*?)^```\n", re.DOTALL | re.MULTILINE)


def environment() -> dict[str, str]:
    """No terminal, no colour, and the program of this Python first on PATH."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "NO_COLOR": "1", "PYTHONDONTWRITEBYTECODE": "1"}


def shell(command: str, folder: Path) -> str:
    """What a person sees: both streams, as they come."""
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300, env=environment()
    )
    return done.stdout


def console(body: str, folder: Path) -> str:
    """A console block with its outputs as they are now; a command's further lines begin with `>`."""
    commands: list[list[str]] = []
    for line in body.splitlines():
        if line.startswith("$ "):
            commands.append([line])
        elif line.startswith("> ") and commands and commands[-1][-1].endswith("\\"):
            commands[-1].append(line)
    return "".join("\n".join(lines) + "\n" + shell("\n".join(line[2:] for line in lines), folder) for lines in commands)


def render(text: str, folder: Path) -> str:
    """A page with every output as it is now; its blocks are run in `folder`."""
    printed: dict[int, str] = {}

    def block(found: re.Match[str]) -> str:
        kind, body = found["kind"], found["body"]
        if found["file"]:
            path = folder / found["file"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(body)
            return found[0]
        if kind == "console":
            body = console(body, folder)
        elif kind == "python":
            done = subprocess.run([sys.executable, "-c", body], cwd=folder, capture_output=True, text=True, timeout=300, env=environment())
            assert done.returncode == 0, f"{body}\n{done.stderr}"
            printed[found.end()] = done.stdout
        elif (at := found.start() - 1) in printed:
            body = printed[at]
        return f"```{kind}\n{body}```\n"

    return BLOCK.sub(block, text)


def wrapped(text: str) -> str:
    """A page with its prose wrapped to `WIDTH`: paragraphs and items of lists; blocks, tables, headings and comments stay.

    >>> print(wrapped("a " * 45 + "\\n| a | table |\\n- an item\\n  of two lines\\n"), end="")
    a a a a a a a a a a a a a a a a a a a a a a a a a a a a a a a a a a a a a a a a
    a a a a a
    | a | table |
    - an item of two lines
    """

    def paragraph(found: re.Match[str]) -> str:
        lines = re.sub(r"\n(?=\s*(?:[-*]|\d+\.) )", "\0", found[0].rstrip("\n")).split("\0")
        return "".join(f"{item(line)}\n" for line in lines)

    def item(line: str) -> str:
        start = re.match(r"\s*(?:(?:[-*]|\d+\.) )?", line)
        assert start is not None
        words = " ".join(line[start.end() :].split())
        return fill(
            words, WIDTH - 1, initial_indent=start[0], subsequent_indent=" " * start.end(), break_long_words=False, break_on_hyphens=False
        )

    return "".join(
        part if part.startswith(("```", "<!--")) else re.sub(r"(?:^(?![|#]).*\S.*\n)+", paragraph, part, flags=re.MULTILINE)
        for part in re.split(r"(^<!--.*?^-->\n|^```.*?^```\n)", text, flags=re.DOTALL | re.MULTILINE)
    )


def copy_of_fixtures(folder: Path) -> Path:
    """A folder as a reader has it, within `folder`."""
    shutil.copytree(ROOT / "fixtures", folder / "fixtures", ignore=shutil.ignore_patterns("__pycache__"))
    return folder / "fixtures"


def rewrite(name: str) -> None:
    """Write a page with every output as it is now, and a page of the guide in lines of a terminal's width."""
    with tempfile.TemporaryDirectory() as folder:
        path = PAGES[name]
        text = render(path.read_text(), copy_of_fixtures(Path(folder)))
        path.write_text(wrapped(text) if path.parent == GUIDE else text)


if __name__ == "__main__":
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(rewrite, sys.argv[1:] or PAGES))
