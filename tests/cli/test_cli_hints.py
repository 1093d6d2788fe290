"""What a refusal or an answer says to try is run here, as it is printed, and works; where nothing would work, nothing is offered."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import ckptsurgeon

NET, VARIANT = "model:Net", "variants:NetVariant"


def command_in(text: str) -> list[str]:
    """The words after `ckptsurgeon` in a text's last line."""
    last = text.splitlines()[-1]
    return shlex.split(last[last.index("ckptsurgeon ") :])[1:]


def tried(ended) -> str:
    """What an error says to try."""
    assert ended.code in (1, 2), ended
    return ended.err.partition("\n  try: ")[2].rstrip("\n")


@pytest.mark.parametrize("name", ["a\nb", "tab\there's", "\x1b[1m \\n", "\x85\u200b", os.fsdecode(b"bad\xff"), 'it\'s "so"\n', "plain"])
def test_bash_reads_a_command_with_special_characters_as_it_is_meant(place, run, name) -> None:
    """In the path, and in a key that takes a rule."""
    inside = name.encode("utf-8", "replace").decode()
    leaves = {"weight": torch.ones(4, 3), "bias": torch.ones(4)}
    source, target = (
        {"fc.weight": torch.ones(2, 3), **{f"{head}{inside}.{leaf}": value for leaf, value in leaves.items()}} for head in ("old", "new")
    )
    torch.save(source, "s.pt")
    os.rename("s.pt", f"{name}.pt")
    torch.save(target, "t.pt")
    for shown in (run("diff", f"{name}.pt", "t.pt").out, run("match", f"{name}.pt", "t.pt").out):
        command = shown.splitlines()[-1].partition(": ")[2]
        assert command.isprintable() and command.startswith("ckptsurgeon merge "), shown
        script = f'ckptsurgeon() {{ printf "%s\\0" "$@"; }}; {command}'
        env = {**os.environ, "LC_ALL": "C.UTF-8"}
        read = subprocess.run(["bash", "-c", script], capture_output=True, check=True, env=env).stdout
        words = [os.fsdecode(word) for word in read.split(b"\0")[:-1]]
        assert words[1] == f"{name}.pt"
        assert run(*words, "--overwrite").code == 0


@pytest.fixture
def objects(place):
    """An .npz file of the network with an array of Python objects in it, under a name that a shell would take apart."""
    state = torch.load("net_params.pkl", weights_only=True)
    np.savez("obj.npz", **{key: value.numpy() for key, value in state.items()}, **{"my meta": np.array([{"a": 1}], dtype=object)})
    return state


@pytest.mark.parametrize("more", [(), ("--match",)])
def test_the_command_after_a_diff_leaves_out_what_can_not_be_carried(objects, run, more) -> None:
    words = command_in(run(*(("match",) if more else ("diff",)), "obj.npz", NET).out)
    assert words == ["merge", "obj.npz", NET, "-o", "merged.pt", "--drop", "my meta", *more]
    assert run(*words).code == 0
    merged = torch.load("merged.pt", weights_only=True)
    assert all(torch.equal(merged[key], value) for key, value in objects.items()) and merged.keys() == objects.keys()


def test_the_command_after_a_match_keeps_the_rules_that_were_given(objects, run) -> None:
    given = ("--drop", "my meta", "--rename", "fc2.{p}", "dense2.{p}")
    words = command_in(run("match", "obj.npz", "variants:NetRenamed", *given).out)
    assert words[-6:] == [*given, "--match"] and run(*words).code == 0


def test_rules_that_were_matched_say_what_can_not_be_carried(objects, run) -> None:
    words = command_in(run("match", "obj.npz", VARIANT, "-o", "rules.toml").out)
    assert words[-4:] == ["--drop", "my meta", "--rules", "rules.toml"] and run(*words).code == 0
    follow = next(line for line in Path("rules.toml").read_text().splitlines() if "Follow it: " in line)
    assert run(*command_in(follow.replace("THIS_FILE", "rules.toml")), "--overwrite").code == 0


