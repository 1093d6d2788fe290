"""Into a model of FSDP2 on two ranks (gloo, CPU): what each rank reads, and the memory that it takes beyond its own parameters.

    python tests/bench/sharded_models.py            # prints a table; about 3 minutes, 5 GB of free disk
    python tests/bench/sharded_models.py --write    # and puts it into RESULTS.md

The model is built on meta and sharded; the sources are one safetensors file, and a folder that `dcp.save` wrote on three ranks with AdamW's
moments. Each way runs in processes of its own. Bytes read are the kernel's count for the process (`rchar` of `/proc/self/io`, which leaves
out what is mapped), less what a rank read before; memory is the peak (`VmHWM`, reset before), less what was resident before and the rank's
own parameters. Of both, the larger of the two ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from results import write_section
from tabulate import tabulate

MB = 1e6
WAYS = {
    "one file: transfer": "ours_file",
    "one file: load_file, set_model_state_dict": "torch_file",
    "DCP folder: transfer": "ours_folder",
    "DCP folder: dcp.load": "torch_folder",
    "DCP folder with AdamW: transfer": "ours_optimizer",
}


def model(layers: int) -> Any:
    """Linear layers of 16 MB each, on meta."""
    import torch
    from torch import nn

    with torch.device("meta"):
        return nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(layers)))


def sharded(layers: int) -> Any:
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    net = model(layers)
    over = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in net:
        fully_shard(layer, mesh=over)
    fully_shard(net, mesh=over)
    return net


def make(folder: Path, layers: int) -> None:
    """The sources, on three ranks."""
    import torch
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import save_file
    from torch.distributed.checkpoint.state_dict import get_state_dict

    net = sharded(layers)
    net.to_empty(device="cpu")
    with torch.no_grad():
        for one in net.parameters():
            one.to_local().uniform_()
    optimizer = torch.optim.AdamW(net.parameters())
    for one in net.parameters():
        one.grad = torch.zeros_like(one)
    optimizer.step()
    weights, moments = get_state_dict(net, optimizer)
    dcp.save({"model": weights, "optim": moments}, checkpoint_id=folder / "folder")
    if dist.get_rank() == 0:
        save_file({f"{number}.weight": torch.rand(2048, 2048) for number in range(layers)}, folder / "one.safetensors")


def way(name: str, folder: Path, net: Any, optimizer: Any) -> None:
    import torch
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import load_file
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

    import ckptsurgeon as cs

    if name == "ours_file":
        cs.transfer(folder / "one.safetensors", net)
    elif name == "ours_folder":
        cs.transfer(folder / "folder", net, root="model")
    elif name == "ours_optimizer":
        cs.transfer(folder / "folder", net, root="model", optimizer=optimizer)
    elif name == "torch_file":
        net.to_empty(device="cpu")
        set_model_state_dict(net, load_file(folder / "one.safetensors"), options=StateDictOptions(full_state_dict=True))
    else:
        net.to_empty(device="cpu")
        with torch.no_grad():
            dcp.load({"model": net.state_dict()}, checkpoint_id=folder / "folder")


def status(field: str) -> float:
    """A figure of this process, in bytes."""
    return float(re.search(rf"^{field}:\s+(\d+)", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) * 1024  # type: ignore[index]


def read() -> int:
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])  # type: ignore[index]


def measured(name: str, folder: Path, layers: int) -> None:
    """One rank's figures, gathered on rank 0, which writes the larger ones."""
    import torch
    import torch.distributed as dist

    import ckptsurgeon as cs
    from ckptsurgeon.api import _live  # noqa: F401  what is imported only once is no cost of the transfer's

    warm = sharded(1)  # torch's own first steps, on a small file
    if dist.get_rank() == 0:
        from safetensors.torch import save_file

        save_file({"0.weight": torch.zeros(2048, 2048)}, folder / "warm.safetensors")
    dist.barrier()
    cs.transfer(folder / "warm.safetensors", warm)
    del warm
    net = sharded(layers)
    optimizer = torch.optim.AdamW(net.parameters()) if name == "ours_optimizer" else None
    Path("/proc/self/clear_refs").write_text("5")
    before, bytes_before = status("VmRSS"), read()
    dist.barrier()
    began = time.perf_counter()
    way(name, folder, net, optimizer)
    dist.barrier()
    seconds = time.perf_counter() - began
    own = sum(one.to_local().numel() * 4 for one in net.parameters())
    kept = own * (3 if optimizer is not None else 1)
    row = (seconds, (read() - bytes_before) / MB, (status("VmHWM") - before - kept) / MB, own / MB)
    rows: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(rows, row)
    if dist.get_rank() == 0:
        (folder / "figures.json").write_text(json.dumps([max(figures) for figures in zip(*rows, strict=True)]))


def under_torchrun(ranks: int, *words: object) -> None:
    command = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", __file__]
    done = subprocess.run([*command, *map(str, words)], env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{words} ended with {done.returncode}: {done.stderr[-3000:]}")


def worker(task: str, folder: Path, layers: int) -> None:
    import torch.distributed as dist

    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    run: Callable[[], None] = (lambda: make(folder, layers)) if task == "make" else (lambda: measured(task, folder, layers))
    run()
    dist.destroy_process_group()


def main() -> int:
    """Measure, and show."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--layers", type=int, nargs="+", default=[15, 60], help="16 MB each")
    parser.add_argument("--write", action="store_true", help="write the table into RESULTS.md")
    arguments = parser.parse_args()
    rows = []
    for layers in arguments.layers:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            under_torchrun(3, "worker", "make", folder, layers)
            for words, task in WAYS.items():
                under_torchrun(2, "worker", task, folder, layers)
                seconds, bytes_read, memory, own = json.loads((folder / "figures.json").read_text())
                counted = "mapped" if task == "torch_file" else f"{bytes_read:.1f}"
                rows.append((words, f"{own:.0f}", counted, f"{memory:.0f}", f"{seconds:.2f}"))
    head = ("way", "own parameters, MB", "read, MB", "memory beyond, MB", "s")
    table = tabulate(rows, head, tablefmt="github", disable_numparse=True)
    import torch

    text = (
        f"\n## Sharded models\n\n`python tests/bench/sharded_models.py --layers {' '.join(map(str, arguments.layers))} --write`: into "
        "FSDP2 on two ranks (gloo, CPU), from one safetensors file and from a folder that `dcp.save` wrote on three ranks with AdamW's "
        "moments; by rank, the larger figure. Memory is the peak beyond what was resident before and the rank's own parameters (and "
        f"moments). torch {torch.__version__}:\n\n{table}\n"
    )
    print(text)
    if arguments.write:
        write_section(text)
    return 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2], Path(sys.argv[3]), int(sys.argv[4]))
    else:
        sys.exit(main())
