"""`--strict` means one thing in every command that has it, and `-q` leaves only what was asked for."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
import torch

from ckptsurgeon.cli.main import COMMANDS, cli

KEPT = "--keep 'norm1.**' --keep 'fc3.*'"
RENAMED = "--rename 'fc2.{p}' 'dense2.{p}'"
# A checkpoint, a target, rules, and whether keys are left that no rule names.
CASES = {
    "all match": ("net_params.pkl", "model:Net", "", False),
    "missing": ("net_params.pkl", "variants:NetDeeper", "", True),
    "missing and kept": ("net_params.pkl", "variants:NetDeeper", "--keep 'norm1.**'", False),
    "mismatched": ("net_params.pkl", "variants:NetTwoClasses", "", True),
    "mismatched and kept": ("net_params.pkl", "variants:NetTwoClasses", "--keep 'fc3.*'", False),
    "mismatched and dropped": ("net_params.pkl", "variants:NetTwoClasses", "--drop 'fc3.*'", False),
    "mismatched and initialised by a file": ("net_params.pkl", "variants:NetTwoClasses", "--rules init.toml", False),
    "extra": ("more.pt", "model:Net", "", True),
    "extra and dropped": ("more.pt", "model:Net", "--drop aux", False),
    "another dtype": ("half.pt", "model:Net", "", False),
    "all three, one renamed": ("net_params.pkl", "variants:NetVariant", RENAMED, True),
    "all three, all named": ("net_params.pkl", "variants:NetVariant", f"{RENAMED} {KEPT}", False),
    "tied, one named": ("untied.pt", "tied.pt", "--keep a", False),
}


@pytest.fixture
def checkpoints(place: Path) -> Path:
    net = torch.load("net_params.pkl")
    torch.save(net | {"aux": torch.zeros(2)}, "more.pt")
    torch.save({key: value.half() for key, value in net.items()}, "half.pt")
    a = torch.ones(3)
    torch.save({"a": a, "b": a, "c": torch.ones(2)}, "tied.pt")
    torch.save({"c": torch.ones(2)}, "untied.pt")
    Path("init.toml").write_text('[[init]]\nkey = "fc3.*"\nscheme = "zeros"\n')
    return place


@pytest.mark.parametrize("name", CASES)
def test_strict_is_a_no_where_a_key_is_left_that_no_rule_names(run, checkpoints, name: str) -> None:
    source, target, rules, left = CASES[name]
    words = [source, target, *shlex.split(rules), "--strict"]
    assert {
        command: run(command, *words, *(["-o", "out.pt"] if command == "merge" else [])).code for command in ("diff", "plan", "merge")
    } == {command: int(left) for command in ("diff", "plan", "merge")}
    if "tied" not in name:  # a match looks at names that are left on both sides
        assert run("match", *words).code == int(left)


def test_match_under_strict_takes_what_it_links_itself(run, checkpoints) -> None:
    """The rules that it proposes name fc2 and dense2; nothing names what is new."""
    assert run("match", "net_params.pkl", "variants:NetRenamed", "--strict").code == 0
    assert run("diff", "net_params.pkl", "variants:NetRenamed", "--strict").code == 1
    assert run("match", "net_params.pkl", "variants:NetVariant", "--strict").code == 1
    assert run("match", "net_params.pkl", "variants:NetVariant", *shlex.split(KEPT), "--strict").code == 0


def test_strict_is_explained_in_the_same_words_everywhere() -> None:
    program = cli.make_context("ckptsurgeon", ["help"])
    commands = [command for name in COMMANDS if (command := cli.get_command(program, name)) is not None]
    words = {command.name: option.help for command in commands for option in command.params if option.name == "strict"}  # type: ignore[attr-defined]
    assert set(words) == {"diff", "match", "plan", "merge"} and len(set(words.values())) == 1


# What -q leaves of stdout: nothing of a summary, all of an answer. In order: what one writes, a later one reads.
QUIET = {
    "merge net_params.pkl variants:NetTwoClasses -o merged.pt": False,
    "skeleton model:Net -o net.json": False,
    "plan net_params.pkl net.json -o plan.json": False,
    "apply plan.json -o out.pt": False,
    "match net_params.pkl variants:NetRenamed -o rules.toml": False,
    "verify out.pt model:Net": False,
    "check out.pt --against net.json": False,
    "verify net_params.pkl variants:NetTwoClasses": True,
    "check net_params.pkl --max-size 1kB": True,
    "inspect net_params.pkl": True,
    "diff net_params.pkl model:Net": True,
    "match net_params.pkl variants:NetRenamed": True,
    "plan net_params.pkl model:Net": True,
    "merge net_params.pkl model:Net -o new.pt --dry-run": True,
    "groups merged.pt variants:NetTwoClasses --lr 1 --fresh-lr 2": True,
    "adapters": True,
}


def test_quiet_leaves_only_what_was_asked_for(run, place) -> None:
    for line, printed in QUIET.items():
        ended = run(*line.split(), "-q")
        assert ended.err == "" and (ended.out == "") is not printed, (line, ended)
        loud = run(*line.split(), *(["--overwrite"] if "-o" in line and "--dry-run" not in line else []))
        assert loud.code == ended.code and loud.out and (not printed or loud.out == ended.out), line


def test_quiet_does_not_hide_json_or_errors(run, place) -> None:
    assert run("merge", "net_params.pkl", "model:Net", "-o", "out.pt", "-q", "--json").json["output"] == "out.pt"
    ended = run("merge", "net_params.pkl", "model:Net", "-o", "out.pt", "-q")
    assert ended.code == 2 and ended.out == "" and ended.err.startswith("error: out.pt")
