"""NumPy's npz: `numpy.load` is the oracle for what it holds, and nothing in it is ever unpickled or taken for what it is not."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import torch
from formats_support import refusal
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from profiles import examples
from torch import nn

import ckptsurgeon as cs
from ckptsurgeon.dtypes import BY_TORCH
from ckptsurgeon.errors import CheckpointError, FormatError, LimitError, UnsafeError
from ckptsurgeon.formats import read
from ckptsurgeon.streaming.reading import Reader
from ckptsurgeon.tensors import Archive, Refused

DTYPES = ["?", "i1", "u1", "<i2", "<u2", "<i4", "<u4", "<i8", "<u8", "<f2", "<f4", "<f8", "<c8", "<c16"]
SAVES: dict[str, Callable[..., None]] = {"stored": np.savez, "deflated": np.savez_compressed}
Arrays = dict[str, Any]
saves = pytest.mark.parametrize("save", SAVES.values(), ids=SAVES)


def some() -> Arrays:
    """Every dtype, and each layout that NumPy saves in its own way."""
    random = np.random.default_rng(0)
    found: Arrays = {f"of.{name.strip('<?') or 'b1'}": random.integers(0, 2, (3, 4)).astype(name) for name in DTYPES}
    found["dense"] = random.normal(size=(4, 3)).astype("<f4")
    found["fortran"] = np.asfortranarray(random.normal(size=(2, 3, 4)))
    found["sliced"] = random.normal(size=(6, 6))[::2, 1::3]
    found["number"], found["none"], found["flat"] = np.float16(0.5), np.zeros((0, 3), "<i4"), np.zeros((3, 0))
    return {**found, "params/head/kernel": np.arange(6.0), "W": np.ones(2), "w": np.zeros(2), "x" * 500: np.ones(1)}


def saved(path: Path, save: Callable[..., None], arrays: Arrays) -> Path:
    with path.open("wb") as file:
        save(file, **arrays)
    return path


def same(tensor: torch.Tensor, array: Any) -> bool:
    """Bit for bit, of one dtype and shape."""
    own = tensor.numpy()
    return (own.dtype, own.shape, own.tobytes()) == (array.dtype, array.shape, np.ascontiguousarray(array).tobytes())


def hold(path: Path) -> None:
    """What is read is what NumPy reads."""
    archive = read(str(path))
    (found,) = archive.state_dicts
    checkpoint = cs.open(path)
    with np.load(path, allow_pickle=False) as arrays, Reader([checkpoint]) as reader:
        assert list(found.tensors) == arrays.files and archive.format == "npz" and not found.entries
        for key, meta in found.tensors.items():
            array = arrays[key]
            assert (meta.shape, meta.dtype) == (array.shape, BY_TORCH[str(torch.from_numpy(array).dtype).removeprefix("torch.")].code)
            assert bytes(reader.read(meta)) == array.tobytes(), key
            assert array.flags.c_contiguous == meta.contiguous


@saves
def test_what_numpy_saves_is_read(save: Callable[..., None], tmp_path: Path) -> None:
    hold(saved(tmp_path / "it", save, some()))


@settings(max_examples=examples(60), deadline=None)
@given(
    st.dictionaries(
        st.text("ab./_é", min_size=1, max_size=4).filter(lambda name: not set(name.split("/")) & {"", ".", ".."}),
        st.sampled_from(DTYPES).flatmap(lambda dtype: hnp.arrays(dtype, hnp.array_shapes(min_dims=0, min_side=0, max_side=4))),
        min_size=1,
        max_size=3,
    ),
    st.booleans(),
    st.sampled_from(list(SAVES)),
)
def test_any_arrays(tmp_path_factory: pytest.TempPathFactory, arrays: Arrays, fortran: bool, save: str) -> None:
    if fortran:
        arrays = {key: np.asfortranarray(array) for key, array in arrays.items()}
    path = saved(tmp_path_factory.mktemp("it") / "it", SAVES[save], arrays)
    if any(f"{key}.npy" in arrays for key in arrays):
        with pytest.raises(FormatError, match="takes for one"):
            read(str(path))
    else:
        hold(path)


@saves
@pytest.mark.parametrize("output", ["out.pt", "out.safetensors"])
def test_a_merge_gives_the_same_bits(save: Callable[..., None], output: str, tmp_path: Path) -> None:
    arrays = {key: array for key, array in some().items() if output.endswith(".pt") or array.dtype != np.complex128}
    report = cs.merge(saved(tmp_path / "it.npz", save, arrays), None, tmp_path / output)
    assert report.coverage.counts == (len(arrays), len(arrays))
    if output.endswith(".pt"):
        found = torch.load(tmp_path / output, weights_only=True)
        assert found.keys() == arrays.keys() and all(same(found[key], array) for key, array in arrays.items())
    else:
        plain = safetensors.numpy.load_file(tmp_path / output)
        assert plain.keys() == arrays.keys()
        assert all((plain[key].dtype, plain[key].tobytes()) == (array.dtype, array.tobytes()) for key, array in arrays.items())


@saves
def test_a_model_takes_it(save: Callable[..., None], tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    arrays = {"weight": np.asfortranarray(random.normal(size=(3, 2)).astype("f4")), "bias": random.normal(size=3).astype("f4")}
    path, net = saved(tmp_path / "it.npz", save, arrays), nn.Linear(2, 3)
    assert cs.diff(path, net).coverage.counts == (2, 2)
    assert cs.transfer(path, net).coverage.counts == (2, 2)
    assert same(net.weight.detach(), arrays["weight"]) and same(net.bias.detach(), arrays["bias"])
    found = cs.verify(path, nn.Linear(2, 3))  # NumPy's own reader gives the other opinion
    assert found.ok and found.bitwise and not [one for one in found.findings if one.level == "error"]
    assert not cs.verify(path, nn.Linear(2, 4)).ok


@saves
def test_check_and_inspect(save: Callable[..., None], tmp_path: Path) -> None:
    path = saved(tmp_path / "it.npz", save, {"w": np.ones((2, 3)), "bad": np.array([np.nan])})
    assert "npz" in cs.inspect(path).__str__() and cs.check(path, full=True, allow="npz").ok
    found = cs.check(path, finite=True, allow="torch").files[0].findings
    assert [(one.code, one.key) for one in found] == [("CK502", None), ("CK401", "bad")]


@saves
def test_damage_is_seen(save: Callable[..., None], tmp_path: Path) -> None:
    path = saved(tmp_path / "it.npz", save, {"a/w": np.random.default_rng(0).normal(size=100), "a/v": np.ones(3)})
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("a/w.npy")
    raw = bytearray(path.read_bytes())
    raw[info.header_offset + 30 + len(info.filename) + 20 + info.compress_size - 9] ^= 1
    path.write_bytes(raw)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() == "a/w.npy"
    assert [(one.code, one.key) for one in cs.check(path, full=True).files[0].findings] == [("CK106", "a/w")]
    with pytest.raises(CheckpointError, match=r"'a/w\.npy', which is|a/w: its storage a/w\.npy has another checksum"):
        cs.merge(path, None, tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


class Runs:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


OTHERS: dict[str, tuple[Any, str]] = {
    "text": (np.array(["a"]), "text"),
    "bytes": (np.array([b"a"]), "text"),
    "records": (np.zeros(2, [("a", "<f4"), ("b", "<i4", (2,))]), "records"),
    "times": (np.zeros(2, "<M8[s]"), "times"),
    "spans": (np.zeros(2, "<m8[ms]"), "times"),
    "raw": (np.zeros(2, "V2"), "raw bytes"),
    "big": (np.zeros(2, ">f4"), "big-endian"),
    "long": (np.zeros(2, np.longdouble), "torch does not have"),
}


@saves
def test_other_arrays_are_refused_by_name_and_nothing_is_unpickled(save: Callable[..., None], tmp_path: Path) -> None:
    arrays = {key: array for key, (array, _) in OTHERS.items()}
    arrays |= {"w": np.ones(2, "f4"), "objects": np.array([Runs(tmp_path / "marker")], dtype=object)}
    path = saved(tmp_path / "it.npz", save, arrays)
    (found,) = cs.inspect(path).state_dicts
    assert list(found.tensors) == ["w"] and found.entries.keys() == {*OTHERS, "objects"}
    for key, words in {**{key: words for key, (_, words) in OTHERS.items()}, "objects": "Python objects"}.items():
        assert isinstance(found.entries[key], Refused) and words in found.entries[key].reason
    assert {(one.code, one.key) for one in cs.check(path).files[0].findings} == {("CK202", key) for key in found.entries}
    with pytest.raises(UnsafeError, match="objects"):
        cs.merge(path, None, tmp_path / "out.pt")
    cs.merge(path, None, tmp_path / "out.pt", drop=list(found.entries))
    assert same(torch.load(tmp_path / "out.pt")["w"], arrays["w"])
    assert not (tmp_path / "marker").exists()


# ---- headers


def array(header: str, data: bytes = bytes(24), version: tuple[int, int] = (1, 0), length: int | None = None) -> bytes:
    """A `.npy` with this header, whose length it says or lies about."""
    raw = header.encode("utf-8" if version[0] == 3 else "latin-1")
    size = len(raw) if length is None else length
    return b"\x93NUMPY" + bytes(version) + size.to_bytes(2 if version[0] == 1 else 4, "little") + raw + data


def packed(entries: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, raw in entries.items():
            archive.writestr(name, raw)
    return buffer.getvalue()


PLAIN = "{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }"
LEGAL = {
    "as NumPy": array(PLAIN + " " * 40 + "\n"),
    "version 2": array(PLAIN, version=(2, 0)),
    "version 3": array(PLAIN, version=(3, 0)),
    "another order": array("{'shape': (2, 3), 'fortran_order': False, 'descr': '<f4'}"),
    "tight": array("{'descr':'<f4','fortran_order':False,'shape':(2,3)}"),
    "spread": array('{ "descr" : "<f4" ,\n "fortran_order" : False, "shape" : ( 2 , 3 , ) }\n'),
    "Python 2": array("{'descr': '<f4', 'fortran_order': False, 'shape': (2L, 3L), }"),
}
LIES = {
    "nothing": b"",
    "no magic": b"\x93NUMPX" + array(PLAIN)[6:],
    "version 0": array(PLAIN, version=(0, 0)),
    "version 1.1": array(PLAIN, version=(1, 1)),
    "version 4": array(PLAIN, version=(4, 0)),
    "cut": array(PLAIN, b"")[:40],
    "too long": array(PLAIN, length=60_000),
    "far too long": array(PLAIN, version=(2, 0), length=(1 << 32) - 1),
    "endless header": array(PLAIN[:-1] + " " * 20_000 + "}"),
    "short data": array(PLAIN, bytes(20)),
    "more data": array(PLAIN, bytes(28)),
    "no data": array(PLAIN, b""),
    "no dict": array("[1, 2]"),
    "no shape": array("{'descr': '<f4', 'fortran_order': False}"),
    "more keys": array(PLAIN.replace("}", "'x': 'y'}")),
    "twice": array(PLAIN.replace("}", "'shape': (3, 2)}")),
    "a call": array(PLAIN.replace("(2, 3)", "__import__('os').getcwd()")),
    "a number as shape": array(PLAIN.replace("(2, 3)", "6")),
    "no tuple": array(PLAIN.replace("(2, 3)", "(6)")),
    "negative": array(PLAIN.replace("(2, 3)", "(-2, -3)")),
    "a sum": array(PLAIN.replace("(2, 3)", "(1+1, 3)")),
    "underscores": array(PLAIN.replace("(2, 3)", "(2, 0_3)")),
    "huge": array(PLAIN.replace("(2, 3)", "(9223372036854775807, 3)")),
    "huge and empty": array(PLAIN.replace("(2, 3)", "(0, 9223372036854775807, 3)"), b""),
    "endless number": array(PLAIN.replace("(2, 3)", "(" + "9" * 5000 + ",)")),
    "too many dims": array(PLAIN.replace("(2, 3)", "(" + "1, " * 65 + ")"), bytes(4)),
    "text as order": array(PLAIN.replace("False", "'F'")),
    "text in pieces": array(PLAIN.replace("'<f4'", "'<f' '4'")),
    "escaped": array(PLAIN.replace("<f4", "<\\x664")),
    "a comment": array(PLAIN.replace("'shape'", "#\n'shape'")),
    "two dicts": array(PLAIN + PLAIN),
    "a number as dtype": array(PLAIN.replace("'<f4'", "True")),
    "endless spaces": array(PLAIN.replace("3)", "3" + " " * 9000 + "x")),
    "endless brackets": array(PLAIN.replace("(2, 3)", "[" + "] " * 4000 + "x")),
    "aligned": array(PLAIN.replace("<f4", "|f4")),
}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("case", LEGAL)
def test_headers_that_others_write(case: str, method: int, tmp_path: Path) -> None:
    (tmp_path / "it").write_bytes(packed({"w.npy": LEGAL[case]}, method))
    hold(tmp_path / "it")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("case", LIES)
def test_headers_that_lie(case: str, method: int, tmp_path: Path) -> None:
    error = refusal(packed({"w.npy": LIES[case]}, method), tmp_path)
    assert isinstance(error, FormatError) and (error.key == "w" or "w is an array" in error.reason), error


NAMES = {
    "no array": ({"w.npy": b"", "readme.txt": b""}, "'readme.txt', which is none"),
    "a torch archive below": ({"a/w.npy": b"", "a/data.pkl": b""}, "'a/data.pkl', which is none"),
    "out": ({"../w.npy": b""}, "unusable name"),
    "absolute": ({"/w.npy": b""}, "unusable name"),
    "backslash": ({"a\\w.npy": b""}, "unusable name"),
    "one for two": ({"w.npy": b"", "w.npy.npy": b""}, "NumPy takes for one"),
}


@pytest.mark.parametrize("case", NAMES)
def test_names(case: str, tmp_path: Path) -> None:
    entries, words = NAMES[case]
    error = refusal(packed({name: raw or array(PLAIN) for name, raw in entries.items()}), tmp_path)
    assert words in error.reason, error


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_an_array_twice(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for value in (1, 2):
            archive.writestr("w.npy", array(PLAIN, bytes([value] * 24)))
    assert "twice" in refusal(buffer.getvalue(), tmp_path).reason


def test_hidden_bytes(tmp_path: Path) -> None:
    raw = packed({"w.npy": array(PLAIN), "v.npy": array(PLAIN)})
    refusal(raw + b"more", tmp_path)
    refusal(packed({"w.npy": array(PLAIN)}) + raw, tmp_path)
    for end in (10, len(raw) // 2, len(raw) - 1):
        refusal(raw[:end], tmp_path)


def test_the_limits(tmp_path: Path) -> None:
    raw = packed({f"{number}.npy": array(PLAIN) for number in range(4)}, zipfile.ZIP_DEFLATED)
    for bounds in ({"tensors": 3}, {"zip_entries": 3}, {"inflated_data_bytes": 100}):
        with cs.limits(**bounds):
            if "inflated_data_bytes" in bounds:
                big = packed({"w.npy": array(PLAIN.replace("(2, 3)", "(100000,)"), bytes(400_000))}, zipfile.ZIP_DEFLATED)
                assert isinstance(refusal(big, tmp_path), LimitError)
            else:
                assert isinstance(refusal(raw, tmp_path), LimitError)


def test_a_header_costs_no_more_than_itself(tmp_path: Path) -> None:
    path = saved(tmp_path / "it", np.savez_compressed, {f"w{number}": np.zeros((1 << 22,), "f4") for number in range(4)})
    read(str(path))  # what is imported once
    tracemalloc.start()
    try:
        read(str(path))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


@settings(max_examples=examples(150), deadline=None)
@given(st.data())
def test_any_bytes_are_an_archive_or_a_refusal(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    raw = bytearray(packed({"w.npy": LEGAL["as NumPy"], "v.npy": array(PLAIN)}, data.draw(st.sampled_from([0, 8]))))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("it") / "it"
    path.write_bytes(raw)
    try:
        assert isinstance(read(str(path)), Archive)
    except CheckpointError as error:
        assert str(error)


@saves
def test_neither_numpy_nor_torch_is_needed(save: Callable[..., None], tmp_path: Path) -> None:
    saved(tmp_path / "it.npz", save, {"w": np.arange(6, dtype="f4").reshape(2, 3)})
    code = (
        "import sys; sys.modules['numpy'] = sys.modules['torch'] = None; import ckptsurgeon as cs; "
        "cs.merge('it.npz', None, 'out.pt'); assert cs.check('it.npz', full=True).ok; cs.verify('it.npz', 'out.pt')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert torch.load(tmp_path / "out.pt")["w"].tolist() == [[0, 1, 2], [3, 4, 5]]


def test_without_numpy_a_verification_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = saved(tmp_path / "it.npz", np.savez, {"weight": np.ones((3, 2), "f4"), "bias": np.ones(3, "f4")})
    monkeypatch.setitem(sys.modules, "numpy", None)
    found = cs.verify(path, nn.Linear(2, 3))
    assert not found.ok and any("numpy" in one.message for one in found.findings if one.level == "error")
