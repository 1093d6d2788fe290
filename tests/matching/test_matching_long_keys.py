"""Keys of very many segments: matching leaves them as they are, says so, and costs little; `--limit` has them matched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import ckptsurgeon as cs
from ckptsurgeon.errors import CoverageError
from ckptsurgeon.rules.drafting.cover import modules

pytest.importorskip("resource", reason="the memory of a process is told by POSIX")
COSTLY = """
import resource
import ckptsurgeon as cs
from ckptsurgeon.errors import CoverageError
before = resource.getrusage(resource.RUSAGE_SELF)
try:
    print({call})
except CoverageError:
    print("refused")
after = resource.getrusage(resource.RUSAGE_SELF)
print(after.ru_utime - before.ru_utime, (after.ru_maxrss - before.ru_maxrss) // 1024)
"""
CALLS = {
    "len(cs.diff('one.pt', 'other.pt').advice.links)": "0",
    "len(cs.match('one.pt', 'other.pt').warnings)": "2",
    "cs.merge('one.pt', 'other.pt', 'out.pt', match=True)": "refused",
}


def save(place: Path, segments: int, count: int = 8) -> None:
    for name, word in (("one", "a"), ("other", "b")):
        deep = ".".join([word] * segments)
        state = {f"{deep}.{i}.{leaf}": torch.zeros(i + 2) for i in range(count) for leaf in ("weight", "bias")}
        torch.save({**state, "fc.weight": torch.zeros(3)}, place / f"{name}.pt")


@pytest.mark.parametrize("call", CALLS)
def test_keys_of_100_000_segments_cost_little(tmp_path: Path, call: str) -> None:
    save(tmp_path, 100_000, 1)
    ended = subprocess.run([sys.executable, "-c", COSTLY.format(call=call)], cwd=tmp_path, capture_output=True, text=True, check=True)
    told, seconds, megabytes = ended.stdout.split()
    assert told == CALLS[call]
    assert float(seconds) < 10 and int(megabytes) < 200


def test_they_are_named_and_matched_where_the_limit_allows(tmp_path: Path) -> None:
    save(tmp_path, 200)
    found = cs.match(tmp_path / "one.pt", tmp_path / "other.pt")
    assert len(found.links) == 1 and len(found.warnings) == 2
    assert all("16 keys have more segments" in words and "--limit match-segments=" in words for words in found.warnings)
    assert "16 keys have more segments" in str(found)
    with pytest.raises(CoverageError):
        cs.merge(tmp_path / "one.pt", tmp_path / "other.pt", tmp_path / "out.pt", match=True)
    with cs.limits(match_segments=300):
        found = cs.match(tmp_path / "one.pt", tmp_path / "other.pt")
        assert len(found.links) == 17 and not found.warnings
        cs.merge(tmp_path / "one.pt", tmp_path / "other.pt", tmp_path / "out.pt", match=True)
    assert torch.load(tmp_path / "out.pt").keys() == torch.load(tmp_path / "other.pt").keys()
    with cs.limits(match_segments=300, match_characters=100):
        assert len(cs.match(tmp_path / "one.pt", tmp_path / "other.pt").warnings) == 2


def test_whole_modules_are_those_that_nothing_forbids() -> None:
    keys = ["a.b.c", "a.b.d", "a.x", "e.f.g", "e.f.h", "i", "ab.c", "ab.d", "j.k.l", "j.k.m"]
    assert modules(keys, ["a.b.e", "e.i", "j"]) == (["e.f.**", "ab.**", "j.**"], ["a.b.c", "a.b.d", "a.x", "i"])
