"""The files that the layouts describe, read by the official libraries."""

from __future__ import annotations

import io
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors
import safetensors.torch
import torch
from formats_support import assert_same, bits, carry_out, code_of, only, out_tensors, sample, sharing
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import examples

from ckptsurgeon.dtypes import TABLE
from ckptsurgeon.errors import OutputError
from ckptsurgeon.formats import read
from ckptsurgeon.formats.layout import OutTensor
from ckptsurgeon.formats.plain import safetensors as safetensors_writer
from ckptsurgeon.formats.torch import zip_writer as torch_zip_writer
from ckptsurgeon.tensors import Refused, find_ties

pytestmark = pytest.mark.filterwarnings("ignore:ComplexHalf")
CODES = [row.code for row in TABLE]
OFFICIAL_CODES = [row.code for row in TABLE if row.safetensors]
Tensors = dict[str, torch.Tensor]


def write_zip(tensors: Tensors, path: Path, entries: Any = None, metadata: Any = None, provenance: bytes | None = None) -> None:
    order = [*tensors, *(entries or {})]
    layout = torch_zip_writer.lay_out(out_tensors(tensors), entries or {}, metadata or {}, order, provenance)
    carry_out(layout, [bits(tensor) for tensor in tensors.values()], path)


def write_safetensors(tensors: Tensors, path: Path, metadata: dict[str, str]) -> None:
    outs = [OutTensor(key, code_of(tensor), tuple(tensor.shape), index) for index, (key, tensor) in enumerate(tensors.items())]
    carry_out(safetensors_writer.lay_out(outs, metadata), [bits(tensor) for tensor in tensors.values()], path)


def assert_loads(path: Path, expected: Tensors) -> None:
    """torch loads it, mapped and not, to equal tensors; so do we."""
    for mapped in (True, False):
        loaded = torch.load(path, weights_only=True, mmap=mapped)
        assert isinstance(loaded, OrderedDict) and list(loaded) == list(expected)
        for key, tensor in expected.items():
            assert (loaded[key].dtype, loaded[key].shape) == (tensor.dtype, tensor.shape)
            assert loaded[key].is_contiguous() and not loaded[key].requires_grad
            assert bits(loaded[key]) == bits(tensor), key
    assert_same(only(read(str(path))).tensors, torch.load(path, weights_only=True))


def states(codes: list[str]) -> st.SearchStrategy[Tensors]:
    """Random state_dicts over these dtypes, with names that need escapes."""
    awkward = st.sampled_from(
        ['"', "\\", "/", "\n", "\t", "\r", "\b", "\f", "\x00", "\x1f", "\x7f", "\x80", "é", "\u2028", "😀", "\uffff", "a"]
    )
    names = st.text(st.one_of(awkward, st.characters(exclude_categories=["Cs"])), max_size=8).filter(lambda name: name != "__metadata__")
    shape = st.lists(st.integers(0, 5), max_size=4).map(tuple)
    return st.dictionaries(names, st.tuples(st.sampled_from(codes), shape, st.integers(0, 99)), max_size=8).map(
        lambda drawn: {name: sample(code, dims, seed) for name, (code, dims, seed) in drawn.items()}
    )


