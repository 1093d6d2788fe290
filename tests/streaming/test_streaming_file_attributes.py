"""What a replaced file had beside its bytes is kept or told; what is not of our making is not swept away; errors speak of the output.

The oracles are the system's own calls: getxattr, stat, listdir.
"""

from __future__ import annotations

import errno
import os
import stat
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckptsurgeon as cs
from ckptsurgeon.errors import CheckpointError, FormatError, OutputError, VerificationError
from ckptsurgeon.streaming import atomic
from ckptsurgeon.streaming.atomic import new_file

ACL = "system.posix_acl_access"
DEFAULT = "system.posix_acl_default"


def acl(group: int, mask: int) -> bytes:
    """An access control list: the owner and user 1234 read and write, the file's group as it says, under a mask."""
    entries = ((1, 6, 0xFFFFFFFF), (2, 6, 1234), (4, group, 0xFFFFFFFF), (16, mask, 0xFFFFFFFF), (32, 0, 0xFFFFFFFF))
    return struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)


def has(folder: Path, name: str, value: bytes) -> None:
    """Skips where the file system has no such attributes."""
    (folder / "probe").write_bytes(b"")
    try:
        os.setxattr(folder / "probe" if name != DEFAULT else folder, name, value)
    except OSError as error:
        pytest.skip(f"no {name} here: {error.strerror}")
    finally:
        (folder / "probe").unlink()


def old(folder: Path) -> Path:
    torch.save({"w": torch.zeros(3)}, folder / "in.pt")
    (folder / "out.pt").write_bytes(b"old")
    return folder / "out.pt"


def merged(folder: Path) -> Any:
    return cs.merge(folder / "in.pt", None, folder / "out.pt", overwrite=True)


def told(report: Any) -> list[tuple[str, str]]:
    return [(found.level, found.message) for found in report.findings if found.code == "attributes"]


def test_user_attributes_are_kept(tmp_path: Path) -> None:
    has(tmp_path, "user.origin", b"x")
    path = old(tmp_path)
    for name, value in (("user.origin", b"run 7"), ("user.empty", b"")):
        os.setxattr(path, name, value)
    assert told(merged(tmp_path)) == []
    assert {name: os.getxattr(path, name) for name in os.listxattr(path)} == {"user.origin": b"run 7", "user.empty": b""}
    assert torch.load(path, weights_only=True)["w"].shape == (3,)


@pytest.mark.parametrize(("group", "mask"), [(0, 6), (4, 7), (7, 4)])
def test_an_access_control_list_is_kept(group: int, mask: int, tmp_path: Path) -> None:
    has(tmp_path, ACL, acl(6, 6))
    path = old(tmp_path)
    os.setxattr(path, ACL, acl(group, mask))
    mode = path.stat().st_mode
    assert told(merged(tmp_path)) == []
    assert (os.getxattr(path, ACL), path.stat().st_mode) == (acl(group, mask), mode)


def test_a_list_that_the_folder_gives_is_not_added(tmp_path: Path) -> None:
    has(tmp_path, DEFAULT, acl(6, 7))
    path = old(tmp_path)
    os.removexattr(path, ACL) if ACL in os.listxattr(path) else None
    path.chmod(0o640)
    os.setxattr(tmp_path, DEFAULT, acl(6, 7))
    merged(tmp_path)
    assert ACL not in os.listxattr(path) and stat.S_IMODE(path.stat().st_mode) == 0o640


def test_while_it_is_written_nobody_else_sees_it(tmp_path: Path) -> None:
    path = old(tmp_path)
    path.chmod(0o666)
    with new_file(str(path), True) as temporary:
        assert stat.S_IMODE(os.fstat(temporary.fd).st_mode) == 0o600
    assert stat.S_IMODE(path.stat().st_mode) == 0o666


