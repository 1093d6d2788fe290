"""A bug in what is written must not reach a file: bytes flipped, tensors in wrong places, names lost. The proof finds each, torch-free."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from streaming_support import names

from ckptsurgeon import formats
from ckptsurgeon.errors import VerificationError
from ckptsurgeon.formats.layout import Layout, Slot
from ckptsurgeon.formats.plain import safetensors
from ckptsurgeon.planning import roots
from ckptsurgeon.planning.plan import make_plan
from ckptsurgeon.storage import copying
from ckptsurgeon.streaming import apply as applying
from ckptsurgeon.streaming.apply import Output, apply
from ckptsurgeon.streaming.atomic import Temporary

REAL = copying.copy_range
Copy = Callable[..., copying.Copied]


def state() -> dict[str, torch.Tensor]:
    return {"a": torch.arange(8.0), "b": -torch.arange(8.0), "turned": torch.arange(6.0).view(2, 3).t(), "half": torch.ones(3)}


def run(folder: Path, suffix: str, proof: bool = True, dtype: str | None = None) -> Path:
    torch.save(state(), folder / "in.pt")
    source = roots.choose(formats.read(str(folder / "in.pt")))
    plan = make_plan([source], None, dtype=dtype)
    output = Output(str(folder / f"out{suffix}"), "safetensors" if suffix == ".safetensors" else "torch", proof="full" if proof else "none")
    apply(plan, [source], None, output)
    return folder / f"out{suffix}"


def flips_a_byte(source: Any, offset: int, output: int, place: int, count: int, *rest: Any) -> copying.Copied:
    copied = REAL(source, offset, output, place, count, *rest)
    byte = os.pread(output, 1, place)[0]
    os.pwrite(output, bytes([byte ^ 1]), place)
    return copied


def copies_from_the_wrong_place(source: Any, offset: int, output: int, place: int, count: int, *rest: Any) -> copying.Copied:
    return REAL(source, offset + 4, output, place, count, *rest)


def copies_nothing(*_: Any) -> copying.Copied:
    return copying.Copied(0)


def copies_the_first_half(source: Any, offset: int, output: int, place: int, count: int, *rest: Any) -> copying.Copied:
    return REAL(source, offset, output, place, count // 2, *rest)


def swaps(layout: Layout) -> Layout:
    slots = {slot.index: slot for slot in layout.slots}
    one, other = slots[0], slots[1]
    swapped = {0: Slot(other.offset, one.nbytes, 0), 1: Slot(one.offset, other.nbytes, 1)}
    return Layout(tuple(swapped.get(slot.index, slot) for slot in layout.slots), layout.chunks, layout.size, layout.checksums, layout.tail)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
@pytest.mark.parametrize("bug", [flips_a_byte, copies_from_the_wrong_place, copies_nothing, copies_the_first_half])
def test_a_copy_that_goes_wrong(bug: Copy, suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "copy_range", bug)
    with pytest.raises(VerificationError) as caught:
        run(tmp_path, suffix)
    assert {problem.partition(":")[0] for problem in caught.value.problems} == {"a", "b", "half"}
    assert names(tmp_path) == ["in.pt"]


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_two_tensors_in_each_others_place(suffix: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = applying._files

    def swapped(*arguments: Any) -> Any:
        files, texts = real(*arguments)
        return [replace(file, layout=swaps(file.layout)) for file in files], texts

    monkeypatch.setattr(applying, "_files", swapped)
    with pytest.raises(VerificationError) as caught:
        run(tmp_path, suffix)
    assert caught.value.problems == ("a: its bytes differ", "b: its bytes differ")
    assert names(tmp_path) == ["in.pt"]


@pytest.mark.parametrize("dtype", [None, "F16"])
def test_made_values_that_are_written_wrong(dtype: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = copying.write_at

    def wrong(output: int, data: bytes, offset: int) -> None:
        real(output, data, offset)
        if len(memoryview(data)) in (24, 12):  # the six elements of `turned`
            os.pwrite(output, b"\x55", offset + 5)

    monkeypatch.setattr(copying, "write_at", wrong)
    with pytest.raises(VerificationError) as caught:
        run(tmp_path, ".safetensors", dtype=dtype)
    assert caught.value.problems == ("turned: its bytes differ",)


@pytest.mark.parametrize("bug", ["lost", "added", "renamed", "another shape", "another dtype"])
def test_names_and_shapes_that_are_written_wrong(bug: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = safetensors.lay_out

    def wrong(tensors, metadata):  # type: ignore[no-untyped-def]
        first = tensors[0]
        other = {
            "lost": [],
            "added": [first, replace(first, name="z")],
            "renamed": [replace(first, name="z")],
            "another shape": [replace(first, shape=(2, 4))],
            "another dtype": [replace(first, dtype="I32")],
        }[bug]
        return real([*other, *tensors[1:]] if bug != "lost" else tensors[1:], metadata)

    monkeypatch.setattr(safetensors, "lay_out", wrong)
    if bug in ("lost", "added"):  # the slots' numbers no longer fit: keep them in step
        monkeypatch.setattr(applying, "begin", lambda run, file, temporary, *_: os.pwrite(temporary.fd, filled(file.layout), 0))
        monkeypatch.setattr(applying, "finish", lambda *_: None)
    with pytest.raises(VerificationError) as caught:
        run(tmp_path, ".safetensors")
    assert any(problem.startswith(("a: ", "z: ")) for problem in caught.value.problems)
    assert names(tmp_path) == ["in.pt"]


def filled(layout: Layout) -> bytes:
    data = bytearray(layout.size)
    for offset, chunk in layout.chunks:
        data[offset : offset + len(chunk)] = chunk
    return bytes(data)


def test_without_proof_nothing_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(copying, "copy_range", flips_a_byte)
    found = torch.load(run(tmp_path, ".pt", proof=False), weights_only=True)
    assert not torch.equal(found["b"], state()["b"])


def test_the_proof_reads_the_file_and_not_what_was_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that loses what it was given: the file is damaged between the writing and the proof."""
    real = applying.finish

    def damaging(run: object, file: object, temporary: Temporary, *more: object) -> None:
        real(run, file, temporary, *more)  # type: ignore[arg-type]
        os.pwrite(temporary.fd, b"\x77", os.fstat(temporary.fd).st_size - 1)

    monkeypatch.setattr(applying, "finish", damaging)
    with pytest.raises(VerificationError):
        run(tmp_path, ".safetensors")
    assert names(tmp_path) == ["in.pt"]
