"""An output is whole or not there: whatever happens, the old file or the new one, and no litter."""

from __future__ import annotations

import errno
import os
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from ckptsurgeon.errors import OutputError
from ckptsurgeon.streaming import atomic
from ckptsurgeon.streaming.atomic import new_file, syncing


def write(path: Path, data: bytes, overwrite: bool = False) -> None:
    with new_file(str(path), overwrite) as temporary:
        os.pwrite(temporary.fd, data, 0)


def test_the_name_appears_only_when_all_is_written(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with new_file(str(path), False) as temporary:
        os.pwrite(temporary.fd, b"new", 0)
        assert not path.exists()
        assert Path(temporary.path).parent == tmp_path
        assert Path(temporary.path).name.startswith(".out.ckptsurgeon-")
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [RuntimeError("bug"), KeyboardInterrupt(), OSError(errno.EIO, "disk")], ids=repr)
@pytest.mark.parametrize("old", [None, b"old"], ids=["new", "old"])
def test_whatever_ends_it_nothing_is_left_and_the_old_file_is_whole(error: BaseException, old: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "out"
    if old is not None:
        path.write_bytes(old)
    with pytest.raises((type(error), OutputError)), new_file(str(path), True) as temporary:
        os.pwrite(temporary.fd, b"half", 0)
        raise error
    assert (path.read_bytes() if path.exists() else None) == old
    assert os.listdir(tmp_path) == ([] if old is None else ["out"])


def test_an_existing_file_stays_without_overwrite(tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    with pytest.raises(OutputError, match="exists already") as caught:
        write(path, b"new")
    assert "overwrite=True" in str(caught.value.hint)
    assert path.read_bytes() == b"old"


def test_one_that_appears_meanwhile_is_not_replaced_either(tmp_path: Path) -> None:
    path = tmp_path / "out"
    with pytest.raises(OutputError, match="exists already"), new_file(str(path), False):
        path.write_bytes(b"somebody else's")
    assert path.read_bytes() == b"somebody else's"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("number", [errno.EPERM, errno.EOPNOTSUPP])
def test_a_file_system_without_hard_links(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_args: object) -> None:
        raise OSError(number, "no links here")

    monkeypatch.setattr(os, "link", link)
    write(tmp_path / "out", b"new")
    assert (tmp_path / "out").read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755])
def test_a_replaced_file_keeps_its_permissions(mode: int, tmp_path: Path) -> None:
    path = tmp_path / "out"
    path.write_bytes(b"old")
    path.chmod(mode)
    write(path, b"new", overwrite=True)
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert path.read_bytes() == b"new"


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_a_new_file_honours_the_umask(mask: int, tmp_path: Path) -> None:
    before = os.umask(mask)
    try:
        write(tmp_path / "out", b"new")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == 0o666 & ~mask


def test_a_link_is_followed_and_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", b"new", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_another_name_of_the_old_file_keeps_the_old_bytes(tmp_path: Path) -> None:
    (tmp_path / "out").write_bytes(b"old")
    os.link(tmp_path / "out", tmp_path / "source")
    write(tmp_path / "out", b"new", overwrite=True)
    assert (tmp_path / "source").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("place", "words"),
    [("no/such/folder", "folder does not exist"), (".", "a folder"), ("x" * 300, "too long"), ("file/below", "part of its path is a file")],
)
def test_a_place_that_can_not_be_written(place: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError) as caught:
        write(tmp_path / place, b"new")
    assert words in caught.value.reason or "folder does not exist" in caught.value.reason
    assert os.listdir(tmp_path) == ["file"]


def test_a_name_of_the_greatest_length(tmp_path: Path) -> None:
    name = "é" * 120
    write(tmp_path / name, b"new")
    assert os.listdir(tmp_path) == [name]


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
        with pytest.raises(OutputError, match="larger than this system allows"), new_file(str(tmp_path / "out"), False) as temporary:
            os.pwrite(temporary.fd, b"x" * 1000, 0)
            os.pwrite(temporary.fd, b"x", 1001)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("where", ["data", "folder"])
def test_a_failing_fsync_is_told(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fsync

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode) == (where == "folder"):
            raise OSError(errno.EIO, "Input/output error")
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OutputError, match="Input/output error"):
        write(tmp_path / "out", b"new")
    assert [name for name in os.listdir(tmp_path) if name.endswith(".tmp")] == []


def test_a_sync_that_fails_in_the_background_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(_fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OutputError, match="disk is full"), new_file(str(tmp_path / "out"), False) as temporary, syncing(temporary):
        pass
    assert os.listdir(tmp_path) == []


HANG = """
import sys, time
from ckptsurgeon.streaming.atomic import new_file
with new_file(sys.argv[1], False) as temporary:
    print("ready", flush=True)
    time.sleep(60)
"""


def started(path: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HANG, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_what_a_killed_run_left_is_taken_away_by_the_next(tmp_path: Path) -> None:
    process = started(tmp_path / "out")
    process.kill()
    process.wait()
    assert len(os.listdir(tmp_path)) == 1
    write(tmp_path / "out", b"new")
    assert os.listdir(tmp_path) == ["out"]


def test_what_a_living_run_writes_is_left_alone(tmp_path: Path) -> None:
    process = started(tmp_path / "out")
    try:
        write(tmp_path / "out", b"new")
        assert len([name for name in os.listdir(tmp_path) if name.endswith(".tmp")]) == 1
    finally:
        process.kill()
        process.wait()


def test_of_two_writers_one_wins_whole(tmp_path: Path) -> None:
    code = """
import os, sys
from ckptsurgeon.errors import OutputError
from ckptsurgeon.streaming.atomic import new_file
try:
    with new_file(sys.argv[1], False) as temporary:
        for place in range(50):
            os.pwrite(temporary.fd, sys.argv[2].encode() * 1000, 1000 * place)
    print("won")
except OutputError:
    print("lost")
"""
    writers = [subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out"), c], stdout=subprocess.PIPE, text=True) for c in "abcd"]
    outcomes = [writer.communicate()[0].strip() for writer in writers]
    assert sorted(outcomes) == ["lost", "lost", "lost", "won"]
    assert (tmp_path / "out").read_text() == "abcd"[outcomes.index("won")] * 50_000
    assert os.listdir(tmp_path) == ["out"]


def test_the_folder_is_synced_after_the_name_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = os.fsync

    def fsync(fd: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file"
        seen.append((kind, (tmp_path / "out").exists()))
        real(fd)

    monkeypatch.setattr(atomic.os, "fsync", fsync)
    write(tmp_path / "out", b"new")
    assert seen == [("file", False), ("folder", True)]
