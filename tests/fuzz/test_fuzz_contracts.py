"""hypothesis on every contract, for a short time; `python tests/fuzz/fuzz.py --engine hypothesis --seconds 600` goes on for longer.

And the fuzzers themselves: that their seeds are read, that a change is a change, and that they would tell what they are there to tell.
"""

from __future__ import annotations

import zipfile
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from random import Random

import fuzz
import fuzz_contracts
import fuzz_mutators
import fuzz_zips
import pytest
from fuzz_contracts import CONTRACTS, Broken, Stuck, bounded
from fuzz_properties import broken, mutated, place
from fuzz_seeds import READERS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from profiles import examples

EXAMPLES = examples(40)
# Seeds that no reader takes: what pickle.dump writes.
REFUSED = {("legacy", "plain"), ("legacy", "plain 5")}


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Where the inputs are written."""
    import shutil

    made = fuzz.memory_folder()
    yield made
    shutil.rmtree(made)


def test_every_reader_has_all_that_it_needs() -> None:
    assert set(READERS) == set(CONTRACTS) == set(fuzz_mutators.MUTATORS) == set(fuzz.NAMES)


@pytest.mark.parametrize("reader", READERS)
def test_the_seeds_are_what_they_say(reader: str, folder: Path) -> None:
    """Otherwise a fuzzer would only ever see the first refusal."""
    for name, data in READERS[reader]().items():
        assert CONTRACTS[reader](data, folder) == ("refused" if (reader, name) in REFUSED else "read"), name


@pytest.mark.parametrize("reader", READERS)
def test_a_checkpoint_or_a_checkpoint_error_and_nothing_else(reader: str, folder: Path) -> None:
    @settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=mutated(reader))
    def holds(data: bytes) -> None:
        error = broken(reader, data, folder)
        if error is not None:
            raise error

    holds()


@settings(max_examples=examples(100), deadline=None)
@given(st.binary(max_size=200), st.sampled_from(fuzz.NAMES))
def test_any_bytes(data: bytes, reader: str) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as name:
        error = broken(reader, data, Path(name))
        if error is not None:
            raise error


@pytest.mark.parametrize("reader", READERS)
def test_changes_come_through(reader: str, folder: Path) -> None:
    """Most changes make another file, and many of those are still read: a mutator that breaks everything finds nothing."""
    random, outcomes, same = Random(0), Counter[str](), 0
    for data in READERS[reader]().values():
        for _ in range(20):
            other = fuzz_mutators.MUTATORS[reader](random, data)
            same += other == data
            with suppress(Broken):  # such a one is the other tests' to tell
                outcomes[CONTRACTS[reader](other, folder)] += 1
    assert same < outcomes.total() / 3
    assert outcomes["read"] > outcomes.total() / 20 and outcomes["refused"] > 0


def test_a_zip_is_built_as_others_read_it() -> None:
    for data in READERS["zip"]().values():
        entries = fuzz_zips.members(data)
        assert entries
        raw = fuzz_zips.build(entries)
        with zipfile.ZipFile(BytesIO(raw)) as archive:
            assert archive.testzip() is None
            assert [(info.filename.encode(), archive.read(info)) for info in archive.infolist()] == [
                (one.name, one.data) for one in entries
            ]


def test_what_breaks_is_told(monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path) -> None:
    """An error of another kind, an endless loop, gigabytes: each is a finding, and is kept once."""

    def fails(_data: bytes, _folder: Path) -> str:
        raise KeyError("x")

    def runs_on(_data: bytes, _folder: Path) -> str:
        with bounded():
            while True:
                pass

    def eats(_data: bytes, _folder: Path) -> str:
        with bounded():
            return str(len(bytes(1 << 30)))

    def dawdles(_data: bytes, _folder: Path) -> str:
        with bounded():
            return str(sum(range(3_000_000)))

    monkeypatch.setattr(fuzz_contracts, "STUCK", 0.2)
    monkeypatch.setattr(fuzz_contracts, "SECONDS", 0.001)
    seen: set[str] = set()
    for number, (contract, kind) in enumerate(((fails, KeyError), (runs_on, Stuck), (eats, MemoryError), (dawdles, Broken))):
        monkeypatch.setitem(fuzz_contracts.CONTRACTS, "zip", contract)  # type: ignore[arg-type]
        error = broken("zip", b"", folder)
        assert isinstance(error, kind)
        for _ in range(2):
            fuzz.keep(error, b"%d" % number, tmp_path, "zip", seen)
        assert place(error) in seen and len(list(tmp_path.glob("*.txt"))) == number + 1
