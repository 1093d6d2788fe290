"""`check --full` and `merge` give one verdict about data: what the one calls good the other copies, and what it calls bad is refused."""

from __future__ import annotations

import zipfile
from pathlib import Path

import make
import pytest
from hostile_zips import archive, items
from hypothesis import example, given
from hypothesis import strategies as st

import ckptsurgeon as cs
from ckptsurgeon.errors import CheckpointError, OutputError

FILES = [row[0] for row in make.stories() if (make.FILES / row[0]).exists() and not row[0].startswith("skeletons/")]
OUTPUTS = ("out.pt", "out.safetensors")


def refusals(path: Path, folder: Path, output: str) -> list[CheckpointError]:
    """Why merges of the file's state_dicts, one after the other, or the file itself, are refused."""
    try:
        archive = cs.inspect(path)
    except CheckpointError as error:
        return [error]
    found = []
    for state in archive.state_dicts:
        try:
            cs.merge(path, None, folder / output, root=state.root, overwrite=True)
        except OutputError:  # a name that the output's format can't have: nothing is wrong with the file
            continue
        except CheckpointError as error:
            found.append(error)
    return found


def verdict(path: Path) -> tuple[bool, set[str]]:
    """Whether `check --full` finds nothing, and the codes of what it finds."""
    (file,) = cs.check(path, full=True).files
    return file.ok, {finding.code for finding in file.findings if finding.level == "error"}


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("name", FILES)
def test_of_every_hostile_file_check_and_merge_say_the_same(name: str, output: str, tmp_path: Path) -> None:
    path = make.make(name, tmp_path)
    good, codes = verdict(path)
    refused = refusals(path, tmp_path, output)
    if good:
        assert not refused
    elif codes & {"CK201", "CK202"}:  # unsafe as well, which is another question than the data's
        assert refused or "CK106" not in codes
    elif name == "checksums/a-wrong-checksum-of-an-entry-that-torch-skips.pt":
        assert codes == {"CK106"} and not refused  # it holds no tensor, and is not read
    else:
        assert refused and codes


@pytest.mark.parametrize("name", [name for name in FILES if name.startswith(("checksums/", "zip-"))])
def test_what_zipfile_calls_damaged_is_not_good(name: str) -> None:
    path = make.FILES / name
    good, _ = verdict(path)
    try:
        with zipfile.ZipFile(path) as found:
            whole = found.testzip() is None or any(not info.CRC for info in found.infolist())
    except (zipfile.BadZipFile, zipfile.zlib.error, OSError, EOFError, ValueError, RuntimeError):  # type: ignore[attr-defined]
        whole = False
    assert whole or not good


CHANGES = st.fixed_dictionaries(
    {"method": st.sampled_from([0, 8])},
    optional={
        "cut": st.integers(0, 12),
        "stray": st.sampled_from([b"", b"\x00", b"STRAY", b"\x03\x00"]),
        "crc": st.sampled_from([0, 1]),
        "flip": st.integers(0, 200),
    },
)


@given(change=CHANGES, which=st.sampled_from(["data/0", "data/1"]))
@example(change={"method": 8, "stray": b"STRAY", "crc": 0}, which="data/0")
@example(change={"method": 8, "cut": 1}, which="data/1")
def test_however_a_record_is_damaged_both_say_the_same(
    change: dict[str, object], which: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    entries = items()
    at = make.at(which)
    flip = change.pop("flip", None)
    entries[at] = type(entries[at])(**{**vars(entries[at]), **change})
    raw = bytearray(archive(*entries))
    if flip is not None:
        raw[flip % len(raw)] ^= 0x10
    path = folder / "it.pt"
    path.write_bytes(raw)
    good, codes = verdict(path)
    for output in OUTPUTS:
        refused = refusals(path, folder, output)
        skipped = codes == {"CK106"} and {finding.key for finding in cs.check(path, full=True).files[0].findings} <= {"version"}
        assert good == (not refused) or (skipped and not refused), (codes, refused)
