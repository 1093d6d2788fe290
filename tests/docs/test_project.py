"""What a contributor finds: the workflow's matrix, the hooks, and pages whose links and commands are there."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from itertools import chain
from pathlib import Path

import pytest

import ckptsurgeon

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).resolve().parents[2]
PAGES = [*(ROOT / ".github").glob("*.md"), ROOT / "tests" / "README.md"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
JOBS = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
HOOKS = ROOT / ".pre-commit-config.yaml"


def commands(job: str) -> list[str]:
    return [step["run"] for step in JOBS[job]["steps"] if "run" in step]


def test_the_workflow_runs_each_python_with_the_newest_torch_and_the_oldest() -> None:
    matrix = JOBS["test"]["strategy"]["matrix"]
    pythons = [re.sub(r".* :: ", "", row) for row in PROJECT["project"]["classifiers"] if re.search(r":: 3\.\d+$", row)]
    assert matrix["python"] == pythons == ["3.11", "3.12", "3.13", "3.14"] and matrix["torch"] == ["torch"]
    (oldest,) = (row.partition(">=")[2] for row in PROJECT["project"]["dependencies"] if row.startswith("torch"))
    assert {row["torch"] for row in matrix["include"]} == {f"torch=={oldest}.*"}
    assert {row["python"] for row in matrix["include"]} <= set(pythons)
    assert f">={pythons[0]}" == PROJECT["project"]["requires-python"]


def test_what_needs_no_torch_is_tried_on_three_systems() -> None:
    assert JOBS["torch-free"]["strategy"]["matrix"]["system"] == ["ubuntu-latest", "macos-latest", "windows-latest"]
    assert not [command for command in commands("torch-free") if re.search(r"pip install.*\btorch\b", command)]


def test_every_job_has_steps_and_names_what_is_there() -> None:
    known = {"pip", "ruff", "mypy", "pre-commit", "pytest", "python", "coverage"}
    for command in chain.from_iterable(map(commands, JOBS)):
        assert command.split()[0] in known, command
        stem = re.sub(r"(\S*)\{([^}]*)\}(\S*)", lambda row: " ".join(row[1] + part + row[3] for part in row[2].split(",")), command)
        for path in re.findall(r"(?:tests|fixtures)/[\w/.]+", stem):
            assert (ROOT / path).exists(), path
    assert any("--cov=ckptsurgeon" in command for command in commands("coverage"))


def test_the_whole_check_runs_the_tests_of_the_readme_and_those_it_leaves_out() -> None:
    check = (ROOT / ".ci" / "run").read_text()
    (quick,) = re.findall(r"\.venv/bin/(pytest .*)", (ROOT / "README.md").read_text())
    assert quick == "pytest -n 2 -m 'not slow'"
    assert re.findall(r"^pytest.*", check, re.MULTILINE) == [quick, "pytest -n 2 -m slow"] and "HYPOTHESIS_PROFILE=ci" in check
    assert not any(re.search("pytest .*not slow", command) for command in commands("test"))


@pytest.mark.skipif(find_spec("pre_commit") is None or shutil.which("git") is None, reason="needs pre-commit and git")
def test_the_hooks_are_valid() -> None:
    done = subprocess.run([sys.executable, "-m", "pre_commit", "validate-config", HOOKS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_hooks_are_ruff_mypy_and_our_own_gate_on_the_fixtures() -> None:
    (local,) = yaml.safe_load(HOOKS.read_text())["repos"]
    hooks = {row["id"]: row for row in local["hooks"]}
    assert list(hooks) == ["ruff", "ruff-format", "mypy", "ckptsurgeon-check"]
    gate = hooks["ckptsurgeon-check"]
    assert re.search(gate["files"], "fixtures/net_params.pkl") and not re.search(gate["files"], "tests/hostile/files/x.pt")
    words = [sys.executable, "-m", *gate["entry"].split(), ROOT / "fixtures" / "net_params.pkl"]
    assert subprocess.run(words, capture_output=True).returncode == 0


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_and_every_place_is_there(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / target).exists(), target
    for path in re.findall(r"`(tests/[\w/]+\.py)`", text) + re.findall(r"\$ python (\S+\.py)", text):
        assert (ROOT / path).exists(), path


def test_the_changelog_has_this_version() -> None:
    assert f"## {ckptsurgeon.__version__}" in (ROOT / ".github" / "CHANGELOG.md").read_text()


def test_an_interrupt_interrupts_where_sigint_is_ignored() -> None:
    """As in a background job: what conftest sets is what the programs start with."""
    if sys.platform == "win32":
        pytest.skip("a background job is POSIX's")
    chosen = "tests/cli/test_cli_exit_codes.py::test_an_interrupt_that_python_drops_is_one_all_the_same"
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", chosen]
    run = f"signal.signal(signal.SIGINT, signal.SIG_IGN); os.execv({sys.executable!r}, {words!r})"
    done = subprocess.run([sys.executable, "-c", f"import os, signal; {run}"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("environment", "expected"),
    [({}, "dev 10 10"), ({"CI": "true"}, "ci 12 40"), ({"HYPOTHESIS_PROFILE": "long", "CI": "true"}, "long 240 800")],
)
def test_the_environment_names_hypothesis_profile(environment: dict[str, str], expected: str) -> None:
    asked = "import profiles as p; p.load(); print(p.settings.get_current_profile_name(), p.examples(12), p.examples(40))"
    clean = {name: value for name, value in os.environ.items() if name not in ("CI", "HYPOTHESIS_PROFILE")}
    words = [sys.executable, "-c", asked]
    done = subprocess.run(words, capture_output=True, text=True, cwd=ROOT / "tests", env={**clean, **environment}, check=True)
    assert done.stdout.strip() == expected
