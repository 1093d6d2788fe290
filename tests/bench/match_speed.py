"""What matching costs where there are many tensors: a mixture of experts of which every third block has other names, as a whole process.

python tests/bench/match_speed.py            # a table
python tests/bench/match_speed.py --write    # and into RESULTS.md
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from results import write_section
from safetensors.torch import save_file
from tabulate import tabulate

HEADERS = ("tensors a side", "command", "CPU seconds", "peak MB", "rules")
SIZES = ((40, 80), (160, 61))  # experts, layers


def tensors(experts: int, layers: int, other: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of a mixture of experts."""
    for layer in range(layers):
        head = f"model.layers.{layer}"
        for name, shape in (("q", (64, 32)), ("k", (16, 32)), ("v", (16, 32)), ("o", (32, 64))):
            yield f"{head}.self_attn.{name}_proj.weight", shape
        yield f"{head}.input_layernorm.weight", (32,)
        yield f"{head}.mlp.gate.weight", (experts, 32)
        for expert in range(experts):
            path = f"{head}.moe.expert_{expert}" if other and layer % 3 == 0 else f"{head}.mlp.experts.{expert}"
            for name, shape in (("gate", (8, 32)), ("up", (8, 32)), ("down", (32, 8))):
                yield f"{path}.{name}_proj.weight", shape


_MEASURED = """
import json, resource, subprocess, sys
code = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode
used = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps([code, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024]))
"""


def cost(*words: str) -> tuple[float, float]:
    """CPU seconds and peak MB of a command, started by a small process (a large one's peak would count); raises where it fails."""
    command = [sys.executable, "-c", _MEASURED, sys.executable, "-m", "ckptsurgeon", *words]
    code, seconds, peak = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    if code:
        raise SystemExit(f"{words} ended with {code}")
    return seconds, peak


def main() -> int:
    """Measure each size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help="write the table into RESULTS.md")
    write = parser.parse_args().write
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for experts, layers in SIZES:
            paths = [str(Path(folder) / f"{name}.safetensors") for name in ("a", "t")]
            for path, other in zip(paths, (False, True), strict=True):
                save_file({key: torch.zeros(shape, dtype=torch.bfloat16) for key, shape in tensors(experts, layers, other)}, path)
            count = sum(1 for _ in tensors(experts, layers, False))
            rules = Path(folder) / "rules.toml"
            for command in (("match", *paths, "-o", str(rules), "--overwrite"), ("diff", *paths)):
                seconds, peak = cost(*command)
                written = len(re.findall(r"^\[\[", rules.read_text(), re.MULTILINE)) if command[0] == "match" else ""
                rows.append((f"{count:,}", command[0], f"{seconds:.1f}", f"{peak:.0f}", written))
    text = tabulate(rows, HEADERS, tablefmt="github") + "\n"
    print(text)
    if write:
        head = "## Matching many tensors\n\n`python tests/bench/match_speed.py --write`: every third block has other names.\n\n"
        write_section(head + text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
