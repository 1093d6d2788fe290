"""The page that goes the whole way, as it stands: transfer, initialise, groups, SGD, StepLR, accuracy."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "fixtures"))
plain_loop = pytest.importorskip("plain_loop", reason="needs scikit-learn")


@pytest.mark.slow
def test_the_page_learns_and_says_what_it_does(capsys: pytest.CaptureFixture[str]) -> None:
    assert plain_loop.main() > 0.97
    out = capsys.readouterr().out
    assert (
        "fresh           7" in out
        and "rates from here: transferred 0.0025, fresh 0.025" in out
        and "transferred 0.000625, fresh 0.00625" in out
    )


def test_it_is_one_page() -> None:
    assert len((Path(__file__).parents[2] / "fixtures" / "plain_loop.py").read_text().splitlines()) <= 50
