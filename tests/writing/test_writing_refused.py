"""What the system refuses (space, size, permission, a failing disk) is one message and exit 2: the old file, or the new one, whole."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from writing_support import PROGRAM, Ended, calls, content, inside, loaded, one_error, run, setting, state, under_strace, writing

pytestmark = pytest.mark.slow  # with its like

MERGE = ("merge", "a.pt", "b.pt", "-o", "out.pt")
OLD = b"the month's only copy"
REMOUNT, READ_ONLY, BIND = 32, 1, 4096


@pytest.fixture(params=[None, OLD], ids=["new", "overwritten"])
def old(request: pytest.FixtureRequest) -> bytes | None:
    """What stands there before."""
    found: bytes | None = request.param
    return found


def place(folder: Path, old: bytes | None) -> tuple[Path, tuple[str, ...]]:
    """A folder to merge in, and the words."""
    setting(folder, 8)
    if old is None:
        return folder, MERGE
    (folder / "out.pt").write_bytes(old)
    return folder, (*MERGE, "--overwrite")


# In strace's words, and what the error says. By `rename` an output takes the name of another, by `link` a new one.
REFUSALS = [
    ("openat", "ENOSPC", "the disk is full"),
    ("openat", "EROFS", "read-only"),
    ("pwrite64", "ENOSPC", "the disk is full"),
    ("pwrite64", "EDQUOT", "quota"),
    ("pwrite64", "EIO", "Input/output error"),
    ("pwrite64", "EFBIG", "larger than this system allows"),
    ("copy_file_range", "ENOSPC", "the disk is full"),
    ("copy_file_range", "EFBIG", "larger than this system allows"),
    ("fsync", "EIO", "Input/output error"),
    ("fsync", "ENOSPC", "the disk is full"),
    ("rename", "EIO", "Input/output error"),
    ("rename", "EACCES", "may not be written to by you"),
    ("link", "ENOSPC", "the disk is full"),
]


@pytest.mark.parametrize(("call", "error", "words"), REFUSALS, ids=lambda word: word)
def test_a_call_that_fails(call: str, error: str, words: str, tmp_path: Path) -> None:
    folder, command = place(tmp_path, None if call == "link" else OLD)
    before = content(folder)
    number = making(folder, command) if call == "openat" else 2 if call in ("pwrite64", "copy_file_range") else 1
    ended = under_strace(folder, *command, inject=f"{call}:error={error}:when={number}")
    one_error(ended, "out.pt: ", words, "\n  try: ")
    assert content(folder) == before


def making(folder: Path, command: tuple[str, ...]) -> int:
    """Which of its `openat` makes the temporary file."""
    other = folder.parent / f"{folder.name}-whole"
    shutil.copytree(folder, other)
    return writing(calls(other, *command))[0].number


# What is no refusal: another way is found, or it is tried again, and the file is the same.
DETOURS = [
    "copy_file_range:error=EXDEV:when=1+",
    "copy_file_range:error=EIO:when=1",
    "copy_file_range:error=ENOSYS:when=1+",
    "copy_file_range:error=EINTR:when=1",
    "copy_file_range:retval=0:when=1",
    "pwrite64:error=EINTR:when=1",
    "preadv,preadv2:error=EINTR:when=1",
    "flock:error=ENOLCK:when=1+",
    "link:error=EPERM",
]


@pytest.mark.parametrize("inject", DETOURS)
def test_a_call_that_can_be_done_another_way(inject: str, tmp_path: Path) -> None:
    folder, command = place(tmp_path, None)
    ended = under_strace(folder, *command, inject=inject)
    assert (ended.code, ended.err) == (0, "")
    assert sorted(os.listdir(folder)) == ["a.pt", "b.pt", "out.pt"]
    expected = state("first", "second", "third", seed=2, size=8) | state("first", "second", seed=1, size=8)
    found = loaded(folder / "out.pt")
    assert {key: found[key].tolist() for key in expected} == {key: value.tolist() for key, value in expected.items()}


LIES = ["copy_file_range:retval=256:when=1", "pwrite64:retval=20:when=2", "pwrite64:retval=512:when=1"]


@pytest.mark.parametrize("inject", LIES)
def test_a_disk_that_says_done_and_is_not_is_found_by_the_proof(inject: str, tmp_path: Path) -> None:
    folder, command = place(tmp_path, OLD)
    before = content(folder)
    ended = under_strace(folder, *command, inject=inject)
    assert ended.code in (1, 2) and ended.err.startswith("error: ") and "Traceback" not in ended.err, ended
    assert content(folder) == before


def test_a_source_that_can_not_be_read_is_named_and_not_the_output(tmp_path: Path) -> None:
    folder, command = place(tmp_path, OLD)
    before = content(folder)
    ended = under_strace(folder, *command, inject=("copy_file_range:error=EIO:when=2", "preadv,preadv2:error=EIO:when=1"))
    one_error(ended, "error: a.pt: could not be read (Input/output error)")
    assert content(folder) == before


def test_a_folder_that_can_not_be_synced_is_told_though_the_file_is_whole(old: bytes | None, tmp_path: Path) -> None:
    folder, command = place(tmp_path, old)
    ended = under_strace(folder, *command, inject="fsync:error=EIO:when=2")
    one_error(ended, "out.pt: is written whole, but its folder could not be synced (Input/output error)")
    assert sorted(os.listdir(folder)) == ["a.pt", "b.pt", "out.pt"] and set(loaded(folder / "out.pt")) == {"first", "second", "third"}


@contextmanager
def mounted(folder: Path, kind: bytes, flags: int, options: bytes | None, source: Path | None = None) -> Iterator[None]:
    """A file system of its own, where this machine lets us; else the test is skipped."""
    libc = ctypes.CDLL(None, use_errno=True)
    folder.mkdir(exist_ok=True)
    if os.geteuid() or libc.mount(os.fsencode(source or "none"), os.fsencode(folder), kind, flags, options):
        pytest.skip("a file system can't be mounted here")
    try:
        if flags & BIND:
            assert libc.mount(b"none", os.fsencode(folder), b"", REMOUNT | BIND | READ_ONLY, None) == 0
        yield
    finally:
        libc.umount2(os.fsencode(folder), 2)


@pytest.mark.parametrize("pages", [0, 1, 5, 11, 12])
def test_a_disk_that_is_full_at_some_point(pages: int, old: bytes | None, tmp_path: Path) -> None:
    folder = setting(tmp_path / "in", 60)
    disk = tmp_path / "disk"
    with mounted(disk, b"tmpfs", 0, b"size=%dk" % (4 * (12 + pages))):
        (disk / "full").write_bytes(bytes(4096 * (11 if old is not None else 12)))
        if old is not None:
            (disk / "out.pt").write_bytes(old)
        before = content(disk)
        ended = run(folder, "merge", "a.pt", "b.pt", "-o", disk / "out.pt", *(("--overwrite",) if old is not None else ()))
        if pages < 12:  # 44 KB of tensors, and their headers
            one_error(ended, f"{disk}/out.pt: the disk is full")
            assert content(disk) == before
        else:
            assert ended.code == 0 and len(content(disk)["out.pt"]) > 3 * 4 * 60 * 60 and len(content(disk)) == 2


def test_every_command_that_writes_tells_a_full_disk(
    commands: dict[str, tuple[str, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    disk = tmp_path / "disk"
    with mounted(disk, b"tmpfs", 0, b"size=16k"):
        folder = setting(tmp_path / "in", 8)
        assert inside(monkeypatch, folder, "plan", "a.pt", "b.pt", "-o", "plan.json") == 0
        (disk / "full").write_bytes(bytes(16384))
        for words in commands.values():
            capfd.readouterr()
            place = words.index("-o") + 1
            code = inside(monkeypatch, folder, *words[:place], disk / words[place], *words[place + 1 :])
            one_error(Ended(code, *capfd.readouterr()), f"{disk / words[place]}: the disk is full")
            assert os.listdir(disk) == ["full"]


@pytest.mark.parametrize("limit", [0, 1500])
def test_a_limit_on_file_size(limit: int, old: bytes | None, tmp_path: Path) -> None:
    folder, command = place(tmp_path, old)
    before = content(folder)
    ended = run(folder, *command, before=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    one_error(ended, "out.pt: the file would be larger than this system allows", "ulimit -f")
    assert content(folder) == before


def closed(how: str, folder: Path) -> str:
    """Make a folder one that can't be written to; says with which word of the error."""
    if how == "immutable":
        done = subprocess.run(["chattr", "+i", folder], capture_output=True) if shutil.which("chattr") else None
        if done is None or done.returncode:
            pytest.skip("chattr can't make a folder immutable here")
        return "may not be changed by you"
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    folder.chmod(0o500)
    return "may not be written to by you"


