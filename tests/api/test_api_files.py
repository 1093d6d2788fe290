"""`merge` and the disk: nothing is replaced unasked, nothing is left behind, and no source is misread, whatever happens on the way."""

from __future__ import annotations

import errno
import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import api_support as support
import pytest
import torch

import ckptsurgeon as cs
from ckptsurgeon.errors import CheckpointError, OutputError, StaleError, VerificationError
from ckptsurgeon.formats.torch import zip_writer
from ckptsurgeon.storage import copying
from ckptsurgeon.streaming import writing

REAL = copying.copy_range


def source(folder: Path) -> Path:
    torch.save(support.network(seed=1).state_dict(), folder / "in.pt")
    return folder / "in.pt"


@pytest.mark.parametrize("output", ["out.pt", "out.safetensors"])
def test_an_existing_output_is_not_replaced_unasked(output: str, tmp_path: Path) -> None:
    (tmp_path / output).write_bytes(b"old")
    given = source(tmp_path)
    before = support.folder_state(tmp_path)
    with pytest.raises(OutputError, match="exists already"):
        cs.merge(given, None, tmp_path / output)
    assert support.folder_state(tmp_path) == before
    cs.merge(given, None, tmp_path / output, overwrite=True)
    support.same(support.load(tmp_path / output), support.load(given))


def test_an_output_that_appears_during_the_run_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def watched(*arguments: Any) -> copying.Copied:
        (tmp_path / "out.pt").write_bytes(b"theirs")
        return REAL(*arguments)

    monkeypatch.setattr(copying, "copy_range", watched)
    with pytest.raises(OutputError, match="exists already"):
        cs.merge(source(tmp_path), None, tmp_path / "out.pt")
    assert (tmp_path / "out.pt").read_bytes() == b"theirs"
    assert sorted(os.listdir(tmp_path)) == ["in.pt", "out.pt"]


@pytest.mark.parametrize("link", [False, True])
def test_the_output_may_be_its_own_source(link: bool, tmp_path: Path) -> None:
    given = source(tmp_path)
    expected = {key: tensor.clone() for key, tensor in torch.load(given, weights_only=True).items()}
    output = given
    if link:
        (tmp_path / "link.pt").symlink_to("in.pt")
        output = tmp_path / "link.pt"
    with pytest.raises(OutputError):
        cs.merge(given, None, output)
    cs.merge(given, None, output, overwrite=True, drop="head.*", dtype="F16")
    found = support.load(given)
    support.same(
        found, {key: tensor.half() if tensor.is_floating_point() else tensor for key, tensor in expected.items() if "head" not in key}
    )
    assert output.is_symlink() == link


def test_the_output_may_be_the_target_checkpoint(tmp_path: Path) -> None:
    target = support.network(seed=2).state_dict()
    torch.save(target, tmp_path / "target.pt")
    given = {key: tensor for key, tensor in support.network(seed=1).state_dict().items() if "head" not in key}
    torch.save(given, tmp_path / "in.pt")
    cs.merge(tmp_path / "in.pt", tmp_path / "target.pt", tmp_path / "target.pt", overwrite=True)
    support.same(support.load(tmp_path / "target.pt"), {**target, **given})


@pytest.mark.parametrize("output", ["out.txt", "out", "nowhere/out.pt"])
def test_an_output_that_can_not_be_is_refused_before_anything_is_written(output: str, tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(2)}, tmp_path / "in.pt")
    with pytest.raises(OutputError):
        cs.merge(tmp_path / "in.pt", None, tmp_path / output)
    with pytest.raises(OutputError):
        cs.merge(tmp_path / "not even there.pt", None, tmp_path / "out.pt", format="gguf")
    assert os.listdir(tmp_path) == ["in.pt"]


def test_the_format_can_be_named(tmp_path: Path) -> None:
    cs.merge(source(tmp_path), None, tmp_path / "out.weights", format="safetensors")
    assert cs.inspect(tmp_path / "out.weights").format == "safetensors"


