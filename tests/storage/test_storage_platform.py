"""A system without POSIX's names, as Windows is one: the same answers, byte for byte, by the plain ways; and nobody else names them."""

from __future__ import annotations

import ast
import os
import re
import stat
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from ckptsurgeon.storage import platform

PACKAGE = Path(platform.__file__).parents[1]
OF_OS = [
    *("preadv", "pread", "pwritev", "pwrite", "copy_file_range", "fchown", "fchmod", "chown", "lchown", "fork", "geteuid", "getuid"),
    *("O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "listxattr", "getxattr", "setxattr", "removexattr", "sched_getaffinity"),
    *("SEEK_DATA", "SEEK_HOLE"),
]
HIDE = f"""
import os, signal, sys
for name in {OF_OS}:
    delattr(os, name)
for name in ("pthread_sigmask", "pthread_kill", "SIGKILL", "SIGALRM"):
    delattr(signal, name)
for name in ("fcntl", "resource", "grp", "pwd", "termios"):
    sys.modules[name] = None
import runpy
sys.argv[0] = "ckptsurgeon"
runpy.run_module("ckptsurgeon", run_name="__main__", alter_sys=True)
"""
MERGES = [("a.pt", ".pt"), ("legacy.pt", ".pt"), ("a.safetensors", ".safetensors"), ("deflated.pt", ".safetensors")]


def program(folder: Path, *arguments: str, hidden: bool) -> tuple[int, bytes, bytes]:
    start = ["-c", HIDE] if hidden else ["-m", "ckptsurgeon"]
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run([sys.executable, *start, *arguments], cwd=folder, capture_output=True, env=environment, timeout=300)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoints")
    torch.manual_seed(0)
    source = {"body.weight": torch.randn(300, 70), "body.bias": torch.randn(300), "head.weight": torch.randn(10, 300)}
    torch.save(source, folder / "a.pt")
    torch.save(source, folder / "legacy.pt", _use_new_zipfile_serialization=False)
    save_file(source, folder / "a.safetensors")
    save_file({**source, "head.weight": torch.randn(2, 300)}, folder / "b.safetensors")
    with zipfile.ZipFile(folder / "a.pt") as old, zipfile.ZipFile(folder / "deflated.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    torch.save({**source, "body.bias": torch.full((300,), float("nan"))}, folder / "nan.pt")
    (folder / "cut.pt").write_bytes((folder / "a.pt").read_bytes()[:-9])
    (folder / "empty").mkdir()
    return folder


@pytest.mark.parametrize(
    "arguments",
    [
        ("inspect", "a.pt", "--json"),
        ("inspect", "deflated.pt"),
        ("inspect", "cut.pt"),
        ("inspect", "empty"),
        ("inspect", "missing.pt"),
        ("diff", "a.pt", "b.safetensors", "--exit-code"),
        ("diff", "legacy.pt", "b.safetensors", "--json"),
        ("plan", "a.pt", "b.safetensors"),
        ("check", "a.pt", "legacy.pt", "cut.pt", "a.safetensors", "deflated.pt", "--full", "--no-finite", "--jobs", "4"),
    ],
    ids=" ".join,
)
def test_looking_gives_the_same_answer(arguments: tuple[str, ...], folder: Path) -> None:
    known = program(folder, *arguments, hidden=False)
    assert program(folder, *arguments, hidden=True) == known
    assert b"Traceback" not in known[2]


@pytest.mark.parametrize(("source", "suffix"), MERGES)
def test_a_merge_writes_the_same_bytes(source: str, suffix: str, folder: Path) -> None:
    written = {}
    for hidden in (False, True):
        output = folder / f"{source}-{hidden}{suffix}"
        for overwrite in ((), ("--overwrite",)):
            code, _, words = program(folder, "merge", source, "b.safetensors", "-o", output.name, *overwrite, hidden=hidden)
            assert code == 0, words
            if not overwrite:
                output.chmod(0o640)
        written[hidden] = output.read_bytes()
        assert stat.S_IMODE(output.stat().st_mode) == 0o640  # of the file that was replaced
        code, _, words = program(folder, "merge", source, "b.safetensors", "-o", output.name, hidden=hidden)
        assert (code, b"exists already" in words) == (2, True)
    assert written[True] == written[False]
    assert [path.name for path in folder.glob(".*")] == []


def test_the_names_are_really_hidden(folder: Path) -> None:
    asked = "from ckptsurgeon.storage import platform\nprint(platform.locks(), platform.may_fork())\nos.fork"
    code = HIDE.partition("import runpy")[0] + asked
    done = subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.stdout == "False False\n" and "AttributeError" in done.stderr


ONLY_POSIX = re.compile(
    r"(fcntl|preadv?|pwritev?|copy_file_range|sendfile|f?chown|fchmod|fork|geteuid|getuid|pthread_\w+|O_\w+|SEEK_(DATA|HOLE)|SIG_(UN)?BLOCK|SIG_SETMASK|flock)"
)


def named(path: Path) -> set[str]:
    """What a module names that only POSIX has: as an attribute, an import or a text by itself."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.attr] if isinstance(node, ast.Attribute) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        names += [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []
        found.update(name for name in names if ONLY_POSIX.fullmatch(name))
    return found - {"O_WRONLY", "O_RDWR", "O_RDONLY"}


def test_no_other_module_names_them() -> None:
    assert {path.name for path in PACKAGE.rglob("*.py") if named(path)} == {"platform.py"}
    assert {"fcntl", "preadv", "pwrite", "copy_file_range", "O_DIRECTORY", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC"} <= named(
        Path(platform.__file__)
    )
    assert {"fchown", "fchmod", "pthread_sigmask", "fork"} <= named(Path(platform.__file__))


@given(data=st.binary(max_size=300), place=st.integers(0, 320), length=st.integers(0, 320))
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_positioned_reads_and_writes_are_the_same(data: bytes, place: int, length: int, tmp_path: Path) -> None:
    found = []
    for hidden in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            for name in ("pread", "preadv", "pwrite") if hidden else ():
                patch.delattr(os, name)
            path = tmp_path / "it"
            path.unlink(missing_ok=True)
            fd = platform.create(str(path), 0o600)
            try:
                written = platform.write(fd, memoryview(data), place)
                view = memoryview(bytearray(length))
                found.append((written, platform.read(fd, length, place), platform.read_into(fd, view, place), bytes(view)))
            finally:
                os.close(fd)
            found.append(path.read_bytes())
    assert found[:2] == found[2:]


def test_threads_share_a_file_by_the_plain_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pread", "preadv", "pwrite"):
        monkeypatch.delattr(os, name)
    (tmp_path / "it").write_bytes(bytes(range(256)) * 256)
    fd = platform.open_to_read(str(tmp_path / "it"))
    wrong: list[int] = []

    def look(number: int) -> None:
        for _ in range(3000):
            view = memoryview(bytearray(16))
            if platform.read_into(fd, view, 256 * number) != 16 or bytes(view) != bytes(range(16)):
                wrong.append(number)

    threads = [threading.Thread(target=look, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    os.close(fd)
    assert wrong == []


def test_a_pipe_is_not_waited_for(folder: Path) -> None:
    os.mkfifo(folder / "pipe")
    try:
        known = program(folder, "inspect", "pipe", hidden=False)
        assert known[0] == 2
        assert program(folder, "inspect", "pipe", hidden=True) == known
    finally:
        (folder / "pipe").unlink()
