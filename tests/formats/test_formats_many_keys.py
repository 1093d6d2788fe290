"""What a header of very many keys costs: a fifth of a million, at a fifth of the cost that a million may have (15 s, 800 MB)."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow  # with its like

pytest.importorskip("resource", reason="the memory of a process is told by POSIX")
KEYS = 200_000
LOOK = """
import resource, sys, time
from ckptsurgeon import api
began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = api.inspect(sys.argv[1])
shown = found.to_text()
usage = resource.getrusage(resource.RUSAGE_SELF)
print(len(found.state_dicts[0].tensors), time.process_time(), (usage.ru_maxrss - began) // 1024, "{0..3999}" in shown)
"""


@pytest.mark.parametrize("reverse", [False, True])
def test_a_safetensors_of_very_many_keys(tmp_path: Path, reverse: bool) -> None:
    """In the order of the data, as they are written, and in the opposite one."""
    rows = [(f"layers.{i // 50}.block_{i % 50}.weight", {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]}) for i in range(KEYS)]
    head = json.dumps(dict(reversed(rows) if reverse else rows)).encode()
    (tmp_path / "many.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bytes(KEYS))
    ended = subprocess.run([sys.executable, "-c", LOOK, tmp_path / "many.safetensors"], capture_output=True, text=True, check=True)
    count, seconds, megabytes, folded = ended.stdout.split()
    assert int(count) == KEYS and folded == "True"
    assert float(seconds) < 8 and int(megabytes) < 200


def test_json_is_written_in_parts(tmp_path: Path) -> None:
    """An answer of many megabytes is never held whole, as text or as rows."""
    rows = {f"layers.{i // 50}.block_{i % 50}.weight": {"dtype": "U8", "shape": [1], "data_offsets": [i, i + 1]} for i in range(KEYS)}
    head = json.dumps(rows).encode()
    (tmp_path / "many.safetensors").write_bytes(struct.pack("<Q", len(head)) + head + bytes(KEYS))
    code = """
import sys, tracemalloc
from ckptsurgeon import api
from ckptsurgeon.cli.output import Show
found = api.inspect(sys.argv[1])
tracemalloc.start()
Show(json=True).result(found)
print(tracemalloc.get_traced_memory()[1], file=sys.stderr)
"""
    ended = subprocess.run([sys.executable, "-c", code, tmp_path / "many.safetensors"], capture_output=True, text=True, check=True)
    told = json.loads(ended.stdout)["tensors"]
    assert [row["name"] for row in told] == list(rows) and told[7] == {"name": list(rows)[7], "dtype": "U8", "shape": [1], "bytes": 1}
    assert int(ended.stderr) < len(ended.stdout) / 2
    assert ended.stdout == json.dumps(json.loads(ended.stdout), indent=2) + "\n"


@pytest.mark.parametrize("records", [False, True])
def test_a_torch_file_of_very_many_tensors(tmp_path: Path, records: bool) -> None:
    """Views of one storage, or each with a record of its own."""
    count = KEYS // 4
    tensors = torch.zeros(2 * count).view(count, 2).unbind()
    named = {f"layers.{i // 50}.block_{i % 50}.weight": one.clone() if records else one for i, one in enumerate(tensors)}
    torch.save(named, tmp_path / "many.pt")
    look = LOOK.replace("{0..3999}", "{0..999}")
    ended = subprocess.run([sys.executable, "-c", look, tmp_path / "many.pt"], capture_output=True, text=True, check=True)
    found, seconds, megabytes, folded = ended.stdout.split()
    assert int(found) == count and folded == "True"
    assert float(seconds) < 5 and int(megabytes) < 60
