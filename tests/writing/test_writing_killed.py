"""Killed at any moment: the old output, or the new one whole; beside it a file of a recognisable name, which the next run takes away."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from pathlib import Path

import pytest
import writing_support
from writing_support import TEMPORARY, Call, Ended, calls, content, inside, setting, under_strace, writing

import ckptsurgeon as cs
from ckptsurgeon.errors import OutputError

# Everything that changes a file or a folder; `openat` only where it makes the temporary file.
CHANGING = ("openat", "flock", "fchmod", "pwrite64", "copy_file_range", "ioctl", "ftruncate", "fsync", "rename", "link", "unlink", "write")
OLD = b"the month's only copy"


def points(found: list[Call]) -> list[tuple[str, int]]:
    """The calls at which to kill, as strace counts them: by name within a thread."""
    places = [call for call in writing(found) if call.name in CHANGING and (call.name != "openat" or "O_CREAT" in call.line)]
    return list(dict.fromkeys((call.name, call.number) for call in places))


def left(folder: Path) -> list[str]:
    """What is in the folder beside sources and output."""
    return sorted(set(os.listdir(folder)) - {"a.pt", "b.pt", "out.pt"})


@pytest.mark.slow
@pytest.mark.parametrize("old", [None, OLD], ids=["new", "overwritten"])
def test_killed_at_every_call_that_changes_something(old: bytes | None, tmp_path: Path) -> None:
    kill_everywhere(old, tmp_path, 8, {"copy_file_range"})


@pytest.mark.slow
def test_killed_where_blocks_are_shared(xfs: Path) -> None:
    place = xfs / "killed"
    place.mkdir()
    kill_everywhere(OLD, place, 600, {"ioctl"})
    shutil.rmtree(place)


@pytest.mark.slow
def test_killed_while_it_is_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Early syncs, which come after 256 MB otherwise, run in threads beside the writing."""
    code = "from ckptsurgeon.streaming import atomic; atomic.EARLY = 1; from ckptsurgeon.cli import main; main.main()"
    monkeypatch.setattr(writing_support, "PROGRAM", [sys.executable, "-c", code])
    folder = setting(tmp_path / "traced", 8)
    found = calls(folder, "merge", "a.pt", "b.pt", "-o", "out.pt")
    assert len({call.thread for call in found if call.name == "fsync"}) >= 2
    kill_everywhere(OLD, tmp_path, 8, {"copy_file_range"})


def kill_everywhere(old: bytes | None, tmp_path: Path, size: int, expected: set[str]) -> None:
    """Kill a merge at each of its calls, among which are those of `expected`."""
    words = ("merge", "a.pt", "b.pt", "-o", "out.pt", *(("--overwrite",) if old is not None else ()))
    folder = setting(tmp_path / "whole", size)
    if old is not None:
        (folder / "out.pt").write_bytes(old)
    found = points(calls(folder, *words))
    whole = (folder / "out.pt").read_bytes()
    assert expected | {"openat", "pwrite64", "fsync", "unlink", "write", "rename" if old is not None else "link"} <= set(dict(found))
    outcomes = []
    for name, number in found:
        place = setting(tmp_path / f"{name}-{number}", size)
        if old is not None:
            (place / "out.pt").write_bytes(old)
        ended = under_strace(place, *words, inject=f"{name}:signal=KILL:when={number}")
        assert ended.code == -signal.SIGKILL, (name, number, ended)
        out = (place / "out.pt").read_bytes() if (place / "out.pt").exists() else None
        assert out in (old, whole), (name, number)
        assert len(left(place)) <= 1 and all(TEMPORARY.fullmatch(one) for one in left(place)), (name, number, left(place))
        outcomes.append((out == whole, len(left(place))))
        again(place, whole, size)
        shutil.rmtree(place)
    # It was really killed before, between and after.
    assert {(False, 1), (True, 0)} <= set(outcomes) and (old is not None or (True, 1) in outcomes)