# torch's zip.


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (7,), (2, 3, 4), (1, 1)])
def test_zip_of_every_dtype(code: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    tensors = {"x": sample(code, shape), "y": sample(code, (3,), seed=1)}
    write_zip(tensors, tmp_path / "it.pt")
    assert_loads(tmp_path / "it.pt", tensors)


@given(tensors=states(CODES))
@settings(max_examples=examples(80), deadline=None)
def test_zip_of_random_state_dicts(tensors: Tensors, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "random.pt"
    if not tensors:
        tensors = {"x": torch.ones(1)}
    write_zip(tensors, path)
    assert_loads(path, tensors)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None


def test_zip_places(tmp_path: Path) -> None:
    tensors = {str(size): torch.full((size,), 3, dtype=torch.uint8) for size in (0, 1, 7, 63, 64, 65, 1000, 4097)}
    write_zip(tensors, tmp_path / "it.pt", provenance=b'{"fresh": []}')
    with zipfile.ZipFile(tmp_path / "it.pt") as archive, open(tmp_path / "it.pt", "rb") as raw:
        assert archive.testzip() is None
        infos = archive.infolist()
        assert len({info.filename.partition("/")[0] for info in infos}) == 1
        for info in infos:
            assert info.compress_type == zipfile.ZIP_STORED and info.date_time[0] == 1980
            raw.seek(info.header_offset + 26)
            name, extra = raw.read(2), raw.read(2)
            data = info.header_offset + 30 + int.from_bytes(name, "little") + int.from_bytes(extra, "little")
            assert data % 64 == 0
    spans = [meta.span for meta in only(read(str(tmp_path / "it.pt"))).tensors.values()]
    assert all(span is not None and span.offset % 64 == 0 for span in spans)


def test_zip_is_laid_out_as_torch_reads_offsets(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(5), "b": torch.randn(3, 3)}
    write_zip(tensors, tmp_path / "it.pt")
    from torch.serialization import _open_zipfile_reader

    with open(tmp_path / "it.pt", "rb") as file, _open_zipfile_reader(file) as reader:
        offsets = [reader.get_record_offset(f"data/{number}") for number in range(2)]
        assert sorted(reader.get_all_records()) == ["byteorder", "data.pkl", "data/0", "data/1", "version"]
    spans = [meta.span for meta in only(read(str(tmp_path / "it.pt"))).tensors.values()]
    assert [span.offset for span in spans if span] == offsets


def test_zip_is_deterministic(tmp_path: Path) -> None:
    tensors = {"b": torch.ones(3), "a": torch.zeros(2, 2)}
    for name in ("one.pt", "another_name.bin"):
        write_zip(tensors, tmp_path / name, {"_extra_state": {"z": 1, "a": 2}}, {"": {"version": 1}}, b'{"fresh": []}')
    assert (tmp_path / "one.pt").read_bytes() == (tmp_path / "another_name.bin").read_bytes()


def test_zip_keeps_metadata(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2))
    state = model.state_dict()
    write_zip(dict(state), tmp_path / "it.pt", metadata=state._metadata)
    loaded = torch.load(tmp_path / "it.pt", weights_only=True)
    assert loaded._metadata == dict(state._metadata) and type(loaded._metadata) is OrderedDict
    assert only(read(str(tmp_path / "it.pt"))).module_metadata == dict(state._metadata)
    torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.BatchNorm2d(2)).load_state_dict(loaded)


def test_zip_keeps_ties(tmp_path: Path) -> None:
    weight = torch.randn(4, 3)
    tensors = {
        "embed": weight,
        "bias": torch.ones(3),
        "head": weight,
        "other": weight.clone(),
        "none": torch.empty(0),
        "nil": torch.empty(0),
    }
    write_zip(tensors, tmp_path / "it.pt")
    assert_loads(tmp_path / "it.pt", tensors)
    for mapped in (True, False):
        loaded = torch.load(tmp_path / "it.pt", weights_only=True, mmap=mapped)
        assert loaded["embed"].data_ptr() == loaded["head"].data_ptr() != loaded["other"].data_ptr()
        assert sharing(loaded) == {frozenset({"embed", "head"}), frozenset({"bias"}), frozenset({"other"})}
    assert find_ties(only(read(str(tmp_path / "it.pt"))).tensors) == (("embed", "head"),)


