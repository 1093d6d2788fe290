"""What a shell offers: keys and roots of the checkpoint that is typed, adapters, schemes, codes; nothing where it can't be read."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.shell_completion import ShellComplete

from ckptsurgeon.cli.completing import OFFERED
from ckptsurgeon.cli.main import COMMANDS, cli

BASH = shutil.which("bash")
NET = ["conv1.weight", "conv1.bias", "conv2.weight", "conv2.bias"] + [f"fc{i}.{part}" for i in (1, 2, 3) for part in ("weight", "bias")]


@pytest.fixture
def checkpoints(place: Path) -> Path:
    net = torch.load("net_params.pkl")
    torch.save({"epoch": 1, "model": net, "ema": {"averaged": torch.ones(2)}}, "train.pt")
    torch.save({"renamed.weight": torch.ones(2)}, "other.pt")
    odd = ["$(touch pwned)", "`touch pwned`", "a b", "a;b", "new\nline", "-x", "*", "'", "\x1b[2J", "ok.weight"]
    torch.save({key: torch.ones(1) for key in odd}, "odd.pt")
    Path("broken.pt").write_bytes(b"PK\x03\x04 no zip")
    Path("bomb.py").write_text("raise SystemExit('this file must not be run')\nclass Net(Module): ...\n")
    return place


def offered(line: str) -> list[str]:
    """The words that are offered at the end of a line; after a space, for a new word."""
    words = shlex.split(line)[1:]
    incomplete = "" if line.endswith(" ") else words.pop()
    return [item.value for item in ShellComplete(cli, {}, "ckptsurgeon", "").get_completions(words, incomplete) if item.type == "plain"]


def test_commands_and_options() -> None:
    assert offered("ckptsurgeon ") == [*COMMANDS]
    assert offered("ckptsurgeon m") == ["match", "merge"] and offered("ckptsurgeon help ve") == ["verify"]
    assert offered("ckptsurgeon completion ") == ["bash", "zsh", "fish"]
    assert offered("ckptsurgeon diff a.pt b.pt --str") == ["--strict"]


def test_keys_of_the_checkpoint(checkpoints) -> None:
    for option in (
        "diff net_params.pkl --drop",
        "match net_params.pkl model:Net --drop",
        "merge net_params.pkl model:Net -o x.pt --rename",
    ):
        assert offered(f"ckptsurgeon {option} ") == NET
    assert offered("ckptsurgeon merge net_params.pkl --drop fc1.w") == ["fc1.weight"]
    assert offered("ckptsurgeon groups net_params.pkl model:Net --override conv1.b") == ["conv1.bias"]
    assert offered("ckptsurgeon diff train.pt --root ema --drop ") == ["averaged"]
    assert offered("ckptsurgeon diff train.pt --drop a") == ["averaged"]


def test_keys_of_the_target_where_it_is_a_file(checkpoints) -> None:
    for option in ("--keep", "--rename fc1.bias", "--rename conv1.bias fc1.bias --keep"):
        assert offered(f"ckptsurgeon diff net_params.pkl other.pt {option} ") == ["renamed.weight"]
    assert offered("ckptsurgeon merge net_params.pkl other.pt --init ") == ["renamed.weight"]
    assert offered("ckptsurgeon merge net_params.pkl other.pt --adapt ") == [*NET, "renamed.weight"]
    assert offered("ckptsurgeon diff net_params.pkl bomb:Net --keep ") == []


def test_roots_adapters_schemes_and_codes(checkpoints) -> None:
    for command in ("inspect train.pt", "merge train.pt model:Net -o x.pt", "check train.pt"):
        assert offered(f"ckptsurgeon {command} --root ") == ["model", "ema"]
    assert "interpolate" in offered("ckptsurgeon merge net_params.pkl model:Net --adapt fc1.weight in")
    assert offered("ckptsurgeon merge net_params.pkl model:Net --init 'fc1.*' xavier") == ["xavier_normal", "xavier_uniform"]
    assert offered("ckptsurgeon check --explain CK30") == ["CK301", "CK302", "CK303", "CK304"]
    assert offered("ckptsurgeon check a.pt --ignore CK101,CK4") == ["CK101,CK401"]
    assert offered("ckptsurgeon check a.pt --allow safe") == ["safetensors"]
    assert offered("ckptsurgeon merge a.pt --dtype B") == ["BF16"]


def test_models_of_this_folder_where_no_path_begins_so(checkpoints) -> None:
    assert offered("ckptsurgeon diff net_params.pkl mod") == ["model:Net", "model:TutorialModule"]
    assert offered("ckptsurgeon merge net_params.pkl bo") == ["bomb:Net"]
    assert offered("ckptsurgeon merge mod") == [] and offered("ckptsurgeon diff net_params.pkl net") == []


@pytest.mark.parametrize("path", ["broken.pt", "missing.pt", "model.py", ".", "/dev/null"])
def test_what_can_not_be_read_offers_nothing(checkpoints, capfd, path: str) -> None:
    for options in ("--drop ", "--root ", "--keep ", "--adapt ", "--rename a "):
        assert offered(f"ckptsurgeon diff {path} {options}") == []
    assert capfd.readouterr() == ("", "")


def test_names_that_a_shell_would_take_for_more_than_a_word_are_not_offered(checkpoints) -> None:
    assert offered("ckptsurgeon diff odd.pt --drop ") == ["ok.weight"]


def test_every_row_of_the_table_is_a_parameter() -> None:
    program = cli.make_context("ckptsurgeon", ["help"])
    params = [param for name in COMMANDS if (command := cli.get_command(program, name)) for param in command.params]
    assert set(OFFERED) - {"patterns"} <= {param.name for param in params}
    assert all(len(OFFERED[param.name]) <= max(param.nargs, 1) for param in params if param.name in OFFERED)


@pytest.mark.skipif(BASH is None, reason="there is no bash")
def test_a_real_bash_completes_without_torch(checkpoints) -> None:
    (checkpoints / "bin").mkdir()
    program = checkpoints / "bin" / "ckptsurgeon"
    code = "import sys; sys.modules['torch'] = None; from ckptsurgeon.cli.main import main; main()"
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -c "{code}" "$@"\n')
    program.chmod(0o755)
    script = """
        eval "$(ckptsurgeon completion bash)" || exit
        COMP_WORDS=(ckptsurgeon merge net_params.pkl model:Net --drop fc3) COMP_CWORD=5
        _ckptsurgeon_completion ckptsurgeon; echo "${COMPREPLY[@]}"
        COMP_WORDS=(ckptsurgeon inspect broken.pt --root '') COMP_CWORD=4 COMPREPLY=()
        _ckptsurgeon_completion ckptsurgeon; echo "nothing: ${COMPREPLY[@]}"
        complete -p ckptsurgeon
    """
    path = f"{checkpoints / 'bin'}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run([str(BASH), "--norc", "-c", script], env={**os.environ, "PATH": path}, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert lines[:2] == ["fc3.weight fc3.bias", "nothing: "] and "_ckptsurgeon_completion" in lines[2]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_script_is_clicks_own(run, shell: str) -> None:
    ended = run("completion", shell)
    assert ended.code == 0 and f"_CKPTSURGEON_COMPLETE={shell}_complete" in ended.out
