"""The map of the code names nothing that is not there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "ckptsurgeon"
PLACES = sorted(set(re.findall(r"`((?:\w+/)*\w+\.py(?::\w+)?|(?:\w+/)+)`", (ROOT / ".github" / "CODE.md").read_text())))


def test_it_names_places() -> None:
    assert len(PLACES) > 40


@pytest.mark.parametrize("place", PLACES)
def test_a_place_is_there(place: str) -> None:
    file, _, name = place.partition(":")
    path = (ROOT if file.startswith("tests/") else PACKAGE) / file
    assert path.exists(), place
    if name:
        assert name in {node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_every_floor_is_on_it() -> None:
    assert {f"{path.name}/" for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} <= set(PLACES) | {"cli/", "loops/"}


# `optimizer.` is a floor, and more often a person's file or object.
FLOORS = sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists() and path.name != "optimizer")
NAMED = re.compile(rf"`((?:{'|'.join(FLOORS)})(?:\.\w+)+)`")


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_docstring_names_no_module_that_is_not_there(path: Path) -> None:
    for name in NAMED.findall(path.read_text()):
        place = PACKAGE / Path(*name.split("."))
        found = (
            place.is_dir(),
            place.with_suffix(".py").exists(),
            place.parent.with_suffix(".py").exists(),
        )  # a room, a module, a name in one
        assert any(found), name