ENTRIES: dict[str, Any] = {
    "none": None, "true": True, "false": False, "zero": 0, "byte": 255, "short": 65535, "int": 65536, "negative": -1, "low": -(1 << 31),
    "long": 1 << 31, "lower": -(1 << 31) - 1, "longer": 1 << 64, "huge": (1 << 900) - 7,
    "edges": [127, 128, 256, -128, -129, 32768, 1 << 15],
    "float": 0.1, "inf": float("-inf"), "text": "ü😀\n", "empty": "", "bytes": bytes(range(256)), "no_bytes": b"", "list": [1, [2, []]],
    "tuple": (1, ("a",), ()), "dict": {"a": {"b": None}, 3: "three"}, "no_dict": {}, "long_list": list(range(3000)), "deep": [[[[[[1]]]]]],
}  # fmt: skip


def test_zip_carries_plain_values(tmp_path: Path) -> None:
    entries = {f"{key}._extra_state": value for key, value in ENTRIES.items()}
    write_zip({"w": torch.ones(1)}, tmp_path / "it.pt", entries)
    loaded = torch.load(tmp_path / "it.pt", weights_only=True)
    assert list(loaded) == ["w", *entries]
    assert {key: value for key, value in loaded.items() if key != "w"} == entries
    assert all(type(loaded[key]) is type(value) for key, value in entries.items())
    assert only(read(str(tmp_path / "it.pt"))).entries == entries


def test_zip_keeps_the_order_given(tmp_path: Path) -> None:
    order = ["b", "x._extra_state", "a"]
    layout = torch_zip_writer.lay_out(
        [OutTensor("a", "F32", (1,), 0), OutTensor("b", "F32", (1,), 1)], {"x._extra_state": 1}, {}, order, None
    )
    carry_out(layout, [bits(torch.tensor([1.0])), bits(torch.tensor([2.0]))], tmp_path / "it.pt")
    loaded = torch.load(tmp_path / "it.pt", weights_only=True)
    assert list(loaded) == order and (loaded["a"], loaded["b"]) == (1, 2)


@pytest.mark.parametrize(
    "value", [Refused("no"), object(), {1, 2}, 1j, {"a": [object()]}, 1 << 4000], ids=lambda value: type(value).__name__
)
def test_zip_refuses_other_values_by_key(value: Any) -> None:
    with pytest.raises(OutputError) as caught:
        torch_zip_writer.lay_out([], {"x._extra_state": value}, {}, ["x._extra_state"], None)
    assert caught.value.key == "x._extra_state"


@pytest.mark.slow
def test_zip_with_many_records(tmp_path: Path) -> None:
    tensors = {f"layer.{index}": torch.full((1,), float(index)) for index in range(70_000)}  # more than a plain zip can count
    write_zip(tensors, tmp_path / "it.pt")
    loaded = torch.load(tmp_path / "it.pt", weights_only=True)
    assert len(loaded) == 70_000 and loaded["layer.69999"] == 69_999
    assert len(only(read(str(tmp_path / "it.pt"))).tensors) == 70_000


def test_zip_beyond_four_gigabytes(tmp_path: Path) -> None:
    sizes = [(1 << 32) + 5, 3, (1 << 32) - 1, 2]
    layout = torch_zip_writer.lay_out([OutTensor(str(n), "U8", (size,), n) for n, size in enumerate(sizes)], {}, {}, "0123", None)
    with open(tmp_path / "it.pt", "wb") as file:
        for slot in layout.slots:
            file.seek(slot.offset + slot.nbytes - 1)
            file.write(b"\x07")
        for offset, chunk in (*layout.chunks, *layout.tail([1, 2, 3, 4])):
            file.seek(offset)
            file.write(chunk)
    assert (tmp_path / "it.pt").stat().st_size == layout.size
    loaded = torch.load(tmp_path / "it.pt", weights_only=True, mmap=True)
    assert [len(tensor) for tensor in loaded.values()] == sizes
    assert all(int(tensor[-1]) == 7 for tensor in loaded.values())
    spans = [meta.span for meta in only(read(str(tmp_path / "it.pt"))).tensors.values()]
    assert [(span.offset, span.nbytes) for span in spans if span] == [(slot.offset, slot.nbytes) for slot in layout.slots]
    with zipfile.ZipFile(tmp_path / "it.pt") as archive:
        assert [info.file_size for info in archive.infolist() if "/data/" in info.filename] == sizes


