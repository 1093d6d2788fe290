"""The checks of `tests/distributed` on a GPU: nccl, one process on one device. They are skipped where there is none."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))
from test_distributed_checks import run

pytestmark = pytest.mark.skipif(
    not (torch.cuda.is_available() and torch.distributed.is_nccl_available()), reason="no CUDA device, or a torch without nccl"
)


def test_models_on_one_device(tmp_path: Path) -> None:
    """Every check that makes sense for a single rank; what it holds lies on the GPU."""
    results = run(1, tmp_path, backend="nccl")
    assert len(results) >= 8
    assert {name: wrong for name, wrong in results.items() if wrong} == {}
