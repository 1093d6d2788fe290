"""Run under torchrun: every check for this number of ranks, and the results as JSON: `run_checks.py RESULTS.json FOLDER [NAME]`."""

from __future__ import annotations

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import checks
import checks_dcp  # noqa: F401
import checks_failing  # noqa: F401
import checks_meta  # noqa: F401
import checks_transfer  # noqa: F401
import checks_verify  # noqa: F401
import torch
import torch.distributed as dist

BACKEND = os.environ.get("CHECKS_BACKEND", "gloo")


def main() -> None:
    if BACKEND == "nccl":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(BACKEND, timeout=timedelta(seconds=60))
    results = checks.run_all(Path(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
