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
    {
        *(
            "errors",
            "shown",
            "dtypes",
            "sizes",
            "tensors",
            "report",
            "limit_table",
            "hints",
            "wrappers",
            "call_text",
            "finding_codes",
        ),
        *("argument_examples", "arguments", "parameter_types", "command", "loading", "low_rank"),
        *("regular_expressions", "progress"),
    },
    {"storage"},
    {"adapters"},
    {"rules"},
    {"formats"},
    {"planning"},
    {"optimizer"},
    {"matching"},
    {"streaming"},
    {"views"},
    {"models"},
    {"api"},
    {"loops"},
    {"cli", "__main__"},
]
# Rooms within a floor, from the ground up as well.
ROOMS = {
    "adapters": [
        {"op", "user_adapter", "widening"},
        {"shapes"},
        {"layout", "combining", "vision", "rows", "quantised", "factors"},
        {"table"},
        {"chain"},
    ],
    "models": [{"target"}, {"init"}, {"own_loading"}, {"training"}, {"sharded"}, {"verify"}],
}
MOST_MODULES, MOST_LINES = 20, 400
HEIGHT = {name: height for height, floor in enumerate(FLOORS) for name in floor}
ROOM_HEIGHT = {floor: {name: height for height, room in enumerate(rooms) for name in room} for floor, rooms in ROOMS.items()}
EVERY = sorted(PACKAGE.rglob("*.py"))
MODULES = [path for path in EVERY if path.parent != PACKAGE or path.stem != "__init__"]


def name_of(path: Path) -> str:
    return ".".join((PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__")


NAMES = {name_of(path): path for path in EVERY}


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
                names = [f"{child.module}.{alias.name}" for alias in child.names]
                found.update(name if name in NAMES else child.module or "" for name in names)
            walk(child)

    walk(ast.parse(path.read_text()))
    return found


def ours(path: Path) -> set[str]:
    """The package's own modules that a file imports."""
    return {name for name in imports(path) if name in NAMES and name != PACKAGE.name}


def part(name: str, depth: int) -> str:
    return (name.split(".") + [""] * depth)[depth]


def test_every_module_has_a_floor_and_every_room_a_place() -> None:
    assert {floor_of(path) for path in MODULES} == set(HEIGHT)
    for floor, rooms in ROOM_HEIGHT.items():
        assert {path.stem if path.is_file() else path.name for path in (PACKAGE / floor).glob("[!_]*")} == set(rooms), floor


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_its_own_floor_and_lower_ones(path: Path) -> None:
    floor, room = floor_of(path), part(name_of(path), 2)
    assert {name for name in ours(path) if HEIGHT[part(name, 1)] > HEIGHT[floor]} == set()
    if room:
        rooms = ROOM_HEIGHT.get(floor, {})
        higher = {name for name in ours(path) if part(name, 1) == floor and part(name, 2) and rooms and rooms[part(name, 2)] > rooms[room]}
        assert higher == set()


def test_the_table_of_views_is_the_only_way_up() -> None:
    """A module that is imported by its name, as a string, is an import all the same."""
    up = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            named = node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""
            if named.startswith(f"{PACKAGE.name}.") and named.split(".")[1] in HEIGHT:
                up.update({floor_of(path)} if HEIGHT[named.split(".")[1]] > HEIGHT[floor_of(path)] else ())
    assert up == {"shown"}


@pytest.mark.parametrize("path", sorted((PACKAGE / "cli" / "commands").glob("[!_]*.py")), ids=lambda path: path.stem)
def test_a_command_imports_only_the_options_at_its_top(path: Path) -> None:
    """All else it imports when it runs, so that no command pays for another."""
    assert {name for name in imports(path, top_only=True) if name in NAMES} == {"ckptsurgeon.cli.options"}


def test_no_imports_go_round_in_a_circle() -> None:
    """Those inside functions too: a circle that is broken by a late import is one all the same."""
    left = {name: ours(path) - {name} for name, path in NAMES.items() if name != PACKAGE.name}
    for name, needs in left.items():  # what a package offers, it may import; and its modules do not need it for it
        needs.difference_update(name.rsplit(".", depth)[0] for depth in range(1, name.count(".")))
    while ready := [name for name, needs in left.items() if not needs & set(left)]:
        for name in ready:
            del left[name]
    assert not left, f"these import each other: {sorted(left)}"


def test_no_folder_and_no_module_is_too_large() -> None:
    for folder in {path.parent for path in MODULES}:
        assert len([path for path in folder.glob("*.py") if path.stem != "__init__"]) <= MOST_MODULES, folder
    assert [path for path in EVERY if len(path.read_text().splitlines()) > MOST_LINES] == []


def test_every_folder_says_its_rule() -> None:
    assert [path for path in EVERY if path.stem == "__init__" and not ast.get_docstring(ast.parse(path.read_text()))] == []


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_torch_stands_at_the_top_of_models_alone(path: Path) -> None:
    if floor_of(path) != "models":
        assert not {name for name in imports(path, top_only=True) if name.split(".")[0] == "torch"}


@pytest.mark.parametrize("floor", ["rules", "planning", "optimizer", "matching"])
def test_what_decides_touches_no_file_and_no_torch(floor: str) -> None:
    for path in (PACKAGE / floor).rglob("*.py"):
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


def test_a_broad_except_stands_only_where_user_code_is_called_where_a_run_ends_and_where_a_thread_hands_its_error_over() -> None:
    broad = set()
    for path in MODULES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ExceptHandler) and not (isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None):
                caught = "" if node.type is None else ast.unparse(node.type)
                if not caught or re.search(r"\b(Base)?Exception\b", caught):
                    broad.add(str(path.relative_to(PACKAGE)))
    assert broad == {"models/target/user_code.py", "cli/main.py", "progress.py", "streaming/in_threads.py"}


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
