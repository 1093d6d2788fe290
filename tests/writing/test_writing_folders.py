"""Folders of shards: the old one or the new one, whole, whatever kills, interrupts or refuses; replaced in one step; gone on with later."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_writing_refused import mounted
from writing_support import Call, calls, content, inside, one_error, run, setting, state, under_strace

import ckptsurgeon as cs
from ckptsurgeon.errors import FormatError, OutputError, StaleError
from ckptsurgeon.storage import platform
from ckptsurgeon.streaming import new_folder

WORDS = ("merge", "a.pt", "b.pt", "-o", "out", "--max-shard-size", "256")
HIDDEN = re.compile(r"\..+\.ckptsurgeon-[0-9a-f]{12}\.(tmp|log|old)")
CHANGING = ("openat", "mkdir", "fchmod", "pwrite64", "copy_file_range", "ftruncate", "fsync", "rename", "renameat2", "unlink", "rmdir")
NAMES = [*(f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)), "model.safetensors.index.json"]


def old_folder(place: Path) -> dict[str, bytes]:
    """An older checkpoint in the folder `out`; its files."""
    cs.merge(place / "a.pt", None, place / "out", max_shard_size=256, format="torch")
    return content(place / "out")


def left(place: Path) -> list[str]:
    """What is beside sources and output."""
    return sorted(set(os.listdir(place)) - {"a.pt", "b.pt", "out"})


def points(found: list[Call]) -> list[tuple[str, int]]:
    """The calls at which to kill, from the making of the journal on: by name within a thread."""
    start = next(place for place, call in enumerate(found) if ".ckptsurgeon-" in call.line and "O_CREAT" in call.line)
    places = [call for call in found[start:] if call.name in CHANGING and (call.name != "openat" or "O_CREAT" in call.line)]
    return list(dict.fromkeys((call.name, call.number) for call in places))


@pytest.mark.slow
def test_killed_at_every_call_that_changes_something(tmp_path: Path) -> None:
    """The folder that is replaced is whole, and so is the new one; the next run takes away what is left, or goes on with it."""
    folder = setting(tmp_path / "whole", 8)
    old_folder(folder)
    found = points(calls(folder, *WORDS, "--overwrite"))
    whole = content(folder / "out")
    assert sorted(whole) == NAMES and {"mkdir", "renameat2", "rmdir", "unlink", "fsync"} <= {name for name, _ in found}
    outcomes, resumed = [], 0
    for place_number, (name, number) in enumerate(found):
        place = setting(tmp_path / f"{name}-{number}", 8)
        old = old_folder(place)
        ended = under_strace(place, *WORDS, "--overwrite", inject=f"{name}:signal=KILL:when={number}")
        assert ended.code == -signal.SIGKILL, (name, number, ended)
        out = content(place / "out")
        assert out in (old, whole), (name, number)
        assert len(left(place)) <= 2 and all(HIDDEN.fullmatch(one) for one in left(place)), (name, number, left(place))
        outcomes.append((out == whole, len(left(place))))
        report = cs.merge(place / "a.pt", place / "b.pt", place / "out", max_shard_size=256, overwrite=True, resume=place_number % 2 == 0)
        resumed += any(finding.code == "resumed" for finding in report.findings)
        assert left(place) == [] and sorted(content(place / "out")) == NAMES and content(place / "out") == whole
        shutil.rmtree(place)
    assert {(False, 2), (True, 2)} <= set(outcomes) and resumed > 2  # with much left beside the old folder, and beside the new one


@pytest.mark.slow
@pytest.mark.parametrize(("sent", "code"), [("INT", 130), ("TERM", 143)])
def test_interrupted_at_any_moment(sent: str, code: int, tmp_path: Path) -> None:
    place = setting(tmp_path / "place", 8)
    folder = shutil.copytree(place, tmp_path / "whole")
    old_folder(folder)
    found = points(calls(folder, *WORDS, "--overwrite"))[::3]
    whole, kept = content(folder / "out"), 0
    for name, number in found:
        old = old_folder(place)
        ended = under_strace(place, *WORDS, "--overwrite", inject=f"{name}:signal={sent}:when={number}")
        assert ended.code in (0, code) and "Traceback" not in ended.err, ended
        assert content(place / "out") in (old, whole)
        if left(place):
            assert sent == "TERM" or "--resume" in ended.err, ended
            done = run(place, *WORDS, "--overwrite", "--resume")
            assert done.code == 0 and "were there from an interrupted run" in done.out, done
            kept += 1
        assert left(place) == []
        shutil.rmtree(place / "out")
    assert kept > 1


REFUSALS = [
    ("mkdir", 1, "EACCES", "may not be written to by you", False),
    ("pwrite64", 2, "ENOSPC", "the disk is full", False),
    ("copy_file_range", 1, "ENOSPC", "the disk is full", False),
    ("copy_file_range", 3, "ENOSPC", "the disk is full", True),
    ("fsync", 1, "EIO", "Input/output error", False),
    ("renameat2", 1, "EIO", "Input/output error", True),
]


@pytest.mark.parametrize(("call", "number", "error", "words", "kept"), REFUSALS, ids=lambda value: str(value))
def test_a_call_that_fails(call: str, number: int, error: str, words: str, kept: bool, tmp_path: Path) -> None:
    place = setting(tmp_path, 8)
    old = old_folder(place)
    ended = under_strace(place, *WORDS, "--overwrite", inject=f"{call}:error={error}:when={number}")
    one_error(ended, "out: ", words, "\n  try: ")
    assert content(place / "out") == old
    assert ("--resume goes on" in ended.err) is bool(left(place)) is kept
    if kept:
        done = run(place, *WORDS, "--overwrite", "--resume")
        assert done.code == 0 and "were there from an interrupted run" in done.out
    assert left(place) == []


@pytest.mark.parametrize("inject", ["renameat2:error=ENOSYS", "renameat2:error=EINVAL"])
def test_without_an_exchange_two_renames_do_it(inject: str, tmp_path: Path) -> None:
    place = setting(tmp_path, 8)
    old_folder(place)
    assert under_strace(place, *WORDS, "--overwrite", inject=inject).code == 0
    assert sorted(content(place / "out")) == NAMES and left(place) == []


def test_a_second_rename_that_fails_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = setting(tmp_path, 8)
    old, real, seen = old_folder(place), os.rename, []

    def refused(source: str, target: str) -> None:
        seen.append(target)
        if len(seen) == 2:
            raise OSError(errno.EIO, "Input/output error")
        real(source, target)

    monkeypatch.setattr(platform, "exchange", lambda *_: False)
    monkeypatch.setattr(os, "rename", refused)
    with pytest.raises(OutputError, match="Input/output error"):
        cs.merge(place / "a.pt", place / "b.pt", place / "out", max_shard_size=256, overwrite=True)
    assert content(place / "out") == old and len(seen) == 3
    monkeypatch.undo()
    cs.merge(place / "a.pt", place / "b.pt", place / "out", max_shard_size=256, overwrite=True)
    assert left(place) == [] and sorted(content(place / "out")) == NAMES


def test_a_kill_after_the_first_of_two_renames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As it lies on the disk then: the old folder stands hidden, the new one too, and neither has the name."""
    place = setting(tmp_path, 8)
    old, real = old_folder(place), os.rename

    def stop(source: str, target: str) -> None:
        real(source, target)
        os.rename = real
        shutil.copytree(place, tmp_path / "killed", symlinks=True)

    monkeypatch.setattr(platform, "exchange", lambda *_: False)
    monkeypatch.setattr(os, "rename", stop)
    cs.merge(place / "a.pt", place / "b.pt", place / "out", max_shard_size=256, overwrite=True)
    killed = tmp_path / "killed"
    assert not (killed / "out").exists() and len(left(killed)) == 3
    with pytest.raises(OutputError, match="exists already"):
        cs.merge(killed / "a.pt", killed / "b.pt", killed / "out", max_shard_size=256)
    assert content(killed / "out") == old and left(killed) == []


