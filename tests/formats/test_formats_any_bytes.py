"""One sentence, for any bytes: an Archive, or a CheckpointError, nothing else. `HYPOTHESIS_PROFILE=long pytest …` runs it longer."""

from __future__ import annotations

import json
import pickle
import zipfile
from io import BytesIO
from pathlib import Path

import numpy
import pytest
import safetensors.torch
import torch
from formats_support import outcome, save_legacy, save_zip
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from profiles import examples

from ckptsurgeon.errors import CheckpointError
from ckptsurgeon.formats.pickle.opcodes import RARE
from ckptsurgeon.tensors import Archive

EXAMPLES = examples(300)
run_for = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])

MAGICS = [
    b"",
    b"PK\x03\x04",
    b"PK\x05\x06",
    b"\x80\x02",
    b"\x80\x04\x95",
    b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.\x80\x02M\xe9\x03.\x80\x02}\x8c\x0dlittle_endian\x88s.",
    b"\x20\0\0\0\0\0\0\0{",
    b'\x08\0\0\0\0\0\0\0{"a":{}}',
    b'{"kind":"skeleton","version":1,"tensors":[',
    b'{"weight_map":{',
]
OPCODES = [bytes([code]) for code in {*RARE, *b"qhrjKX(tMJ\x94\x85\x86)RQ.\x89"}]
NAMES = [
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch FloatStorage",
    "torch._utils _rebuild_parameter",
    "numpy dtype",
    "numpy.core.multiarray scalar",
    "torch._tensor _rebuild_from_type_v2",
    "torch Size",
    "builtins set",
    "os system",
    "torch int8",
]
FRAGMENTS = ["c{}\n{}\n".format(*name.split()).encode() for name in NAMES] + [
    b"X\x01\x00\x00\x00a", b"X\x07\x00\x00\x00storage", b"X\x01\x00\x00\x000",
    b"K\x01", b"N", b"]", b"}", b")", b"(", b"(K\x01t", b"tQ", b"\x86R",
    b"q\x00", b"h\x00", b"\x85", b"s", b"b", b"u", b"e", b"a", b"R", b"o", b"\x81", b"G\x7f\xf8\0\0\0\0\0\0", b"\x8a\x01\xff", b"2", b"0",
]  # fmt: skip


def _seeds() -> dict[str, bytes]:
    """One small real file of each kind."""
    weight = torch.arange(4.0)
    value = {"w": weight, "tied": weight, "h": torch.ones(2, dtype=torch.float16), "u": torch.ones(2, dtype=torch.uint16)}
    nested = {"model": value, "step": numpy.float64(1), "list": [{"x": weight.t()}], "p": torch.nn.Parameter(weight)}
    seeds = {}
    for name, save, content in (
        ("zip", save_zip, value),
        ("nested", save_zip, nested),
        ("legacy", save_legacy, value),
        ("legacy nested", save_legacy, nested),
        ("protocol 5", lambda content, file: torch.save(content, file, pickle_protocol=5), nested),
    ):
        buffer = BytesIO()
        save(content, buffer)
        seeds[name] = buffer.getvalue()
    deflated = BytesIO()
    with zipfile.ZipFile(BytesIO(seeds["zip"])) as old, zipfile.ZipFile(deflated, "w", zipfile.ZIP_DEFLATED) as new:
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    seeds["deflated"] = deflated.getvalue()
    seeds["safetensors"] = safetensors.torch.save({"a": weight, "b": torch.ones(2, 0)}, metadata={"format": "pt"})
    rows = [{"name": "w", "dtype": "F32", "shape": [2]}]
    seeds["skeleton"] = json.dumps(
        {"version": 1, "kind": "skeleton", "tensors": rows, "ties": [["w"]], "entries": [], "module_metadata": {}}
    ).encode()
    seeds["index"] = json.dumps({"metadata": {}, "weight_map": {"a": "it", "b": "other"}}).encode()
    arrays = BytesIO()
    numpy.savez(arrays, a=numpy.ones(2), b=numpy.asfortranarray(numpy.ones((2, 3))))
    seeds["npz"] = arrays.getvalue()
    seeds["pickle"] = pickle.dumps({"w": numpy.ones(2)})
    return seeds


