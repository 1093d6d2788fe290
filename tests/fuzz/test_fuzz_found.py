"""What the fuzzers found, each kept with its line of story: it must keep its contract now.

The faults that rebuilding other scanners' suites brought to light are held by `tests/scanners`.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz_contracts import CONTRACTS
from fuzz_properties import HERE

FOUND = HERE / "found"
# The file: what was wrong with it, and what it must come to. The name begins with the reader's.
STORIES: dict[str, tuple[str, str]] = {
    "planfile-fingerprint": ("a fingerprint that is no SHA-256 was taken for one of a file that has changed", "refused"),
    "patterns-long-key": ("an ordinary pattern took seconds for one key of two thousand characters, and years for a longer one", "read"),
}


def test_every_file_has_a_story() -> None:
    assert {path.name for path in FOUND.iterdir()} == set(STORIES)
    assert all(path.stat().st_size < 10_000 for path in FOUND.iterdir())


@pytest.mark.parametrize("name", STORIES)
def test_what_was_found_is_mended(name: str, tmp_path: Path) -> None:
    assert CONTRACTS[name.partition("-")[0]]((FOUND / name).read_bytes(), tmp_path) == STORIES[name][1]
