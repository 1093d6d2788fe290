"""Every example in a docstring is run, in a folder that has the fixtures."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import shutil
from pathlib import Path

import pytest

import ckptsurgeon

ROOT = Path(__file__).parents[2]
MODULES = sorted(found.name for found in pkgutil.walk_packages(ckptsurgeon.__path__, "ckptsurgeon.") if not found.name.endswith("__main__"))


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "fixtures", tmp_path / "fixtures")
    monkeypatch.chdir(tmp_path)
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


@pytest.mark.parametrize(
    "verb", [name for name in ckptsurgeon.__all__ if name not in ("Checkpoint", "CheckpointError", "Rule", "TensorMeta", "__version__")]
)
def test_every_verb_says_what_it_takes_gives_and_raises(verb: str) -> None:
    words = getattr(ckptsurgeon, verb).__doc__
    assert words
    for part in ("Raises:", ">>>"):
        assert part in words, part
