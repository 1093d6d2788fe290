"""A checkpoint of more files than a process may have open is read, written, proven and checked as any other."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import FileSystemWriter

from ckptsurgeon.errors import StaleError
from ckptsurgeon.storage.opening import MOST_OPEN, OpenFiles, ReopenedFile, open_regular

pytest.importorskip("resource", reason="only POSIX limits how many files a process has open")
MOST = 100  # files that the process may have open
STATE = {f"layer{number:03}.weight": torch.randn(3, 4) for number in range(MOST + 10)}
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, ({most}, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
from ckptsurgeon.cli.main import main
main()
"""


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sources")
    writer = FileSystemWriter(folder / "dcp", single_file_per_rank=False, sync_files=False)
    dcp.save(STATE, storage_writer=writer, no_dist=True)
    assert len(list(folder.glob("dcp/*.distcp"))) == len(STATE)
    (folder / "shards").mkdir()
    names = {key: f"model-{number:05}-of-{len(STATE):05}.safetensors" for number, key in enumerate(STATE, 1)}
    for key, name in names.items():
        safetensors.torch.save_file({key: STATE[key]}, folder / "shards" / name)
    (folder / "shards/model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    torch.save(STATE, folder / "plain.pt")
    with zipfile.ZipFile(folder / "plain.pt") as old, zipfile.ZipFile(folder / "deflated.pt", "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    return folder


def run(folder: Path, *words: object, most: int = MOST) -> subprocess.CompletedProcess[str]:
    code = [sys.executable, "-c", LIMITED.format(most=most), *map(str, words)]
    return subprocess.run(code, cwd=folder, capture_output=True, text=True)


@pytest.mark.parametrize(("name", "shards"), [("dcp", False), ("shards", False), ("deflated.pt", False), ("dcp", True)])
def test_every_file_is_read_written_and_proven(name: str, shards: bool, sources: Path, tmp_path: Path) -> None:
    output = tmp_path / ("out" if shards else "out.safetensors")
    words = ["--format", "safetensors", "--max-shard-size", "50B"] if shards else []
    ended = run(sources, "merge", name, "--output", output, *words)
    assert ended.returncode == 0, ended.stderr
    files = sorted(output.glob("*.safetensors")) if shards else [output]
    assert len(files) == (len(STATE) if shards else 1)
    written = {key: value for file in files for key, value in safetensors.torch.load_file(file).items()}
    assert written.keys() == STATE.keys() and all(torch.equal(written[key], STATE[key]) for key in STATE)


@pytest.mark.parametrize("words", [["inspect"], ["check", "--full", "--finite"], ["diff", "plain.pt"]])
@pytest.mark.parametrize("name", ["dcp", "shards"])
def test_every_file_is_looked_at(words: list[str], name: str, sources: Path) -> None:
    ended = run(sources, *words, name)
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_a_file_is_reopened_only_as_it_was_seen(tmp_path: Path) -> None:
    paths = [tmp_path / str(number) for number in range(MOST_OPEN + 2)]
    for path in paths:
        path.write_bytes(path.name.encode() * 9)
    with OpenFiles() as opened:
        files = [opened.add(open_regular(str(path))) for path in paths]
        assert [type(file) is ReopenedFile for file in files] == [False] * MOST_OPEN + [True] * 2
        assert [file.read(0, file.size) for file in files] == [path.read_bytes() for path in paths]
        files[-1].check_unchanged()
        paths[-1].write_bytes(b"another one, of other bytes")
        for read in (files[-1].check_unchanged, lambda: files[-1].read(0, 3), lambda: files[-1].fill(bytearray(3), 0)):
            with pytest.raises(StaleError):
                read()


def test_a_process_that_may_open_no_more_is_told_how_to_raise_the_limit(sources: Path) -> None:
    code = """
import resource
import ckptsurgeon as cs
cs.inspect("plain.pt")
held = [open("plain.pt") for _ in range(20)]
resource.setrlimit(resource.RLIMIT_NOFILE, (20, 20))
try:
    cs.inspect("plain.pt")
except cs.CheckpointError as error:
    print(error.reason, error.path, error.hint, sep="|")
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=sources, capture_output=True, text=True)
    words = "can't be opened: this process has as many files open as it may|plain.pt|raise the limit: ulimit -n $(ulimit -Hn)"
    assert ended.stdout.strip() == words, ended.stderr
