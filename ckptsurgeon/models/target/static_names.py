"""Which Python files of a folder have a name, by their source alone: none is imported, since a hint must never lead to running a script.

Rule: a name counts where a file defines it, or imports it by name; what `from x import *` brings is not known.
"""

from __future__ import annotations

import ast
import warnings
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

from ckptsurgeon.hints import close_names

FILES = 500  # of a folder that are looked at
LARGEST = 1 << 19  # bytes of a file that is parsed


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
    return (defined or imported)[:3]


def _names(path: Path, name: str) -> tuple[set[str], set[str]]:
    """The names that a file defines at its top, and those that it imports; none of a file that can't hold `name` or be parsed."""
    try:
        if path.stat().st_size > LARGEST:
            return set(), set()
        source = path.read_bytes()
        if name.isascii() and name.encode() not in source:
            return set(), set()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            body = ast.parse(source).body
    except (OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        return set(), set()
    defined: set[str] = set()
    imported: set[str] = set()
    for statement in _at_import(body):
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
