"""The public API says what it takes, gives and raises: docstrings, types and exports. Every example in a docstring is run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

import ckptsurgeon
from ckptsurgeon import api, errors

ROOT = Path(__file__).parents[2]
MODULES = sorted(found.name for found in pkgutil.walk_packages(ckptsurgeon.__path__, "ckptsurgeon.") if not found.name.endswith("__main__"))
PUBLIC = {name: getattr(ckptsurgeon, name) for name in ckptsurgeon.__all__ if name != "__version__"}


def methods(kind: type) -> Iterator[tuple[str, Callable[..., Any]]]:
    """A class's public methods, those of our own bases too."""
    for name, function in inspect.getmembers(kind, lambda value: inspect.isfunction(value) or inspect.ismethod(value)):
        if not name.startswith("_") and function.__module__.startswith("ckptsurgeon"):
            yield name, function


FUNCTIONS = {name: value for name, value in PUBLIC.items() if not isinstance(value, type)}
FUNCTIONS |= {name: getattr(api, name) for name in api.__all__}  # two verbs more, that the command line uses
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
    subprocess.run([sys.executable, "-c", code.format(names=[name for name in FUNCTIONS if name in PUBLIC])], check=True)
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


def sections(function: Callable[..., Any]) -> dict[str, dict[str, str]]:
    """A docstring's sections, each with its entries: `name, name: words`."""
    found: dict[str, dict[str, str]] = {}
    entries: dict[str, str] | None = None
    names: list[str] = []
    for line in (inspect.getdoc(function) or "").splitlines():
        if re.fullmatch(r"[A-Z]\w+:", line):
            entries = found.setdefault(line[:-1], {})
            names = []
        elif entries is None or (line and not line.startswith("    ")):
            entries = None
        elif entry := re.match(r" {4}(\w+(?:, \w+)*): (.*)", line):
            names = entry[1].split(", ")
            entries.update(dict.fromkeys(names, entry[2]))
        elif line:
            for name in names:
                entries[name] += f" {line.strip()}"
    return found


VERBS = {name: value for name, value in FUNCTIONS.items() if "." not in name} | {"Thaw": ckptsurgeon.Thaw}


def parameters(function: Callable[..., Any]) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


@pytest.mark.parametrize("name", FUNCTIONS | VERBS)
def test_every_parameter_has_words_and_so_has_what_is_returned(name: str) -> None:
    function = (FUNCTIONS | VERBS)[name]
    found = sections(function)
    assert list(found.get("Args", {})) == parameters(function)
    assert all(words.endswith(".") for words in found.get("Args", {}).values())
    gives = not isinstance(function, type) and get_type_hints(function)["return"] not in (None, type(None))
    assert ("Returns" in found) == gives


@pytest.mark.parametrize("name", VERBS)
def test_every_verb_says_what_it_raises_and_has_an_example(name: str) -> None:
    raised = sections(VERBS[name])["Raises"]
    words = {error for errors_ in raised for error in errors_.split(", ")} - {""}
    assert words and all(hasattr(ckptsurgeon, word) or word == "KeyboardInterrupt" for word in words)
    assert ">>> " in (VERBS[name].__doc__ or "")


# A parameter that several verbs take has the same words in each, but for these, which mean another thing in another verb.
OTHER_WORDS = {
    *("path", "source", "target", "checkpoint", "model", "what", "optimizer", "scheduler"),
    *("full", "partial", "root", "lr", "layer_decay", "weight_decay", "progress"),
}


def test_a_parameter_has_the_same_words_in_every_verb() -> None:
    said: dict[str, set[str]] = {}
    for function in VERBS.values():
        for name, words in sections(function)["Args"].items():
            said.setdefault(name, set()).add(words)
    assert {name for name, words in said.items() if len(words) > 1} == OTHER_WORDS


RESULTS = {name: kind for name, kind in PUBLIC.items() if isinstance(kind, type) and is_dataclass(kind)}


@pytest.mark.parametrize("name", RESULTS)
def test_every_field_of_a_result_has_words(name: str) -> None:
    said = sections(RESULTS[name])["Attributes"]
    assert set(said) == {field.name for field in fields(RESULTS[name])}
    assert all(words.endswith(".") for words in said.values())