SEEDS = _seeds()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the file under test is written."""
    return tmp_path_factory.mktemp("any") / "it"


def check(data: bytes, place: Path) -> Archive | CheckpointError:
    place.write_bytes(data)
    found = outcome(place)
    if isinstance(found, CheckpointError):
        assert found.path and all(line.isprintable() for line in str(found).split("\n"))
        return found
    for state_dict in found.state_dicts:
        for name, meta in state_dict.tensors.items():
            assert meta.name == name and len(meta.shape) == len(meta.stride)
            span = meta.span
            if span is not None and span.nbytes and span.packed is None:
                assert span.offset >= 0 and span.offset + span.nbytes <= len(data)
            elif span is not None and span.packed is not None and span.nbytes:
                assert span.offset + span.nbytes <= span.packed.size and span.packed.offset + span.packed.nbytes <= len(data)
    return found


@pytest.mark.parametrize("seed", SEEDS)
def test_the_seeds(seed: str, place: Path) -> None:
    assert isinstance(check(SEEDS[seed], place), Archive) is (seed not in ("index", "pickle"))


@given(magic=st.sampled_from(MAGICS), rest=st.binary(max_size=400))
@run_for
def test_bytes_behind_a_magic(magic: bytes, rest: bytes, place: Path) -> None:
    check(magic + rest, place)


@given(parts=st.lists(st.one_of(st.sampled_from(OPCODES), st.sampled_from(FRAGMENTS), st.binary(min_size=1, max_size=4)), max_size=60))
@run_for
@example(parts=[b"c_codecs\nencode\n", b")", b"R"])
@example(parts=[b"ctorch._utils\n_rebuild_parameter\n", b"N", b"R"])
def test_opcodes_in_any_order(parts: list[bytes], place: Path) -> None:
    program = b"\x80\x02" + b"".join(parts) + b"."
    check(program, place)
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/data.pkl", program)
        archive.writestr("a/data/0", b"1234")
    check(buffer.getvalue(), place)


@given(seed=st.sampled_from(sorted(SEEDS)), data=st.data())
@run_for
def test_real_files_mutated(seed: str, data: st.DataObject, place: Path) -> None:
    raw = bytearray(SEEDS[seed])
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, len(raw)))
        gone = data.draw(st.integers(0, 6))
        raw[at : at + gone] = data.draw(
            st.one_of(st.binary(max_size=6), st.just(bytes(raw[at : at + gone]) * 2), st.sampled_from(FRAGMENTS))
        )
    check(bytes(raw), place)


@given(seed=st.sampled_from(sorted(SEEDS)), data=st.data())
@run_for
def test_real_pickles_mutated_within_honest_containers(seed: str, data: st.DataObject, place: Path) -> None:
    """Past the checksums: the pickle changes and the zip around it is made anew."""
    raw = SEEDS[seed]
    if raw[:2] != b"PK":
        return
    buffer = BytesIO()
    with zipfile.ZipFile(BytesIO(raw)) as old, zipfile.ZipFile(buffer, "w") as new:
        for info in old.infolist():
            content = bytearray(old.read(info))
            if info.filename.endswith("data.pkl"):
                for _ in range(data.draw(st.integers(1, 4))):
                    at = data.draw(st.integers(0, len(content) - 1))
                    content[at : at + data.draw(st.integers(0, 3))] = data.draw(
                        st.one_of(st.binary(max_size=4), st.sampled_from(OPCODES), st.sampled_from(FRAGMENTS))
                    )
            new.writestr(info.filename, bytes(content))
    check(buffer.getvalue(), place)


FIELDS = ["dtype", "shape", "data_offsets", "__metadata__", "name", "tensors", "ties", "weight_map", "a"]
leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-(1 << 70), 1 << 70), st.floats(), st.text(max_size=4), st.sampled_from(["F32", "a"])
)
json_values: st.SearchStrategy[object] = st.deferred(
    lambda: st.one_of(leaves, st.lists(json_values, max_size=3), st.dictionaries(st.sampled_from(FIELDS), json_values, max_size=3))
)


@given(
    value=json_values, fields=st.dictionaries(st.sampled_from(["tensors", "ties", "entries", "module_metadata", "version"]), json_values)
)
@run_for
def test_json_of_any_shape(value: object, fields: dict[str, object], place: Path) -> None:
    raw = json.dumps(value).encode()
    check(len(raw).to_bytes(8, "little") + raw + bytes(4), place)
    entry = json.dumps({"a": value, "b": {"dtype": "F32", "shape": [1], "data_offsets": value}}).encode()
    check(len(entry).to_bytes(8, "little") + entry + bytes(4), place)
    for changed in (fields, {**fields, "tensors": [value, {"name": "a", "dtype": "F32", "shape": value}]}):
        check(json.dumps({"kind": "skeleton", "version": 1, "tensors": [], **changed}).encode(), place)
    check(json.dumps({"weight_map": value}).encode(), place)


@pytest.mark.slow
def test_every_opcode_on_an_empty_stack(place: Path) -> None:
    for code in range(256):
        for before in (
            b"",
            b"N",
            b"(",
            b"]",
            b"}",
            b")",
            b"cos\nsystem\n",
            b"NN",
            b"(NN",
            b"]N",
            b"]]",
            b"}}",
            b"}NN",
            b"X\x01\x00\x00\x00a",
        ):
            for after in (b".", b"\0" * 8 + b".", b"1\n1\n.", b""):
                check(b"\x80\x04" + before + bytes([code]) + after, place)
