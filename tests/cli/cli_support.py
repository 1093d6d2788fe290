"""Where the project is, and how its program is started as a process of its own."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = [sys.executable, "-m", "ckptsurgeon"]
