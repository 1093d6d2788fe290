"""What we use of torch.distributed is public, and torch 2.6 has it already: every name, method and keyword against a table of that version.

The table, `torch_2_6_distributed.json` beside this file, was read from the wheel without importing it, by

    pip download --no-deps --only-binary=:all: --platform macosx_11_0_arm64 --python-version 311 torch==2.6.0
    python tests/models/test_torch_distributed_names.py torch-2.6.0-cp311-none-macosx_11_0_arm64.whl

and has, for each module, its names: of a function its parameters, of a class its methods with theirs, of an imported name where it is from.
`**` stands for any keyword. The installed torch is asked too.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
PACKAGE = HERE.parents[1] / "ckptsurgeon"
TABLE = HERE / "torch_2_6_distributed.json"
MODULES = ("__init__", "distributed_c10d", "device_mesh", "checkpoint/", "tensor/", "fsdp/", "_tensor/", "algorithms/_checkpoint/")
D = "torch.distributed"
_MODULE = re.compile(r"torch\.distributed(\.\w+)+\.?")  # as a text
# Not public, and used all the same: where, and why nothing breaks without it.
PRIVATE = {f"{D}.algorithms._checkpoint.checkpoint_wrapper": "the name of a module that is known when it is met, never imported"}


def parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """A function's parameters."""
    spec = node.args
    return [one.arg for one in (*spec.posonlyargs, *spec.args, *spec.kwonlyargs)] + (["**"] if spec.kwarg else [])


def names_in(tree: ast.Module, module: str, package: bool) -> dict[str, Any]:
    """The names at a module's top."""
    found: dict[str, Any] = {}
    for node in _statements(tree.body):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            found[node.name] = parameters(node)
        elif isinstance(node, ast.ClassDef):
            own = {one.name: parameters(one) for one in node.body if isinstance(one, ast.FunctionDef)}
            fields = [one.target.id for one in node.body if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name)]
            found[node.name] = {"bases": [ast.unparse(base) for base in node.bases], "methods": own, "fields": fields}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: len(module.split(".")) - node.level + (1 if package else 0)] if node.level else []
            home = ".".join([*base, *(node.module or "").split(".")]).strip(".")
            found.update({alias.asname or alias.name: f"{home}:{alias.name}" for alias in node.names})
        elif isinstance(node, ast.Assign):
            found.update({target.id: None for target in node.targets if isinstance(target, ast.Name)})
    return {name: value for name, value in found.items() if _kept(name, value)}


def _kept(name: str, value: Any) -> bool:
    """Whether a name goes into the table: what is imported from elsewhere does not, nor a private function."""
    return D in value if isinstance(value, str) else isinstance(value, dict) or not name.startswith("_")


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        if isinstance(node, ast.If | ast.Try):
            yield from _statements([*node.body, *node.orelse])
        else:
            yield node


def read_wheel(path: str) -> dict[str, dict[str, Any]]:
    """The table of a wheel."""
    found = {}
    with zipfile.ZipFile(path) as wheel:
        for name in sorted(wheel.namelist()):
            below = name.removeprefix("torch/distributed/")
            if below != name and name.endswith(".py") and below.removesuffix(".py").startswith(MODULES):
                module = name.removesuffix(".py").replace("/", ".")
                package = module.endswith(".__init__")
                module = module.removesuffix(".__init__")
                found[module] = names_in(ast.parse(wheel.read(name)), module, package)
    return found


