"""A merge and a transfer that take less than a tenth of the target's elements warn, with the command that shows why; no other does."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import ckptsurgeon as cs


def net(large: int, small: int) -> nn.Module:
    return nn.ModuleDict({"large": nn.Linear(large, 1, bias=False), "small": nn.Linear(small, 1, bias=False)})


def little(found: cs.Report | cs.Plan) -> list[cs.Finding]:
    return [row for row in found.findings if row.code == "little"]


@pytest.mark.parametrize(("small", "large", "warned"), [(9, 91, True), (10, 90, False), (1, 10_000, True), (50, 50, False)])
@pytest.mark.parametrize("as_file", [False, True])
def test_below_a_tenth(tmp_path: Path, monkeypatch, small: int, large: int, warned: bool, as_file: bool) -> None:
    monkeypatch.chdir(tmp_path)
    model = net(large, small)
    share = small / (small + large)
    torch.save({"small.weight": torch.ones(1, small)}, "a.pt")
    torch.save(model.state_dict(), "b.pt")
    target = "b.pt" if as_file else model
    merged = cs.merge("a.pt", target, "out.pt")
    found = [cs.plan("a.pt", target), merged] + ([] if as_file else [cs.transfer("a.pt", model), cs.transfer(torch.load("a.pt"), model)])
    for one in found:
        rows = little(one)
        assert len(rows) == warned and abs(one.coverage.elements - share) < 1e-9
        if warned:
            assert rows[0].level == "warning" and rows[0].message in one.to_text(verbose=True)
            told = "less than 0.1 %" if share < 0.001 else f"{100 * share:.1f} %"
            assert told in rows[0].message
    if warned and as_file:
        assert "ckptsurgeon diff a.pt b.pt" in little(merged)[0].message


def test_a_conversion_is_no_matter_of_coverage(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(1)}, tmp_path / "a.pt")
    assert not little(cs.merge(tmp_path / "a.pt", None, tmp_path / "b.pt"))
