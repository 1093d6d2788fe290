"""How a run ends: 0 yes or done, 1 a true no, 2 could not answer, 130 interrupted; and what goes to which stream then."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from cli_support import PROGRAM, on_a_terminal

NET, VARIANT = "model:Net", "variants:NetVariant"


def test_zero(program):
    for words in (("--version",), ("--help",), ("inspect", "net_params.pkl"), ("check", "net_params.pkl")):
        ended = program(*words)
        assert ended.code == 0 and ended.err == "" and ended.out


def test_no_command_shows_the_help_on_stderr(program):
    ended = program()
    assert ended.code == 2 and ended.out == "" and ended.err.startswith("Usage: ckptsurgeon ")


@pytest.mark.parametrize(
    "words",
    [
        ("diff", "net_params.pkl", VARIANT, "--exit-code"),
        ("diff", "net_params.pkl", VARIANT, "--strict"),
        ("verify", "net_params.pkl", VARIANT),
        ("merge", "net_params.pkl", VARIANT, "-o", "out.pt", "--strict"),
        ("merge", "net_params.pkl", VARIANT, "-o", "out.pt", "--min-coverage", "0.9"),
        ("merge", "net_params.pkl", "other.pt", "-o", "out.pt"),
        ("plan", "net_params.pkl", "other.pt", "-o", "plan.json"),
        ("check", "net_params.pkl", "--against", VARIANT),
        ("check", "missing.pt"),
        ("check", "model.py", "net_params.pkl"),
        ("groups", "net_params.pkl", VARIANT, "--lr", "1e-3", "--fresh-lr", "1e-2"),
    ],
    ids=" ".join,
)
def test_one_is_a_true_no(place, files, run, words):
    torch.save({"other": torch.zeros(3)}, "other.pt")
    before = files()
    ended = run(*words)
    assert ended.code == 1 and "Traceback" not in ended.err and files() == before
    assert run(*words, "--json").code == 1


@pytest.mark.parametrize(
    "words",
    [
        ("dif", "net_params.pkl", NET),
        ("diff", "net_params.pkl"),
        ("diff", "net_params.pkl", NET, "--nonsense"),
        ("merge", "net_params.pkl", NET),
        ("merge", "net_params.pkl", NET, "-o", "x.pt", "--rename", "only-one"),
        ("merge", "net_params.pkl", NET, "-o", "x.pt", "--dtype", "F8"),
        ("merge", "net_params.pkl", NET, "-o", "x.pt", "--min-coverage", "2"),
        ("merge", "net_params.pkl", NET, "-o", "x.pt", "--seed", "-1"),
        ("groups", "net_params.pkl", NET, "--lr", "fast"),
        ("check",),
    ],
    ids=" ".join,
)
def test_two_for_a_command_line_that_is_not_well_formed(run, files, words):
    before = files()
    ended = run(*words)
    assert ended.code == 2 and ended.out == "" and files() == before
    first, last = ended.err.splitlines()[0], ended.err.splitlines()[-1]
    assert first.startswith("error: ") and last.startswith("  try: ckptsurgeon ")
    assert last.endswith(("--help", "-o merged.pt", "ckptsurgeon diff net_params.pkl model:Net"))
    as_json = run(words[0], "--json", *words[1:])
    assert as_json.code == 2 and as_json.err == ""
    assert as_json.json["version"] == 1 and as_json.json["error"]["type"] == "UsageError" and as_json.json["error"]["hint"]


def test_an_error_under_json_stands_on_stdout_with_the_same_code(run):
    ended = run("inspect", "missing.pt", "--json")
    assert ended.code == 2 and ended.err == ""
    assert ended.json["error"] | {"hint": "", "problems": []} == {
        "type": "UnreadableError",
        "message": "missing.pt: does not exist",
        "path": "missing.pt",
        "key": None,
        "hint": "",
        "problems": [],
    }
    no = run("merge", "net_params.pkl", VARIANT, "-o", "x.pt", "--min-coverage", "0.9", "--json")
    assert no.code == 1 and no.json["error"]["type"] == "CoverageError"


def test_quiet_leaves_out_the_notes_but_not_the_errors(run):
    assert run("diff", "net_params.pkl", NET, "-q").err == ""
    ended = run("diff", "missing.pt", NET, "-q")
    assert ended.code == 2 and ended.err.startswith("error: missing.pt")


def test_verbose_shows_every_key(run):
    short, long = (run("diff", "net_params.pkl", VARIANT, *flag).out for flag in ((), ("-v",)))
    assert "norm1.{" in short and "conv1.weight" not in short
    for key in ("norm1.running_mean", "conv1.weight", "fc2.bias"):
        assert re.search(rf"^    {re.escape(key)}( |$)", long, re.M)


def test_a_narrow_terminal_gets_no_long_lines_and_a_pipe_one_row_a_line(run):
    words = ["diff", "net_params.pkl", "base.pt"]
    assert run("merge", "net_params.pkl", VARIANT, "-o", "base.pt").code == 0
    narrow = on_a_terminal(*words, COLUMNS="60", NO_COLOR="1")
    assert max(map(len, narrow.splitlines())) <= 66  # a folded key stays whole
    assert "Next:\n  ckptsurgeon merge net_params.pkl base.pt -o merged.pt \\\n      --rename" in narrow
    piped = subprocess.run([*PROGRAM, *words], capture_output=True, text=True, env={**os.environ, "COLUMNS": "60"}).stdout
    assert "\nNext: ckptsurgeon merge net_params.pkl base.pt -o merged.pt --rename" in piped


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(place, files, sent, code):
    (place / "slow.py").write_text(
        "import pathlib, time\nfrom model import Net as Quick\n"
        "class Net(Quick):\n    def __init__(self):\n        super().__init__()\n"
        "        if next(self.parameters()).device.type == 'cpu':\n"
        "            pathlib.Path('started').touch()\n            time.sleep(60)\n"
    )
    before = files()
    process = subprocess.Popen(
        [*PROGRAM, "merge", "net_params.pkl", "slow:Net", "-o", "out.pt"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not Path("started").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(sent)
    out, err = process.communicate(timeout=30)
    assert process.returncode == code and out == "" and "Traceback" not in err
    assert sent != signal.SIGINT or err.endswith("interrupted\n")
    Path("started").unlink()
    assert files() == before


def test_a_reader_that_goes_early_is_no_error(place):
    torch.save({f"layer{chr(97 + n % 26)}{n}x{n * n}": torch.zeros(n + 1) for n in range(5000)}, "many.pt")
    process = subprocess.Popen([*PROGRAM, "inspect", "-v", "many.pt"], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline().startswith(b"many.pt: ")
    process.stdout.close()
    assert process.wait(60) == 0 and process.stderr.read() == b""
    process.stderr.close()


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
def test_a_full_stdout_is_an_error_without_a_traceback(place):
    with open("/dev/full", "w") as full:
        done = subprocess.run([*PROGRAM, "inspect", "net_params.pkl"], stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2 and done.stderr == "error: stdout: the answer can't be written: No space left on device\n"


SWALLOWED = """
import signal, sys
from ckptsurgeon.cli import main
class Dropped:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
def command(**_words):
    Dropped()
    return 0