def again(place: Path, whole: bytes, size: int) -> None:
    """The next run, whether it may overwrite or not, takes away what the killed one left."""
    if (place / "out.pt").exists():
        with pytest.raises(OutputError, match="exists already"):
            cs.merge(place / "a.pt", place / "b.pt", place / "out.pt")
        assert left(place) == []
    cs.merge(place / "a.pt", place / "b.pt", place / "out.pt", overwrite=True)
    assert left(place) == [] and cs.open(place / "out.pt").fingerprint
    assert {key: value.nbytes for key, value in cs.open(place / "out.pt").items()} == dict.fromkeys(
        ("first", "second", "third"), 4 * size * size
    )
    assert len((place / "out.pt").read_bytes()) == len(whole)


def spread(found: list[Call], count: int, step: int) -> list[Call]:
    """Some of the calls from where our program is loaded on, and of those that write each `step`th."""
    start = next(place for place, call in enumerate(found) if "ckptsurgeon/cli/" in call.line)
    main = [call for call in found[start:] if call.thread == found[0].thread]
    changing = set(points(found))
    return [*main[:: len(main) // count], *[call for call in main if (call.name, call.number) in changing][::step]]


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [("INT", 130), ("TERM", 143)])
def test_interrupted_at_any_moment(sent: str, code: int, tmp_path: Path) -> None:
    words = ("merge", "a.pt", "b.pt", "-o", "out.pt")
    found = spread(calls(setting(tmp_path / "whole", 8), *words), 8, 1 if sent == "INT" else 5)
    whole = (tmp_path / "whole" / "out.pt").read_bytes()
    place = setting(tmp_path / "place", 8)
    shutil.rmtree(tmp_path / "whole")
    before = content(place)
    outcomes = []
    for call in found:
        ended = under_strace(place, *words, inject=f"{call.name}:signal={sent}:when={call.number}")
        outcomes.append(check(ended, code, call, sent))
        after = content(place)
        # Once it has its name it stays: it is whole, and a run that is told to stop then still says so.
        assert after in (before, {**before, "out.pt": whole}), call
        assert ended.code != 0 or "out.pt" in after
        (place / "out.pt").unlink(missing_ok=True)
    assert outcomes.count(code) > len(found) // 2


def check(ended: Ended, code: int, call: Call, sent: str) -> int:
    """Words instead of a traceback. A signal after the last word changes nothing; outside of our lines SIGTERM kills as ever."""
    assert "Traceback" not in ended.err, (call, ended)
    outside = sent == "TERM" and ended.code == -signal.SIGTERM
    assert ended.code in (0, code) or outside, (call, ended)
    assert ended.code != 130 or ended.err.endswith("interrupted\n")
    return ended.code


def test_two_interrupts_leave_no_more_than_one(tmp_path: Path) -> None:
    words = ("merge", "a.pt", "b.pt", "-o", "out.pt")
    place = setting(tmp_path / "place", 8)
    before = content(place)
    ended = under_strace(place, *words, inject=("copy_file_range:signal=INT:when=1", "unlink:signal=INT:when=1"))
    assert ended.code == 130 and "Traceback" not in ended.err and content(place) == before


def test_every_command_is_as_whole_when_killed_as_its_output_takes_its_name(
    tmp_path: Path, commands: dict[str, tuple[str, ...]], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, words in commands.items():
        folder = setting(tmp_path / name, 8)
        assert inside(monkeypatch, folder, "plan", "a.pt", "b.pt", "-o", "plan.json") == 0
        output = folder / words[words.index("-o") + 1]
        assert inside(monkeypatch, folder, *words) == 0
        whole = output.read_bytes()
        old = b"{}" + whole[:7].replace(b"\0", b" ")
        for call, expected in (("rename", old), ("unlink", whole)):
            output.write_bytes(old)
            before = set(os.listdir(folder))
            ended = under_strace(folder, *words, "--overwrite", inject=f"{call}:signal=KILL:when=1")
            assert (ended.code, output.read_bytes()) == (-signal.SIGKILL, expected), (name, call)
            assert all(TEMPORARY.fullmatch(one) for one in set(os.listdir(folder)) - before), (name, call)
            assert inside(monkeypatch, folder, *words, "--overwrite") == 0
            assert set(os.listdir(folder)) == before and output.read_bytes() == whole, (name, call)
