"""The wheel is whole: every module and every data file of the package is in it, and the program in it answers by its own schema."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import jsonschema
import pytest

ROOT = Path(__file__).resolve().parents[2]
NOT_SHIPPED = {"README.md"}  # the map of the code, for contributors


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the wheel holds, built from a copy so that nothing is left in the source."""
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "ckptsurgeon", folder / "source" / "ckptsurgeon", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(folder), str(folder / "source")]
    built = subprocess.run(command, capture_output=True, text=True)
    if built.returncode and "setuptools" in built.stderr:
        pytest.skip("setuptools, which builds the wheel, can't be had here")
    assert built.returncode == 0, built.stderr
    [wheel] = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "installed")
    return folder / "installed"


def test_the_wheel_holds_every_file_of_the_package(installed: Path) -> None:
    files = {path.relative_to(ROOT) for path in (ROOT / "ckptsurgeon").rglob("*") if path.is_file() and "__pycache__" not in path.parts}
    assert [path for path in sorted(files) if path.name not in NOT_SHIPPED and not (installed / path).is_file()] == []


def test_the_program_in_the_wheel_answers_by_the_schema_in_it(installed: Path, tmp_path: Path) -> None:
    def ran(*words: str) -> str:
        environment = {**os.environ, "PYTHONPATH": str(installed)}
        return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=True, cwd=tmp_path, env=environment).stdout

    assert Path(ran("-c", "import ckptsurgeon; print(ckptsurgeon.__file__)").strip()).is_relative_to(installed)
    answer = json.loads(ran("-m", "ckptsurgeon", "inspect", str(ROOT / "fixtures" / "net_params.pkl"), "--json"))
    jsonschema.validate(answer, json.loads((installed / "ckptsurgeon" / "views" / "schemas" / "inspect.json").read_text()))
    page = (ROOT / "ckptsurgeon" / "guide" / "patterns.md").read_text()
    assert ran("-m", "ckptsurgeon", "guide", "patterns").partition("\n")[0] == page.partition("\n")[0]
