"""What a person's Python files have, by their text alone: none is imported or run, since a hint must never lead to running a script.

Rule: a name counts where a file defines it, or imports it by name; what `from x import *` brings is not known.
"""

from __future__ import annotations

import ast
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

from ckptsurgeon.hints import close_names

MOST = 3  # names or files that a hint offers
FILES = 500  # of a folder and those in it that are looked at
DEEPEST = 3  # folders within it
LARGEST = 1 << 19  # bytes of a file that is parsed


def model_names(path: str, seen: frozenset[str] = frozenset()) -> list[str]:
    """The public classes of a file that inherit from a `Module`, also by way of a file beside it, the functions without required arguments
    that return one, and names for one; classes that others build on come last. None of a file that can't be read."""
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
        elif isinstance(node, ast.FunctionDef):
            makes = _last(node.returns).endswith("Module") or any(
                _makes_model(one.value, known) for one in ast.walk(node) if isinstance(one, ast.Return)
            )
            if makes and len(node.args.args) == len(node.args.defaults):
                found.append(node.name)
        elif isinstance(node, ast.Assign):
            value = node.value
            plain = not isinstance(value, ast.Lambda) or len(value.args.args) == len(value.args.defaults)
            if plain and _makes_model(value.body if isinstance(value, ast.Lambda) else value, known):
                found += [target.id for target in node.targets if isinstance(target, ast.Name)]
    return sorted((name for name in dict.fromkeys(found) if not name.startswith("_")), key=bases.__contains__)


def _makes_model(value: ast.expr | None, known: dict[str, None]) -> bool:
    """Whether an expression calls a class of models: one that is known, or one of torch's `nn`."""
    if not isinstance(value, ast.Call):
        return False
    made = value.func
    of_torch = isinstance(made, ast.Attribute) and _last(made.value) == "nn" and made.attr[:1].isupper() and made.attr != "Parameter"
    return of_torch or _last(made).endswith("Module") or _last(made) in known


def _last(node: ast.expr | None) -> str:
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def files_with(name: str, wanted: str, folder: Path) -> list[str]:
    """Files of a folder that define `name`, or, where none does, that import it by name; those called much like `wanted` come first. Where
    the folder has none, or none that is called so, those in its folders."""
    files = _files(folder)
    close = close_names(wanted, [file for file in files if os.sep not in file])

    def rank(file: str) -> tuple[bool, bool, int]:
        return os.path.basename(file) != wanted, os.sep in file, close.index(file) if file in close else len(close)

    found: dict[bool, list[str]] = {True: [], False: []}
    for file in sorted(files, key=rank):
        defined, imported = names_in(str(folder / file), name)
        if name in defined or name in imported:
            found[name in defined].append(file)
    best = found[True] or found[False]
    exact = [file for file in best if os.path.basename(file) == wanted]
    return (exact or [file for file in best if os.sep not in file] or best)[:MOST]


def _files(folder: Path) -> list[str]:
    """The Python files of a folder, and of those in it, by their paths from there; installed packages and hidden folders aside."""
    found: list[str] = []
    for root, folders, files in os.walk(folder):
        within = os.path.relpath(root, folder)
        depth = 0 if within == os.curdir else within.count(os.sep) + 1
        own = [name for name in folders if not name.startswith((".", "_")) and name not in ("node_modules", "site-packages")]
        folders[:] = sorted(name for name in own if depth < DEEPEST and not os.path.exists(os.path.join(root, name, "pyvenv.cfg")))
        found += sorted(os.path.normpath(os.path.join(within, name)) for name in files if name.endswith(".py"))
        if len(found) >= FILES:
            break
    return found[:FILES]


def names_in(path: str, name: str = "") -> tuple[set[str], set[str]]:
    """The names that a file defines at its top, and those that it imports; none of a file that can't hold `name` or be parsed."""
    defined: set[str] = set()
    imported: set[str] = set()
    for statement in _at_import(_statements(Path(path), name)):
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
