"""Models over ranks: torchrun is started once for each number of ranks, runs every check of `checks_*.py`, and each is a test here."""

from __future__ import annotations

import ast
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
SECONDS = 300


def run(size: int, folder: Path, backend: str = "gloo", name: str = "") -> dict[str, str]:
    """Each check's result, by its name; `""` for a good one."""
    results = folder / "results.json"
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}", HERE / "run_checks.py"]
    environment = {**os.environ, "CHECKS_BACKEND": backend, "PYTHONWARNINGS": "ignore"}
    try:
        done = subprocess.run(
            [*words, results, folder, *([name] if name else [])],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired as error:
        pytest.fail(f"{size} ranks did not end in {SECONDS} s: {str(error.stdout)[-4000:]}")
    if not results.exists():
        pytest.fail(f"{size} ranks ended without results: {done.stdout[-4000:]}")
    found: dict[str, str] = json.loads(results.read_text())
    return found


def names(size: int) -> list[str]:
    """The checks for a number of ranks, as `@check(2, 4)` stands above them; torch is not imported for it."""
    found = []
    for path in sorted(HERE.glob("checks_*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.decorator_list:
                sizes = [ast.literal_eval(size) for call in node.decorator_list if isinstance(call, ast.Call) for size in call.args]
                found += [f"{path.stem.removeprefix('checks_')}-{node.name}"] if size in sizes else []
    return found


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One for all of pytest's workers."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def results(size: int, folder: Path) -> dict[str, str]:
    """What one run of all checks gave, which the first worker that comes here starts."""
    own = folder / f"ranks-{size}"
    with open(folder / f"ranks-{size}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not own.exists():
            own.mkdir()
            (own / "all.json").write_text(json.dumps(run(size, own)))
        found: dict[str, str] = json.loads((own / "all.json").read_text())
    return found


@pytest.mark.parametrize("name", names(2))
def test_on_two_ranks(name: str, folder: Path) -> None:
    assert results(2, folder)[name] == ""


@pytest.mark.parametrize("name", names(4))
def test_on_four_ranks(name: str, folder: Path) -> None:
    assert results(4, folder)[name] == ""
