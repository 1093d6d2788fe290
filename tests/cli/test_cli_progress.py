"""The line that says how far the work is: on a terminal's stderr after a second, nowhere else, and gone when the answer comes."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import forked
import pytest
import safetensors.torch
import torch
from cli_support import ROOT, read_to_end

from ckptsurgeon.cli import progress_line
from ckptsurgeon.cli.progress_line import ProgressLine
from ckptsurgeon.progress import Progress

pytestmark = pytest.mark.slow  # with its like

# The program, with a line at once, many events, and a copy that takes its time where `SLOW` says so.
SETTING = """
import os, time
from ckptsurgeon import progress
from ckptsurgeon.cli import progress_line
from ckptsurgeon.storage import copying, platform
progress_line.DELAY = float(os.environ["DELAY"])
progress.EVERY = 0.0
copying.AT_ONCE = copying.BUFFER = copying.IN_CACHE = copying.PART = 1 << 18
plain = platform.copy_in_kernel
platform.copy_in_kernel = lambda *words: time.sleep(float(os.environ["SLOW"])) or plain(*words)
from ckptsurgeon.cli.main import main
main()
"""


@pytest.fixture
def files(place: Path) -> Path:
    state = {f"layer{number}.weight": torch.zeros(1 << 10, 1 << 9) for number in range(2)}
    torch.save(state, "a.pt")
    safetensors.torch.save_file(state, "a.safetensors")
    return place


def program(*words: str, out: int, err: int, delay: float = 0.0, slow: float = 0.0) -> subprocess.Popen[bytes]:
    env = {**os.environ, "DELAY": str(delay), "SLOW": str(slow), "NO_COLOR": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen([sys.executable, "-c", SETTING, *words], stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=env)


def run(*words: str, out: bool = True, err: bool = True, columns: int = 80, **how: float) -> tuple[int, str, str]:
    """The exit code, and what a run gives on stdout and stderr, which may be one terminal, or a terminal and a pipe."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    pipe, end = os.pipe()
    process = program(*words, out=theirs if out else end, err=theirs if err else end, **how)
    os.close(theirs)
    os.close(end)
    seen, piped = read_to_end(ours), read_to_end(pipe)
    return process.wait(60), seen, piped


def screen(text: str) -> list[str]:
    """What a terminal shows in the end, where `\\r` goes back to the line's beginning."""
    lines = []
    for row in text.split("\n"):
        line: list[str] = []
        for part in row.removesuffix("\r").split("\r"):
            line[: len(part)] = part
        lines.append("".join(line).rstrip())
    return lines[:-1] if lines[-1] == "" else lines


MERGE = ("merge", "a.safetensors", "-o", "out.pt", "--overwrite")


def test_a_terminal_is_told_how_far_it_is_and_keeps_the_answer_alone(files: Path) -> None:
    code, seen, _ = run(*MERGE, slow=0.01)
    told = seen.split("\r")
    assert code == 0
    assert any(re.fullmatch(r"writing [\d.]+ [KMG]i?B of [\d.]+ [KMG]i?B, [\d.]+ [KMG]i?B/s, \d+ s left *", row) for row in told), told
    assert any(row.startswith("proving ") for row in told)
    without = subprocess.run([sys.executable, "-m", "ckptsurgeon", *MERGE], capture_output=True, text=True, check=True)
    assert screen(seen) == without.stdout.splitlines() and without.stderr == ""


def test_within_a_second_nothing_is_said(files: Path) -> None:
    assert progress_line.DELAY == 1.0
    code, seen, _ = run(*MERGE, delay=60.0)
    assert code == 0 and "writing" not in seen and seen.count("\r") == seen.count("\r\n")


@pytest.mark.parametrize("flag", ["-q", "--quiet"])
def test_quiet_says_nothing(files: Path, flag: str) -> None:
    code, seen, _ = run(*MERGE, flag)
    assert code == 0 and "writing" not in seen and seen.count("\r") == seen.count("\r\n")


def test_a_pipe_gets_none_of_it(files: Path) -> None:
    code, seen, piped = run(*MERGE, err=False)
    assert code == 0 and piped == "" and "writing" not in seen
    code, seen, piped = run(*MERGE, out=False)
    assert code == 0 and "\r" not in piped and piped.startswith("Wrote out.pt") and "\rwriting " in seen and screen(seen) in ([], [""])
    assert run(*MERGE, out=False, err=False)[1] == ""


