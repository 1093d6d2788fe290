"""Bytes that a file system shares between source and output, holes, and plain copies: the same file each time."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from profiles import examples
from safetensors.torch import load_file, save_file

import ckptsurgeon as cs
from ckptsurgeon.errors import FormatError, SettingsError, StaleError, VerificationError
from ckptsurgeon.formats.plain import safetensors
from ckptsurgeon.storage import copying, platform
from ckptsurgeon.storage.local import open_path
from ckptsurgeon.storage.platform import BLOCK
from ckptsurgeon.streaming import apply as applying
from ckptsurgeon.streaming import checksums

SUFFIXES = (".pt", ".safetensors")
RENAMED = {"layers.{i}.{p}": "blocks.{i}.{p}"}


def network() -> dict[str, torch.Tensor]:
    """Large tensors and small ones, in sizes that are no multiples of a block."""
    generator = torch.Generator().manual_seed(3)
    shapes = {"weight": (1024, 515), "bias": (1030,), "scale": (3,)}
    return {f"layers.{number}.{name}": torch.randn(*shape, generator=generator) for number in range(6) for name, shape in shapes.items()}


def save(folder: Path, suffix: str) -> Path:
    path = folder / f"a{suffix}"
    if suffix == ".pt":
        torch.save(network(), path)
    else:
        save_file(network(), path)
    return path


def room(path: Path) -> int:
    """The bytes that a file takes on its disk."""
    return os.stat(path).st_blocks * 512


def used(folder: Path) -> int:
    """The bytes that are used of a file system."""
    os.sync()
    status = os.statvfs(folder)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


@pytest.fixture
def place(xfs: Path, request: pytest.FixtureRequest) -> Path:
    folder = xfs / str(abs(hash(request.node.name)))
    folder.mkdir()
    request.addfinalizer(lambda: shutil.rmtree(folder))
    return folder


@pytest.mark.parametrize("output", SUFFIXES)
@pytest.mark.parametrize("source", SUFFIXES)
def test_a_merge_of_renames_shares_its_bytes_and_is_the_same_file_everywhere(source: str, output: str, tmp_path: Path, place: Path) -> None:
    given = save(place, source)
    shutil.copy(given, tmp_path / given.name)
    before = used(place)
    report = cs.merge(given, None, place / f"out{output}", rename=RENAMED)
    taken = used(place) - before
    plain = cs.merge(tmp_path / given.name, None, tmp_path / f"out{output}", rename=RENAMED)
    assert (place / f"out{output}").read_bytes() == (tmp_path / f"out{output}").read_bytes()
    nbytes = sum(tensor.nbytes for tensor in network().values())
    assert report.shared + report.copied == plain.copied == nbytes and plain.shared == 0
    assert report.to_dict()["shared"] == report.shared and report.to_dict()["copied"] == report.copied
    assert ", shared " not in str(plain)
    if (source, output) == (".pt", ".safetensors"):  # no gaps are allowed there, so few tensors can be where they were
        return
    assert report.copied < 0.02 * nbytes and taken < 0.02 * nbytes + (64 << 10)
    assert f", shared {report.shared / 1e6:.1f} MB, copied " in str(report)


def test_shards_are_shared_and_resumed(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {key: tensor for key, tensor in network().items() if "scale" not in key}  # data begins at multiples of 8
    given, nbytes = place / "a.safetensors", sum(tensor.nbytes for tensor in state.values())
    save_file(state, given)
    report = cs.merge(given, None, f"{place}/out/", max_shard_size="5MB")
    assert len(report.files) > 2 and report.shared > 0.9 * nbytes
    whole = {path.name: path.read_bytes() for path in (place / "out").iterdir()}
    real, calls = copying.copy_range, []

    def fails(*arguments):  # type: ignore[no-untyped-def]
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(copying, "copy_range", fails)
    with pytest.raises(KeyboardInterrupt):
        cs.merge(given, None, f"{place}/again/", max_shard_size="5MB")
    monkeypatch.undo()
    again = cs.merge(given, None, f"{place}/again/", max_shard_size="5MB", resume=True)
    assert "resumed" in {finding.code for finding in again.findings} and 0 < again.shared < report.shared
    assert {path.name: path.read_bytes() for path in (place / "again").iterdir()} == whole


def test_the_output_replaces_its_own_source(place: Path) -> None:
    given = save(place, ".safetensors")
    report = cs.merge(given, None, given, rename=RENAMED, overwrite=True)
    assert report.shared > report.copied
    expected = {key.replace("layers", "blocks"): tensor for key, tensor in network().items()}
    assert all(torch.equal(tensor, expected[key]) for key, tensor in load_file(given).items())


@given(
    source_offset=st.integers(0, 3 * BLOCK),
    distance=st.integers(-2, 2),
    shift=st.sampled_from([0, 0, 0, 1, 8]),
    nbytes=st.integers(0, 1 << 18),
)
@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_range(source_offset: int, distance: int, shift: int, nbytes: int, place: Path) -> None:
    data = torch.randint(0, 256, (1 << 19,), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)).numpy().tobytes()
    (place / "source").write_bytes(data)
    output_offset = max(source_offset + distance * BLOCK + shift, 0)
    output = os.open(place / "output", os.O_RDWR | os.O_CREAT | os.O_TRUNC)
    with open_path(str(place / "source")) as source:
        copied = copying.copy_range(source, source_offset, output, output_offset, nbytes)
    assert os.pread(output, 1 << 20, 0) == b"\0" * (output_offset if nbytes else 0) + data[source_offset : source_offset + nbytes]
    os.close(output)
    assert copied.nbytes + copied.stop - copied.start == nbytes
    if copied.start < copied.stop:
        assert copied.start % BLOCK == copied.stop % BLOCK == 0 and output_offset <= copied.start < copied.stop <= output_offset + nbytes
    congruent = (output_offset - source_offset) % BLOCK == 0
    assert (copied.start < copied.stop) >= (congruent and nbytes >= (64 << 10) + 2 * BLOCK)
    assert congruent or copied.start == copied.stop


def test_a_source_whose_last_block_is_not_whole(place: Path) -> None:
    data = os.urandom((1 << 18) + 5)
    (place / "source").write_bytes(data)
    output = os.open(place / "output", os.O_RDWR | os.O_CREAT)
    with open_path(str(place / "source")) as source:
        copied = copying.copy_range(source, 0, output, 0, len(data))
    assert os.pread(output, 1 << 20, 0) == data and copied == copying.Copied(5, 0, 1 << 18)
    os.close(output)


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.EPERM])
def test_where_nothing_can_be_shared_it_is_copied(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")

    def refuses(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "ioctl", refuses)
    (tmp_path / "source").write_bytes(os.urandom(1 << 18))
    output = os.open(tmp_path / "output", os.O_RDWR | os.O_CREAT)
    with open_path(str(tmp_path / "source")) as source:
        assert copying.copy_range(source, 0, output, 0, 1 << 18) == copying.Copied(1 << 18)
    os.close(output)
    assert (tmp_path / "output").read_bytes() == (tmp_path / "source").read_bytes()


def test_a_full_disk_is_no_reason_to_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fcntl = pytest.importorskip("fcntl")
    if not hasattr(os, "copy_file_range"):
        pytest.skip("nothing is shared here")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(fcntl, "ioctl", full)
    with pytest.raises(OSError, match="No space"):
        platform.share(0, 0, BLOCK, 0, 0)


# Holes.


def sparse(folder: Path) -> Path:
    """A checkpoint of zeros, of which nothing is stored but the header, and a few values amid them."""
    path = folder / "sparse.safetensors"
    save_file({f"layers.{number}.weight": torch.zeros(1 << 20) for number in range(4)}, path)
    header = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    head, size = path.read_bytes()[:header], path.stat().st_size
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(size)
        file.seek(5 << 20)
        file.write(torch.ones(1000).numpy().tobytes())
    if room(path) > size // 4:
        pytest.skip("this file system keeps no holes")
    return path


@pytest.mark.parametrize("output", SUFFIXES)
@pytest.mark.parametrize("where", ["here", "xfs"])
def test_holes_stay_holes(output: str, where: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    folder = tmp_path if where == "here" else request.getfixturevalue("place")
    given, out = sparse(folder), folder / f"out{output}"
    for rename in (RENAMED, {"layers.3.{p}": "much.longer.name.{p}"}):
        report = cs.merge(given, None, out, rename=rename, overwrite=True)
        assert room(out) < 1 << 20 and report.copied < 1 << 20
        state = torch.load(out, weights_only=True) if output == ".pt" else load_file(out)
        assert sum(float(tensor.sum()) for tensor in state.values()) == 1000.0 and sum(map(torch.numel, state.values())) == 4 << 20


def test_a_hole_at_the_end_is_told_from_a_file_that_became_shorter(tmp_path: Path) -> None:
    with open(tmp_path / "source", "wb") as file:
        file.truncate(1 << 20)
    output = os.open(tmp_path / "output", os.O_RDWR | os.O_CREAT)
    with open_path(str(tmp_path / "source")) as source:
        copying.copy_range(source, 3, output, 0, (1 << 20) - 3)
        os.truncate(tmp_path / "source", 1 << 19)
        with pytest.raises(StaleError, match="shorter"):
            copying.copy_range(source, 3, output, 0, (1 << 20) - 3)
    os.close(output)


# What is proven.


def bytes_read(patch: pytest.MonkeyPatch) -> list[int]:
    """The lengths of all that is compared from now on."""
    real, compared = copying.common_crc, []

    def counting(left, left_offset, right, right_offset, nbytes, wanted=True):  # type: ignore[no-untyped-def]
        compared.append(nbytes)
        return real(left, left_offset, right, right_offset, nbytes, wanted)

    patch.setattr(copying, "common_crc", counting)
    return compared


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_each_proof_reads_what_it_says(suffix: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, compared, checked = save(place, suffix), bytes_read(monkeypatch), []
    real = checksums.checking
    monkeypatch.setattr(applying, "checking", lambda reader, spans: checked.append(len(spans)) or real(reader, spans))
    nbytes, read = sum(tensor.nbytes for tensor in network().values()), {}
    for proof in ("full", "copied", "none"):
        compared.clear()
        report = cs.merge(given, None, place / f"{proof}{suffix}", rename=RENAMED, proof=proof)
        read[proof] = sum(compared)
        assert (report.proof, report.proven, report.to_dict()["proof"]) == (proof, proof != "none", proof)
        assert ("proven: what it does not share" in str(report)) == (proof == "copied")
        assert report.shared + report.copied == nbytes and report.shared > 0.98 * nbytes
    assert read == {"full": nbytes, "copied": report.copied, "none": 0} and checked == [0, 0]
    assert len({(place / f"{proof}{suffix}").read_bytes() for proof in read}) == 1


def test_where_nothing_is_shared_all_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, compared = save(tmp_path, ".safetensors"), bytes_read(monkeypatch)
    monkeypatch.setattr(platform, "share", lambda *_: False)
    cs.merge(given, None, tmp_path / "out.safetensors", proof="copied")
    assert sum(compared) == sum(tensor.nbytes for tensor in network().values())


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_damaged_byte_beside_what_is_shared_is_found(suffix: str, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given, real = save(place, suffix), copying.copy_range

    def damages(source, offset, output, position, nbytes, *more):  # type: ignore[no-untyped-def]
        copied = real(source, offset, output, position, nbytes, *more)
        if copied.start < copied.stop and copied.start > position:
            os.pwrite(output, bytes([os.pread(output, 1, position)[0] ^ 1]), position)
        return copied

    monkeypatch.setattr(copying, "copy_range", damages)
    with pytest.raises(VerificationError, match="not what was planned"):
        cs.merge(given, None, place / f"out{suffix}", proof="copied")


def test_a_header_that_says_other_offsets_than_were_shared_is_found(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {"a": torch.randn(1 << 18), "b": torch.randn(1 << 18)}  # each the same number of blocks, so that both are shared
    save_file(state, place / "a.safetensors")
    real = safetensors.lay_out

    def exchanged(tensors, metadata):  # type: ignore[no-untyped-def]
        layout = real(tensors, metadata)
        (offset, header), *rest = layout.chunks
        return replace(
            layout, chunks=((offset, header.replace(b'"a":', b'"?":').replace(b'"b":', b'"a":').replace(b'"?":', b'"b":')), *rest)
        )

    monkeypatch.setattr(safetensors, "lay_out", exchanged)
    with pytest.raises(VerificationError) as caught:
        cs.merge(place / "a.safetensors", None, place / "out.safetensors", proof="copied")
    assert caught.value.problems == ("a: its bytes differ", "b: its bytes differ")


def test_a_wrong_checksum_of_a_shared_record_is_left_to_a_full_proof(place: Path) -> None:
    given = save(place, ".pt")
    span = cs.open(given)["layers.3.weight"].span
    assert span is not None
    data = bytearray(given.read_bytes())
    data[span.offset + span.nbytes // 2] ^= 1
    given.write_bytes(data)
    with pytest.raises(FormatError, match="its own checksum"):
        cs.merge(given, None, place / "out.pt")
    assert cs.merge(given, None, place / "out.pt", proof="copied").shared
    assert not cs.check(place / "out.pt", full=True).ok  # the wrong checksum was carried on


def test_a_model_is_loaded_without_values(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(3, 2).state_dict(), tmp_path / "in.pt")
    verifications = {}
    for proof in ("full", "copied", "none"):
        report = cs.merge(tmp_path / "in.pt", torch.nn.Linear(3, 2), tmp_path / f"{proof}.pt", proof=proof)
        verifications[proof] = None if report.verification is None else (report.verification.device, report.verification.bitwise)
    assert verifications == {"full": ("cpu", True), "copied": ("meta", False), "none": None}


@pytest.mark.parametrize(
    ("words", "refused"),
    [
        ({"proof": "all"}, "'all' is no proof"),
        ({"proof": "copied", "verify": False}, "contradicts --no-verify"),
        ({"proof": "none", "verify": True}, "contradicts --verify"),
        ({"proof": "copied", "format": "dcp"}, "DCP"),
        ({"proof": "none", "max_shard_size": "5MB", "resume": True}, "proves none"),
    ],
)
def test_proofs_that_are_refused(words: dict[str, Any], refused: str, tmp_path: Path) -> None:
    save(tmp_path, ".safetensors")
    with pytest.raises(SettingsError, match=refused):
        cs.merge(tmp_path / "a.safetensors", None, f"{tmp_path}/out/", **words)
