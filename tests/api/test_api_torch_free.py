"""Bytes that only move need no torch: a fresh interpreter runs each verb and must not have loaded it. Memory is flat in the file's size."""

from __future__ import annotations

import json
import os
from pathlib import Path

import api_support as support
import pytest
import safetensors.torch
import torch

WORK = """
import json, os, resource, sys
import ckptsurgeon as cs
{code}
assert "torch" not in sys.modules and "numpy" not in sys.modules, "a heavy import"
"""
VERBS = {
    "import": "",
    "open": "assert len(cs.open(a)) == 3",
    "inspect": "assert cs.inspect(a).state_dicts and cs.inspect(s).state_dicts",
    "diff": "assert cs.diff(a, s).matched and str(cs.diff(s, a).coverage)",
    "plan": "assert str(cs.plan(a, s)) and cs.plan(s)",
    "match": "assert str(cs.match(a, s)) and cs.match(a, s).refusal() is None and not cs.match(a, j).unmatched",
    "matched": "assert cs.merge(n, s, 'm.pt', match=True).coverage.counts == (3, 3) and cs.plan(n, s, match=True).coverage.tensors == 1",
    "check": "assert cs.check([a, s], against=s).ok and cs.check(a).ok",
    "verify": "assert cs.verify(a, s).ok",
    "merge": "str(cs.merge(a, s, 'm.pt')); cs.merge(s, a, 'm.safetensors')",
    "merge with rules": "cs.merge(a, None, 'm.pt', rename={'one': 'two'}, drop='tail')",
    "convert": "cs.merge(a, None, 'c.safetensors'); cs.merge(s, None, 'c.pt'); cs.merge(p, None, 'd.pt')",
    "kept": "cs.merge(k, a, 'm.pt')",
    "apply": "cs.apply(cs.plan(a, s), 'm.pt')",
    "skeleton": "cs.skeleton(a)",
}

FILES = ("a.pt", "s.safetensors", "p.pkl", "k.pt", "n.pt", "j.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("files")
    state = {"one": torch.randn(3, 4), "tail": torch.randn(5), "count": torch.tensor(3)}
    torch.save(state, home / "a.pt")
    torch.save(state, home / "p.pkl", _use_new_zipfile_serialization=False)
    torch.save({"one": state["one"]}, home / "k.pt")
    torch.save({f"net.{key}": value for key, value in state.items()}, home / "n.pt")
    rows = [
        {"name": key, "dtype": "F32" if value.is_floating_point() else "I64", "shape": list(value.shape)} for key, value in state.items()
    ]
    (home / "j.json").write_text(json.dumps({"version": 1, "kind": "skeleton", "tensors": rows}))
    safetensors.torch.save_file(state, home / "s.safetensors")
    return home


@pytest.mark.parametrize("verb", VERBS)
def test_without_torch(verb: str, folder: Path, tmp_path: Path) -> None:
    names = f"a, s, p, k, n, j = (os.path.join(sys.argv[1], name) for name in {FILES})\n{VERBS[verb]}"
    done = support.python(WORK.format(code=names), folder, folder=tmp_path)
    assert done.returncode == 0, done.stderr


COMMANDS = {
    "inspect": ["inspect", "a.pt"],
    "diff": ["diff", "a.pt", "s.safetensors"],
    "plan": ["plan", "a.pt", "s.safetensors", "-o", "{out}/plan.json"],
    "check": ["check", "a.pt", "s.safetensors"],
    "match": ["match", "a.pt", "j.json", "-o", "{out}/rules.toml"],
    "merge": ["merge", "a.pt", "s.safetensors", "-o", "{out}/m.pt"],
    "convert": ["merge", "p.pkl", "-o", "{out}/m.safetensors"],
}
COMMAND = """
import sys
from ckptsurgeon.cli.main import main
try:
    main()
except SystemExit as ended:
    assert not ended.code, ended.code
assert "torch" not in sys.modules, "a heavy import"
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line_without_torch(command: str, folder: Path, tmp_path: Path) -> None:
    words = [word.format(out=tmp_path) for word in COMMANDS[command]]
    done = support.python(COMMAND, *words, folder=folder)
    assert done.returncode == 0, done.stderr


GIGABYTE = 1 << 30


def sparse_safetensors(path: Path, nbytes: int) -> None:
    """A valid file whose data is a hole."""
    each = nbytes // 4
    header = json.dumps(
        {f"w{i}": {"dtype": "F32", "shape": [each // 4], "data_offsets": [i * each, (i + 1) * each]} for i in range(4)}
    ).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + nbytes)


def peak(code: str, *arguments: object, folder: Path) -> int:
    """The peak memory, in bytes, of a fresh interpreter that runs the code."""
    work = f"{code}\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    # A child's peak begins as its parent's resident size: an interpreter in between, small, makes room for the truth.
    outer = "import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', *sys.argv[1:]]).returncode)"
    done = support.python(outer, f"import os, resource, sys\nimport ckptsurgeon as cs\n{work}", *arguments, folder=folder)
    assert done.returncode == 0, done.stderr
    return int(done.stdout.split()[-1])


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("big") / "big.safetensors"
    sparse_safetensors(path, GIGABYTE + (256 << 20))
    return path


@pytest.mark.parametrize("output", ["out.safetensors", "out.pt"])
def test_a_merge_of_more_than_a_gigabyte_takes_little_memory(output: str, big: Path, tmp_path: Path) -> None:
    used = peak("cs.merge(sys.argv[1], None, sys.argv[2], rename={'w0': 'v0'})", big, tmp_path / output, folder=tmp_path)
    assert (tmp_path / output).stat().st_size > GIGABYTE
    assert used < 64 << 20, f"{used >> 20} MB"
    os.unlink(tmp_path / output)


@pytest.mark.slow
def test_a_cast_of_a_large_tensor_takes_memory_that_does_not_grow_with_it(tmp_path: Path) -> None:
    used = []
    for number, nbytes in enumerate((32 << 20, 512 << 20)):
        sparse_safetensors(tmp_path / f"{number}.safetensors", nbytes)
        code = "import torch; torch.set_num_threads(1); cs.merge(sys.argv[1], None, sys.argv[2], dtype='BF16', verify=False)"
        used.append(peak(code, tmp_path / f"{number}.safetensors", tmp_path / f"{number}.pt", folder=tmp_path))
        os.unlink(tmp_path / f"{number}.pt")
    assert used[1] - used[0] < 48 << 20, [f"{one >> 20} MB" for one in used]
