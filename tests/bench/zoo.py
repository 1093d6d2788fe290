"""Every architecture of the installed transformers that builds at reduced size: what `save_pretrained` writes, transferred and verified.

    python tests/bench/zoo.py                     # all of them, in some minutes
    python tests/bench/zoo.py mixtral gte         # these
    python tests/bench/zoo.py --write             # and the counts into RESULTS.md
    python tests/bench/zoo.py --save FOLDER       # under another release of transformers: save them, also those with a head
    python tests/bench/zoo.py --folders FOLDER    # transfer and verify what that has saved
    python tests/bench/zoo.py --match             # with the models' own conversions off: only what `match` is sure of is transferred

The oracle is the model that was saved; of another release's folders `from_pretrained`, in what it loads. *Complete*: every tensor of a
fresh model is equal to it, bit for bit, after one `transfer` without a flag. *Part*: some stay fresh. *Wrong*: a tensor that the report
calls transferred is another one. *Refused*: a CheckpointError. *Verified*: `verify` says ok, where the library's own code loads the folder.
What does not build at this size, or can't be saved or loaded by transformers itself, is not counted; nor, with --match, what fits by its
names.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from results import write_section

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "api"))

import torch  # noqa: E402
import transformers  # noqa: E402
import transformers_models as models  # noqa: E402

KINDS = ("complete", "part", "wrong", "refused", "verified")
HEADS = (
    "",
    "ForCausalLM",
    "ForMaskedLM",
    "ForImageClassification",
    "ForVision2Seq",
    "ForSpeechSeq2Seq",
)  # of `AutoModel`, that --save saves
GOOD, MATCHED = {"complete": 1, "verified": 1}, {"complete": 1}
Outcome = dict[str, int] | None  # None where it is not counted


def main() -> int:
    """Try every architecture, or the named ones, or the folders that were saved; 0 only if all are complete and verified, or, with --match,
    none is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("names", nargs="*", metavar="NAME", help="architectures, as transformers' configurations name them")
    parser.add_argument("--save", type=Path, metavar="FOLDER", help="save each below this folder, and do nothing more")
    parser.add_argument("--folders", type=Path, metavar="FOLDER", help="transfer what --save saved, under another release")
    parser.add_argument("--match", action="store_true", help="without the models' own conversions: by the rules that match is sure of")
    parser.add_argument("--write", action="store_true", help="write the counts into RESULTS.md")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    names = arguments.names or models.NAMES
    if arguments.save:
        return _save(arguments.save, names)
    began, counts, total = time.perf_counter(), Counter[str](), 0
    for name, found in (
        _of_folders(arguments.folders) if arguments.folders else ((name, _of_architecture(name, arguments.match)) for name in names)
    ):
        if found is None:
            continue
        total += 1
        counts.update(found)
        if found != (MATCHED if arguments.match else GOOD):
            print(f"{name:60} {' '.join(found)}", flush=True)
    version, minutes = f"transformers {transformers.__version__}, torch {torch.__version__}", (time.perf_counter() - began) / 60
    text = f"{_table(counts, total)}\n\n{version}; {minutes:.0f} minutes.\n"
    print(text)
    if arguments.write:
        _write(text, (arguments.folders / "VERSION").read_text() if arguments.folders else "", arguments.match)
    good = not counts["wrong"] if arguments.match else counts["complete"] == counts["verified"] == total
    return int(not total or not good)


def _save(folder: Path, names: list[str]) -> int:
    """Save the models that build, every third in torch's own format."""
    folder.mkdir(parents=True)
    (folder / "VERSION").write_text(transformers.__version__)
    for name in names:
        for head in HEADS:
            try:
                make = models.maker(models.small(name), getattr(transformers, f"AutoModel{head}"))
                if make is not None:
                    model = make(0)
                    model.save_pretrained(folder / f"{type(model).__name__}-{name}", safe_serialization=len(list(folder.iterdir())) % 3 > 0)
            except Exception:  # noqa: BLE001 - it has no such head, does not build at this size, or can't be saved
                continue
    print(len(list(folder.iterdir())) - 1, "saved by transformers", transformers.__version__)
    return 0


