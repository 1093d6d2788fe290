"""A source, or a target, that changes while it is read is told by name, and no output is named; a replaced one stays whole for us."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from writing_support import PROGRAM, Ended, content, environment, inside, loaded, one_error, setting, state, strace

import ckptsurgeon as cs
from ckptsurgeon.errors import StaleError, VerificationError
from ckptsurgeon.streaming import proof, writing
from ckptsurgeon.tensors import Span

pytestmark = pytest.mark.slow  # with its like


def grown(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"x")


def shrunk(path: Path) -> None:
    os.truncate(path, 1000)


def rewritten(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\0")


def replaced(path: Path) -> None:
    (path.parent / "new").write_bytes(path.read_bytes()[::-1])
    os.replace(path.parent / "new", path)


def stopped(folder: Path, words: tuple[str, ...], call: str, change: Callable[[], None]) -> Ended:
    """The real program, stopped at the second `call` of a thread, and let go on after the change."""
    log = folder.parent / "log"
    command = [*strace(log, (f"{call}:signal=STOP:when=2",)), *PROGRAM, *words]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment())
    try:
        deadline = time.monotonic() + 60
        line = None
        while line is None and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.01)
            lines = log.read_text().splitlines() if log.exists() else []
            line = next((one for one in lines if "--- stopped by SIGSTOP ---" in one), None)
        assert line is not None, process.communicate()
        change()
        program, deadline = int(lines[0].split()[0]), time.monotonic() + 60
        while True:
            with suppress(ProcessLookupError):
                os.kill(program, signal.SIGCONT)
            try:
                out, err = process.communicate(timeout=0.2)
                break
            except subprocess.TimeoutExpired:  # strace counts calls by thread: another one has stopped the program again
                assert time.monotonic() < deadline
    finally:
        process.kill()
        process.wait()
    return Ended(process.returncode, out, err)


COPY, READ = "copy_file_range", "preadv,preadv2"
COMMANDS: dict[str, tuple[str, tuple[str, ...]]] = {
    "merge": (COPY, ("merge", "a.pt", "b.pt", "-o", "out.pt")),
    "merge unproven": (COPY, ("merge", "a.pt", "b.pt", "-o", "out.safetensors", "--no-verify", "--overwrite")),
    "apply": (COPY, ("apply", "plan.json", "-o", "out.pt")),
    "average": (READ, ("merge", "a.pt", "a2.pt", "-o", "out.pt", "--average")),
    "verify": (READ, ("verify", "a.pt", "net.json", "--finite")),
}


def place(folder: Path) -> Path:
    """A folder in which each of the commands can be run."""
    setting(folder, 60)
    torch.save(state("first", "second", seed=3, size=60), folder / "a2.pt")
    return folder


CHANGES = [
    *((command, change) for command in ("merge", "merge unproven", "apply") for change in (grown, shrunk, rewritten)),
    ("average", rewritten),
    ("verify", shrunk),
]


@pytest.mark.parametrize(("command", "change"), CHANGES)
def test_a_source_that_changes_while_it_is_read(
    command: str, change: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = place(tmp_path / "in")
    assert inside(monkeypatch, folder, "plan", "a.pt", "b.pt", "-o", "plan.json") == 0
    assert inside(monkeypatch, folder, "skeleton", "a.pt", "-o", "net.json") == 0
    (folder / "out.safetensors").write_bytes(b"the month's only copy")
    call, words = COMMANDS[command]
    before = content(folder)
    ended = stopped(folder, words, call, lambda: change(folder / "a.pt"))
    one_error(ended, "error: a.pt: ", "while it was read", "run it again when nothing writes to it")
    assert {**content(folder), "a.pt": before["a.pt"]} == before


@pytest.mark.parametrize("change", [grown, shrunk])
def test_a_target_that_changes_while_it_is_read(change: Callable[[Path], None], tmp_path: Path) -> None:
    folder = place(tmp_path / "in")
    before = content(folder)
    ended = stopped(folder, COMMANDS["merge"][1], COPY, lambda: change(folder / "b.pt"))
    one_error(ended, "error: b.pt: ", "while it was read")
    assert {**content(folder), "b.pt": before["b.pt"]} == before


def test_a_source_that_is_replaced_whole_stays_what_it_was_for_the_run(tmp_path: Path) -> None:
    folder = place(tmp_path / "in")
    expected = loaded(folder / "a.pt")
    ended = stopped(folder, COMMANDS["merge"][1], COPY, lambda: replaced(folder / "a.pt"))
    assert ended.code == 0, ended
    found = loaded(folder / "out.pt")
    assert all(torch.equal(found[key], expected[key]) for key in expected)


def test_check_finds_a_file_that_changes(tmp_path: Path) -> None:
    folder = place(tmp_path / "in")
    ended = stopped(folder, ("check", "--finite", "a.pt"), READ, lambda: grown(folder / "a.pt"))
    assert ended.code == 1 and "changed while it was read" in ended.out and "Traceback" not in ended.err


@pytest.mark.parametrize("change", [grown, rewritten])
@pytest.mark.parametrize("when", ["before the proof reads", "after it"])
def test_the_proof_reads_the_source_again_and_the_stamp_is_compared_after_it(
    when: str, change: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = place(tmp_path)
    before = content(folder)

    def changing(*arguments: Any) -> list[Span]:
        damaged = proof.prove(*arguments) if when == "after it" else []
        change(folder / "a.pt")
        return damaged if when == "after it" else proof.prove(*arguments)

    monkeypatch.setattr(writing, "prove", changing)
    with pytest.raises(StaleError, match=r"a\.pt: changed while it was read"):
        cs.merge(folder / "a.pt", folder / "b.pt", folder / "out.pt")
    assert {**content(folder), "a.pt": before["a.pt"]} == before


def test_a_source_whose_values_change_before_the_proof_is_stale_and_no_fault_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = place(tmp_path)

    def changing(*arguments: Any) -> list[Span]:
        data = bytearray((folder / "a.pt").read_bytes())
        data[len(data) // 2] ^= 1  # within a tensor
        (folder / "a.pt").write_bytes(data)
        with pytest.raises(VerificationError):
            proof.prove(*arguments)
        return proof.prove(*arguments)

    monkeypatch.setattr(writing, "prove", changing)
    with pytest.raises(StaleError):
        cs.merge(folder / "a.pt", folder / "b.pt", folder / "out.pt")
    assert not (folder / "out.pt").exists()


NET = """
from torch import nn
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(3, 3), nn.Linear(3, 3)
"""


def test_verify_with_a_model_notices_a_file_that_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptsurgeon.streaming.reading import Reader

    (tmp_path / "writing_net.py").write_text(NET)
    net: dict[str, Any] = {}
    exec(NET, net)
    torch.save(net["Net"]().state_dict(), tmp_path / "a.pt")
    monkeypatch.chdir(tmp_path)
    assert cs.verify("a.pt", "writing_net.py:Net").ok
    real = Reader.read

    def changing(self: Reader, tensor: Any) -> bytearray:
        found = real(self, tensor)
        os.utime("a.pt", ns=(5, 5))
        return found

    monkeypatch.setattr(Reader, "read", changing)
    with pytest.raises(StaleError):
        cs.verify("a.pt", "writing_net.py:Net")
