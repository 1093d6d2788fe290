"""Large outputs are synced while they are written. An error of any of these syncs is told, though the system says so only once."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import ckptsurgeon as cs
from ckptsurgeon.errors import OutputError
from ckptsurgeon.progress import Progress
from ckptsurgeon.storage import copying
from ckptsurgeon.streaming import atomic
from ckptsurgeon.streaming.atomic import Syncs, new_file, syncing

pytestmark = pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="which file is synced is told by /proc")
OUTPUTS: dict[str, dict[str, object]] = {
    "out.pt": {},
    "out.safetensors": {},
    "without proof.pt": {"verify": False},
    "cast.safetensors": {"dtype": "F64"},
    "folder": {"max_shard_size": 1 << 20},
}
SIZE = 200_000


def save(folder: Path, count: int = 4) -> Path:
    torch.save({f"{number}.weight": torch.full((SIZE,), float(number)) for number in range(count)}, folder / "a.pt")
    return folder / "a.pt"


class Disk:
    """`os.fsync` that notes the checkpoint files that it is called for, and tells an error once, in its call of a number for one."""

    def __init__(self, fails: int | None = None, act: Callable[[], object] = bool) -> None:
        self.real, self.fails, self.act = os.fsync, fails, act
        self.synced: list[str] = []

    def __call__(self, fd: int) -> None:
        path = os.readlink(f"/proc/self/fd/{fd}")
        if os.path.isdir(path) or path.endswith((".json", ".log")):
            return self.real(fd)
        self.synced.append(path)
        self.act()
        if len(self.synced) - 1 == self.fails:
            raise OSError(errno.EIO, "Input/output error")
        return self.real(fd)


@pytest.fixture(autouse=True)
def no_thread_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(copying, "AT_ONCE", 1 << 16)
    before = threading.active_count()
    yield
    assert threading.active_count() == before


@pytest.mark.parametrize("name", OUTPUTS)
@pytest.mark.parametrize("fails", [0, 1])
def test_an_error_that_the_system_tells_once_is_told(name: str, fails: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, disk = save(tmp_path), Disk(fails)
    monkeypatch.setattr(atomic, "EARLY", 1 << 16)
    monkeypatch.setattr(atomic.os, "fsync", disk)
    with pytest.raises(OutputError, match="Input/output error") as caught:
        cs.merge(given, None, tmp_path / name, **OUTPUTS[name])  # type: ignore[arg-type]
    assert caught.value.path == str(tmp_path / name) and len(disk.synced) > fails
    assert os.listdir(tmp_path) == ["a.pt"]


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_output_is_the_same_and_synced_whole_after_the_last_write(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, whole = save(tmp_path), tmp_path / f"whole {name}"
    cs.merge(given, None, whole, **OUTPUTS[name])  # type: ignore[arg-type]
    disk = Disk()
    monkeypatch.setattr(atomic, "EARLY", 1 << 16)
    monkeypatch.setattr(atomic.os, "fsync", disk)
    cs.merge(given, None, tmp_path / name, **OUTPUTS[name])  # type: ignore[arg-type]
    for path in sorted(whole.rglob("*")) if whole.is_dir() else [whole]:
        assert path.read_bytes() == (tmp_path / name / path.relative_to(whole) if whole.is_dir() else tmp_path / name).read_bytes()
    assert len(disk.synced) > (4 if name == "folder" else 2)


def test_small_outputs_have_no_thread_while_they_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, running, real = save(tmp_path), list[int](), copying.copy_range
    monkeypatch.setattr(copying, "copy_range", lambda *given: (running.append(threading.active_count()), real(*given))[1])
    before = threading.active_count()
    cs.merge(given, None, tmp_path / "out.safetensors", verify=False)
    assert set(running) == {before}


def test_one_sync_runs_at_a_time_while_more_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    go, disk = threading.Event(), Disk(act=lambda: go.wait(60))
    monkeypatch.setattr(atomic, "EARLY", 10)
    monkeypatch.setattr(atomic.os, "fsync", disk)
    with open(tmp_path / "it", "wb") as file, syncing(atomic.Temporary("it", file.fileno())) as syncs:
        for nbytes in (9, 1, 10, 10, 10):
            syncs.wrote(nbytes)
        assert len(syncs.running()) == 1
        go.set()
        while syncs.running():
            pass
        syncs.wrote(1)  # with those that were not synced then
        while syncs.running():
            pass
        syncs.wrote(9)
        assert len(disk.synced) == 2


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_whatever_ends_the_writing_no_sync_is_left(error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, heard = save(tmp_path), list[Progress]()
    monkeypatch.setattr(atomic, "EARLY", 1 << 16)
    monkeypatch.setattr(atomic.os, "fsync", Disk(act=lambda: threading.Event().wait(0.1)))

    def stop(progress: Progress) -> None:
        heard.append(progress)
        if progress.phase == "writing" and progress.done:
            raise error

    with pytest.raises(error):
        cs.merge(given, None, tmp_path / "out.pt", progress=stop)
    assert os.listdir(tmp_path) == ["a.pt"]


def test_an_error_stops_the_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "EARLY", 1)
    monkeypatch.setattr(atomic.os, "fsync", Disk(0))
    with pytest.raises(OutputError, match="Input/output error"), new_file(str(tmp_path / "out"), False) as temporary:
        syncs = Syncs(temporary.fd)
        syncs.wrote(1)
        while syncs.running():
            pass
        syncs.wrote(1)
        pytest.fail("went on")


def test_what_is_shared_is_not_synced(xfs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, disk = xfs / "syncs", Disk()
    folder.mkdir()
    given = save(folder, 20)
    monkeypatch.setattr(atomic, "EARLY", 1 << 20)
    monkeypatch.setattr(atomic.os, "fsync", disk)
    report = cs.merge(given, None, folder / "out.pt", verify=False)
    assert report.shared > 10 << 20 and len(disk.synced) == 2  # the last one, in the background and as the file gets its name
    shutil.rmtree(folder)


def test_a_disk_that_is_full_below_its_file_system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system on a loop device whose image has no room: writes go well, and write-back fails, as on a failing disk."""
    make = shutil.which("mkfs.ext4", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if make is None or os.geteuid() != 0:
        pytest.skip("needs mkfs.ext4, and root to mount a file system")
    memory, disk = tmp_path / "memory", tmp_path / "disk"
    memory.mkdir()
    disk.mkdir()
    mounted = []
    try:
        for command in (
            ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(memory)],
            ["truncate", "-s", "64m", str(memory / "image")],
            [make, "-q", "-F", "-O", "^has_journal", str(memory / "image")],
            ["mount", "-o", "loop", str(memory / "image"), str(disk)],
        ):
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"none here: {done.stderr.strip()}")
            mounted += [command[-1]] * (command[0] == "mount")
        given = save(tmp_path, 40)
        monkeypatch.setattr(atomic, "EARLY", 8 << 20)
        monkeypatch.setattr(copying, "AT_ONCE", 4 << 20)
        with pytest.raises(OutputError, match=r"disk is full|could not be written"):
            cs.merge(given, None, disk / "out.safetensors", verify=False)
        assert os.listdir(disk) == ["lost+found"]
    finally:
        for place in reversed(mounted):
            subprocess.run(["umount", "-l", place], check=True)
