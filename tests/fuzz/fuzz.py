"""Fuzz what comes from strangers, for as long as you say:

    python tests/fuzz/fuzz.py --seconds 600                         # atheris, guided by coverage, over all readers in turn
    python tests/fuzz/fuzz.py --seconds 600 --reader zip            # one of zip legacy training safetensors json planfile rulefile …
    python tests/fuzz/fuzz.py --seconds 600 --engine hypothesis     # hypothesis, which makes what it finds small
    python tests/fuzz/fuzz.py --reader zip --replay FILE            # what one input does

Every input that breaks its contract (`fuzz_contracts`) is written to `--keep`, once for each place where it breaks, and the exit code is 1.
The contract runs in a process of its own, which a crash or an endless loop can't take along. atheris: pip install -e '.[fuzz]'.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

NAMES = ("zip", "legacy", "training", "safetensors", "json", "planfile", "rulefile", "patterns", "labels")
MOST_BYTES = 1 << 16
SLOW = 60  # seconds after which libFuzzer gives an input up


@dataclass(frozen=True)
class Run:
    """What a run over one reader did."""

    reader: str
    executions: int
    edges: int | None
    findings: tuple[Path, ...]


def memory_folder() -> Path:
    """A new folder in memory, where the system has one: every input is a file."""
    shared = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="ckptsurgeon-fuzz-", dir=shared if shared.is_dir() else None))


def keep(error: BaseException, data: bytes, folder: Path, reader: str, seen: set[str]) -> None:
    """Write an input that broke its contract, unless one that breaks at the same place is kept already."""
    from fuzz_properties import place

    where = place(error)
    if where in seen:
        return
    seen.add(where)
    folder.mkdir(parents=True, exist_ok=True)
    name = folder / f"{reader}-{hashlib.sha256(data).hexdigest()[:12]}"
    name.write_bytes(data)
    words = "".join(traceback.format_exception(error))
    name.with_suffix(".txt").write_text(words)
    print(f"{reader}: {where} -> {name}", file=sys.stderr, flush=True)


def atheris_child(reader: str, seconds: int, kept: Path, corpus: Path) -> None:
    """Run libFuzzer in this process, which it ends."""
    import atheris

    with atheris.instrument_imports(include=["ckptsurgeon"]):
        from fuzz_mutators import MUTATORS
        from fuzz_properties import broken
        from fuzz_seeds import READERS
    folder, seen = memory_folder(), set[str]()
    for name, raw in READERS[reader]().items():
        (corpus / f"seed-{hashlib.sha256(name.encode()).hexdigest()[:8]}").write_bytes(raw)

    def one(data: bytes) -> None:
        error = broken(reader, data, folder)
        if error is not None:
            keep(error, data, kept, reader, seen)

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        random = Random(seed)
        if random.randint(0, 4):
            for _ in range(random.randint(1, 3)):
                data = MUTATORS[reader](random, data)
            if len(data) <= most:
                return data
        return bytes(atheris.Mutate(data[:most], most))

    options = [
        f"-max_total_time={seconds}",
        f"-max_len={MOST_BYTES}",
        f"-timeout={SLOW}",
        "-rss_limit_mb=4096",
        f"-artifact_prefix={kept}/libfuzzer-",
    ]
    atheris.Setup([sys.argv[0], str(corpus), *options], one, custom_mutator=mutate)
    atheris.Fuzz()


def hypothesis_child(reader: str, seconds: int, kept: Path) -> None:
    """Draw and shrink until the time is over."""
    from fuzz_properties import broken, mutated
    from hypothesis import HealthCheck, Phase, given, settings

    folder, seen, ends = memory_folder(), set[str](), time.monotonic() + seconds
    count = 0
    last: list[tuple[BaseException, bytes]] = []

    @settings(
        max_examples=500, deadline=None, database=None, suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink), report_multiple_bugs=False,
    )  # fmt: skip
    @given(data=mutated(reader))
    def holds(data: bytes) -> None:
        nonlocal count
        count += 1
        error = broken(reader, data, folder)
        if error is not None:
            last.append((error, data))
            raise error

    while time.monotonic() < ends:
        try:
            holds()
        except BaseException as error:  # the smallest is the last that broke
            if isinstance(error, KeyboardInterrupt) or not last:
                raise
            keep(*last[-1], kept, reader, seen)
    shutil.rmtree(folder, ignore_errors=True)
    print(f"Done {count} runs", file=sys.stderr)


def replay(reader: str, path: Path) -> int:
    """What one input does: 1 where it breaks the contract."""
    from fuzz_properties import broken

    folder = memory_folder()
    error = broken(reader, path.read_bytes(), folder)
    shutil.rmtree(folder, ignore_errors=True)
    if error is None:
        print(f"{path}: as it should be")
        return 0
    traceback.print_exception(error)
    return 1


def run(engine: str, reader: str, seconds: int, kept: Path, corpus: Path | None) -> Run:
    """One reader in processes of their own, until the time is over; what they found is tried again without instruments."""
    kept.mkdir(parents=True, exist_ok=True)
    before = set(kept.iterdir())
    grown = corpus / reader if corpus else Path(tempfile.mkdtemp(prefix="ckptsurgeon-corpus-"))
    grown.mkdir(parents=True, exist_ok=True)
    executions, edges, ends = 0, None, time.monotonic() + seconds
    while (left := int(ends - time.monotonic())) > 0:
        words = [
            sys.executable,
            __file__,
            "--engine",
            engine,
            "--reader",
            reader,
            "--seconds",
            str(left),
            "--keep",
            str(kept),
            "--child",
            str(grown),
        ]
        try:
            found = subprocess.run(words, stderr=subprocess.PIPE, text=True, errors="replace", timeout=left + 4 * SLOW, check=False)
            log, died = found.stderr, found.returncode != 0
        except subprocess.TimeoutExpired as error:
            log, died = str(error.stderr or ""), True
        executions += max(
            (int(number) for number in re.findall(r"^#(\d+)\s|Done (\d+) runs", log, re.MULTILINE) for number in number if number),
            default=0,
        )
        edges = max([edges or 0, *(int(number) for number in re.findall(r"cov: (\d+)", log))]) or None
        if died:
            print(log[-2000:], file=sys.stderr)
            if executions == 0:
                raise SystemExit(f"{engine} did not run")
    if corpus is None:
        shutil.rmtree(grown, ignore_errors=True)
    new = sorted(path for path in set(kept.iterdir()) - before if path.suffix != ".txt")
    return Run(reader, executions, edges, tuple(path for path in new if _confirmed(reader, path)))


def _confirmed(reader: str, path: Path) -> bool:
    words = [sys.executable, __file__, "--reader", reader, "--replay", str(path)]
    try:
        return subprocess.run(words, capture_output=True, timeout=4 * SLOW, check=False).returncode != 0
    except subprocess.TimeoutExpired:
        return True


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=600, help="in total, shared equally by the readers")
    parser.add_argument("--reader", action="append", choices=NAMES, help="may be given several times; without it, all")
    parser.add_argument("--engine", choices=("atheris", "hypothesis"), default="atheris")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-findings"), help="a folder for what breaks")
    parser.add_argument("--corpus", type=Path, help="a folder where atheris keeps what it learned, for the next run")
    parser.add_argument("--replay", type=Path)
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    readers = given.reader or list(NAMES)
    if given.replay:
        return replay(readers[0], given.replay)
    if given.child:
        if given.engine == "atheris":
            atheris_child(readers[0], given.seconds, given.keep, given.child)
        else:
            hypothesis_child(readers[0], given.seconds, given.keep)
        return 0
    runs = []
    for reader in readers:
        runs.append(run(given.engine, reader, max(given.seconds // len(readers), 1), given.keep, given.corpus))
        one = runs[-1]
        print(f"{one.reader:12} {one.executions:9} executions  {one.edges or '':>6} edges  {len(one.findings)} findings", flush=True)
    for path in (path for one in runs for path in one.findings):
        print(
            f"  {path}: {path.with_suffix('.txt').read_text().splitlines()[-1] if path.with_suffix('.txt').exists() else 'see libFuzzer'}"
        )
    return 1 if any(one.findings for one in runs) else 0


if __name__ == "__main__":
    sys.exit(main())
