"""Outputs on the edge: races over one name, file systems without links, locks or space, and names that few people choose."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from streaming_support import names

from ckptsurgeon.errors import OutputError
from ckptsurgeon.storage import platform
from ckptsurgeon.storage.copying import write_at
from ckptsurgeon.streaming import atomic
from ckptsurgeon.streaming.atomic import check_free, new_file


def write(path: Path, data: bytes, overwrite: bool = False) -> None:
    with new_file(str(path), overwrite) as temporary:
        write_at(temporary.fd, data, 0)


def refusing(code: int):  # type: ignore[no-untyped-def]
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    return refuse


def test_what_appears_during_the_run_is_not_replaced_where_there_are_no_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", refusing(errno.EPERM))
    with pytest.raises(OutputError, match="exists already"), new_file(str(tmp_path / "out"), False) as temporary:
        write_at(temporary.fd, b"mine", 0)
        (tmp_path / "out").write_bytes(b"theirs")
    assert (tmp_path / "out").read_bytes() == b"theirs"
    assert names(tmp_path) == ["out"]


def test_with_overwrite_what_appears_or_goes_during_the_run_does_not_matter(tmp_path: Path) -> None:
    with new_file(str(tmp_path / "appears"), True) as temporary:
        write_at(temporary.fd, b"mine", 0)
        (tmp_path / "appears").write_bytes(b"theirs")
    (tmp_path / "goes").write_bytes(b"old")
    with new_file(str(tmp_path / "goes"), True) as temporary:
        write_at(temporary.fd, b"mine", 0)
        (tmp_path / "goes").unlink()
    assert (tmp_path / "appears").read_bytes() == (tmp_path / "goes").read_bytes() == b"mine"
    assert names(tmp_path) == ["appears", "goes"]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform.fcntl, "flock", refusing(code))
    write(tmp_path / "out", b"data")
    write(tmp_path / "out", b"again", overwrite=True)
    assert (tmp_path / "out").read_bytes() == b"again"


def test_a_link_to_what_is_not_there_yet(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "link").symlink_to("elsewhere/real")
    write(tmp_path / "link", b"data")
    assert (tmp_path / "link").is_symlink()
    assert names(tmp_path / "elsewhere") == ["real"]


@pytest.mark.parametrize(("kind", "reason"), [("pipe", "is not a regular file"), ("round", "could not be written")])
def test_what_is_no_file_stays_what_it_is(kind: str, reason: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "round").symlink_to("round")
    for overwrite in (False, True):
        with pytest.raises(OutputError, match=reason):
            write(tmp_path / kind, b"data", overwrite)
        with pytest.raises(OutputError, match=reason):
            check_free(str(tmp_path / kind), overwrite)
    assert names(tmp_path) == ["pipe", "round"]


@pytest.mark.parametrize("name", ["字" * 85, "[*]?.pt", "-o", ".hidden", "a b\nc", "\udcff"])
def test_any_name_that_the_system_takes(name: str, tmp_path: Path) -> None:
    write(tmp_path / name, b"data")
    write(tmp_path / name, b"again", overwrite=True)
    assert names(tmp_path) == [name]


@contextmanager
def mounted(folder: Path) -> Iterator[ctypes.CDLL]:
    """64 KB of a file system of its own, where this machine lets us; else the test is skipped."""
    libc = ctypes.CDLL(None, use_errno=True)
    if os.geteuid() or libc.mount(b"none", os.fsencode(folder), b"tmpfs", 0, b"size=64k"):
        pytest.skip("a file system can't be mounted here")
    try:
        yield libc
    finally:
        libc.umount2(os.fsencode(folder), 2)


def test_a_read_only_file_system(tmp_path: Path) -> None:
    remount, read_only = 32, 1
    with mounted(tmp_path) as libc:
        (tmp_path / "old").write_bytes(b"old")
        assert libc.mount(b"none", os.fsencode(tmp_path), b"tmpfs", remount | read_only, None) == 0
        for name in ("out", "old"):
            with pytest.raises(OutputError, match="read-only"):
                write(tmp_path / name, b"data", overwrite=True)
        assert names(tmp_path) == ["old"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    with pytest.raises(OutputError, match="may not be written to by you"):
        write(tmp_path / "closed" / "out", b"data")


def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    with mounted(tmp_path):
        (tmp_path / "old").write_bytes(b"old")
        for name in ("out", "old"):
            with pytest.raises(OutputError, match="the disk is full"):
                write(tmp_path / name, b"x" * (1 << 20), overwrite=True)
        assert names(tmp_path) == ["old"]
        assert (tmp_path / "old").read_bytes() == b"old"


def test_a_file_swept_in_the_moment_before_its_lock_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, swept = platform.lock, list[list[str]]()

    def late(fd: int) -> None:
        if not swept:
            swept.append(names(tmp_path))
            atomic._sweep(str(tmp_path), ".out" + atomic._MARK)
            assert names(tmp_path) == []
        real(fd)

    monkeypatch.setattr(platform, "lock", late)
    write(tmp_path / "out", b"data")
    assert len(swept[0]) == 1
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_many_writers_in_one_process_one_wins_whole(overwrite: bool, tmp_path: Path) -> None:
    contents = [bytes([number]) * 200_000 for number in range(8)]
    outcomes: list[str] = []
    start = threading.Barrier(len(contents))

    def run(data: bytes) -> None:
        start.wait()
        try:
            write(tmp_path / "out", data, overwrite)
            outcomes.append("done")
        except OutputError as error:
            outcomes.append(error.reason)

    threads = [threading.Thread(target=run, args=(data,)) for data in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "out").read_bytes() in contents
    assert names(tmp_path) == ["out"]
    assert sorted(outcomes) == (["done"] * 8 if overwrite else ["done"] + ["exists already"] * 7)
