"""The pre-commit hooks by the real program on real repositories: in the project's own environment, and in one that pre-commit builds."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml
from cli_support import ROOT

HOOKS = ROOT / ".pre-commit-hooks.yaml"
BIN = Path(sys.executable).parent
PRE_COMMIT = [sys.executable, "-m", "pre_commit"]
pytestmark = pytest.mark.skipif(find_spec("pre_commit") is None or shutil.which("git") is None, reason="needs pre-commit and git")
SYSTEM, ISOLATED = "ckptsurgeon-check", "ckptsurgeon-check-isolated"
BUILT_BY = tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]
GOOD, CUT = "good.pt", "cut.pt"


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """An empty repository, with ckptsurgeon on PATH and pre-commit's own cache out of the way."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{BIN}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PRE_COMMIT_HOME", str(tmp_path / ".cache"))
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)  # pip's settings, beside it in the home, are needed
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):
        monkeypatch.delenv(name, raising=False)
    start(tmp_path)
    Path(".gitignore").write_text(".cache/\n.hooks/\n.trap/\n")
    return tmp_path


def git(*words):
    return subprocess.run(["git", *map(str, words)], capture_output=True, text=True)


def start(folder: Path) -> None:
    for words in (("init", "-q"), ("config", "user.email", "someone@example.org"), ("config", "user.name", "Someone")):
        git("-C", folder, *words)


def hook(identity: str) -> dict[str, object]:
    return next(row for row in yaml.safe_load(HOOKS.read_text()) if row["id"] == identity)


def install(repo: dict[str, object]) -> None:
    Path(".pre-commit-config.yaml").write_text(yaml.safe_dump({"repos": [repo]}))
    installed = subprocess.run([*PRE_COMMIT, "install"], capture_output=True, text=True)
    assert installed.returncode == 0, installed.stdout + installed.stderr


def configure(**more: object) -> None:
    """A configuration that takes the hook's definition as it stands."""
    install({"repo": "local", "hooks": [{**hook(SYSTEM), **more}]})


