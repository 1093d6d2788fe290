"""The coverage-guided fuzzer runs, for some seconds, by the command that people use for hours."""

from __future__ import annotations

import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from fuzz_properties import HERE

pytestmark = pytest.mark.skipif(find_spec("atheris") is None, reason="atheris is not installed: pip install -e '.[fuzz]'")


def test_a_short_run_finds_nothing(tmp_path: Path) -> None:
    words = [sys.executable, str(HERE / "fuzz.py"), "--seconds", "4", "--reader", "zip", "--keep", str(tmp_path / "kept")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"zip +(\d+) executions +(\d+) edges +0 findings", done.stdout)
    assert found and int(found[1]) > 9 and int(found[2]) > 100, done.stdout + done.stderr
    assert not [path for path in (tmp_path / "kept").iterdir() if path.suffix != ".txt"]
