"""The house's floors: a module imports only from lower ones, torch stands at the top of `models` alone, and nothing can run a file."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ckptsurgeon"
# From the ground up; a module may import its own floor and those before it.
FLOORS = [
    {"errors", "shown", "dtypes", "tensors", "report", "version"},
    {"formats", "regular_expressions"},
    {"surgery"},
    {"views"},
    {"streaming"},
    {"models"},
    {"api"},
    {"loops"},
    {"cli", "__main__"},
]
HEIGHT = {name: height for height, floor in enumerate(FLOORS) for name in floor}
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem != "__init__")


def floor_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path, top_only: bool = False) -> set[str]:
    """Every module that a file imports, also inside functions unless `top_only`, but not for type checkers alone."""
    found: set[str] = set()

    def walk(node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
                continue
            if top_only and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                continue
            if isinstance(child, ast.Import):
                found.update(alias.name for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path} imports relatively"
                found.add(child.module or "")
                found.update(f"{child.module}.{alias.name}" for alias in child.names)
            walk(child)

    walk(ast.parse(path.read_text()))
    return found


def ours(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("ckptsurgeon.") and name.split(".")[1] in HEIGHT}


def test_every_module_has_a_floor() -> None:
    assert {floor_of(path) for path in MODULES} == set(HEIGHT)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_its_own_floor_and_lower_ones(path: Path) -> None:
    height = HEIGHT[floor_of(path)]
    assert {name for name in ours(imports(path)) if HEIGHT[name] > height} == set()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_torch_stands_at_the_top_of_models_alone(path: Path) -> None:
    if floor_of(path) != "models":
        assert not {name for name in imports(path, top_only=True) if name.split(".")[0] == "torch"}


def test_compare_and_plan_touch_no_file_and_no_torch() -> None:
    for path in (PACKAGE / "surgery").glob("*.py"):
        assert not {name.split(".")[0] for name in imports(path)} & {"torch", "os", "io", "pathlib", "click", "sys"}, path


def calls(path: Path) -> set[str]:
    return {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}


def test_only_the_command_line_prints_and_exits() -> None:
    for path in MODULES:
        if floor_of(path) not in ("cli", "__main__"):
            assert not calls(path) & {"print", "click.echo", "sys.exit", "exit", "os._exit"}, path


def test_nothing_can_run_a_checkpoint() -> None:
    for path in MODULES:
        assert not calls(path) & {"pickle.load", "pickle.loads", "pickle.Unpickler", "eval", "exec", "marshal.loads"}, path
        assert "weights_only=False" not in path.read_text(), path


def test_a_broad_except_stands_only_where_a_persons_own_code_is_called_and_where_a_run_ends() -> None:
    broad = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler) and not (isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None):
                caught = "" if node.type is None else ast.unparse(node.type)
                if not caught or re.search(r"\b(Base)?Exception\b", caught):
                    broad.add(str(path.relative_to(PACKAGE)))
    assert broad == {"models/persons_code.py", "cli/main.py"}


def run(code: str, *arguments: str) -> str:
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True).stdout


def test_importing_the_package_loads_next_to_nothing() -> None:
    heavy = run("import sys, ckptsurgeon; print([m for m in ('torch', 'numpy', 'click', 'tabulate', 'safetensors') if m in sys.modules])")
    assert heavy.strip() == "[]"


def test_the_library_names_every_verb() -> None:
    import ckptsurgeon

    for name in ckptsurgeon.__all__:
        assert getattr(ckptsurgeon, name)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        ckptsurgeon.nonsense  # noqa: B018
    assert set(ckptsurgeon.__all__) <= set(dir(ckptsurgeon))
