"""What can be told cheaply is told first: before a model is imported, and before a byte is written."""

from __future__ import annotations

from pathlib import Path

import pytest

import ckptsurgeon as cs
from ckptsurgeon.errors import RuleError, UnreadableError

BOOM = "raise RuntimeError('this module was imported')"


@pytest.fixture
def target(tmp_path: Path) -> str:
    (tmp_path / "boom.py").write_text(BOOM)
    return f"{tmp_path}/boom.py:Net"


def test_a_missing_source_is_told_before_the_model_is_imported(target: str, tmp_path: Path) -> None:
    for verb in (
        lambda: cs.diff("no.pt", target),
        lambda: cs.plan("no.pt", target),
        lambda: cs.merge("no.pt", target, tmp_path / "out.pt"),
        lambda: cs.verify("no.pt", target),
    ):
        with pytest.raises(UnreadableError, match=r"no\.pt: does not exist"):
            verb()


def test_an_unknown_scheme_is_told_before_the_model_is_imported(target: str, tmp_path: Path) -> None:
    for verb in (
        lambda: cs.plan("fixtures/net_params.pkl", target, init={"fc3.*": "xavier_nromal"}),
        lambda: cs.merge("fixtures/net_params.pkl", target, tmp_path / "out.pt", init={"fc3.*": "xavier_nromal"}),
    ):
        with pytest.raises(RuleError, match="xavier_nromal"):
            verb()


def test_a_conversion_says_that_it_was_proven(tmp_path: Path) -> None:
    source = Path(__file__).parents[2] / "fixtures" / "net_params.pkl"
    assert cs.merge(source, None, tmp_path / "a.pt").proven
    report = cs.merge(source, None, tmp_path / "b.pt", verify=False)
    assert not report.proven
    assert "proven" not in str(report)
