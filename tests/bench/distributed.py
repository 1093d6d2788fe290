"""Measures folders of torch.distributed.checkpoint: into one file, beside a bare copy of the same bytes and torch's own tool.

    python tests/bench/distributed.py --write                    # about 5 minutes, 8 GB of free disk; into RESULTS.md
    python tests/bench/distributed.py --gigabytes 0.2 --runs 1

The folders are saved by two real ranks, with an optimizer of two moments: `rows` tiled along dim 0 (FSDP), `columns` with every second
weight tiled along dim 1 (tensor parallel). Whole processes, as in `run.py`; CPU seconds where a header is read.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from results import write_section
from run import CLI, Row, median, pair, python, run, table

HERE = Path(__file__).parent

SAVE = """
import sys, warnings
import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
warnings.filterwarnings("ignore")
dist.init_process_group("gloo")
world, rank = dist.get_world_size(), dist.get_rank()
mesh, generator = init_device_mesh("cpu", (world,)), torch.Generator().manual_seed(rank)

def some(shape, dim):
    own = [size // world if at == dim else size for at, size in enumerate(shape)]
    return DTensor.from_local(torch.rand(own, generator=generator), mesh, [Shard(dim)], run_check=False)

layers, width = int(sys.argv[1]), 1024
for name, dim in (("rows", 0), ("columns", 1)):
    kinds = [(layer, kind) for layer in range(layers) for kind in ("q", "k", "up", "down")]
    dims = {f"layers.{layer}.{kind}.weight": dim if kind in ("down", "k") else 0 for layer, kind in kinds}
    shapes = {"q": (width, width), "k": (width, width), "up": (4 * width, width), "down": (width, 4 * width)}
    model = {key: some(shapes[key.split(".")[2]], at) for key, at in dims.items()}
    state = {key: {slot: some(model[key].shape, at) for slot in ("exp_avg", "exp_avg_sq")} for key, at in dims.items()}
    dcp.save({"model": model, "optim": {"state": state, "param_groups": [{"lr": 0.1, "params": list(model)}]}}, checkpoint_id=name)
    del model, state
dist.destroy_process_group()
"""

MANY = """
import torch, torch.distributed.checkpoint as dcp, pickle, warnings
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import *
warnings.filterwarnings("ignore")
dcp.save({"model": {f"layers.{i}.w": torch.rand(8, 16 + i % 3) for i in range(16_000)}}, checkpoint_id="many")
def metadata(chunks, ranks=64):
    tensors, stored, paths = {}, {}, {}
    for number in range(chunks // ranks):
        key = f"model.layers.{number}.attention.wq.weight"
        blocks = [ChunkStorageMetadata(torch.Size((rank * 64, 0)), torch.Size((64, 1024))) for rank in range(ranks)]
        tensors[key] = TensorStorageMetadata(TensorProperties(torch.float32), torch.Size((64 * ranks, 1024)), blocks)
        paths[key] = ("model", key[6:])
        for rank in range(ranks):
            stored[MetadataIndex(key, (rank * 64, 0), rank)] = _StorageInfo(f"__{rank}_0.distcp", number * 262144, 263144)
    return Metadata(tensors, paths, stored, StorageMeta("run", "id"), "1.0.0")
for count in (64_000, 1_000_000):
    with open(f"{count}.metadata", "wb") as file:
        pickle.dump(metadata(count), file)
"""

COPY = """
import os, sys
*sources, path = sys.argv[1:]
output, place = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC), 0
for source in sources:
    given, done = os.open(source, os.O_RDONLY), 0
    while (copied := os.copy_file_range(given, output, 1 << 30, done, place)) > 0:
        done, place = done + copied, place + copied
os.fsync(output)
"""

TORCH = """
import sys, warnings
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
warnings.filterwarnings("ignore")
dcp_to_torch_save(*sys.argv[1:])
"""

PARSE = """
import sys, time, resource
from ckptsurgeon.formats.folders.dcp_metadata import parse
from ckptsurgeon.formats.sniff import no_collections
raw = open(sys.argv[1], "rb").read()
with no_collections():
    began = time.process_time()
    found = parse(raw, "x")
print(time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""

UNPICKLE = """
import sys, time, resource, pickle, torch.distributed.checkpoint
raw = open(sys.argv[1], "rb").read()
began = time.process_time()
found = pickle.loads(raw)
print(time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
"""


def prepare(gigabytes: float) -> None:
    Path("save.py").write_text(SAVE)
    layers = max(1, round(gigabytes * 1e9 / (3 * 10 * 4 * 1024**2)))
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "save.py", str(layers)]
    subprocess.run(words, check=True, capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    subprocess.run(python(MANY), check=True)


def merging(runs: int) -> list[Row]:
    rows = []
    for folder in ("rows", "columns"):
        files = [str(file) for file in sorted(Path(folder).glob("*.distcp"))]
        run([*CLI, "merge", folder, "-o", "model.bin.safetensors", "--root", "model"], lambda: None)
        for part, root, copied in (("all of it", "", files), ("its model", "model", ["model.bin.safetensors"])):
            for proof in (False, True):
                output = f"{folder}.safetensors"
                words = ["merge", folder, "-o", output, "--root", root, *([] if proof else ["--no-verify"])]
                ours, theirs, ratio = pair([*CLI, *words], python(COPY, *copied, "copy.bin"), runs, [Path(output), Path("copy.bin")])
                times = 2.2 if proof else 1.3
                kept = ours.seconds <= times * theirs.seconds + 0.3 and ours.megabytes <= 64
                name = f"merge {folder}/ → .safetensors, {part}, {'proven' if proof else '--no-verify'}"
                rows.append(Row(name, "copy_file_range, fsync", ours, theirs, ratio, f"≤ {times} × + 0.3 s, ≤ 64 MB", kept))
        Path("model.bin.safetensors").unlink()
        ours, theirs, ratio = pair(
            python(TORCH, folder, "torch.pt"), python(COPY, *files, "copy.bin"), runs, [Path("torch.pt"), Path("copy.bin")]
        )
        rows.append(
            Row(f"(dcp_to_torch_save {folder}/, not synced)", "copy_file_range, fsync", ours, theirs, ratio, "for comparison", True)
        )
    return rows


def reading(runs: int) -> str:
    """What headers cost: CPU seconds and peak memory of a process."""
    lines = ["", "| read | CPU seconds | MB | pickle.load | MB | ratio | bound | kept |", "|---|---|---|---|---|---|---|---|"]
    for count, bound in ((64_000, 2.0), (1_000_000, 2.0)):
        path = f"{count}.metadata"
        times = []
        for _ in range(runs):
            ours, theirs = (
                subprocess.run(python(code, path), check=True, capture_output=True, text=True).stdout.split() for code in (PARSE, UNPICKLE)
            )
            times.append([*map(float, ours), *map(float, theirs)])
        found = sorted(times, key=lambda row: row[0] / row[2])[len(times) // 2]
        ratio = found[0] / found[2]
        name = f"`.metadata` of {count:,} chunks, {Path(path).stat().st_size / 1e6:.0f} MB"
        figures = f"{found[0]:.2f} | {found[1]:.0f} | {found[2]:.2f} | {found[3]:.0f} | {ratio:.2f}"
        lines.append(f"| {name} | {figures} | ≤ {bound:.0f} × | {'yes' if ratio <= bound else '**no**'} |")
    measured = median([run([*CLI, "inspect", "many"], lambda: None) for _ in range(runs)])
    lines.append(f"\n`inspect` of a folder of 16,000 tensors, a chunk each: {measured.seconds:.2f} s, {measured.megabytes:.0f} MB.")
    return "\n".join(lines) + "\n"


def tensor_bytes(folder: str) -> int:
    shown = json.loads(subprocess.run([*CLI, "inspect", folder, "--json"], check=True, capture_output=True, text=True).stdout)
    return sum(root["bytes"] for root in shown["roots"])


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--write", action="store_true", help="write the tables into RESULTS.md")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as place:
        os.chdir(place)
        prepare(arguments.gigabytes)
        command = f"python tests/bench/distributed.py --gigabytes {arguments.gigabytes} --runs {arguments.runs} --write"
        text = (
            f"\n## Distributed checkpoints\n\n`{command}`: folders that 2 ranks saved, {tensor_bytes('rows') / 1e9:.2f} GB of weights and "
            "moments each; `rows` is tiled along dim 0, of `columns` every second weight along dim 1.\n\n"
        )
        text += table(merging(arguments.runs)) + "\n" + reading(arguments.runs)
        os.chdir(HERE)
    print(text)
    if arguments.write:
        write_section(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
