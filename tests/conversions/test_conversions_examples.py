"""The rules files are worked examples that people read: each is well formed, says why, and is tried by a test."""

from __future__ import annotations

from pathlib import Path

import pytest

import ckptsurgeon as cs
from ckptsurgeon.errors import RuleError
from ckptsurgeon.rules.rulefile import parse_rules, to_toml

FOLDER = Path(__file__).resolve().parent
FILES = sorted((FOLDER / "rules").glob("*.toml"))


def test_there_are_ten_and_more() -> None:
    assert len(FILES) >= 10


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_an_example_is_one(path: Path) -> None:
    text = path.read_text()
    assert text.startswith("# "), "begins with what it is for"
    assert "/work/" not in text
    rules = parse_rules(text, path.name)
    assert rules
    assert parse_rules(to_toml(rules), path.name) == rules
    tried = "".join(test.read_text() for test in FOLDER.glob("test_*.py") if test.name != Path(__file__).name)
    assert f'"{path.stem}"' in tried


def test_an_example_for_another_model_is_refused() -> None:
    """Each rule that matches nothing is named, so that a file for another architecture can't half work."""
    source = FOLDER.parents[1] / "fixtures" / "net_params.pkl"
    with pytest.raises(RuleError) as caught:
        cs.plan(source, source, rules=FOLDER / "rules" / "resnet_to_hf.toml")
    assert str(caught.value).count("matches nothing") >= 6