def uses(tree: ast.Module) -> Iterator[tuple[str, str, tuple[str, ...]]]:
    """What a module uses of torch.distributed: a full dotted name, a method where a subclass has one, and the keywords of a call."""
    aliases: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith(D):
                    yield alias.name, "", ()
                    aliases[alias.asname or alias.name.partition(".")[0]] = alias.name if alias.asname else "torch"
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith(D):
            for alias in node.names:
                aliases[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield f"{node.module}.{alias.name}", "", ()
    aliases.setdefault("torch", "torch")

    def dotted(node: ast.expr) -> str | None:
        if isinstance(node, ast.Name):
            return aliases.get(node.id)
        if isinstance(node, ast.Attribute) and (before := dotted(node.value)) is not None:
            return f"{before}.{node.attr}"
        return None

    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and (name := dotted(node)) is not None and name.startswith(f"{D}."):
            yield name, "", ()
        elif isinstance(node, ast.Call) and (name := dotted(node.func)) is not None and name.startswith(f"{D}."):
            yield name, "", tuple(keyword.arg or "" for keyword in node.keywords)
        elif isinstance(node, ast.ClassDef):
            for base in node.bases:
                if (name := dotted(base)) is not None and name.startswith(f"{D}."):
                    yield from ((name, one.name, ()) for one in node.body if isinstance(one, ast.FunctionDef) and one.name != "__init__")
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _MODULE.fullmatch(node.value):
            yield node.value.rstrip("."), "", ()


def calls_of_subclasses(tree: ast.Module) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Calls of our own classes without an `__init__` of theirs that inherit from torch.distributed's: the base, and the keywords."""
    imported = {
        alias.asname or alias.name: f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(D)
        for alias in node.names
    }
    own = {
        node.name: imported[base.id]
        for node in tree.body
        if isinstance(node, ast.ClassDef) and not any(isinstance(one, ast.FunctionDef) and one.name == "__init__" for one in node.body)
        for base in node.bases
        if isinstance(base, ast.Name) and base.id in imported
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in own:
            yield own[node.func.id], tuple(keyword.arg or "" for keyword in node.keywords)


USED = sorted(
    {(str(path.relative_to(PACKAGE)), *use) for path in PACKAGE.rglob("*.py") for use in uses(ast.parse(path.read_text()))}
    | {
        (str(path.relative_to(PACKAGE)), base, "", keywords)
        for path in PACKAGE.rglob("*.py")
        for base, keywords in calls_of_subclasses(ast.parse(path.read_text()))
    }
)


class Table:
    """Finds names in the table as Python would."""

    def __init__(self, rows: dict[str, dict[str, Any]]) -> None:
        self.rows = rows

    def find(self, name: str, seen: tuple[str, ...] = ()) -> Any:
        """What a full name is: `module`, or its row; KeyError where it is not there."""
        if name in self.rows:
            return "module"
        if name in seen:
            raise KeyError(name)
        module, _, last = name.rpartition(".")
        rows = self.rows.get(module)
        if rows is None:
            raise KeyError(name)
        if last in rows:
            value = rows[last]
            return self.find(value.replace(":", "."), (*seen, name)) if isinstance(value, str) else value
        star = rows.get("*")
        if star is None:
            raise KeyError(name)
        return self.find(f"{star.partition(':')[0]}.{last}", (*seen, name))

    def method(self, module: str, row: Any, method: str) -> list[str]:
        """The parameters of a class's method, its bases' too."""
        if method in row["methods"]:
            found: list[str] = row["methods"][method]
            return found
        for base in row["bases"]:
            for home in (module, *self.rows):
                value = self.rows.get(home, {}).get(base)
                if isinstance(value, dict):
                    try:
                        return self.method(home, value, method)
                    except KeyError:
                        continue
        raise KeyError(method)


@pytest.fixture(scope="module")
def table() -> Table:
    return Table(json.loads(TABLE.read_text()))


def test_something_is_used() -> None:
    names = {name for _, name, _, _ in USED}
    assert {f"{D}.checkpoint.state_dict_saver.save", f"{D}.checkpoint.state_dict_loader.load", f"{D}.get_rank"} <= names
    assert any(keywords == ("storage_writer",) for _, _, _, keywords in USED) and any(method == "storage_meta" for _, _, method, _ in USED)


@pytest.mark.parametrize(("module", "name", "method", "keywords"), USED, ids=lambda value: str(value))
def test_torch_2_6_has_it(module: str, name: str, method: str, keywords: tuple[str, ...], table: Table) -> None:
    row = table.find(name)
    if method and not method.startswith("_"):
        table.method(name.rpartition(".")[0], row, method)
    if not keywords:
        return
    try:
        accepted = row if isinstance(row, list) else table.method(name.rpartition(".")[0], row, "__init__")
    except KeyError:
        accepted = row["fields"]  # a dataclass
    assert "**" in accepted or set(keywords) <= set(accepted), (module, name, keywords)


@pytest.mark.parametrize(("module", "name", "method", "keywords"), USED, ids=lambda value: str(value))
def test_the_installed_torch_has_it_too(module: str, name: str, method: str, keywords: tuple[str, ...]) -> None:
    try:
        found: Any = importlib.import_module(name)
    except ModuleNotFoundError:
        home, _, last = name.rpartition(".")
        found = getattr(importlib.import_module(home), last)
    if method:
        assert callable(getattr(found, method))
    if keywords and not inspect.isclass(found):
        accepted = inspect.signature(found).parameters
        assert set(keywords) <= set(accepted) or any(one.kind is one.VAR_KEYWORD for one in accepted.values()), module


def test_only_public_names_are_used() -> None:
    private = {name for _, name, _, _ in USED if any(part.startswith("_") for part in name.split("."))}
    assert private == set(PRIVATE)
    passed = {word for path in PACKAGE.rglob("*.py") for word in _keywords(ast.parse(path.read_text()))}
    assert "no_dist" not in passed  # torch 2.6 lacks it, and without a group it is implied


def _keywords(tree: ast.Module) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from (keyword.arg for keyword in node.keywords if keyword.arg)


if __name__ == "__main__":
    TABLE.write_text(json.dumps(read_wheel(sys.argv[1]), separators=(",", ":")) + "\n")
