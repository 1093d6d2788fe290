"""Folders that accelerate and Lightning really write, by 2 ranks: named, read, and equal to what torch gathers of the same training."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from save_by_frameworks import net

import ckptsurgeon as cs

SCRIPT = Path(__file__).parent / "save_by_frameworks.py"


def saved(library: str, folder: Path) -> Any:
    """What torch gathers of the model and the optimizer that a library saved into a folder."""
    pytest.importorskip(library, reason=f"{library} is not installed")
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(SCRIPT), library]
    ended = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr[-2000:]
    return torch.load(folder / "full.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("library", "weights", "optimizer_from", "roots"),
    [
        ("accelerate", "checkpoint-5/pytorch_model_fsdp_0", "checkpoint-5/optimizer_0", ["model"]),
        ("lightning", "last.ckpt", None, ["state_dict", "optimizer_0"]),
    ],
)
def test_what_a_framework_saved_is_what_torch_gathers(
    library: str, weights: str, optimizer_from: str | None, roots: list[str], tmp_path: Path
) -> None:
    full = saved(library, tmp_path)
    shown = cs.inspect(tmp_path / weights)
    assert [row.root for row in shown.state_dicts] == roots and "saved by 2 ranks" in shown.notes[0]
    assert any("Lightning" in note for note in shown.notes) == (library == "lightning")
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    more = {} if optimizer_from is None else {"optimizer_from": tmp_path / optimizer_from}
    cs.transfer(tmp_path / weights, model, optimizer=optimizer, **more)  # type: ignore[arg-type]
    assert model.state_dict().keys() == full["model"].keys()
    assert all(torch.equal(value, full["model"][key]) for key, value in model.state_dict().items())
    state, names = optimizer.state_dict()["state"], [key for key, _ in model.named_parameters()]
    for at, name in enumerate(names):
        wanted = full["optimizer"]["state"][name]
        assert state[at].keys() == wanted.keys() and all(torch.equal(state[at][slot], wanted[slot]) for slot in wanted)
    assert not [row for row in cs.check(tmp_path / weights).files[0].findings if row.level == "error"]