main.cli.main = command
main.main()
"""


def test_an_interrupt_that_python_drops_is_one_all_the_same() -> None:
    done = subprocess.run([sys.executable, "-c", SWALLOWED], capture_output=True, text=True, check=False)
    assert done.returncode == 130
    assert done.stderr.endswith("interrupted\n")


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("merge", "net_params.pkl", NET, "-o", "x.pt", "--dry-run", "--finite"), "--finite"),
        (("merge", "net_params.pkl", NET, "-o", "x.pt", "--dry-run", "--tied", "copy"), "--tied"),
        (("merge", "net_params.pkl", "copy.pkl", "-o", "x.pt", "--dry-run", "--device", "cpu"), "--device"),
        (("merge", "net_params.pkl", NET, "-o", "x.pt", "--dry-run", "--optimizer-root", "x"), "--optimizer-root"),
        (("merge", "net_params.pkl", "-o", "x.pt", "--seed", "0"), "--seed"),
        (("merge", "net_params.pkl", "-o", "x.pt", "--strict"), "--strict"),
        (("merge", "net_params.pkl", "-o", "x.pt", "--min-coverage", "0"), "--min-coverage"),
        (("merge", "net_params.pkl", "-o", "x.pt", "--dtype", "target"), "--dtype"),
        (("merge", "net_params.pkl", "copy.pkl", "-o", "x.pt", "--device", "cpu"), "--device"),
        (("merge", "net_params.pkl", NET, "-o", "x.pt", "--device", "cpu", "--no-verify"), "--device"),
        (("merge", "net_params.pkl", NET, "-o", "x.pt", "--tied", "copy"), "--tied"),
        (("merge", "net_params.pkl", NET, "-o", "x.pt", "--weights", "1"), "--weights"),
        (("plan", "net_params.pkl", NET, "--overwrite"), "--overwrite"),
        (("match", "net_params.pkl", NET, "--overwrite"), "--overwrite"),
        (("match", "net_params.pkl", NET, "--tolerance", "0.1"), "--tolerance"),
        (("verify", "net_params.pkl", "copy.pkl", "--device", "cpu"), "--device"),
        (("verify", "net_params.pkl", "copy.pkl", "--input", "1x3x32x32"), "--input"),
        (("verify", "net_params.pkl", NET, "--device", "meta", "--input", "1x3x32x32"), "--input"),
        (("verify", "net_params.pkl", "copy.pkl", "--seed", "0"), "--seed"),
        (("check", "net_params.pkl", "--finite", "--ignore", "CK4"), "--finite"),
        (("check", "net_params.pkl", "--explain", "CK401"), "--explain"),
        (("check", "--full", "--explain", "CK401"), "--explain"),
    ],
    ids=" ".join,
)
def test_two_for_an_option_that_would_do_nothing(run, place, files, words, option):
    (place / "copy.pkl").write_bytes((place / "net_params.pkl").read_bytes())
    before = files()
    ended = run(*words)
    assert ended.code == 2 and ended.out == "" and option in ended.err and files() == before, ended.err
    assert option in run(*words, "--json").out


def test_one_for_values_that_are_not_finite_whatever_the_target(run, files):
    torch.save({"w": torch.tensor([1.0, float("nan")]), "b": torch.ones(1)}, "nan.pt")
    torch.save({"w": torch.zeros(2), "b": torch.ones(1)}, "fine.pt")
    run("skeleton", "fine.pt", "-o", "fine.json")
    run("plan", "nan.pt", "fine.pt", "-o", "plan.json")
    before = files()
    for words in (("merge", "nan.pt"), ("merge", "nan.pt", "fine.pt"), ("merge", "nan.pt", "fine.json"), ("apply", "plan.json")):
        for out in ("x.pt", "x.safetensors"):
            for more in ((), ("--no-verify",)):
                ended = run(*words, "-o", out, "--finite", *more)
                assert ended.code == 1 and "  w: has 1 values that are NaN or infinite" in ended.err and files() == before
                assert run(*words, "-o", out, "--finite", *more, "--json").json["error"]["problems"]
    for target in ("fine.pt", "fine.json"):
        assert run("verify", "nan.pt", target, "--finite").code == 1 and run("verify", "fine.pt", target, "--finite").code == 0
    assert run("merge", "fine.pt", "-o", "x.pt", "--finite").code == 0
