"""What a person's Python files have, by their text alone: none is imported or run, since a hint must never lead to running a script.

Rule: a name counts where a file defines it, or imports it by name; what `from x import *` brings is not known.
"""

from __future__ import annotations

import ast
import os
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from ckptsurgeon.hints import close_names

MOST = 3  # names or files that a hint offers
FILES = 500  # of a folder that are looked at
LARGEST = 1 << 19  # bytes of a file that is parsed


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
    known: dict[str, None] = {}
    found: list[str] = []
    bases: set[str] = set()
    for node in _statements(Path(path)):
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


def files_with(name: str, wanted: str, folder: Path) -> list[str]:
    """Files of a folder that define `name`, or, where none does, that import it by name; those called much like `wanted` come first."""
    try:
        files = sorted(path.name for path in islice(folder.iterdir(), FILES) if path.suffix == ".py" and path.is_file())
    except OSError:
        return []
    close = close_names(wanted, files)
    defined, imported = [], []
    for file in [*close, *(file for file in files if file not in close)]:
        names = _names(folder / file, name)
        if name in names[0]:
            defined.append(file)
        elif name in names[1]:
            imported.append(file)
    return (defined or imported)[:MOST]


def _names(path: Path, name: str) -> tuple[set[str], set[str]]:
    """The names that a file defines at its top, and those that it imports; none of a file that can't hold `name` or be parsed."""
    defined: set[str] = set()
    imported: set[str] = set()
    for statement in _at_import(_statements(path, name)):
        if isinstance(statement, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            defined.add(statement.name)
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)) and statement.value is not None:
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            defined.update(node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name))
        elif isinstance(statement, (ast.Import, ast.ImportFrom)):
            imported.update(one.asname or one.name for one in statement.names)
    return defined, imported


def _at_import(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that an import runs, within `if` and `try` too, save under `if __name__ == "__main__"`."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If) and "__name__" in {node.id for node in ast.walk(statement.test) if isinstance(node, ast.Name)}:
            yield from _at_import(statement.orelse)
        elif isinstance(statement, (ast.If, ast.Try)):
            handlers = [line for handler in getattr(statement, "handlers", ()) for line in handler.body]
            yield from _at_import([*statement.body, *handlers, *statement.orelse, *getattr(statement, "finalbody", ())])


def _statements(path: Path, name: str = "") -> list[ast.stmt]:
    """A file's statements; none of a file that is large, can't be read or parsed, or does not hold `name`."""
    try:
        if not path.is_file() or path.stat().st_size > LARGEST:
            return []
        source = path.read_bytes()
        if name.isascii() and name.encode() not in source:
            return []
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return ast.parse(source).body
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return []
