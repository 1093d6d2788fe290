"""The public API says what it takes, gives and raises: docstrings, types and exports. Every example in a docstring is run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

import ckptsurgeon
from ckptsurgeon import errors

ROOT = Path(__file__).parents[2]
MODULES = sorted(found.name for found in pkgutil.walk_packages(ckptsurgeon.__path__, "ckptsurgeon.") if not found.name.endswith("__main__"))
PUBLIC = {name: getattr(ckptsurgeon, name) for name in ckptsurgeon.__all__ if name != "__version__"}


def methods(kind: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """A class's own public methods."""
    for name, value in vars(kind).items():
        function = value.__func__ if isinstance(value, classmethod) else value
        if not name.startswith("_") and inspect.isfunction(function):
            yield name, function


FUNCTIONS = {name: value for name, value in PUBLIC.items() if not isinstance(value, type)}
FUNCTIONS |= {f"{name}.{each}": method for name, kind in PUBLIC.items() if isinstance(kind, type) for each, method in methods(kind)}


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(ROOT / "fixtures", tmp_path / "fixtures")
    monkeypatch.chdir(tmp_path)
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0


def test_types_resolve_and_only_asking_for_them_imports_torch() -> None:
    code = """
import sys, typing, ckptsurgeon as cs
names = {names!r}
for name in names: getattr(cs, name)
assert "torch" not in sys.modules, "importing and naming them loads torch"
for name in names: assert "return" in typing.get_type_hints(getattr(cs, name)), name
assert typing.get_type_hints(cs.transfer)["model"] is sys.modules["torch"].nn.Module
"""
    subprocess.run([sys.executable, "-c", code.format(names=[name for name in FUNCTIONS if "." not in name])], check=True)
    for name, value in PUBLIC.items():
        assert isinstance(get_type_hints(value.__init__ if isinstance(value, type) else value), dict), name
    for name, function in FUNCTIONS.items():
        assert set(get_type_hints(function)) >= set(inspect.signature(function).parameters) - {"self", "cls"}, name


def classes_in(annotation: Any) -> Iterator[type]:
    if isinstance(annotation, type) and annotation.__module__.startswith("ckptsurgeon"):
        yield annotation
    for inner in get_args(annotation):
        yield from classes_in(inner)


def test_what_a_public_function_returns_is_exported() -> None:
    returned = {kind for function in FUNCTIONS.values() for kind in classes_in(get_type_hints(function).get("return"))}
    assert ckptsurgeon.Report in returned and ckptsurgeon.Rule in returned
    assert {kind.__name__ for kind in returned if PUBLIC.get(kind.__name__) is not kind} == set()


def test_every_error_is_exported() -> None:
    kinds = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, errors.CheckpointError)}
    assert len(kinds) > 20 and kinds <= set(ckptsurgeon.__all__)