def _of_architecture(name: str, by_match: bool) -> Outcome:
    """What becomes of an architecture that is saved now."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            make = models.maker(models.small(name))
            if make is None:
                return None
            saved = make(0)
            saved.save_pretrained(folder)
            make(1)
        except Exception:  # noqa: BLE001 - it does not build at this size, or can't be saved: whatever the library says
            return None
        return _matched(folder, make(1), saved.state_dict()) if by_match else _outcome(folder, make, saved.state_dict())


def _of_folders(folder: Path) -> Iterator[tuple[str, Outcome]]:
    """What becomes of each folder that another release has saved, as far as this one's `from_pretrained` loads it."""
    for place in sorted(path for path in folder.iterdir() if path.is_dir()):
        kind = getattr(transformers, place.name.partition("-")[0], None)
        if kind is None:
            continue

        def make(seed: int, kind: Any = kind, place: Path = place) -> Any:
            torch.manual_seed(seed)
            return kind(kind.config_class.from_pretrained(place)).eval()

        try:
            config = make(1).config
            words = {"config": config, "output_loading_info": True, "ignore_mismatched_sizes": True}
            theirs, told = kind.from_pretrained(place, **words)
        except Exception:  # noqa: BLE001 - this release can't load it
            continue
        lacking = {*told["missing_keys"], *(key for key, *_ in told["mismatched_keys"])}
        truth = {key: value for key, value in theirs.state_dict().items() if key not in lacking}
        found = _outcome(str(place), make, truth)
        yield place.name, {**found, **({"verified": 1} if lacking else {})}  # what theirs lacks, no verify can find


def _outcome(folder: str, make: Callable[[int], Any], truth: dict[str, torch.Tensor]) -> dict[str, int]:
    import ckptsurgeon as cs

    verified = {"verified": 1} if cs.verify(folder, make(2)).ok else {}
    model = make(3)
    try:
        report = cs.transfer(folder, model)
    except cs.CheckpointError:
        return {"refused": 1, **verified}
    return {**_compared(model, truth, report.transferred), **verified}


def _matched(folder: str, model: Any, truth: dict[str, torch.Tensor]) -> Outcome:
    """What becomes of a folder where only matching says what goes where; layouts in doubt stay open."""
    import ckptsurgeon as cs

    if not cs.diff(folder, model, conversions=False).missing:
        return None
    try:
        report = cs.transfer(folder, model, rules=cs.match(folder, model, conversions=False).rules, conversions=False)
    except cs.CheckpointError:
        return {"refused": 1}
    return _compared(model, truth, report.transferred)


def _compared(model: Any, truth: dict[str, torch.Tensor], transferred: Iterable[str]) -> dict[str, int]:
    differ = set(models.unlike(model, truth))
    return {"complete" if not differ else "wrong" if differ & set(transferred) else "part": 1}


def _table(counts: Counter[str], total: int) -> str:
    head = ("models", *KINDS)
    row = (total, *(counts[kind] for kind in KINDS))
    return "\n".join(
        f"| {' | '.join(str(cell).rjust(len(name)) for cell, name in zip(cells, head, strict=True))} |"
        for cells in (head, tuple("-" * len(name) for name in head), row)
    )


def _write(text: str, release: str, by_match: bool) -> None:
    title = f"Folders of transformers {release}" if release else f"Models of transformers{', matched' if by_match else ''}"
    command = "--folders FOLDER --write`, for what `--save FOLDER` saved there" if release else "--write`, for what it saves itself"
    how = "transferred without a flag, and verified"
    if by_match:
        command, how = (
            "--match --write`, for what it saves itself",
            "without the models' own conversions, by the rules that match is sure of",
        )
    write_section(f"## {title}\n\n`python tests/bench/zoo.py {command}: {how}\n\n{text}")


if __name__ == "__main__":
    sys.exit(main())