Change = Callable[[Path], None]


def rewritten(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(-500, 2)
        file.write(b"\x01" * 8)
    os.utime(path, ns=(7, 7))


def truncated(path: Path) -> None:
    os.truncate(path, 2000)


def grown(path: Path) -> None:
    with path.open("ab") as file:
        file.write(b"more")


@pytest.mark.parametrize("change", [rewritten, truncated, grown])
@pytest.mark.parametrize("when", ["between header and copy", "during the copy"])
def test_a_source_that_changes_is_stale(when: str, change: Change, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = source(tmp_path)
    if when == "during the copy":
        done: list[int] = []

        def watched(*arguments: Any) -> copying.Copied:
            if not done:
                change(given)
                done.append(1)
            return REAL(*arguments)

        monkeypatch.setattr(copying, "copy_range", watched)
        opened: Any = given
    else:
        opened = cs.open(given)
        change(given)
    with pytest.raises(StaleError):
        cs.merge(opened, None, tmp_path / "out.pt")
    assert sorted(os.listdir(tmp_path)) == ["in.pt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError])
def test_an_interruption_leaves_nothing(error: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out.pt").write_bytes(b"old")
    given = source(tmp_path)
    before = support.folder_state(tmp_path)
    calls: list[int] = []

    def watched(*arguments: Any) -> copying.Copied:
        calls.append(1)
        if len(calls) == 3:
            raise error
        return REAL(*arguments)

    monkeypatch.setattr(copying, "copy_range", watched)
    with pytest.raises(error):
        cs.merge(given, None, tmp_path / "out.pt", overwrite=True)
    assert support.folder_state(tmp_path) == before


def test_a_full_disk_leaves_the_old_file_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "out.pt").write_bytes(b"old")
    given = source(tmp_path)
    before = support.folder_state(tmp_path)

    def full(*_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(copying, "copy_range", full)
    with pytest.raises(OutputError, match="disk is full") as caught:
        cs.merge(given, None, tmp_path / "out.pt", overwrite=True)
    assert caught.value.path == str(tmp_path / "out.pt")
    assert support.folder_state(tmp_path) == before


KILLED = """
import os, signal, sys
import ckptsurgeon as cs
from ckptsurgeon.storage import copying

def killed(*_):
    os.kill(os.getpid(), signal.SIGKILL)

copying.copy_range = killed
cs.merge(sys.argv[1], None, sys.argv[2], overwrite=True)
"""


def test_a_killed_run_is_swept_by_the_next(tmp_path: Path) -> None:
    given = source(tmp_path)
    (tmp_path / "out.pt").write_bytes(b"old")
    done = support.python(KILLED, given, tmp_path / "out.pt", folder=tmp_path)
    assert done.returncode == -signal.SIGKILL
    assert (tmp_path / "out.pt").read_bytes() == b"old"
    assert len(os.listdir(tmp_path)) == 3
    cs.merge(given, None, tmp_path / "out.pt", overwrite=True)
    assert sorted(os.listdir(tmp_path)) == ["in.pt", "out.pt"]


@pytest.mark.parametrize("overwrite", [False, True])
def test_of_several_merges_at_once_one_wins_whole(overwrite: bool, tmp_path: Path) -> None:
    states = []
    for number in range(4):
        states.append({"w": torch.full((50_000,), float(number)), "v": torch.full((3,), float(number))})
        torch.save(states[-1], tmp_path / f"{number}.pt")
    outcomes: list[object] = []

    def run(number: int) -> None:
        try:
            cs.merge(tmp_path / f"{number}.pt", None, tmp_path / "out.safetensors", overwrite=overwrite)
            outcomes.append("done")
        except OutputError as error:
            outcomes.append(error.reason)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = support.load(tmp_path / "out.safetensors")
    support.same(found, states[int(found["v"][0])])
    assert sorted(map(str, outcomes)) == (["done"] * 4 if overwrite else ["done"] + ["exists already"] * 3)
    assert len(os.listdir(tmp_path)) == 5


def flips(source: Any, offset: int, output: int, place: int, count: int, *rest: Any) -> copying.Copied:
    copied = REAL(source, offset, output, place, count, *rest)
    if count:
        os.pwrite(output, bytes([os.pread(output, 1, place)[0] ^ 1]), place)
    return copied


def test_the_proof_catches_a_flipped_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = source(tmp_path)
    monkeypatch.setattr(copying, "copy_range", flips)
    with pytest.raises(VerificationError, match="not what was planned"):
        cs.merge(given, None, tmp_path / "out.pt")
    assert sorted(os.listdir(tmp_path)) == ["in.pt"]
    report = cs.merge(given, None, tmp_path / "out.pt", verify=False)
    assert report.verification is None
    assert not torch.equal(support.load(tmp_path / "out.pt")["conv.weight"], support.load(given)["conv.weight"])


def test_the_official_readers_do_not_trust_our_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the proof blinded, and a pickle that names a storage wrongly, loading into the model still finds it."""
    given, spec = source(tmp_path), support.nets(tmp_path) + ":Net"
    monkeypatch.setattr(writing, "prove", lambda *_: [])
    real = zip_writer.lay_out

    def wrong(tensors: Any, entries: Any, metadata: Any, order: Any, *rest: Any) -> Any:
        return real(tensors, entries, metadata, [key for key in order if key != "head.bias"], *rest)

    monkeypatch.setattr(zip_writer, "lay_out", wrong)
    with pytest.raises(VerificationError, match="does not load") as caught:
        cs.merge(given, spec, tmp_path / "out.pt")
    assert any("head.bias" in problem for problem in caught.value.problems)
    assert not (tmp_path / "out.pt").exists()
    assert cs.merge(given, spec, tmp_path / "out.pt", verify=False).verification is None


def test_a_verification_that_fails_leaves_nothing(tmp_path: Path) -> None:
    torch.save({**support.network().state_dict(), "head.bias": torch.tensor([1.0, float("nan"), 2.0])}, tmp_path / "in.pt")
    spec = support.nets(tmp_path) + ":Net"
    before = support.folder_state(tmp_path)
    with pytest.raises(VerificationError, match="nothing was kept") as caught:
        cs.merge(tmp_path / "in.pt", spec, tmp_path / "out.pt", finite=True)
    assert caught.value.path == str(tmp_path / "out.pt") and caught.value.exit_code == 1
    assert support.folder_state(tmp_path) == before
    report = cs.merge(tmp_path / "in.pt", spec, tmp_path / "out.pt")
    assert [finding.level for finding in report.findings if finding.code == "non-finite"] == ["warning"]
    assert report.verification is not None and report.verification.ok and report.verification.tensors == 11


def test_a_device_that_is_not_here(tmp_path: Path) -> None:
    from ckptsurgeon.errors import DeviceError

    given, spec = source(tmp_path), support.nets(tmp_path) + ":Net"
    if torch.cuda.is_available():
        pytest.skip("this machine has one")
    with pytest.raises(DeviceError):
        cs.merge(given, spec, tmp_path / "out.pt", device="cuda:0")
    assert not (tmp_path / "out.pt").exists()


def test_a_model_that_can_not_be_copied_is_an_error_of_ours(tmp_path: Path) -> None:
    class Stubborn(torch.nn.Linear):
        def __deepcopy__(self, _memo: object) -> object:
            raise RuntimeError("there is only one of me")

    torch.save({"weight": torch.ones(1, 1)}, tmp_path / "in.pt")
    with pytest.raises(CheckpointError, match="only one of me"):
        cs.merge(tmp_path / "in.pt", Stubborn(1, 1), tmp_path / "out.pt")
