"""What each command imports: no more of ours than it needs, and nothing heavy. A fresh interpreter runs the real program and tells."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

from ckptsurgeon.cli.main import COMMANDS, cli

LOOK = """
import sys
before = set(sys.modules)
from ckptsurgeon.cli.main import main
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
print(*sorted(set(sys.modules) - before), file=sys.stderr)
"""
HEAVY = {"torch", "numpy", "safetensors", "tabulate", "difflib", "email", "socket", "subprocess", "tempfile", "tomllib", "zipfile"}
MATCHER = "ckptsurgeon.matching"
# The command line, the most modules of ours, what must not be among them. (Click looks for names that are close to `-o`, by difflib.)
COSTS = {
    "--version": (["--version"], 12, {"ckptsurgeon.cli.commands", "json"}),
    "--help": (["--help"], 12, {"ckptsurgeon.cli.commands", "json"}),
    "inspect": (["inspect", "a.pt"], 62, {MATCHER, "ckptsurgeon.adapters", "ckptsurgeon.rules.rules"}),
    "inspect safetensors": (
        ["inspect", "a.safetensors"],
        60,
        {MATCHER, "ckptsurgeon.formats.pickle.machine", "ckptsurgeon.formats.torch.zip"},
    ),
    "inspect --json": (["inspect", "a.pt", "--json"], 60, {MATCHER, "ckptsurgeon.views.text"}),
    "diff": (["diff", "a.pt", "b.pt"], 95, {MATCHER, "ckptsurgeon.streaming", "ckptsurgeon.models.target"}),
    "diff --json": (["diff", "a.pt", "b.pt", "--json"], 95, {MATCHER, "ckptsurgeon.views.text"}),
    "diff with keys left on one side": (["diff", "a.pt", "less.pt"], 95, {MATCHER}),
    "check": (["check", "a.pt", "a.safetensors"], 90, {MATCHER, "ckptsurgeon.adapters"}),
    "guide": (["guide", "patterns"], 25, {MATCHER, "ckptsurgeon.adapters", "json"}),
    "plan": (["plan", "a.pt", "b.pt"], 130, {MATCHER}),
    "merge": (["merge", "a.pt", "b.pt", "--output", "out.pt", "--overwrite"], 145, {MATCHER, "ckptsurgeon.models.verify"}),
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    state = {f"layer{number}.weight": torch.zeros(3, 2) for number in range(4)}
    torch.save(state, folder / "a.pt")
    torch.save(state, folder / "b.pt")
    torch.save({key: state[key] for key in list(state)[:3]}, folder / "less.pt")
    torch.save({key.replace("layer3", "head"): value for key, value in state.items()}, folder / "renamed.pt")
    safetensors.torch.save_file(state, folder / "a.safetensors")
    return folder


def imported(words: list[str], folder: Path) -> set[str]:
    done = subprocess.run([sys.executable, "-c", LOOK, *words], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stderr.splitlines()[-1].split())


@pytest.mark.parametrize("name", COSTS)
def test_a_command_imports_what_it_needs_and_no_more(name: str, files: Path) -> None:
    words, most, without = COSTS[name]
    found = imported(words, files)
    ours = sorted(module for module in found if module.split(".")[0] == "ckptsurgeon")
    assert len(ours) <= most, ours
    assert sorted(found & (HEAVY | without)) == []


def test_a_diff_with_keys_left_on_both_sides_matches_them(files: Path) -> None:
    assert MATCHER in imported(["diff", "a.pt", "renamed.pt"], files)


def test_the_table_of_commands_has_every_command_and_alone_says_its_short_help() -> None:
    folder = Path(sys.modules[cli.__module__].__file__ or "").parent / "commands"
    assert sorted(COMMANDS) == sorted(path.stem for path in folder.glob("[!_]*.py"))
    assert "short_help" not in "".join(path.read_text() for path in folder.glob("*.py"))
    for name, words in COMMANDS.items():
        command = cli.get_command(cli.make_context("ckptsurgeon", ["inspect", "a.pt"]), name)
        assert command is not None and command.name == name and command.short_help == words
