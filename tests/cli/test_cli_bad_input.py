"""Whatever is wrong with the input: one clear sentence, what to try, exit 2, no traceback, nothing left behind, the old file whole."""

from __future__ import annotations

import json
import os
import pickle
import resource
import subprocess
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from cli_support import PROGRAM

NET, VARIANT = "model:Net", "variants:NetVariant"
LFS = (
    "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)


class Whole(torch.nn.Module):
    """To be pickled whole."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)


def optimizer_state() -> dict[str, object]:
    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return optimizer.state_dict()


def truncated(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def save_truncated(path: Path) -> None:
    torch.save({"w": torch.zeros(1000)}, path)
    truncated(path, 0.5)


def save_truncated_legacy(path: Path) -> None:
    torch.save({"w": torch.zeros(1000)}, path, _use_new_zipfile_serialization=False)
    truncated(path, 0.5)


ARRAYS = {"w": np.zeros((2, 3), np.float32), "b": np.zeros(3, np.float32)}
# How to make it, what the error says of it, and what it says to try.
BAD: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "missing": (lambda path: None, "does not exist", "check the path"),
    "folder": (lambda path: path.mkdir(), "is a folder", "give a checkpoint file"),
    "empty": (lambda path: path.touch(), "is empty", "download it again"),
    "truncated zip": (save_truncated, "is truncated", "download it again"),
    "truncated legacy": (save_truncated_legacy, "is truncated", "download it again"),
    "FIFO": (os.mkfifo, "is not a regular file", "a checkpoint file on disk"),
    "git-LFS pointer": (lambda path: path.write_text(LFS), "is a Git LFS pointer", "git lfs pull"),
    "HTML": (lambda path: path.write_text("<!DOCTYPE html>\n<html><body>Sign in</body></html>"), "is an HTML page", "log in"),
    "plain pickle": (
        lambda path: path.write_bytes(pickle.dumps(OrderedDict(w=torch.zeros(2)))),
        "was written by pickle.dump, not by torch.save",
        "torch.save(",
    ),
    "NumPy arrays, pickled": (lambda path: path.write_bytes(pickle.dumps(ARRAYS)), "2 NumPy arrays", "torch.from_numpy"),
    "NumPy arrays, torch.save": (lambda path: torch.save(ARRAYS, path), "2 NumPy arrays", "torch.from_numpy"),
    "npz": (lambda path: np.savez(path.open("wb"), words=np.array(["a"])), "holds no tensors: words is an array of text", "the weights"),
    "whole module": (lambda path: torch.save(Whole(), path), "a whole pickled object of", "model.state_dict()"),
    "optimizer only": (lambda path: torch.save(optimizer_state(), path), "holds an optimizer's state and no model's", "state_dict"),
    "text": (lambda path: path.write_text("import this\n"), "is not a checkpoint", "the formats are"),
    "bare tensor": (lambda path: torch.save(torch.zeros(2), path), "one bare tensor", "save it under a key"),
    "no tensors": (lambda path: torch.save({"epoch": 3}, path), "holds no tensors", "state_dict"),
    "other JSON": (lambda path: path.write_text('{"a": 1}'), "is JSON, not a skeleton", "ckptsurgeon skeleton"),
}


def assert_refused(ended, reason, *tries):
    assert ended.code == 2 and ended.out == "" and "Traceback" not in ended.err
    error = ended.err[ended.err.index("error: ") :]
    assert reason in error.splitlines()[0], error
    assert "\n  try: " in error and any(words in error for words in tries or [""]), error


@pytest.mark.parametrize("kind", BAD)
def test_bad_checkpoints(place, files, run, kind):
    make, reason, hint = BAD[kind]
    make(place / "bad.pt")
    (place / "old.pt").write_bytes(b"old")
    before = files()
    for words in (
        ("inspect", "bad.pt"),
        ("diff", "bad.pt", NET),
        ("diff", "net_params.pkl", "bad.pt"),
        ("plan", "bad.pt", NET, "-o", "plan.json"),
        ("merge", "bad.pt", NET, "-o", "new.pt"),
        ("merge", "bad.pt", "-o", "old.pt", "--overwrite"),
        ("verify", "bad.pt", NET),
        ("groups", "bad.pt", NET, "--lr", "1e-3", "--fresh-lr", "1e-2"),
    ):
        assert_refused(run(*words), reason, hint)
        assert files() == before, words
    found = run("check", "bad.pt", "net_params.pkl", "--json")
    assert found.code == 1 and [row["ok"] for row in found.json["files"]] == [False, True]


MODULES = {
    "broken.py": "import nowhere_to_be_found\n",
    "raises.py": "1 / 0\n",
    "syntax.py": "def f(:\n",
    "exits.py": "import sys\nsys.exit(0)\n",
    "needs.py": (
        "from torch import nn\nclass Net(nn.Module):\n    def __init__(self, width, depth=2):\n        super().__init__()\n"
        "class Fails(nn.Module):\n    def __init__(self):\n        raise OSError('no weights here')\n"
        "number = 3\n"
    ),
}


@pytest.mark.parametrize(
    ("target", "reason", "hint"),
    [
        ("broken:Net", "No module named 'nowhere_to_be_found'", "in which your own code runs"),
        ("raises.py:Net", "ZeroDivisionError: division by zero (", "raises.py:1"),
        ("syntax:Net", "SyntaxError", "syntax.py:1"),
        ("exits:Net", "SystemExit", "__main__"),
        (
            "needs:Net",
            "needs arguments (missing a required argument: 'width'); its signature is Net(width, depth=2)",
            "needs:Net(width=...)",
        ),
        ("needs:Net(1, 2, 3)", "does not take these arguments", "its signature is Net(width, depth=2)"),
        ("needs:Net(4, dpth=3)", "does not take these arguments", "needs:Net(4, depth=3)"),
        ("needs:Net(width=open('x'))", "not a call with literals only", "a function without arguments"),
        ("needs:Fails", "OSError: no weights here", "needs.py:7"),
        ("needs:number", "not a class, a function or a model", ""),
        ("modle:Net", "there is no module 'modle'", "model:Net"),
        ("modle.py:Net", "there is no such file", "model.py:Net"),
        ("model:net", "model has no 'net'", "model:Net"),
        ("variants:NetVarient", "variants has no 'NetVarient'", "variants:NetVariant"),
        ("model:Net(", "not a call with literals only", ""),
        ("model.py", "is not a checkpoint", ""),
    ],
)
def test_bad_targets(place, files, run, target, reason, hint):
    for name, text in MODULES.items():
        (place / name).write_text(text)
    before = files()
    for words in (
        ("diff", "net_params.pkl", target),
        ("merge", "net_params.pkl", target, "-o", "out.pt"),
        ("skeleton", target, "-o", "net.json"),
    ):
        ended = run(*words)
        assert ended.code == 2 and ended.out == "" and "Traceback" not in ended.err
        assert reason in ended.err and hint in ended.err, ended.err
        assert files() == before


def test_outputs_that_exist_stay_as_they_are(place, files, run):
    run("plan", "net_params.pkl", NET, "-o", "plan.json")
    for name in ("out.pt", "out.json"):
        (place / name).write_bytes(b"old")
    before = files()
    for words in (
        ("merge", "net_params.pkl", NET, "-o", "out.pt"),
        ("merge", "net_params.pkl", "-o", "out.pt"),
        ("apply", "plan.json", "-o", "out.pt"),
        ("plan", "net_params.pkl", NET, "-o", "out.json"),
        ("skeleton", NET, "-o", "out.json"),
    ):
        assert_refused(run(*words), f"{words[-1]}: exists already", "--overwrite")
        assert files() == before
        assert run(*words, "--overwrite").code == 0
        (place / words[-1]).write_bytes(b"old")


@pytest.mark.parametrize("name", ["nowhere/out.pt", "net_params.pkl/out.pt"])
def test_the_outputs_folder_is_missing(files, run, name):
    before = files()
    for words in (("merge", "net_params.pkl", NET), ("plan", "net_params.pkl", NET), ("skeleton", NET)):
        ended = run(*words, "-o", name)
        assert ended.code == 2 and "Traceback" not in ended.err and name in ended.err and files() == before


def test_an_unknown_suffix(files, run):
    before = files()
    assert_refused(
        run("merge", "net_params.pkl", NET, "-o", "out.onnx"),
        "its suffix '.onnx' does not say which format",
        "end it in one of .safetensors",
    )
    assert files() == before
    assert run("merge", "net_params.pkl", NET, "-o", "out.onnx", "--format", "torch").code == 0
    assert torch.load("out.onnx", weights_only=True).keys() == torch.load("net_params.pkl").keys()


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))


@pytest.mark.parametrize("words", [("net_params.pkl", NET), ("net_params.pkl",)], ids=["merge", "convert"])
@pytest.mark.parametrize("name", ["out.pt", "out.safetensors"])
def test_no_room_for_the_output(place, files, program, words, name):
    (place / name).write_bytes(b"old")
    before = files()
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    ended = program("merge", *words, "-o", name, "--overwrite", preexec_fn=limited, env=env)
    assert ended.code == 2 and ended.out == "" and "Traceback" not in ended.err
    assert f"error: {name}: " in ended.err and "try: " in ended.err and files() == before


def test_a_full_disk(place, program, files):
    disk = place / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=128k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("this user can't mount a small tmpfs")
    try:
        (disk / "out.pt").write_bytes(b"old")
        before = files()
        ended = program("merge", "net_params.pkl", NET, "-o", "disk/out.pt", "--overwrite")
        assert ended.code == 2 and "Traceback" not in ended.err and files() == before
        assert "error: disk/out.pt: " in ended.err and "space" in ended.err and "try: " in ended.err
    finally:
        subprocess.run(["umount", disk], check=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_to(place, files, run):
    (place / "closed").mkdir(mode=0o555)
    before = files()
    assert_refused(run("merge", "net_params.pkl", NET, "-o", "closed/out.pt"), "closed/out.pt")
    assert files() == before


@pytest.mark.parametrize(
    ("device", "reason"),
    [
        pytest.param("cuda:0", "no device 'cuda:0'", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")),
        pytest.param("mps", "no device 'mps'", marks=pytest.mark.skipif(torch.backends.mps.is_available(), reason="this machine has MPS")),
        ("tpu", "'tpu' is not the name of a device"),
    ],
)
def test_a_device_that_is_not_here(files, run, device, reason):
    before = files()
    assert_refused(run("verify", "net_params.pkl", NET, "--device", device), reason, "--device cpu")
    assert_refused(run("merge", "net_params.pkl", NET, "-o", "out.pt", "--device", device), reason, "--device cpu")
    assert files() == before


@pytest.mark.parametrize("shape", ["3xx", "x", "1x3x32x32:Q9", "-1x3", "", "1,3,32,32"])
def test_an_input_that_is_no_shape(run, shape):
    assert_refused(run("verify", "net_params.pkl", NET, "--input", shape), "is not an input's shape", "1x3x32x32")


def test_an_input_that_does_not_go_through_the_model_is_a_no(run):
    ended = run("verify", "net_params.pkl", NET, "--input", "3x32")
    assert ended.code == 1 and "the forward pass with 3x32 failed: " in ended.out and "Traceback" not in ended.out + ended.err


@pytest.mark.parametrize(
    ("rules", "reason"),
    [
        (("--init", "fc3.*", "xavier"), "'xavier'"),
        (("--init", "fc3.*", "normal(std='wide')"), "std"),
        (("--init", "norm1.*", "xavier_normal"), "at least two dimensions"),
        (("--init", "fc3.weight", "zeros", "--init", "fc3.w*", "ones"), "never gets a turn"),
        (("--init", "conv1.*", "zeros"), "matches only keys that take weights from the source"),
        (("--drop", "fcc2.*"), "matches nothing (close: fc2."),
        (("--drop", "/(/"), "/(/"),
        (("--rename", "fc2.{p}", "dense2.{q}"), "uses {q}"),
        (("--rename", "fc2.{p}", "dense9.{p}"), "none of its results is in the target (close: dense2."),
        (("--rename", "fc{n}.weight", "dense2.weight"), "two sources land on 'dense2.weight'"),
    ],
)
def test_bad_rules(files, run, rules, reason):
    before = files()
    ended = run("merge", "net_params.pkl", VARIANT, "-o", "out.pt", *rules)
    assert ended.code == 2 and ended.out == "" and "Traceback" not in ended.err
    assert reason in ended.err and files() == before


def test_all_bad_rules_are_named_at_once(run):
    ended = run("plan", "net_params.pkl", VARIANT, "--drop", "x.*", "--drop", "y.*", "--rename", "z", "w")
    assert ended.code == 2 and all(f"{rule} matches nothing" in ended.err for rule in ("--drop 'x.*'", "--drop 'y.*'", "--rename 'z' 'w'"))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"nope",
        b"[]",
        b'{"a": 1}',
        b'{"version": 99}',
        b'{"version": 1, "steps": 3}',
        b"\xff\xfe",
        b'{"version": 1, "sources": [], "target": null, "seed": 0, "steps": [], "dropped": []}',
    ],
)
def test_a_plan_that_is_none(place, files, run, content):
    (place / "plan.json").write_bytes(content)
    before = files()
    ended = run("apply", "plan.json", "-o", "out.pt")
    assert ended.code == 2 and ended.out == "" and "Traceback" not in ended.err and "error: plan.json: " in ended.err
    assert "try: " in ended.err and files() == before


def test_a_plan_that_was_changed_by_hand_is_followed_or_refused_but_never_half_done(place, files, run):
    run("plan", "net_params.pkl", VARIANT, "-o", "plan.json")
    good = json.loads(Path("plan.json").read_text())
    for change in (
        lambda plan: plan["steps"].pop(),
        lambda plan: plan["steps"].append(plan["steps"][0]),
        lambda plan: plan["steps"][0].update(shape=[1]),
        lambda plan: plan["steps"][0].update(action="explode"),
        lambda plan: plan["steps"][0]["sources"][0].update(key="nowhere"),
        lambda plan: plan["steps"][0]["sources"][0].update(file=7),
        lambda plan: plan["target"].update(spec="model:Net"),
        lambda plan: plan["sources"][0].update(path="missing.pt"),
    ):
        plan = json.loads(json.dumps(good))
        change(plan)
        Path("plan.json").write_text(json.dumps(plan))
        before = files()
        ended = run("apply", "plan.json", "-o", "out.pt")
        assert ended.code == 2 and ended.out == "" and "Traceback" not in ended.err and "error: " in ended.err
        assert files() == before


HOSTILE = "a\x1b[31mred\x1b]0;title\x07\nb\u202e"


def test_keys_can_not_steer_a_terminal(place, run):
    torch.save({HOSTILE: torch.zeros(2), "ok": torch.zeros(1)}, "esc.pt")
    torch.save({HOSTILE: torch.zeros(3), "ok": torch.zeros(1)}, "other.pt")
    torch.save({"ok": torch.zeros(1)}, "less.pt")
    for words in (
        ("inspect", "esc.pt"),
        ("diff", "esc.pt", "other.pt"),
        ("diff", "esc.pt", "less.pt", "-v"),
        ("diff", "less.pt", "esc.pt"),
        ("plan", "esc.pt", "other.pt"),
        ("merge", "esc.pt", "-o", "out.pt", "--overwrite", "-v"),
        ("merge", "esc.pt", "less.pt", "-o", "out.pt", "--overwrite"),
        ("check", "esc.pt", "--against", "less.pt"),
        ("verify", "esc.pt", "less.pt"),
        ("merge", "esc.pt", "less.pt", "-o", "new.pt", "--strict"),
    ):
        for flag in ((), ("--json",)):
            ended = run(*words, *flag)
            assert all(char.isprintable() or char == "\n" for char in ended.out + ended.err), (words, ended)
    assert r"a\x1b[31mred\x1b]0;title\x07\nb\u202e" in run("inspect", "esc.pt").out
    names = [row["name"] for row in run("inspect", "esc.pt", "--json").json["tensors"]]
    assert names == [HOSTILE, "ok"]  # JSON gives the very key back


def test_a_path_can_not_steer_a_terminal(run):
    ended = run("inspect", "\x1b[31mred.pt")
    assert ended.code == 2 and "\x1b" not in ended.err and r"\x1b[31mred.pt" in ended.err


def test_a_bad_file_is_told_in_a_process_of_its_own_too(place):
    (place / "page.pt").write_text("<html></html>")
    done = subprocess.run([*PROGRAM, "merge", "page.pt", "-o", "out.pt"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.splitlines()[0] == "error: page.pt: is an HTML page" and len(done.stderr.splitlines()) == 2
