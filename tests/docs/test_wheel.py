"""The wheel is whole: every module and every data file of the package is in it, and the program in it answers by its own schema."""

from __future__ import annotations

import email
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import click
import jsonschema
import pytest
import tabulate

import ckptsurgeon

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]


MOST_BYTES = 1_000_000


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the wheel is built from, a `tests` folder beside it."""
    folder = tmp_path_factory.mktemp("source")
    shutil.copytree(ROOT / "ckptsurgeon", folder / "ckptsurgeon", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    (folder / "tests").mkdir()
    (folder / "tests" / "test_nothing.py").touch()
    return folder


@pytest.fixture(scope="module")
def wheel(source: Path) -> Path:
    before = sorted(source.rglob("*"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(source / "dist"), str(source)]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode and "No matching distribution found for flit_core" in built.stderr:
        pytest.skip("flit_core, which builds the wheel, can't be had here")
    assert built.returncode == 0, built.stderr
    [wheel] = (source / "dist").glob("*.whl")
    assert sorted(path for path in source.rglob("*") if path not in (wheel, wheel.parent)) == before, "the build leaves files in the source"
    return wheel


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel holds."""
    folder = tmp_path_factory.mktemp("installed")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_is_small_and_holds_the_package_alone(wheel: Path, installed: Path) -> None:
    assert wheel.stat().st_size < MOST_BYTES
    assert [path.name for path in sorted(installed.iterdir())] == ["ckptsurgeon", f"ckptsurgeon-{ckptsurgeon.__version__}.dist-info"]
    assert not [path for path in installed.rglob("*") if path.name == "tests" or path.name.startswith(("test_", "conftest"))]


def test_it_says_its_version_and_its_licence(installed: Path) -> None:
    (information,) = installed.glob("*.dist-info")
    fields = email.message_from_string((information / "METADATA").read_text())
    assert fields["Version"] == ckptsurgeon.__version__
    assert (fields["License-Expression"], fields["License-File"]) == ("MIT", "LICENSE")
    assert (information / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_the_wheel_holds_every_file_of_the_package(installed: Path) -> None:
    files = {path.relative_to(ROOT) for path in (ROOT / "ckptsurgeon").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert [path for path in sorted(files) if not (installed / path).is_file()] == []


def test_the_program_in_the_wheel_answers_by_the_schema_in_it(installed: Path, tmp_path: Path) -> None:
    def ran(*words: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(installed)}
        return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment).stdout

    assert Path(ran("-c", "import ckptsurgeon; print(ckptsurgeon.__file__)").strip()).is_relative_to(installed)
    answer = json.loads(ran("-m", "ckptsurgeon", "inspect", str(ROOT / "fixtures" / "net_params.pkl"), "--json"))
    jsonschema.validate(answer, json.loads((installed / "ckptsurgeon" / "views" / "schemas" / "inspect.json").read_text()))
    page = (ROOT / "ckptsurgeon" / "guide" / "patterns.md").read_text()
    assert ran("-m", "ckptsurgeon", "guide", "patterns").partition("\n")[0] == page.partition("\n")[0]


def python(version: str) -> str:
    """The interpreter of this version; the test skips where there is none."""
    if f"{sys.version_info.major}.{sys.version_info.minor}" == version:
        return sys.executable
    found = shutil.which(f"python{version}")
    if found is None or subprocess.run([found, "-c", "import venv"], capture_output=True).returncode:
        pytest.skip(f"python{version} is not on PATH")
    return found


@pytest.mark.parametrize("version", ["3.11", "3.12", "3.13", "3.14"])
def test_it_is_installed_and_run_on_each_python(version: str, wheel: Path, tmp_path: Path) -> None:
    """As `pip install` does it, not editable, in an environment without torch: what needs none works there."""
    subprocess.run([python(version), "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    folder, ending = ("Scripts", ".exe") if sys.platform == "win32" else ("bin", "")
    here, program = (tmp_path / "venv" / folder / f"{name}{ending}" for name in ("python", "ckptsurgeon"))
    pip = [sys.executable, "-m", "pip", "--python", str(here), "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    packages = subprocess.run([here, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], capture_output=True, text=True)
    for package in (click, tabulate):  # of Python alone, so that they run on any
        where = Path(package.__file__)
        if where.name == "__init__.py":
            shutil.copytree(where.parent, Path(packages.stdout.strip()) / where.parent.name)
        else:
            shutil.copy(where, packages.stdout.strip())

    def ran(*words: object) -> str:
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        done = subprocess.run(list(map(str, words)), capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert ran(program, "--version") == ran(here, "-m", "ckptsurgeon", "--version") == f"ckptsurgeon, version {ckptsurgeon.__version__}\n"
    weights = ROOT / "fixtures" / "net_params.pkl"
    assert "transferred    10" in ran(here, "-m", "ckptsurgeon", "merge", weights, "-o", "net.safetensors")
    assert "all good" in ran(here, "-m", "ckptsurgeon", "check", "net.safetensors", "--full")
    assert "  matched        10\n" in ran(here, "-m", "ckptsurgeon", "diff", weights, "net.safetensors")
