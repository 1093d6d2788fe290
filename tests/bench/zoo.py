"""Every architecture of the installed transformers that builds at reduced size: what `save_pretrained` writes, transferred and verified.

    python tests/bench/zoo.py                 # all of them, in some minutes
    python tests/bench/zoo.py mixtral gte     # these
    python tests/bench/zoo.py --write         # and the counts into RESULTS.md

The oracle is the model that was saved. *Complete*: every tensor of a fresh model is equal to it, bit for bit, after one `transfer` without
a flag. *Part*: some stay fresh. *Wrong*: a tensor that the report calls transferred is another one. *Refused*: a CheckpointError.
*Verified*: `verify` of the folder says ok, where the library's own code loads it. An architecture that does not build at this size, or that
transformers can't save at it, is not counted.
"""

from __future__ import annotations

import argparse
import re
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "api"))

import torch  # noqa: E402
import transformers_models as models  # noqa: E402
from transformers import __version__ as version  # noqa: E402

import ckptsurgeon as cs  # noqa: E402

KINDS = ("complete", "part", "wrong", "refused", "verified")
_SECTION = re.compile(r"\n## Models of transformers\n.*?(?=\n## |\Z)", re.DOTALL)


def main() -> int:
    """Try every architecture, or the named ones; 0 only if all are complete and verified."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="NAME", help="architectures, as transformers' configurations name them")
    parser.add_argument("--write", action="store_true", help="write the counts into RESULTS.md")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    counts: Counter[str] = Counter()
    began, total = time.perf_counter(), 0
    for name in arguments.names or models.NAMES:
        found = _tried(name)
        if found is None:
            continue
        total += 1
        counts.update(found)
        if found != {"complete": 1, "verified": 1}:
            print(f"{name:34} {' '.join(found)}", flush=True)
    minutes = (time.perf_counter() - began) / 60
    text = (
        f"`python tests/bench/zoo.py --write`, transformers {version}, torch {torch.__version__}: each architecture at reduced size,\n"
        "saved by `save_pretrained`, transferred into a fresh model without a flag, and verified.\n\n"
        f"{_table(counts, total)}\n\n{minutes:.0f} minutes.\n"
    )
    print(text)
    if arguments.write:
        _write(text)
    return int(not total or counts["complete"] < total or counts["verified"] < total)


def _tried(name: str) -> dict[str, int] | None:
    """What became of an architecture; None where it can't be built or saved."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            make = models.maker(models.small(name))
            if make is None:
                return None
            saved = make(0)
            saved.save_pretrained(folder)
            fresh = make(1)
        except Exception:  # noqa: BLE001 - it does not build at this size, or can't be saved: whatever the library says
            return None
        return {_outcome(folder, fresh, saved.state_dict()): 1, **_verified(folder, make)}


def _outcome(folder: str, model: Any, truth: dict[str, torch.Tensor]) -> str:
    try:
        report = cs.transfer(folder, model)
    except cs.CheckpointError:
        return "refused"
    differ = set(models.unlike(model, truth))
    return "complete" if not differ else "wrong" if differ & set(report.transferred) else "part"


def _verified(folder: str, make: Callable[[int], Any]) -> dict[str, int]:
    return {"verified": 1} if cs.verify(folder, make(2)).ok else {}


def _table(counts: Counter[str], total: int) -> str:
    head = ("architectures", *KINDS)
    row = (total, *(counts[kind] for kind in KINDS))
    return "\n".join(
        f"| {' | '.join(str(cell).rjust(len(name)) for cell, name in zip(cells, head, strict=True))} |"
        for cells in (head, tuple("-" * len(name) for name in head), row)
    )


def _write(text: str) -> None:
    path = HERE / "RESULTS.md"
    old = _SECTION.sub("", path.read_text()).rstrip("\n")
    path.write_text(f"{old}\n\n## Models of transformers\n\n{text}")


if __name__ == "__main__":
    sys.exit(main())
