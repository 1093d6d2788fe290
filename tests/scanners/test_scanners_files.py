"""The files of the two scanners' suites that are no pickle alone: archives that lie, archives in archives, arrays, polyglots, pictures.

A scanner looks into each as far as it can. `check` says what a file is, and passes only what is a checkpoint with one reading.
"""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
import warnings
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy
import pytest
import torch
from scanners_pickles import alone, call, honest, in_zip, stacked, text, zipped

import ckptsurgeon as cs


@dataclass(frozen=True)
class Bad:
    """A file, made for a marker's path, the codes that it may be found under, and words that tell what it is."""

    make: Callable[[str], bytes]
    words: str
    codes: tuple[str, ...] = ("CK102",)


def payload(path: str) -> bytes:
    """A pickle that leaves the marker."""
    return alone(call(stacked("builtins", "eval"), text(f"open({path!r}, 'w').close()")))


def seen(path: str) -> bytes:
    """The same in the place where torch looks: `archive/data.pkl`, alone."""
    return zipped({"archive/data.pkl": payload(path)})


def flagged(raw: bytes, bits: int) -> bytes:
    """A zip whose entries all have these flag bits, in both headers."""
    out = bytearray(raw)
    for magic, at in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = raw.find(magic)
        while place >= 0:
            out[place + at] |= bits
            place = raw.find(magic, place + 1)
    return bytes(out)


class _Payload:
    """An element of an object array; pickled, it names what it would call."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return eval, (f"open({self.path!r}, 'w').close()",)


def array(value: object, **more: object) -> bytes:
    """A .npy file, or .npz with several arrays."""
    buffer = io.BytesIO()
    numpy.savez(buffer, **more) if more else numpy.save(buffer, value, allow_pickle=True)  # type: ignore[arg-type]
    return buffer.getvalue()


def objects(*values: object) -> numpy.ndarray:
    """An array of objects, which NumPy keeps as a pickle."""
    made = numpy.empty(len(values), dtype=object)
    made[:] = values
    return made


def tar(name: str, raw: bytes) -> bytes:
    """A tar of one file."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        info = tarfile.TarInfo(name)
        info.size = len(raw)
        archive.addfile(info, io.BytesIO(raw))
    return buffer.getvalue()