# safetensors.


@given(tensors=states(OFFICIAL_CODES))
@settings(max_examples=examples(150), deadline=None)
def test_safetensors_are_the_library_s_bytes(tensors: Tensors, tmp_path_factory: pytest.TempPathFactory) -> None:
    path, official = (tmp_path_factory.getbasetemp() / name for name in ("ours.safetensors", "theirs.safetensors"))
    for metadata in ({}, {"format": "pt"}, {"a": '"\\\n\x01é😀'}):
        write_safetensors(tensors, path, metadata)
        safetensors.torch.save_file(tensors, official, metadata=metadata or None)
        assert path.read_bytes() == official.read_bytes()


@pytest.mark.parametrize("code", OFFICIAL_CODES)
def test_safetensors_of_every_dtype(code: str, tmp_path: Path) -> None:
    tensors = {"x": sample(code, (2, 3)), "zero": sample(code, ()), "none": sample(code, (0, 2))}
    write_safetensors(tensors, tmp_path / "it", {"format": "pt"})
    with safetensors.safe_open(tmp_path / "it", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
        assert set(opened.keys()) == set(tensors)
        assert all(bits(opened.get_tensor(key)) == bits(tensor) for key, tensor in tensors.items())
    assert_same(only(read(str(tmp_path / "it"))).tensors, safetensors.torch.load_file(tmp_path / "it"))


def test_safetensors_of_all_dtypes_are_the_library_s_bytes(tmp_path: Path) -> None:
    tensors = {f"{letter}.{code}": sample(code, (3,), seed=1) for letter in "ba" for code in OFFICIAL_CODES}
    write_safetensors(tensors, tmp_path / "ours", {"format": "pt"})
    safetensors.torch.save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_safetensors_gives_tied_tensors_bytes_of_their_own(tmp_path: Path) -> None:
    weight = torch.randn(2, 2)
    tensors = {"a": weight, "b": weight}
    carry_out(safetensors_writer.lay_out(out_tensors(tensors), {}), [bits(weight)] * 2, tmp_path / "it")
    loaded = safetensors.torch.load_file(tmp_path / "it")
    assert all(torch.equal(loaded[key], weight) for key in "ab")


@pytest.mark.parametrize("code", [row.code for row in TABLE if not row.safetensors])
def test_safetensors_refuses_dtypes_that_it_lacks(code: str) -> None:
    with pytest.raises(OutputError) as caught:
        safetensors_writer.lay_out([OutTensor("x", code, (1,), 0)], {})
    assert caught.value.key == "x" and code in caught.value.reason


@pytest.mark.parametrize("name", ["__metadata__", "\ud800", "a\udfffb"])
def test_safetensors_refuses_names_that_it_cant_hold(name: str) -> None:
    with pytest.raises(OutputError) as caught:
        safetensors_writer.lay_out([OutTensor(name, "F32", (1,), 0)], {})
    assert caught.value.key == name


def test_safetensors_refuses_a_header_that_the_library_would_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors_writer, "MOST_HEADER", 100)
    with pytest.raises(OutputError):
        safetensors_writer.lay_out([OutTensor("x" * 100, "F32", (1,), 0)], {})


def test_what_torch_writes_and_what_we_write_hold_the_same(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3), "b": torch.randn(2, 2).to(torch.bfloat16)}
    torch.save(OrderedDict(tensors), tmp_path / "theirs.pt")
    write_zip(tensors, tmp_path / "ours.pt")
    buffers = []
    for name in ("theirs.pt", "ours.pt"):
        buffer = io.BytesIO()
        torch.save(torch.load(tmp_path / name, weights_only=True), buffer)
        buffers.append(buffer.getvalue())
    assert buffers[0] == buffers[1]
