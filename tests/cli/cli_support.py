"""Where the project is, and how its program is started as a process of its own, on a terminal too."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, "-m", "ckptsurgeon"]


def read_to_end(number: int) -> str:
    """All that is written to the other side of a pipe or terminal, whose descriptor is closed then."""
    parts = []
    try:
        while part := os.read(number, 65536):
            parts.append(part)
    except OSError:  # Linux: the other side of a terminal is closed
        pass
    os.close(number)
    return b"".join(parts).decode()


def on_a_terminal(*words: str, **env: str) -> str:
    """What a run that ends in 0 writes to a terminal, which is its stdin too."""
    import pty

    ours, theirs = pty.openpty()
    with subprocess.Popen([*PROGRAM, *words], stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, **env}) as process:
        os.close(theirs)
        text = read_to_end(ours).replace("\r\n", "\n")
    assert process.returncode == 0, text
    return text
