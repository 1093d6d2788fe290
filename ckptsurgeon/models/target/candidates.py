"""The specs that a path without one may mean: the models in a person's Python file, by its text. Nothing is imported or run."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterator

MOST = 3  # specs that a hint offers
_LARGEST = 1 << 20


def specs_of(text: str) -> list[str]:
    """The specs that a target may mean which is a `.py` file, or a module's name without one.

    >>> specs_of("fixtures/model.py"), specs_of("fixtures/net_params.pkl")
    (['fixtures/model.py:Net', 'fixtures/model.py:TutorialModule'], [])
    """
    path = text if text.endswith(".py") else f"{text.replace('.', os.sep)}.py"
    return [f"{text}:{name}" for name in model_names(path)[:MOST]]


def model_names(path: str, seen: frozenset[str] = frozenset()) -> list[str]:
    """The public classes of a file that inherit from a `Module`, also by way of a file beside it, and the functions without required
    arguments that return one; classes that others build on come last. None of a file that can't be read."""
    try:
        with open(path, "rb") as file:
            body = ast.parse(file.read(_LARGEST)).body if os.path.isfile(path) else []
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []
    known: dict[str, None] = {}
    found: list[str] = []
    bases: set[str] = set()
    for node in body:
        if isinstance(node, ast.ImportFrom) and node.module and path not in seen:
            beside = model_names(os.path.join(os.path.dirname(path), f"{node.module}.py"), seen | {path})
            known.update((alias.asname or alias.name, None) for alias in node.names if alias.name in beside)
        elif isinstance(node, ast.ClassDef):
            names = [_last(base) for base in node.bases]
            if any(name.endswith("Module") or name in known for name in names):
                known[node.name] = None
                found.append(node.name)
                bases.update(names)
        elif (
            isinstance(node, ast.FunctionDef)
            and len(node.args.args) == len(node.args.defaults)
            and any(name.endswith("Module") or name in known for name in _returned(node))
        ):
            found.append(node.name)
    return sorted((name for name in dict.fromkeys(found) if not name.startswith("_")), key=bases.__contains__)


def _returned(function: ast.FunctionDef) -> Iterator[str]:
    """What a function says that it returns, and what its `return` statements call."""
    yield _last(function.returns)
    yield from (_last(one.value.func) for one in ast.walk(function) if isinstance(one, ast.Return) and isinstance(one.value, ast.Call))


def _last(node: ast.expr | None) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""