def published(folder: Path) -> str:
    """This project as a repository of its own, in its present state; its commit."""
    folder.mkdir()
    shutil.copytree(ROOT / "ckptsurgeon", folder / "ckptsurgeon", ignore=shutil.ignore_patterns("__pycache__"))
    for name in (HOOKS.name, "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    start(folder)
    git("-C", folder, "add", "-A")
    done = git("-C", folder, "commit", "-qm", "x")
    assert done.returncode == 0, done.stderr
    return git("-C", folder, "rev-parse", "HEAD").stdout.strip()


def commit():
    git("add", "-A")
    return git("commit", "-m", "a change")


def passes_the_good_and_blocks_the_bad() -> None:
    torch.save({"w": torch.zeros(2)}, GOOD)
    Path("notes.txt").write_text("no checkpoint\n")
    good = commit()
    assert good.returncode == 0, good.stdout + good.stderr
    assert "Passed" in good.stdout + good.stderr
    data = Path(GOOD).read_bytes()
    Path(CUT).write_bytes(data[: len(data) // 2])
    bad = commit()
    said = bad.stdout + bad.stderr
    assert bad.returncode == 1 and f"{CUT}: CK102 is truncated" in said and GOOD not in said, said
    assert git("log", "--oneline").stdout.count("\n") == 1
    Path(CUT).unlink()


def test_both_definitions_are_valid():
    done = subprocess.run([*PRE_COMMIT, "validate-manifest", HOOKS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    system, isolated = hook(SYSTEM), hook(ISOLATED)
    assert (system["language"], isolated["language"]) == ("system", "python")
    assert system["files"] == isolated["files"] and system["entry"] == isolated["entry"] == "ckptsurgeon check"


def test_the_hooks_and_a_folder_mean_the_same_files():
    from ckptsurgeon.formats.registry import SUFFIXES

    before, *suffixes, after = re.split(r"[(|)]", hook(SYSTEM)["files"])
    assert (before, after) == (r"\.", "$") and {f".{suffix}" for suffix in suffixes} == set(SUFFIXES)


# --- language: system ---------------------------------------------------------------------------------------------------------------


def test_a_good_commit_passes_and_a_bad_one_is_blocked(repository):
    configure()
    passes_the_good_and_blocks_the_bad()


def test_ten_files_without_torch(repository, monkeypatch):
    """A torch that leaves a mark when it is imported. How long it takes, `tests/bench/run.py` measures."""
    trap = repository / ".trap"
    (trap / "torch").mkdir(parents=True)
    (trap / "torch" / "__init__.py").write_text(f"open({str(trap / 'imported')!r}, 'w').close()\nraise ImportError('a trap')\n")
    for number in range(10):
        torch.save({f"layers.{layer}.weight": torch.zeros(3) for layer in range(50)}, f"{number}.pt")
    subprocess.run([BIN / "ckptsurgeon", "skeleton", "0.pt", "-o", "net.json"], check=True, capture_output=True)
    monkeypatch.setenv("PYTHONPATH", str(trap))
    Path("pyproject.toml").write_text('[tool.ckptsurgeon.check]\nfull = true\nallow = "torch"\ndtype = "F32"\nmax-size = "1MB"\n')
    configure(args=["--against", "net.json"])
    good = commit()
    assert good.returncode == 0 and "Passed" in good.stdout + good.stderr, good.stdout + good.stderr
    torch.save({f"layers.{layer}.weight": torch.zeros(3) for layer in range(49)}, "7.pt")
    bad = commit()
    assert bad.returncode == 1 and "7.pt: CK301 layers.49.weight: is in the target only" in bad.stdout + bad.stderr
    assert not (trap / "imported").exists()
    seen = subprocess.run([BIN / "ckptsurgeon", "check", "0.pt", "--finite"], capture_output=True, text=True)
    assert (trap / "imported").exists() and seen.returncode  # so the trap works


def test_a_commit_without_checkpoints_does_not_run_it(repository):
    configure()
    Path("notes.txt").write_text("no checkpoint\n")
    assert "Skipped" in commit().stderr


def test_an_lfs_pointer_is_told_as_one(repository):
    configure()
    Path("net.pt").write_text(f"version https://git-lfs.github.com/spec/v1\noid sha256:{'0' * 64}\nsize 12345\n")
    bad = commit()
    assert bad.returncode == 1 and "net.pt: CK105 is a Git LFS pointer" in bad.stdout + bad.stderr


def test_as_another_repository_names_it(repository):
    """`pre-commit try-repo` clones the hooks' repository and runs the hook by its id."""
    published(repository / ".hooks")
    torch.save({"w": torch.zeros(2)}, GOOD)
    git("add", "-A")
    words = [*PRE_COMMIT, "try-repo", repository / ".hooks", SYSTEM, "--all-files"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and "Passed" in done.stdout, done.stdout + done.stderr
    Path("page.safetensors").write_text("<html></html>")
    git("add", "-A")
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1 and "page.safetensors: CK102 is an HTML page" in done.stdout


# --- language: python ---------------------------------------------------------------------------------------------------------------


def pip(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True)


def need(*requirements: str) -> None:
    """Skip, with the reason, where pip can't find what an environment needs, or would bring gigabytes of CUDA."""
    found = pip("install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-", *requirements)
    if found.returncode:
        pytest.skip(f"pip finds no {' '.join(requirements)} here: {found.stderr.strip()[-200:]}")
    names = [row["metadata"]["name"] for row in json.loads(found.stdout)["install"]]
    heavy = [name for name in names if name.startswith(("nvidia-", "cuda-")) or name == "triton"]
    if heavy:
        pytest.skip(f"pip would bring CUDA ({', '.join(heavy[:3])} …)")


def isolated(repository: Path) -> Path:
    """Use the hook as another repository does; where pre-commit builds its environments."""
    hooks = repository / ".hooks"
    install({"repo": str(hooks), "rev": published(hooks), "hooks": [{"id": ISOLATED}]})
    return repository / ".cache"


def has_torch(cache: Path) -> bool:
    (environment,) = cache.glob("repo*/py_env-*")
    return any(environment.glob("lib/python*/site-packages/torch/__init__.py"))


@pytest.mark.slow
def test_isolated_without_dependencies(repository, monkeypatch):
    """What a gate uses and no more: no torch, and it works, and says what it can't do."""
    need(*BUILT_BY, "click>=8.1")
    cache = isolated(repository)
    monkeypatch.setenv("PIP_NO_DEPS", "1")
    built = subprocess.run([*PRE_COMMIT, "install-hooks"], capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    monkeypatch.delenv("PIP_NO_DEPS")
    passes_the_good_and_blocks_the_bad()
    assert not has_torch(cache)
    (program,) = cache.glob("repo*/py_env-*/bin/ckptsurgeon")
    for words in (["--finite"], ["--against", "model:Net"]):
        done = subprocess.run([program, "check", GOOD, *words], capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.startswith("error: this needs torch, which is not installed here"), done.stderr
    made = subprocess.run([program, "skeleton", GOOD, "-o", "net.json"], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    full = [program, "check", GOOD, "--against", "net.json", "--full", "--dtype", "F32", "--allow", "torch", "--max-size", "1MB"]
    assert subprocess.run(full, capture_output=True).returncode == 0


@pytest.mark.slow
def test_isolated_with_all_that_it_depends_on(repository, monkeypatch):
    version = torch.__version__.partition("+")[0]
    need(*BUILT_BY, f"torch=={version}", "safetensors>=0.4.3", "click>=8.1", "tabulate>=0.9")
    constraint = repository / ".cache" / "constraint.txt"
    constraint.parent.mkdir()
    constraint.write_text(f"torch=={version}\n")
    monkeypatch.setenv(
        "PIP_CONSTRAINT", " ".join(filter(None, (str(constraint), pip("config", "get", "global.constraint").stdout.strip())))
    )
    cache = isolated(repository)
    passes_the_good_and_blocks_the_bad()
    assert has_torch(cache)
    torch.save({"w": torch.tensor([float("nan")])}, "nan.pt")
    Path("pyproject.toml").write_text("[tool.ckptsurgeon.check]\nfinite = true\n")
    bad = commit()
    assert bad.returncode == 1 and "nan.pt: CK401 w: has 1 value" in bad.stdout + bad.stderr