def test_a_disk_that_is_full_keeps_the_old_folder_and_what_is_proven(tmp_path: Path) -> None:
    place = setting(tmp_path / "in", 60)
    disk = tmp_path / "disk"
    words = ("merge", "a.pt", "b.pt", "-o", disk / "out", "--max-shard-size", "15KB", "--overwrite")
    with mounted(disk, b"tmpfs", 0, b"size=120k"):
        cs.merge(place / "a.pt", None, disk / "out", max_shard_size="15KB")
        old = content(disk / "out")
        (disk / "full").write_bytes(bytes(48 * 1024))
        ended = run(place, *words)
        one_error(ended, f"{disk}/out: the disk is full", "proven and kept", "--resume")
        assert content(disk / "out") == old and len(os.listdir(disk)) == 4
        (disk / "full").unlink()
        done = run(place, *words, "--resume")
        assert done.code == 0 and "were there from an interrupted run" in done.out
        assert sorted(os.listdir(disk)) == ["out"] and sorted(content(disk / "out")) == NAMES


def stopped(place: Path, patch: pytest.MonkeyPatch, after: int = 2, **options: Any) -> Path:
    """A run that is interrupted after so many shards; its hidden folder."""
    real, seen = new_folder.NewFolder.keep, []

    def keep(folder: Any, *arguments: Any) -> None:
        real(folder, *arguments)
        seen.append(folder.path)
        if len(seen) == after:
            raise KeyboardInterrupt

    with patch.context() as inner:
        inner.setattr(new_folder.NewFolder, "keep", keep)
        with pytest.raises(KeyboardInterrupt):
            cs.merge(place / "a.pt", place / "b.pt", place / "out", max_shard_size=256, **options)
    return Path(seen[0])