def test_the_error_says_how_to_leave_them_out(objects, run) -> None:
    hint = tried(run("merge", "obj.npz", NET, "-o", "merged.pt"))
    assert hint == "leave them out: --drop 'my meta'"
    assert run("merge", "obj.npz", NET, "-o", "merged.pt", *shlex.split(hint)[3:]).code == 0


@pytest.mark.parametrize("command", ["diff", "match"])
def test_no_merge_is_offered_into_a_file_that_can_not_be_kept(objects, run, command) -> None:
    last = run(command, "net_params.pkl", "obj.npz").out.splitlines()[-1]
    assert last == "No merge can keep my meta of obj.npz: give the model itself, or its skeleton, as the target."
    assert run("merge", "net_params.pkl", "obj.npz", "-o", "merged.pt").code == 2


def test_groups_of_a_file_without_a_record(place, run) -> None:
    rates = ("--lr", "1e-3", "--fresh-lr", "1e-2")
    ended = run("groups", "net_params.pkl", "variants:NetTwoClasses", *rates)
    assert ended.code == 1 and "{" not in tried(ended)
    assert run(*command_in(tried(ended))).code == 0
    assert run("groups", "merged.pt", "variants:NetTwoClasses", *rates).code == 0
    run("merge", "net_params.pkl", NET, "-o", "whole.pt")
    torch.save({"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}, "layer.pt")
    Path("plain.py").write_text("from torch import nn\ndef make():\n    return nn.Linear(2, 2)\n")
    run("merge", "layer.pt", "plain:make", "-o", "layers.pt")
    for file, target, pattern in (("whole.pt", NET, "fc3.*"), ("layers.pt", "plain:make", "bias")):
        hint = tried(run("groups", file, target, *rates))
        option = shlex.split(hint.removeprefix("give rates by pattern: "))
        assert option == ["--override", pattern, "1e-2"] and run("groups", file, target, "--lr", "1e-3", *option).code == 0


def test_a_stale_plan_says_how_it_was_made(place, run) -> None:
    Path("my plans").mkdir()
    torch.save({"a": {"net": torch.load("net_params.pkl", weights_only=True)}, "b": 1}, "a b.pt")
    asked = ("--root", "a.net", "--seed", "3", "--full")
    assert run("plan", "a b.pt", NET, "--drop", "fc3.bias", *asked, "-o", "my plans/s.json").code == 0
    net = torch.load("net_params.pkl", weights_only=True)
    for change in ({"fc3.bias": torch.ones(10)}, {"more": torch.ones(1)}):
        torch.save({"a": {"net": {**net, **change}}, "b": 1}, "a b.pt")
        hint = tried(run("apply", "my plans/s.json", "-o", "out.pt"))
        assert hint.startswith("plan again, with the rules and other options that it had, if any: ckptsurgeon plan 'a b.pt'")
        words = command_in(hint)
        assert words == ["plan", "a b.pt", NET, *asked, "-o", "my plans/s.json", "--overwrite"]
        assert run(*words).code == 0
    assert run("apply", "my plans/s.json", "-o", "out.pt").code == 0


def test_a_stale_plan_of_an_average(place, run) -> None:
    net = torch.load("net_params.pkl", weights_only=True)
    torch.save(net, "a.pt")
    assert run("plan", "net_params.pkl", "a.pt", "--average", "-o", "mean.json").code == 0
    torch.save({key: value + 1 for key, value in net.items()}, "a.pt")
    assert run(*command_in(tried(run("apply", "mean.json", "-o", "out.pt")))).code == 0
    assert run("apply", "mean.json", "-o", "out.pt").code == 0


def test_a_stale_plan_for_a_model_in_memory_offers_no_command(place, run) -> None:
    torch.save({"weight": torch.zeros(2, 2), "bias": torch.zeros(2)}, "layer.pt")
    Path("plan.json").write_text(json.dumps(ckptsurgeon.plan("layer.pt", torch.nn.Linear(2, 2)).to_dict()))
    torch.save({"weight": torch.ones(2, 2), "bias": torch.zeros(2)}, "layer.pt")
    assert tried(run("apply", "plan.json", "-o", "out.pt")) == "plan again"


def test_a_plan_of_another_version_and_a_checkpoint_in_its_place(place, run) -> None:
    Path("v99.json").write_text(json.dumps({"version": 99, "steps": []}))
    for path in set(Path(".").glob("*.py")) - {Path("model.py")}:
        path.unlink()  # one model is left in this folder
    ended = run("apply", "v99.json", "-o", "out.pt")
    assert ended.code == 2 and "is a plan of version 99" in ended.err and run(*command_in(tried(ended))).code == 0
    ended = run("apply", "net_params.pkl", "-o", "out.pt")
    assert ended.code == 2 and "is a checkpoint (torch-legacy), not a plan" in ended.err
    words = command_in(tried(ended))
    assert run(*words).code == 0 and run("apply", words[words.index("-o") + 1], "-o", "out.pt").code == 0


def test_rules_that_are_no_toml(place, run) -> None:
    run("plan", "net_params.pkl", NET, "-o", "plan.json")
    ended = run("diff", "net_params.pkl", NET, "--rules", "plan.json")
    assert "is not TOML" in ended.err and run(*command_in(tried(ended))).code == 0
    Path("rules.toml").write_text("drop fc3\n")
    hint = tried(run("diff", "net_params.pkl", NET, "--rules", "rules.toml"))
    assert hint == "write a rule as [[drop]], and in the line below key = 'aux.**'"
    Path("rules.toml").write_text("[[drop]]\nkey = 'fc3.**'\n")
    assert run("diff", "net_params.pkl", NET, "--rules", "rules.toml").code == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="its special file system is Linux's")
def test_a_folder_in_which_no_file_can_be_made(place, run) -> None:
    ended = run("merge", "net_params.pkl", "-o", "/proc/x.pt")
    assert ended.code == 2 and "/proc/x.pt: no file can be made in its folder\n  try: choose another folder\n" in ended.err
    assert os.path.isdir("/proc")
    hint = tried(run("merge", "net_params.pkl", "-o", "new folder/x.pt"))
    assert hint == f"mkdir -p {shlex.quote(str(place / 'new folder'))}"


@pytest.mark.parametrize(("name", "offered"), [("n.npz", False), ("n.json", False), ("n.gguf", False), ("n.xyz", True), ("n", True)])
def test_a_suffix_that_is_not_written(place, run, name, offered) -> None:
    hint = tried(run("merge", "net_params.pkl", "-o", name))
    assert hint.startswith("end it in one of .safetensors .pt") and ("--format" in hint) is offered
    assert not offered or run("merge", "net_params.pkl", "-o", name, *shlex.split(hint.partition("or give ")[2])).code == 0


@pytest.mark.parametrize("format", [(), ("--format", "torch")])
def test_a_folder_and_no_path_as_the_output(place, files, run, format) -> None:
    before = files()
    assert "error: .: is a folder" in run("merge", "net_params.pkl", "-o", ".", *format).err
    assert "error: --output '' is empty" in run("merge", "net_params.pkl", "-o", "", *format).err
    for words in (("plan", "net_params.pkl", NET), ("skeleton", NET), ("match", "net_params.pkl", VARIANT)):
        assert "error: .: is a folder" in run(*words, "-o", ".").err
        assert "error: --output '' is empty" in run(*words, "-o", "").err
    assert files() == before


@pytest.mark.parametrize(
    ("words", "error", "help_of"),
    [
        (("marge",), "No such command 'marge'; is it merge?", "ckptsurgeon"),
        (("merge", "net_params.pkl", "--renam", "a"), "'--renam'; is it --rename?", "ckptsurgeon merge"),
        (("merge", "net_params.pkl", "--overwrit"), "'--overwrit'; is it --overwrite?", "ckptsurgeon merge"),
        (("merge", "net_params.pkl", "--fooling"), "'--fooling'", "ckptsurgeon merge"),
        (("merge", "net_params.pkl", NET, "--rename", "fc1.{p}"), "Option '--rename' requires 2 arguments.", "ckptsurgeon merge"),
        (("check", "net_params.pkl", "--jobs"), "Option '--jobs' requires an argument.", "ckptsurgeon check"),
        (("check", "--jobs", "abc"), "'abc' is not a valid integer.", "ckptsurgeon check"),
        (("plan", "net_params.pkl", "--min-coverage", "abc"), "'abc' is not a valid number.", "ckptsurgeon plan"),
    ],
)
def test_a_command_line_with_a_mistake(run, words, error, help_of) -> None:
    ended = run(*words)
    assert ended.code == 2 and error in ended.err.splitlines()[0] and tried(ended) == f"{help_of} --help"
    assert run(*command_in(tried(ended))).code == 0


CODE = """
from torch import nn
import model as other
from model import Net
class _Hidden(nn.Module): ...
class Config: ...
class Base(nn.Module): ...
class Big(Base): ...
class Bigger(Net): ...
def make(depth=2):
    return Bigger()
def build(depth): return Bigger()
def count() -> int: return 1
raise RuntimeError("this file must not be run")
"""


def test_a_file_of_code_as_the_target_without_a_name(place, run) -> None:
    from ckptsurgeon.models.target.source_names import model_names

    Path("nets.py").write_text(CODE)
    assert model_names("nets.py") == ["Big", "Bigger", "make", "Base"]
    for target in ("model.py", "model"):
        hint = tried(run("merge", "net_params.pkl", target, "-o", "out.pt"))
        assert hint == f"is it {target}:Net or {target}:TutorialModule?"
        assert run("merge", "net_params.pkl", hint.split()[2], "-o", f"{target}.pt").code == 0
    Path("empty.py").write_text("x = 1\n")
    assert tried(run("diff", "net_params.pkl", "empty.py")) == "name the model in it: empty.py:NAME"
    assert tried(run("diff", "net_params.pkl", "nowhere")).startswith("check the path")
    ended = run("diff", "net_params.pkl", "model:nn")
    assert "is of the type module" in ended.err and tried(ended).splitlines()[-1] == "is it model:Net or model:TutorialModule?"


def test_findings_of_several_keys_are_said_of_several(place, run) -> None:
    torch.save({"conv1.weight": torch.zeros(6, 3, 5, 5)}, "part.pt")
    for words in (("verify", "part.pt", NET), ("check", "part.pt", "--against", NET)):
        out = run(*words).out
        assert "are in the target only" in out and "is in the target only" not in out
    assert "fc2.bias: is in the target only" in run("check", "part.pt", "--against", NET, "-v").out
    ended = run("match", "net_params.pkl", "variants:NetRenamed", "-o", "rules.toml")
    assert "note: wrote rules.toml: 1 rule\n" in ended.err


def test_a_mistyped_path(place, run) -> None:
    Path("my runs").mkdir()
    Path("my runs/last.pt").write_bytes(Path("net_params.pkl").read_bytes())
    for wrong, right in (("net_param.pkl", "net_params.pkl"), ("my runs/lats.pt", "my runs/last.pt")):
        for words in (["inspect", wrong], ["diff", wrong, NET], ["diff", "net_params.pkl", wrong], ["merge", wrong, NET, "-o", "out.pt"]):
            ended = run(*words)
            assert ended.code == 2 and f"{wrong}: does not exist" in ended.err
            assert tried(ended) == f"is it {shlex.quote(right)}?"
    assert tried(run("inspect", "other.pkl")) == tried(run("inspect", "no folder/other.pkl")) == "check the path; `ls` its folder"