@pytest.mark.parametrize("name", ["user.origin", ACL])
def test_what_cant_be_kept_is_told(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    has(tmp_path, name, value := b"x" if name != ACL else acl(0, 6))
    path = old(tmp_path)
    os.setxattr(path, name, value)

    def refuses(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "setxattr", refuses)
    report = merged(tmp_path)
    ((level, words),) = told(report)
    assert level == "warning" and (name in words or "access control list" in words) and "could not be kept" in str(report)
    if name == ACL:
        assert not stat.S_IMODE(path.stat().st_mode) & stat.S_IRWXG  # the mask is not the group's to have


def test_a_group_that_cant_be_kept_takes_the_list_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    has(tmp_path, ACL, acl(6, 6))
    path = old(tmp_path)
    os.setxattr(path, ACL, acl(6, 6))
    if os.geteuid() == 0:
        os.chown(path, -1, 4321)
    else:
        pytest.skip("only root can give a file to another group")

    def refuses(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "fchown", refuses)
    ((_, words),) = told(merged(tmp_path))
    assert "its group" in words and "access control list" in words
    assert not stat.S_IMODE(path.stat().st_mode) & stat.S_IRWXG and ACL not in os.listxattr(path)


def test_a_system_without_attributes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    for name in ("listxattr", "getxattr", "setxattr", "removexattr"):
        monkeypatch.setattr(os, name, refuses)
    old(tmp_path)
    assert told(merged(tmp_path)) == []
    monkeypatch.delattr(os, "listxattr")
    monkeypatch.delattr(os, "removexattr")
    assert told(merged(tmp_path)) == []


# --- what is swept ------------------------------------------------------------------------------------------------------------------


def left(folder: Path) -> Path:
    """What a run that is killed leaves beside `out`, by the real program."""
    code = "import os, sys\nfrom ckptsurgeon.streaming.atomic import new_file\nwith new_file(sys.argv[1], True) as t:\n"
    code += "    os.write(t.fd, b'half'); print(t.path, flush=True); os.kill(os.getpid(), 9)\n"
    run = subprocess.run([sys.executable, "-c", code, str(folder / "out")], capture_output=True, text=True)
    return Path(run.stdout.strip())


def write(folder: Path) -> None:
    with new_file(str(folder / "out"), True) as temporary:
        os.pwrite(temporary.fd, b"new", 0)


def test_what_a_killed_run_left_goes_and_what_only_looks_like_it_stays(tmp_path: Path) -> None:
    mine = left(tmp_path)
    strangers = [
        ".out.ckptsurgeon-0123456789ab.tmp",
        ".out.ckptsurgeon-notes.tmp",
        ".out.ckptsurgeon-.tmp",
        ".out.ckptsurgeon-backup of it.tmp",
    ]
    for name in strangers:
        (tmp_path / name).write_bytes(b"precious")
    write(tmp_path)
    assert not mine.exists() and sorted(os.listdir(tmp_path)) == sorted(["out", *strangers])
    assert all((tmp_path / name).read_bytes() == b"precious" for name in strangers)


@pytest.mark.parametrize("kind", ["link", "folder", "pipe", "hard link", "another user's"])
def test_under_a_name_of_ours_only_a_file_of_ours_goes(kind: str, tmp_path: Path) -> None:
    mine = left(tmp_path)
    (tmp_path / "precious").write_bytes(b"precious")
    if kind == "another user's":
        if os.geteuid():
            pytest.skip("only root can give a file away")
        os.chown(mine, 4321, -1)
    else:
        mine.unlink()
        {"link": mine.symlink_to, "hard link": mine.hardlink_to}.get(kind, lambda _: None)(tmp_path / "precious")
        {"folder": os.mkdir, "pipe": os.mkfifo}.get(kind, lambda _: None)(mine)
    write(tmp_path)
    assert os.path.lexists(mine) and (tmp_path / "precious").read_bytes() == b"precious"


def test_a_name_that_was_taken_and_not_let_go_of_is_swept(tmp_path: Path) -> None:
    """A run that was killed between giving the output its name and taking the temporary one away."""
    mine = left(tmp_path)
    os.link(mine, tmp_path / "out")
    write(tmp_path)
    assert os.listdir(tmp_path) == ["out"] and (tmp_path / "out").read_bytes() == b"new"


def test_a_name_that_is_there_already_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    chances = iter([bytes(4), bytes(4), b"\1\1\1\1"])
    monkeypatch.setattr(atomic.os, "urandom", lambda _: next(chances))
    with new_file(str(tmp_path / "out"), True) as first, new_file(str(tmp_path / "out"), True) as second:
        assert first.path != second.path and os.path.exists(first.path) and os.path.exists(second.path)
    assert os.listdir(tmp_path) == ["out"]


# --- what errors name ---------------------------------------------------------------------------------------------------------------


def speaks(error: CheckpointError) -> str:
    return "\n".join(map(str, (error, error.path, error.reason, error.key, error.hint, *error.problems, *error.args)))


ERRORS = [
    lambda path: FormatError(f"can't be read: {path}", path=path, hint=f"look at {path}", problems=(f"{os.path.basename(path)}: bad",)),
    lambda path: VerificationError("does not load", path=None, key=os.path.basename(path), problems=(f"[Errno 2] No such file: '{path}'",)),
    lambda path: OSError(errno.ENOSPC, "No space left on device", path),
    lambda path: OSError(errno.EROFS, "Read-only file system", path),
    lambda path: OSError(errno.EACCES, "Permission denied", path),
    lambda path: OSError(errno.EIO, "Input/output error", path),
]


@pytest.mark.parametrize("make", ERRORS)
def test_an_error_names_the_output_and_not_the_temporary_file(make: Any, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link.pt").symlink_to("real/out.pt")
    for path in (tmp_path / "out.pt", tmp_path / "link.pt"):
        with pytest.raises(CheckpointError) as caught, new_file(str(path), False) as temporary:
            raise make(temporary.path)
        assert ".tmp" not in speaks(caught.value) and "ckptsurgeon-" not in speaks(caught.value)
        assert path.name in speaks(caught.value)


class Failing(nn.Module):
    """Its own loading code fails, with the words that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))


@pytest.mark.parametrize("wrong", ["reader", "bytes"])
def test_a_proof_that_fails_names_the_output(wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "in.pt")
    from ckptsurgeon.models.verify import official
    from ckptsurgeon.storage import copying

    def refuses(path: str) -> Any:
        raise RuntimeError(f"PytorchStreamReader failed reading {path}: file {os.path.basename(path)} not found")

    if wrong == "reader":
        monkeypatch.setitem(official.READERS, "torch", refuses)
    else:
        monkeypatch.setattr(copying, "copy_range", lambda *_: copying.Copied(0))
    with pytest.raises(VerificationError) as caught:
        cs.merge(tmp_path / "in.pt", Failing(), tmp_path / "out.pt")
    assert ".tmp" not in speaks(caught.value) and str(tmp_path / "out.pt") in speaks(caught.value)
    assert os.listdir(tmp_path) == ["in.pt"]


def test_an_output_error_of_the_system_names_the_output(tmp_path: Path) -> None:
    with pytest.raises(OutputError) as caught, new_file(str(tmp_path / "out"), False) as temporary:
        os.pwrite(os.open(temporary.path, os.O_RDONLY), b"x", 0)
    assert caught.value.path == str(tmp_path / "out") and ".tmp" not in speaks(caught.value)
