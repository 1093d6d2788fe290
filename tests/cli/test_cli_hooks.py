"""The pre-commit hooks: the one of the project's own environment by the real program on a real repository, both as a manifest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from cli_support import ROOT

HOOKS = ROOT / ".pre-commit-hooks.yaml"
BIN = Path(sys.executable).parent


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """An empty repository, with ckptsurgeon on PATH and pre-commit's own cache out of the way."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{BIN}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PRE_COMMIT_HOME", str(tmp_path / ".cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("GIT_DIR", "GIT_INDEX_FILE", "GIT_WORK_TREE"):
        monkeypatch.delenv(name, raising=False)
    git("init", "-q")
    git("config", "user.email", "someone@example.org")
    git("config", "user.name", "Someone")
    Path(".gitignore").write_text(".cache/\n")
    return tmp_path


def git(*words):
    return subprocess.run(["git", *words], capture_output=True, text=True)


def hook(identity: str) -> dict[str, object]:
    return next(row for row in yaml.safe_load(HOOKS.read_text()) if row["id"] == identity)


def configure(**more: object) -> None:
    """A configuration that takes the hook's definition as it stands."""
    rows = [{**hook("ckptsurgeon-check"), **more}]
    Path(".pre-commit-config.yaml").write_text(yaml.safe_dump({"repos": [{"repo": "local", "hooks": rows}]}))
    installed = subprocess.run([BIN / "pre-commit", "install"], capture_output=True, text=True)
    assert installed.returncode == 0, installed.stdout + installed.stderr


def commit():
    git("add", "-A")
    return git("commit", "-m", "a change")


def test_both_definitions_are_valid():
    done = subprocess.run([BIN / "pre-commit", "validate-manifest", HOOKS], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    system, isolated = hook("ckptsurgeon-check"), hook("ckptsurgeon-check-isolated")
    assert (system["language"], isolated["language"]) == ("system", "python")
    assert system["files"] == isolated["files"] and system["entry"] == isolated["entry"] == "ckptsurgeon check"


def test_a_good_commit_passes_and_a_bad_one_is_blocked(repository):
    configure()
    torch.save({"w": torch.zeros(2)}, "good.pt")
    Path("notes.txt").write_text("no checkpoint\n")
    good = commit()
    assert good.returncode == 0, good.stdout + good.stderr
    assert "Passed" in good.stdout + good.stderr
    data = Path("good.pt").read_bytes()
    Path("cut.pt").write_bytes(data[: len(data) // 2])
    bad = commit()
    assert bad.returncode == 1
    assert (
        "cut.pt: CK" in bad.stdout + bad.stderr and "is truncated" in bad.stdout + bad.stderr and "good.pt" not in bad.stdout + bad.stderr
    )
    assert git("log", "--oneline").stdout.count("\n") == 1


def test_a_commit_without_checkpoints_does_not_run_it(repository):
    configure()
    Path("notes.txt").write_text("no checkpoint\n")
    assert "Skipped" in commit().stderr


def test_with_a_skeleton_to_fit(repository):
    torch.save({"w": torch.zeros(2)}, "good.pt")
    made = subprocess.run([BIN / "ckptsurgeon", "skeleton", "good.pt", "-o", "net.json"], capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    configure(args=["--against", "net.json"])
    assert commit().returncode == 0
    torch.save({"w": torch.zeros(3)}, "good.pt")
    bad = commit()
    assert bad.returncode == 1 and "good.pt: CK303 w: has shape (3,), the target (2,)" in bad.stdout + bad.stderr


def test_as_another_repository_names_it(repository):
    """`pre-commit try-repo` clones the hooks' repository and runs the hook by its id."""
    hooks = repository / ".cache" / "hooks"
    hooks.mkdir(parents=True)
    (hooks / ".pre-commit-hooks.yaml").write_bytes(HOOKS.read_bytes())
    for words in (
        ("init", "-q"),
        ("config", "user.email", "a@example.org"),
        ("config", "user.name", "A"),
        ("add", "-A"),
        ("commit", "-qm", "x"),
    ):
        git("-C", str(hooks), *words)
    torch.save({"w": torch.zeros(2)}, "good.pt")
    git("add", "-A")
    words = [BIN / "pre-commit", "try-repo", hooks, "ckptsurgeon-check", "--all-files"]
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0 and "Passed" in done.stdout, done.stdout + done.stderr
    Path("page.safetensors").write_text("<html></html>")
    git("add", "-A")
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 1 and "page.safetensors: CK102 is an HTML page" in done.stdout