@pytest.mark.parametrize("how", ["immutable", "mode"])
def test_a_folder_that_may_not_be_written_to(how: str, old: bytes | None, tmp_path: Path) -> None:
    folder, command = place(tmp_path / "folder", old)
    before = content(folder)
    words = closed(how, folder)
    try:
        ended = run(folder, *command)
    finally:
        subprocess.run(["chattr", "-i", folder], capture_output=True) if how == "immutable" else folder.chmod(0o700)
    one_error(ended, f"out.pt: {words if how == 'mode' else ''}")
    assert words in ended.err and content(folder) == before


def test_a_read_only_place(old: bytes | None, tmp_path: Path) -> None:
    folder, command = place(tmp_path / "folder", old)
    before = content(folder)
    with mounted(tmp_path / "view", b"", BIND, None, folder):
        ended = run(tmp_path / "view", *command)
        one_error(ended, "out.pt: its file system is read-only", "choose another folder")
        assert content(folder) == before


def test_no_room_to_unpack_deflated_entries_is_no_fault_of_the_output(tmp_path: Path) -> None:
    import zipfile

    folder = setting(tmp_path / "in", 60)
    with zipfile.ZipFile(folder / "a.pt") as stored, zipfile.ZipFile(folder / "packed.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name in stored.namelist():
            archive.writestr(name, stored.read(name))
    before = content(folder)
    with mounted(tmp_path / "scratch", b"tmpfs", 0, b"size=4k"):
        done = subprocess.run(
            ["env", f"TMPDIR={tmp_path / 'scratch'}", *PROGRAM, "merge", "packed.pt", "b.pt", "-o", "out.pt"],
            cwd=folder,
            capture_output=True,
            text=True,
        )
    one_error(Ended(done.returncode, done.stdout, done.stderr), "packed.pt has deflated entries", "No space left", "TMPDIR")
    assert content(folder) == before
