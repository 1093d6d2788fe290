"""Where the process starts, also as `python -m ckptsurgeon`: loads the command line so that even an early Ctrl-C ends in words."""

from __future__ import annotations

import os
import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line of this process and exit."""
    try:
        from ckptsurgeon.cli.main import main as run

        run()
    except KeyboardInterrupt:
        _end("interrupted", 130)
    except ImportError as error:
        _end(f"error: ckptsurgeon is not whole here ({error})\n  try: pip install ckptsurgeon", 2)


def _end(words: str, code: int) -> NoReturn:
    if sys.stderr is not None:
        sys.stderr.write(f"{words}\n")
    sys.exit(code)


if __name__ == "__main__":
    # `python -m` looks in the current folder first, which may be a stranger's. A target's modules are looked for there later.
    if sys.path and sys.path[0] == os.getcwd():
        del sys.path[0]
    main()