@pytest.mark.parametrize("options", [{}, {"dtype": "BF16"}, {"format": "torch"}, {"tied": "alias"}], ids=str)
def test_what_is_proven_is_not_written_again(options: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place, other = setting(tmp_path, 8), setting(tmp_path / "other", 8)
    hidden = stopped(place, monkeypatch, **options)
    before = {name: os.stat(hidden / name).st_ino for name in os.listdir(hidden)}
    times = {name: os.stat(hidden / name).st_mtime_ns for name in before if "index" not in name}
    report = cs.merge(place / "a.pt", place / "b.pt", place / "out", max_shard_size=256, resume=True, **options)  # type: ignore[arg-type]
    whole = cs.merge(other / "a.pt", other / "b.pt", other / "out", max_shard_size=256, **options)  # type: ignore[arg-type]
    assert content(place / "out") == content(other / "out") and left(place) == ["other"]
    shards = [name for name in times if os.stat(place / "out" / name).st_mtime_ns == times[name]]
    assert len(shards) == 2 and all(os.stat(place / "out" / name).st_ino == before[name] for name in shards)
    assert [f.message for f in report.findings if f.code == "resumed"] and report.casts == whole.casts


def spoil_shard(hidden: Path) -> None:
    path = sorted(hidden.glob("*-00001-*"))[0]
    raw = bytearray(path.read_bytes())
    raw[-3] ^= 1
    path.write_bytes(raw)


def spoil_header(hidden: Path) -> None:
    path = sorted(hidden.glob("*-00001-*"))[0]
    path.write_bytes(path.read_bytes().replace(b'"fresh', b'"frosh', 1))


def cut_shard(hidden: Path) -> None:
    path = sorted(hidden.glob("*-00001-*"))[0]
    os.truncate(path, path.stat().st_size - 1)


def lose_shard(hidden: Path) -> None:
    sorted(hidden.glob("*-00001-*"))[0].unlink()


def add_file(hidden: Path) -> None:
    (hidden / "stray.bin").write_bytes(b"x")


def cut_journal(hidden: Path) -> None:
    path = hidden.with_suffix(".log")
    path.write_bytes(path.read_bytes()[:-5])


def lie_in_journal(hidden: Path) -> None:
    path = hidden.with_suffix(".log")
    path.write_text(re.sub('"[0-9a-f]{64}"}', f'"{"0" * 64}"}}', path.read_text()))


def garbage_in_journal(hidden: Path) -> None:
    hidden.with_suffix(".log").write_bytes(b"\x80\x04garbage[[[")


@pytest.mark.parametrize("dtype", [None, "BF16"])
@pytest.mark.parametrize(
    "spoil", [spoil_shard, spoil_header, cut_shard, lose_shard, add_file, cut_journal, lie_in_journal, garbage_in_journal]
)
def test_what_is_not_as_it_was_proven_is_written_again(
    spoil: Callable[[Path], None], dtype: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, other = setting(tmp_path, 8), setting(tmp_path / "other", 8)
    spoil(stopped(place, monkeypatch, dtype=dtype))
    cs.merge(place / "a.pt", place / "b.pt", place / "out", max_shard_size=256, resume=True, dtype=dtype)
    cs.merge(other / "a.pt", other / "b.pt", other / "out", max_shard_size=256, dtype=dtype)
    assert content(place / "out") == content(other / "out") and left(place) == ["other"]


def test_a_source_that_is_damaged_between_two_runs_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its size and times are the same, as after a disk error; the shard of the first run still has the right checksum."""
    place = setting(tmp_path, 8)
    stopped(place, monkeypatch, format="torch")
    source, first = place / "a.pt", torch.load(place / "a.pt", weights_only=True)["first"].numpy().tobytes()
    raw, times = bytearray(source.read_bytes()), source.stat()
    raw[raw.index(first)] ^= 1
    with source.open("r+b") as file:
        file.write(raw)
    os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(FormatError, match="not what its own checksum says"):
        cs.merge(place / "a.pt", place / "b.pt", place / "out", max_shard_size=256, format="torch", resume=True)
    assert not (place / "out").exists()


@pytest.mark.parametrize("change", ["source", "dtype", "size", "record"])
def test_other_inputs_or_options_do_not_go_on(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = setting(tmp_path, 8)
    stopped(place, monkeypatch)
    options: dict[str, Any] = {"max_shard_size": 256}
    options |= {"dtype": {"dtype": "BF16"}, "size": {"max_shard_size": 512}, "record": {"provenance": False}}.get(change, {})
    if change == "source":
        torch.save(state("first", "second", seed=7, size=8), place / "a.pt")
    with pytest.raises(StaleError, match="an interrupted run left"):
        cs.merge(place / "a.pt", place / "b.pt", place / "out", resume=True, **options)
    assert not (place / "out").exists() and len(left(place)) == 2
    cs.merge(place / "a.pt", place / "b.pt", place / "out", **options)
    assert left(place) == []


def test_without_locks_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, where an open file can't be deleted either: no later run could tell whether this one has ended."""
    place, real = setting(tmp_path, 8), os.unlink

    def refused(path: str) -> None:
        if os.path.realpath(path) in {os.path.realpath(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")}:
            raise PermissionError(errno.EACCES, "is open", path)
        real(path)

    monkeypatch.setattr(platform, "fcntl", None)
    monkeypatch.setattr(os, "unlink", refused)
    stopped(place, monkeypatch)
    assert left(place) == [] and not (place / "out").exists()
    cs.merge(place / "a.pt", place / "b.pt", place / "out", max_shard_size=256)
    assert left(place) == [] and sorted(content(place / "out")) == NAMES


def test_values_of_a_model_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code may have changed since; only what files alone decide is gone on with."""
    place = setting(tmp_path, 8)
    (place / "net.py").write_text(
        "import torch\nfrom torch import nn\n\nclass Net(nn.Module):\n    def __init__(self):\n        super().__init__()\n"
        "        for name in ('first', 'second', 'third'):\n            setattr(self, name, nn.Parameter(torch.full((8, 8), 1.0)))\n"
    )
    real, seen = new_folder.NewFolder.keep, []

    def keep(folder: Any, *arguments: Any) -> None:
        real(folder, *arguments)
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt

    spec = f"{place / 'net.py'}:Net"
    with monkeypatch.context() as patch:
        patch.setattr(new_folder.NewFolder, "keep", keep)
        with pytest.raises(KeyboardInterrupt):
            cs.merge(place / "a.pt", spec, place / "out", max_shard_size=256)
    (place / "net.py").write_text((place / "net.py").read_text().replace("1.0", "2.0"))
    done = run(place, "merge", "a.pt", "net.py:Net", "-o", "out", "--max-shard-size", "256", "--resume")
    assert done.code == 0 and "2 of 3 shards were there" in done.out, done
    assert load_file(place / "out" / NAMES[2])["third"].unique().tolist() == [2.0]


def test_two_runs_at_once_do_not_touch_each_others_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = setting(tmp_path, 8)
    real = new_folder.NewFolder.keep
    inner = []

    def keep(folder: Any, *arguments: Any) -> None:
        real(folder, *arguments)
        if not inner:
            inner.append(run(place, *WORDS, "--resume"))

    monkeypatch.setattr(new_folder.NewFolder, "keep", keep)
    with pytest.raises(OutputError, match="exists already"):
        cs.merge(place / "a.pt", place / "b.pt", place / "out", max_shard_size=256)
    assert inner[0].code == 0 and left(place) == [] and sorted(content(place / "out")) == NAMES


@pytest.mark.parametrize("other", ["config.json", "folder", "link"])
def test_a_folder_with_anything_else_in_it_is_not_replaced(other: str, tmp_path: Path) -> None:
    place = setting(tmp_path, 8)
    old_folder(place)
    if other == "folder":
        (place / "out" / "model.safetensors").mkdir()
    elif other == "link":
        (place / "out" / "model.safetensors").symlink_to(place / "a.pt")
    else:
        (place / "out" / other).write_text("{}")
    before = sorted(os.listdir(place / "out"))
    for overwrite in (False, True):
        with pytest.raises(OutputError, match="would be replaced whole"):
            cs.merge(place / "a.pt", place / "b.pt", place / "out", max_shard_size=256, overwrite=overwrite)
        assert sorted(os.listdir(place / "out")) == before and left(place) == []


def test_a_file_that_comes_while_the_folder_is_written_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = setting(tmp_path, 8)
    real = new_folder.NewFolder.keep
    for already in (False, True):
        if already:
            (place / "out" / "mine.txt").unlink()
            (place / "out").rmdir()
            old_folder(place)

        def keep(folder: Any, *arguments: Any) -> None:
            real(folder, *arguments)
            (place / "out").mkdir(exist_ok=True)
            (place / "out" / "mine.txt").write_text("mine")

        with monkeypatch.context() as patch:
            patch.setattr(new_folder.NewFolder, "keep", keep)
            with pytest.raises(OutputError, match="would be replaced whole" if already else "exists already"):
                cs.merge(place / "a.pt", place / "b.pt", place / "out", max_shard_size=256, overwrite=already)
        assert (place / "out" / "mine.txt").read_text() == "mine"


def test_the_folder_of_the_source_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = setting(tmp_path, 8)
    cs.merge(place / "b.pt", None, place / "out", max_shard_size=256)
    monkeypatch.chdir(place)
    assert inside(monkeypatch, place, "merge", "out", "-o", "out", "--dtype", "BF16", "--max-shard-size", "256") == 2
    assert inside(monkeypatch, place, "merge", "out", "-o", "out", "--dtype", "BF16", "--max-shard-size", "256", "--overwrite") == 0
    found = {key: value for path in (place / "out").glob("*.safetensors") for key, value in load_file(path).items()}
    expected = torch.load(place / "b.pt", weights_only=True)
    assert {key: value.bfloat16().tolist() for key, value in expected.items()} == {key: value.tolist() for key, value in found.items()}


def test_who_may_read_the_old_folder_may_read_the_new_one(tmp_path: Path) -> None:
    place = setting(tmp_path, 8)
    old_folder(place)
    (place / "out").chmod(0o750)
    for number, path in enumerate(sorted((place / "out").iterdir())):
        path.chmod(0o640 if number else 0o600)
    cs.merge(place / "a.pt", place / "b.pt", place / "out", max_shard_size=256, overwrite=True)
    assert (place / "out").stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in (place / "out").iterdir()} == {0o600}


def test_a_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    place = setting(tmp_path, 8)
    (place / "real").mkdir()
    (place / "out").symlink_to("real")
    cs.merge(place / "a.pt", place / "b.pt", place / "out", max_shard_size=256)
    assert (place / "out").is_symlink() and sorted(content(place / "real")) == NAMES


def test_files_folder_and_home_are_synced_before_the_command_says_done(tmp_path: Path) -> None:
    place = setting(tmp_path / "place", 8)
    found = calls(place, *WORDS)
    made = next(number for number, call in enumerate(found) if call.name == "mkdir" and ".ckptsurgeon-" in call.line)
    taken = next(number for number, call in enumerate(found) if call.name == "rename" and ".ckptsurgeon-" in call.line)
    assert sum(call.name == "fsync" for call in found[made:taken]) >= len(NAMES) + 1
    folder = max(number for number, call in enumerate(found[:taken]) if "O_DIRECTORY" in call.line and ".ckptsurgeon-" in call.line)
    assert any(call.name == "fsync" for call in found[folder:taken])
    home = next(number for number, call in enumerate(found) if number > taken and "O_DIRECTORY" in call.line)
    said = next(number for number, call in enumerate(found) if re.search(r" write\(1, \"\w", call.line))
    assert taken < home < said and any(call.name == "fsync" for call in found[home:said])


def test_a_journal_that_is_none_of_ours_is_left_alone(tmp_path: Path) -> None:
    place = setting(tmp_path, 8)
    (place / ".out.ckptsurgeon-0123456789ab.log").write_text(json.dumps({"version": 1}))
    cs.merge(place / "a.pt", place / "b.pt", place / "out", max_shard_size=256)
    assert left(place) == [".out.ckptsurgeon-0123456789ab.log"]