def program() -> bytes:
    """A TorchScript archive."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), buffer)
    return buffer.getvalue()


def both() -> bytes:
    """One zip that is a state_dict and a TorchScript program, by which loader opens it."""
    with zipfile.ZipFile(io.BytesIO(program())) as one, zipfile.ZipFile(io.BytesIO(honest())) as other:
        entries = {info.filename.partition("/")[2]: one.read(info) for info in one.infolist()}
        entries |= {info.filename.partition("/")[2]: other.read(info) for info in other.infolist()}
    return zipped({f"archive/{name}": raw for name, raw in entries.items()})


def whole_model(legacy: bool) -> bytes:
    """A module pickled whole, so with its class and no state_dict."""
    buffer = io.BytesIO()
    torch.save(torch.nn.Linear(2, 2), buffer, _use_new_zipfile_serialization=not legacy)
    return buffer.getvalue()


SEVENZ = b"7z\xbc\xaf\x27\x1c\x00\x04" + struct.pack("<LQQL", 0, 0, 0, 0)
EITHER = ("CK102", "CK201")

BAD: dict[str, Bad] = {
    "a pickle in a zip, at its top": Bad(lambda p: zipped({"data.pkl": payload(p)}), "none that torch.save wrote"),
    "a pickle in a zip, under a name that is no pickle's": Bad(lambda p: zipped({"data.txt": payload(p)}), "none that torch.save wrote"),
    "a pickle in a zip, in a folder": Bad(lambda p: zipped({"model/config.pkl": payload(p)}), "none that torch.save wrote"),
    "a pickle where torch looks, and no tensor": Bad(seen, "builtins.eval", EITHER),
    "a name that the zip's two headers spell differently": Bad(
        lambda p: seen(p).replace(b"data.pkl", b"datap.kl", 1), "differently in its two headers"
    ),
    "a zip whose checksum is wrong": Bad(lambda p: seen(p).replace(b"'w'", b"'a'", 1), "checksum"),
    "a flag that says encrypted, over plain bytes": Bad(lambda p: flagged(seen(p), 0x1), "encrypted"),
    "a flag that says patch data": Bad(lambda p: flagged(seen(p), 0x20), "flags 0x20"),
    "a flag that says strong encryption": Bad(lambda p: flagged(seen(p), 0x40), "flags 0x40"),
    "the flag of patch data over an honest state_dict": Bad(lambda p: flagged(honest(), 0x20), "which torch does not write"),
    "the encrypted flag over an honest state_dict": Bad(lambda p: flagged(honest(), 0x1), "encrypted"),
    "a deflated pickle": Bad(lambda p: zipped({"archive/data.pkl": payload(p)}, zipfile.ZIP_DEFLATED), "builtins.eval", EITHER),
    "a zip with bytes before it": Bad(lambda p: b"twenty random letters" + zipped({"a.tmp": b"x" * 1024}), "not a checkpoint"),
    "a state_dict with bytes before it": Bad(
        lambda p: b"MZ" + in_zip(call(stacked("os", "system"), text(f"touch {p}"))), "not a checkpoint"
    ),
    "a 7z archive": Bad(lambda p: SEVENZ, "7z archive"),
    "a picture, named as a checkpoint": Bad(lambda p: b"\x89PNG\r\n\x1a\n", "too short"),
    "a picture of some size": Bad(lambda p: b"\x89PNG\r\n\x1a\n" + bytes(100), "not a checkpoint"),
    "text that begins as a pickle would": Bad(lambda p: b"cmod\n\xf8\n", "too short"),
    "a NumPy array of numbers": Bad(lambda p: array(numpy.array([[1, 2], [3, 4]])), "NumPy array"),
    "a NumPy array of objects": Bad(lambda p: array(objects((1, 2), (3, 4))), "NumPy array"),
    "a NumPy array of objects, one of which calls": Bad(lambda p: array(objects(_Payload(p))), "NumPy array"),
    "NumPy arrays of objects in a zip": Bad(lambda p: array(None, a=objects(0, 1), b=objects(_Payload(p))), "Python objects"),
    "a NumPy array within a zip": Bad(lambda p: zipped({"pickle.npy": array(objects(_Payload(p)))}), "Python objects"),
    "a NumPy array within a tar": Bad(lambda p: tar("pickle.npy", array(objects(_Payload(p)))), "tar archive"),
    "torch's tar, before 0.2": Bad(lambda p: tar("pickle", payload(p)), "tar archive"),
    "a TorchScript program": Bad(lambda p: program(), "TorchScript"),
    "a state_dict and a program in one zip": Bad(lambda p: both(), "TorchScript"),
    "a module pickled whole": Bad(lambda p: whole_model(False), "torch.nn.modules.linear.Linear", EITHER),
    "a module pickled whole, as before 1.6": Bad(lambda p: whole_model(True), "torch.nn.modules.linear.Linear", EITHER),
    "a list": Bad(lambda p: pickle.dumps(["a", "b", "c"], 3), "plain pickle"),
    "a counter": Bad(lambda p: pickle.dumps(Counter([1, 2, 3])), "plain pickle"),
    "an empty file": Bad(lambda p: b"", "empty"),
    "a zip without an entry": Bad(lambda p: zipped({}), "empty zip"),
}


@pytest.mark.parametrize("story", BAD)
def test_a_bad_file(story: str, tmp_path: Path) -> None:
    bad, marker = BAD[story], tmp_path / "ran"
    for suffix in (".pt", ".bin", ".zip", ""):  # a suffix says nothing
        patient = tmp_path / f"patient{suffix}"
        patient.write_bytes(bad.make(str(marker)))
        report = cs.check(patient)
        found = report.files[0].findings
        assert not report.ok and {one.code for one in found} <= set(bad.codes), found
        assert any(bad.words in one.message for one in found), found
    assert not marker.exists()


def test_what_is_harmless_names_nothing(tmp_path: Path) -> None:
    """Told as no checkpoint, and not as dangerous."""
    for story in ("a list", "a counter", "a NumPy array of numbers"):
        (tmp_path / "patient").write_bytes(BAD[story].make(""))
        (found,) = cs.check(tmp_path / "patient").files[0].findings
        assert found.code == "CK102" and "asks for" not in found.message


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_honest_checkpoints_pass(legacy: bool, tmp_path: Path) -> None:
    """What the suites call safe: tensors in an OrderedDict, plain containers beside them, NumPy numbers, sets, counters."""
    state = OrderedDict(weight=torch.ones(2, 3), bias=torch.zeros(3))
    values = [
        state,
        {"state_dict": state, "epoch": 3, "names": ["a", "b"], "seen": Counter([1, 2]), "loss": numpy.float64(0.5), "done": {1, 2}},
    ]
    for value in values:
        torch.save(value, tmp_path / "patient", _use_new_zipfile_serialization=not legacy)
        report = cs.check(tmp_path / "patient")
        assert report.ok and not report.files[0].findings, str(report)


def test_numpy_arrays_of_numbers_in_a_zip_pass(tmp_path: Path) -> None:
    (tmp_path / "patient").write_bytes(array(None, a=numpy.arange(3), b=numpy.arange(3)))
    assert not cs.check(tmp_path / "patient", full=True).files[0].findings


def test_a_password_is_asked_for_by_no_reader(tmp_path: Path) -> None:
    """A zip that is really encrypted, whatever is in it: the bits of one entry say so."""
    raw = zipped({"test.txt": b"harmless"})
    (tmp_path / "patient").write_bytes(flagged(raw, 0x1))
    (found,) = cs.check(tmp_path / "patient").files[0].findings
    assert found.code == "CK102" and "encrypted" in found.message
