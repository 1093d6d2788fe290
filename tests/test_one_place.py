"""One decision, one place: what is named here stands in the modules that decide it, and nowhere else in the package."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ckptsurgeon.wrappers import WRAPPERS

PACKAGE = Path(__file__).parents[1] / "ckptsurgeon"
# A name, called, read as an attribute or imported, to the modules that may.
OWNERS = {
    "difflib": {"hints.py"},
    "decompressobj": {"formats/inflate.py"},
    "named_parameters": {"models/target/parameters.py", "models/target/build.py"},
    "named_buffers": {"models/target/parameters.py", "models/target/build.py", "models/own_loading/loaded_values.py"},
}
TREES = {str(path.relative_to(PACKAGE)): ast.parse(path.read_text()) for path in sorted(PACKAGE.rglob("*.py"))}


def names_of(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (node.module or "", *(alias.name for alias in node.names))


def texts_of(tree: ast.AST) -> Iterator[str]:
    """Every text in the code that is no docstring."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    heads = {id(node.body[0].value) for node in ast.walk(tree) if isinstance(node, documented) and isinstance(node.body[0], ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in heads:
            yield node.value


@pytest.mark.parametrize("name", OWNERS)
def test_a_decision_is_made_in_its_modules_alone(name: str) -> None:
    assert {module for module, tree in TREES.items() if name in names_of(tree)} == OWNERS[name]


def test_wrappers_segments_stand_in_one_table() -> None:
    own = WRAPPERS - {"module"}  # a word that means a module of Python too
    holds = {module for module, tree in TREES.items() for text in texts_of(tree) if own & set(text.split("."))}
    assert holds == {"wrappers.py"}


def test_the_scheme_that_copies_a_key_is_read_in_one_place() -> None:
    holds = {module for module, tree in TREES.items() for text in texts_of(tree) if r"from\s*\(" in text or r"from\(" in text}
    assert holds == {"rules/copied_value.py"}


def test_what_the_package_defines_it_uses() -> None:
    """Functions and classes at the top of a module; methods are also called by click, torch and training loops."""
    defined = {node.name for tree in TREES.values() for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    used = {node.id for tree in TREES.values() for node in ast.walk(tree) if isinstance(node, ast.Name)}
    used |= {name for tree in TREES.values() for name in names_of(tree)}
    used |= {word for tree in TREES.values() for text in texts_of(tree) for word in re.findall(r"\w+", text)}  # tables of dotted names
    assert {name for name in defined - used if not re.fullmatch(r"__\w+__", name)} == set()