def test_json_on_a_terminal_comes_after_it(files: Path) -> None:
    code, seen, _ = run(*MERGE, "--json")
    assert code == 0 and "\rwriting " in seen and screen(seen)[0] == "{" and screen(seen)[-1] == "}"


@pytest.mark.parametrize("columns", [20, 40])
def test_it_is_never_wider_than_the_terminal(files: Path, columns: int) -> None:
    code, seen, _ = run(*MERGE, columns=columns)
    rows = [row for row in re.split(r"[\r\n]", seen) if row.startswith(("writing", "computing", "proving"))]
    assert code == 0 and rows and max(map(len, rows)) < columns


def test_an_error_stands_on_a_line_of_its_own(files: Path) -> None:
    data = bytearray(Path("a.pt").read_bytes())
    data[len(data) // 3] ^= 1
    Path("a.pt").write_bytes(data)
    code, seen, _ = run("merge", "a.pt", "-o", "new.safetensors")
    assert code == 2 and "\rproving " in seen and screen(seen)[0].startswith("error: a.pt: has data that is not what its own checksum says")
    assert not Path("new.safetensors").exists()


@pytest.mark.parametrize(("sent", "code", "shown"), [(signal.SIGINT, 130, ["", "interrupted"]), (signal.SIGTERM, 143, [])])
def test_an_interrupt_leaves_a_clean_line_and_no_file(files: Path, sent: int, code: int, shown: list[str]) -> None:
    before = sorted(os.listdir())
    ours, theirs = pty.openpty()
    process = program(*MERGE, out=theirs, err=theirs, slow=0.5)
    os.close(theirs)
    seen, deadline = b"", time.monotonic() + 60
    while b"writing" not in seen and time.monotonic() < deadline:
        seen += os.read(ours, 65536)
    process.send_signal(sent)
    text = seen.decode() + read_to_end(ours)
    assert process.wait(60) == code and screen(text) in (shown, [*shown, ""]), text
    assert sorted(os.listdir()) == before


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("check", "a.pt", "a.safetensors", "net_params.pkl"), "checking 3 files"),
        (("check", "a.pt", "a.safetensors", "--full", "--jobs", "2"), "checking 1 of 2 files"),
        (("match", "net_params.pkl", "variants:NetVariant"), "matching 15 tensors"),
        (("diff", "net_params.pkl", "variants:NetVariant"), "matching 15 tensors"),
        (("plan", "net_params.pkl", "variants:NetVariant", "--match"), "matching 15 tensors"),
        (("verify", "net_params.pkl", "model:Net"), "comparing "),
    ],
)
def test_what_may_last_says_how_far_it_is(files: Path, words: tuple[str, ...], line: str) -> None:
    code, seen, _ = run(*words)
    assert code == 0 and any(row.startswith(line) for row in seen.split("\r")), seen
    shown = [row for row in screen(seen) if not row.startswith("note:")]
    told = forked.program(*words).out.splitlines()
    assert shown[0] == told[0] and len(shown) >= len(told)  # a terminal of 80 columns breaks long lines


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(progress_line, "monotonic", found)
    return found


def test_speed_and_what_is_left_are_those_of_the_latest_events(clock: Clock) -> None:
    lines: list[str] = []
    line = ProgressLine(lines.append)
    for second in range(40):
        clock.now = 100.0 + second
        line.show(Progress("writing", second * 10**6, 10**9, "bytes"))
    assert len(lines) == 39 and lines[-1].endswith("/s, 16 min 1 s left")
    clock.now += 1
    line.show(Progress("proving", 0, 10**9, "bytes"))
    assert lines[-1] == str(Progress("proving", 0, 10**9, "bytes"))  # the last phase's speed is not this one's
    clock.now += 12
    line.show(Progress("proving", 0, 10**9, "bytes"))
    assert lines[-1].endswith(", 12 s")
    line.show(Progress("checking", 0, 40, "files"))
    clock.now += 3
    line.show(Progress("checking", 10, 40, "files"))
    assert lines[-1] == "checking 10 of 40 files, 9 s left"


def test_the_same_phase_twice_begins_anew(clock: Clock) -> None:
    lines: list[str] = []
    line = ProgressLine(lines.append)
    clock.now += 5
    line.show(Progress("reading values", 10**9, 10**9, "bytes"))
    clock.now += 1
    line.show(Progress("reading values", 0, 10**9, "bytes"))
    assert "left" not in lines[-1] and ", " not in lines[-1]
