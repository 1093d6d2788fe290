"""Finds names in the user's Python files by parsing them. None is imported or run, since giving a hint must never run a script.

Rule: a file has the names that it defines or imports by name; those that `from x import *` imports are unknown.
"""

from __future__ import annotations

import ast
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from ckptsurgeon.hints import close_names

MOST = 3  # names or files that a hint offers
FILES = 500  # files of a folder and its subfolders that are read
DEEPEST = 3  # levels of subfolders
LARGEST = 1 << 19  # bytes of a file that is parsed


def model_names(path: str, seen: frozenset[str] = frozenset()) -> list[str]:
    """The public names for models in a file: subclasses of a `Module`, also through a file in the same folder; functions without required
    arguments that return a model; and variables that hold one. Base classes of others come last. Empty if the file can't be read."""
    known: dict[str, None] = {}
    names: list[str] = []
    bases: set[str] = set()
    for node in _statements(Path(path)):
        if isinstance(node, ast.ImportFrom) and node.module and path not in seen:
            of_module = model_names(os.path.join(os.path.dirname(path), f"{node.module}.py"), seen | {path})
            known.update((alias.asname or alias.name, None) for alias in node.names if alias.name in of_module)
        elif isinstance(node, ast.ClassDef):
            parents = [_last(base) for base in node.bases]
            if any(name.endswith("Module") or name in known for name in parents):
                known[node.name] = None
                names.append(node.name)
                bases.update(parents)
        elif isinstance(node, ast.FunctionDef):
            returns_model = _last(node.returns).endswith("Module") or any(
                _makes_model(inner.value, known) for inner in ast.walk(node) if isinstance(inner, ast.Return)
            )
            if returns_model and len(node.args.args) == len(node.args.defaults):
                names.append(node.name)
        elif isinstance(node, ast.Assign):
            value = node.value
            needs_no_arguments = not isinstance(value, ast.Lambda) or len(value.args.args) == len(value.args.defaults)
            if needs_no_arguments and _makes_model(value.body if isinstance(value, ast.Lambda) else value, known):
                names += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return sorted((name for name in dict.fromkeys(names) if not name.startswith("_")), key=bases.__contains__)


def _makes_model(value: ast.expr | None, known: dict[str, None]) -> bool:
    """Whether an expression calls a class of models: a known one, or one of `torch.nn`."""
    if not isinstance(value, ast.Call):
        return False
    function = value.func
    of_torch = (
        isinstance(function, ast.Attribute)
        and _last(function.value) == "nn"
        and function.attr[:1].isupper()
        and function.attr != "Parameter"
    )
    return of_torch or _last(function).endswith("Module") or _last(function) in known


def _last(node: ast.expr | None) -> str:
    """The last segment of a dotted name."""
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def files_with(name: str, file_name: str, folder: Path) -> list[str]:
    """Files of a folder and its subfolders that define `name`, or else import it: those called `file_name`, or else those in the folder
    itself, or else all. Names close to `file_name` come first."""
    files = _files(folder)
    close = close_names(file_name, [file for file in files if os.sep not in file])

    def rank(file: str) -> tuple[bool, bool, int]:
        return os.path.basename(file) != file_name, os.sep in file, close.index(file) if file in close else len(close)

    by_definition: dict[bool, list[str]] = {True: [], False: []}
    for file in sorted(files, key=rank):
        defined, imported = names_in(str(folder / file), name)
        if name in defined or name in imported:
            by_definition[name in defined].append(file)
    best = by_definition[True] or by_definition[False]
    exact = [file for file in best if os.path.basename(file) == file_name]
    return (exact or [file for file in best if os.sep not in file] or best)[:MOST]


def _files(folder: Path) -> list[str]:
    """The relative paths of the Python files in a folder and its subfolders, without installed packages and hidden folders."""
    paths: list[str] = []
    for root, folders, files in os.walk(folder):
        within = os.path.relpath(root, folder)
        depth = 0 if within == os.curdir else within.count(os.sep) + 1
        subfolders = [name for name in folders if not name.startswith((".", "_")) and name not in ("node_modules", "site-packages")]
        folders[:] = sorted(name for name in subfolders if depth < DEEPEST and not os.path.exists(os.path.join(root, name, "pyvenv.cfg")))
        paths += sorted(os.path.normpath(os.path.join(within, name)) for name in files if name.endswith(".py"))
        if len(paths) >= FILES:
            break
    return paths[:FILES]


def names_in(path: str, name: str = "") -> tuple[set[str], set[str]]:
    """The names that a file defines at its top level, and those that it imports. Both are empty if the file does not contain `name`."""
    defined: set[str] = set()
    imported: set[str] = set()
    for statement in _at_import(_statements(Path(path), name)):
        if isinstance(statement, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            defined.add(statement.name)
        elif isinstance(statement, (ast.Assign, ast.AnnAssign)) and statement.value is not None:
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            defined.update(node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name))
        elif isinstance(statement, (ast.Import, ast.ImportFrom)):
            imported.update(alias.asname or alias.name for alias in statement.names)
    return defined, imported


def _at_import(body: Sequence[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements that an import runs, also within `if` and `try`, but not those under `if __name__ == "__main__"`."""
    for statement in body:
        yield statement
        if isinstance(statement, ast.If) and "__name__" in {node.id for node in ast.walk(statement.test) if isinstance(node, ast.Name)}:
            yield from _at_import(statement.orelse)
        elif isinstance(statement, (ast.If, ast.Try)):
            handlers = [line for handler in getattr(statement, "handlers", ()) for line in handler.body]
            yield from _at_import([*statement.body, *handlers, *statement.orelse, *getattr(statement, "finalbody", ())])


def _statements(path: Path, name: str = "") -> list[ast.stmt]:
    """A file's statements; empty if the file is too large, can't be read or parsed, or does not contain `name`."""
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
