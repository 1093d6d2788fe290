"""Where the process starts, also as `python -m ckptsurgeon`: loads the command line so that even an early Ctrl-C ends in words."""

from __future__ import annotations

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line of this process and exit."""
    try:
        from ckptsurgeon.cli.main import main as run

        run()
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)


if __name__ == "__main__":
    main()
