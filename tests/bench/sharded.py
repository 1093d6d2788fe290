"""Measures outputs in several files as whole processes: shards beside one file, and a DCP folder beside torch's own way.

python tests/bench/sharded.py --gigabytes 1 --runs 3            # some 3 minutes, 8 GB of free disk
python tests/bench/sharded.py --gigabytes 1 --runs 3 --write    # and puts the table into RESULTS.md
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from results import write_section
from run import CLI, Row, pair, python, table

MAKE = """
import sys, torch
from safetensors.torch import save_file
each = int(float(sys.argv[1]) * 1e9 / 4 / 100) // 1000 * 1000
torch.manual_seed(0)
save_file({f"layers.{i}.weight": torch.randn(each // 1000, 1000) for i in range(100)}, "a.safetensors", metadata={"format": "pt"})
"""
DCP = """
import torch, warnings
from safetensors.torch import load_file
from torch.distributed import checkpoint as dcp
warnings.simplefilter("ignore")
dcp.save(load_file("a.safetensors"), checkpoint_id="theirs")
"""
HEADING = "## Outputs in several files"


class Folder(Path().__class__):  # type: ignore[misc]
    """An output that is a folder: it is taken away between runs as a file is."""

    def unlink(self, missing_ok: bool = False) -> None:
        """Take it away."""
        shutil.rmtree(self, ignore_errors=missing_ok)


def rows(runs: int) -> list[Row]:
    """The table."""
    found = []
    shards = ["-o", "out/", "--max-shard-size", "100MB"]
    for words, name in (([], "proven"), (["--no-verify"], "--no-verify"), (["--dtype", "BF16"], "cast to BF16, proven")):
        one = [*CLI, "merge", "a.safetensors", "-o", "out.safetensors", *words]
        ours, theirs, ratio = pair([*CLI, "merge", "a.safetensors", *shards, *words], one, runs, [Folder("out"), Path("out.safetensors")])
        kept = ratio <= 1.1 and ours.megabytes <= theirs.megabytes + 8
        found.append(
            Row(f"merge -o out/ --max-shard-size 100MB, {name}", "the same into one file", ours, theirs, ratio, "≤ 1.1 ×, + 8 MB", kept)
        )
    save = [*CLI, "merge", "a.safetensors", "-o", "dcp", "--format", "dcp"]
    for words, name in ((["--no-verify"], "--no-verify"), ([], "proven")):
        ours, theirs, ratio = pair([*save, *words], python(DCP), runs, [Folder("dcp"), Folder("theirs")])
        found.append(Row(f"merge --format dcp, {name}", "load_file + dcp.save", ours, theirs, ratio, "for comparison", True))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--write", action="store_true")
    choices = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="ckptsurgeon-bench-"))
    os.chdir(folder)
    try:
        subprocess.run(python(MAKE, str(choices.gigabytes)), check=True)
        size, found = os.path.getsize("a.safetensors") / 1e9, rows(choices.runs)
    finally:
        shutil.rmtree(folder)
    words = (
        f"{HEADING}\n\n`python tests/bench/sharded.py --gigabytes {choices.gigabytes} --runs {choices.runs}` gave, on a file of "
        f"{size:.2f} GB in the page cache, Python {platform.python_version()}, {os.cpu_count()} cores:\n\n"
        f"{table(found)}\n\nThe megabytes of a DCP folder's writing are the file's pages, which torch reads through a mapping; they are "
        "the page cache's and can be dropped. What is the process's own is flat, which `tests/api/test_api_dcp_output.py` holds.\n"
    )
    print(words)
    if choices.write:
        write_section(words)


if __name__ == "__main__":
    main()
