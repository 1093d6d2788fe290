"""Pickles whose tensors' values hang on what happens after, or around, their making: we read what torch reads, or refuse.

Each is made byte by byte, so that it holds what torch.save never writes. The oracle is torch.load, with weights_only, or
without where that refuses.
"""

from __future__ import annotations

import io
import pickle
import struct
from collections import Counter, OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from formats_support import bits, outcome, stored
from hostile_pickles import legacy, long, text, zipped
from hypothesis import example, given, settings
from hypothesis import strategies as st
from profiles import examples

import ckptsurgeon as cs
from ckptsurgeon.errors import CheckpointError
from ckptsurgeon.tensors import Archive, Refused, TensorMeta

WORDS = (RuntimeError, pickle.UnpicklingError, TypeError, ValueError, AttributeError, AssertionError, KeyError, IndexError, EOFError)
RECORDS = {"0": struct.pack("<10f", *range(10)), "1": struct.pack("<10f", *range(100, 110)), "c": struct.pack("<4f", 1, 2, 3, 4)}
HOOKS = b"ccollections\nOrderedDict\n)R"


def storage(key: str = "0", kind: str = "FloatStorage", numel: int = 10) -> bytes:
    return b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + long(numel) + b"tQ"


def plain(key: str = "0", length: bytes = b"K\x02") -> bytes:
    """A tensor of the first elements of a storage; `length` is an opcode."""
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(key) + b"K\x00" + length + b"\x85K\x01\x85\x89" + HOOKS + b"tR"


def complex_tensor() -> bytes:
    where = storage("c", "ComplexFloatStorage", 2)
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + where + b"K\x00K\x02\x85K\x01\x85\x89" + HOOKS + b"tR"


def parameter(tensor: bytes, learns: bytes = b"\x89") -> bytes:
    return b"ctorch._utils\n_rebuild_parameter\n(" + tensor + learns + HOOKS + b"tR"


def with_state(tensor: bytes, state: bytes, learns: bytes = b"\x89") -> bytes:
    return b"ctorch._utils\n_rebuild_parameter_with_state\n(" + tensor + learns + HOOKS + state + b"tR"


def subclass(function: str, args: bytes, state: bytes, kind: str = "torch._tensor\nTensor") -> bytes:
    return f"ctorch._tensor\n_rebuild_from_type_v2\n(ctorch._utils\n{function}\nc{kind}\n".encode() + args + state + b"tR"


def attributes(**pairs: bytes) -> bytes:
    return b"}(" + b"".join(text(key) + value for key, value in pairs.items()) + b"u"


def dict_of(**pairs: bytes) -> bytes:
    return b"\x80\x02" + attributes(**pairs) + b"."


def readings(data: bytes) -> list[Any]:
    """What torch makes of a file: by its weights_only reader, else by Python's unpickler, which knows more opcodes and names."""
    for weights_only in (True, False):
        with suppress(*WORDS):
            return [torch.load(io.BytesIO(data), weights_only=weights_only)]  # everything here is made above, and harmless
    return []


def under(value: Any, root: str) -> Any:
    for name in filter(None, root.split(".")):
        value = value[name]
    return value


def assert_like_torch(data: bytes, folder: Path, refused: bool | None = None) -> None:
    """Every tensor that we read is torch's, of the same bits; where torch reads nothing at all, something is refused by name."""
    (folder / "it.pt").write_bytes(data)
    found = outcome(folder / "it.pt")
    tensors: dict[tuple[str, str], TensorMeta] = {}
    if isinstance(found, Archive):
        tensors = {(part.root, key): meta for part in found.state_dicts for key, meta in part.tensors.items()}
    if refused is not None:
        assert refused == (not any(key[1] == "w" for key in tensors)), tensors
    if not isinstance(found, Archive):
        return
    found_by_torch = readings(data)
    if not found_by_torch:  # torch takes all or nothing
        assert any(type(entry) is Refused for part in found.state_dicts for entry in part.entries.values())
        return
    (truth,) = found_by_torch
    for (root, key), meta in tensors.items():
        state = under(truth, root)
        assert type(state[key]) in (torch.Tensor, torch.nn.Parameter)
        assert bits(stored(meta)) == bits(state[key]), (root, key)
        assert meta.shape == tuple(state[key].shape)
    for part in found.state_dicts:
        metadata = getattr(under(truth, part.root), "_metadata", {})
        assert {path: dict(local) for path, local in part.module_metadata.items()} == {
            path: dict(local) for path, local in metadata.items()
        }


OTHER = plain("1")
FOUR = b"(" + storage("1") + b"K\x00K\x02\x85K\x01\x85t"
FIVE = b"(" + OTHER + b"N" + HOOKS + b"\x89\x89t"
THREE = b"\x89\x89" + HOOKS + b"\x87"
STATES = {
    "data": attributes(data=OTHER),
    "data behind others": attributes(partition_dim=b"K\x01", data=OTHER),
    "data in slots": b"N" + attributes(data=OTHER) + b"\x86",
    "data beside no slots": attributes(data=OTHER) + b"N\x86",
    "real": attributes(real=OTHER),
    "a class": b"}" + text("__class__") + b"ctorch\nTensor\ns",
    "attributes": attributes(partition_dim=b"K\x01", allreduce=b"\x88"),
    "attributes and slots": attributes(partition_dim=b"K\x01") + attributes(a=b"N") + b"\x86",
    "a gradient": attributes(grad=OTHER),
    "nothing": b"N",
    "an empty dict": b"}",
    "a list": b"](K\x01e",
    "three things": THREE,
}
KEPT = {"attributes", "attributes and slots", "a gradient", "nothing", "an empty dict"}


@pytest.mark.parametrize("wrap", ["parameter", "tensor", "parameter within", "with state within"])
@pytest.mark.parametrize("state", STATES)
def test_a_state_that_comes_with_a_tensor(state: str, wrap: str, tmp_path: Path) -> None:
    given = STATES[state]
    args = b"(" + plain() + b"\x89" + HOOKS
    made = {
        "parameter": lambda: with_state(plain(), given),
        "tensor": lambda: subclass("_rebuild_tensor_v2", b"(" + storage() + b"K\x00K\x02\x85K\x01\x85\x89" + HOOKS + b"t", given),
        "parameter within": lambda: subclass("_rebuild_parameter", args + b"t", given),
        "with state within": lambda: subclass("_rebuild_parameter_with_state", args + given + b"t", b"N"),
    }[wrap]()
    assert_like_torch(zipped(dict_of(w=made, v=plain("1")), RECORDS), tmp_path, refused=state not in KEPT)


@pytest.mark.slow
@pytest.mark.parametrize("learns", [b"\x89", b"\x88"])
def test_every_attribute_of_a_parameter_that_changes_it_is_refused(learns: bytes, tmp_path: Path) -> None:
    """The oracle is torch, attribute by attribute: whichever it lets a file set, and which then changes the values."""
    values = (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage("1", numel=10) + b"K\x00K\x02\x85K\x01\x85\x89" + HOOKS + b"tR",
        b"\x88",
        b"K\x01",
        b"N",
    )
    changing = set()
    for name in dir(torch.nn.Parameter):
        for value in values:
            for tensor in (plain(), complex_tensor()):
                data = zipped(dict_of(w=with_state(tensor, b"}" + text(name) + value + b"s", learns)), RECORDS)
                found = readings(data)
                if found and type(found[0]["w"]) is torch.nn.Parameter and torch.is_complex(found[0]["w"]) == (tensor != plain()):
                    wanted = torch.tensor([0.0, 1.0]) if tensor == plain() else torch.tensor([1 + 2j, 3 + 4j])
                    if torch.equal(torch.Tensor.detach(found[0]["w"]).resolve_neg().resolve_conj(), wanted):
                        continue
                if found:
                    changing.add(name)
                    assert_like_torch(data, tmp_path, refused=True)
    assert "data" in changing and (learns == b"\x88" or {"real", "imag"} <= changing)


@pytest.mark.parametrize("made", ["tensor", "parameter", "parameter by NEWOBJ", "parameter by its class", "buffer"])
@pytest.mark.parametrize(
    "state", [THREE, FOUR, FIVE, b"(" + OTHER + b"t", b")", b"N", attributes(data=OTHER), b"](" + b"\x89\x89" + HOOKS + b"e"]
)
def test_a_build_after_the_making(state: bytes, made: str, tmp_path: Path) -> None:
    tensor = {
        "tensor": plain(),
        "parameter": parameter(plain()),
        "parameter by NEWOBJ": b"ctorch.nn.parameter\nParameter\n" + plain() + b"\x89\x86\x81",
        "parameter by its class": b"ctorch.nn.parameter\nParameter\n" + plain() + b"\x85R",
        "buffer": subclass("_rebuild_parameter", b"(" + plain() + b"\x89" + HOOKS + b"t", b"N"),
    }[made]
    keeps = made.startswith("parameter") and len(state) in (len(THREE), len(THREE) + 2) and state[:2] in (THREE[:2], b"](")
    assert_like_torch(zipped(dict_of(w=tensor + state + b"b", v=plain("1")), RECORDS), tmp_path, refused=not keeps)


def pairs(opcode: bytes = b"]", *more: bytes) -> bytes:
    return b"](" + text("w") + plain() + b"\x86" + b"".join(more) + b"e"


DICTS: dict[str, tuple[bytes, bool]] = {
    "OrderedDict of pairs": (b"ccollections\nOrderedDict\n" + pairs() + b"\x85R", False),
    "OrderedDict of a dict": (b"ccollections\nOrderedDict\n" + attributes(w=plain()) + b"\x85R", False),
    "OrderedDict of pairs by NEWOBJ": (b"ccollections\nOrderedDict\n" + pairs() + b"\x85\x81", True),
    "OrderedDict by NEWOBJ, filled": (b"ccollections\nOrderedDict\n)\x81(" + text("w") + plain() + b"u", False),
    "OrderedDict of a text": (b"ccollections\nOrderedDict\n](" + text("ab") + b"e\x85R(" + text("w") + plain() + b"u", True),
    "Counter of pairs": (b"ccollections\nCounter\n" + pairs() + b"\x85R", True),
    "Counter of a dict": (b"ccollections\nCounter\n" + attributes(w=plain()) + b"\x85R", False),
    "Counter of a dict by NEWOBJ": (b"ccollections\nCounter\n" + attributes(w=plain()) + b"\x85\x81", True),
    "Counter of a text": (b"ccollections\nCounter\n" + text("w") + b"\x85R(" + text("v") + plain() + b"u", True),
    "dict of pairs by NEWOBJ": (b"c__builtin__\ndict\n" + pairs() + b"\x85\x81", True),
}


@pytest.mark.parametrize("place", ["top", "nested"])
@pytest.mark.parametrize("case", DICTS)
def test_a_dict_that_is_made_of_something(case: str, place: str, tmp_path: Path) -> None:
    made, refused = DICTS[case]
    value = b"\x80\x02" + made + b"." if place == "top" else dict_of(model=made, rest=attributes(v=plain("1")))
    assert_like_torch(zipped(value, RECORDS), tmp_path, refused=refused)


def version(number: int) -> bytes:
    return b"}" + text("") + b"}" + text("version") + long(number) + b"ss"


def ordered(*states: bytes) -> bytes:
    return HOOKS + b"(" + text("w") + plain() + b"u" + b"".join(state + b"b" for state in states)


BUILDS = {
    "metadata": ordered(attributes(_metadata=version(2))),
    "metadata twice": ordered(attributes(_metadata=version(1)), attributes(_metadata=version(2))),
    "metadata, then something else": ordered(attributes(_metadata=version(2)), attributes(note=b"N")),
    "metadata that changes later": HOOKS + b"(" + text("w") + plain() + b"u}q\x09bh\x09(" + text("_metadata") + version(3) + b"u0",
    "metadata as pairs": ordered(b"](" + text("_metadata") + version(2) + b"\x86e"),
    "metadata in slots": ordered(b"N" + attributes(_metadata=version(2)) + b"\x86"),
    "another way to list its keys": ordered(attributes(keys=b"ctorch\nSize\n")),
    "another way to list its items": ordered(attributes(items=b"ctorch\nSize\n")),
    "nothing": ordered(b"N"),
}


@pytest.mark.parametrize("case", BUILDS)
def test_attributes_of_a_state_dict(case: str, tmp_path: Path) -> None:
    assert_like_torch(zipped(b"\x80\x02" + BUILDS[case] + b".", RECORDS), tmp_path)


def test_a_hidden_way_to_list_the_keys_is_real(tmp_path: Path) -> None:
    """The oracle: load_state_dict sees an empty state_dict."""
    (tmp_path / "it.pt").write_bytes(zipped(b"\x80\x02" + BUILDS["another way to list its keys"] + b".", RECORDS))
    state = torch.load(tmp_path / "it.pt", weights_only=True)
    assert list(state) == ["w"] and list(state.keys()) == []
    assert not isinstance(outcome(tmp_path / "it.pt"), Archive)


NUMBERS = [
    *("I010", "I08", "I0x5", "I0b1", "I0o7", "I 2", "I2 ", "I+2", "I1_0", "I00", "I01", "I2", "I-0", "I002", "I\u0662", "I2L", "I", "I-"),
    *("L010L", "L2LL", "L2", "L2L", "L 2L", "L0x5L", "L1_0L", "L-0L", "L00L", "L01L", "LL", "L"),
]


@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_in_lines(number: str, tmp_path: Path) -> None:
    """As a tensor's length, where a wrong number is other weights."""
    assert_like_torch(zipped(dict_of(w=plain(length=number.encode() + b"\n")), RECORDS), tmp_path)
    assert isinstance(outcome(tmp_path / "it.pt"), Archive) == (number in ("I2", "L2L", "L2")) or number in ("I00", "I01")


def _put(data: bytes, folder: Path) -> Path:
    (folder / "it.pt").write_bytes(data)
    return folder / "it.pt"


@pytest.mark.parametrize(
    "number", ["1_0", "0x1p3", " 1.5", "1.5 ", "1.5", "1e5", "1E5", "-inf", "nan", "infinity", "+1", "1.", ".5", "1d5", ""]
)
def test_fractions_in_lines(number: str, tmp_path: Path) -> None:
    data = zipped(dict_of(w=plain(), _extra_state=b"F" + number.encode() + b"\n"), RECORDS)
    (tmp_path / "it.pt").write_bytes(data)
    found = outcome(tmp_path / "it.pt")
    if isinstance(found, Archive):
        (truth,) = readings(data)
        assert repr(found.state_dicts[0].entries["_extra_state"]) == repr(truth["_extra_state"])
    assert isinstance(found, Archive) or number not in ("1.5", "1e5", "-inf", "nan")


@pytest.mark.parametrize(
    "place", ["7", "007", "+7", " 7", "7 ", "1_0", "-7", "100000000000000000000", "100000000000000000001", "", "7L", "0x7"]
)
def test_memo_places_in_lines(place: str, tmp_path: Path) -> None:
    put = b"p" + place.encode() + b"\n"
    other = b"p10000000000000000000" + b"9\n" if len(place) > 20 else b"p8\n"
    body = b"\x80\x02}(" + text("v") + plain("1") + put + text("x") + plain("0") + other + text("w") + b"g" + place.encode() + b"\nu."
    assert_like_torch(zipped(body, RECORDS), tmp_path)


def test_memo_places_of_many_digits_are_not_cut(tmp_path: Path) -> None:
    places = (b"1" + b"0" * 20, b"1" + b"0" * 19 + b"1")
    body = b"\x80\x02}(" + text("a") + plain("0") + b"p" + places[0] + b"\n" + text("b") + plain("1") + b"p" + places[1] + b"\n"
    body += text("w") + b"g" + places[0] + b"\nu."
    assert not isinstance(outcome(_put(zipped(body, RECORDS), tmp_path)), Archive)


# --- values that are no tensors ---------------------------------------------------------------------------------------------------------

EXTRA = [
    *({1, 2}, frozenset([1]), torch.device("cuda:1"), torch.strided, torch.float16, 1 + 2j, bytearray(b"ab")),
    *(torch.Size([2, 3]), Counter("aab"), OrderedDict(a=1), b"\xff", (1, [2, {"a": None}]), 2**70, True, "text", -1.5),
]


@pytest.mark.parametrize("value", EXTRA, ids=repr)
@pytest.mark.parametrize("nested", [False, True])
def test_an_extra_state_is_torch_s_or_refused(nested: bool, value: Any, tmp_path: Path) -> None:
    state = {"w": torch.ones(2), "_extra_state": [value] if nested else value, "beside": value, "deeper": {"value": value}}
    torch.save(state, tmp_path / "it.pt")
    found = outcome(tmp_path / "it.pt")
    assert isinstance(found, Archive)
    entry = found.state_dicts[0].entries["_extra_state"]
    assert isinstance(entry, Refused) == (value in EXTRA[:7]), entry
    assert isinstance(entry, Refused) or entry == torch.load(tmp_path / "it.pt", weights_only=False)["_extra_state"]
    assert not isinstance(found.state_dicts[0].entries.get("beside"), Refused) or type(value) is bytearray


def test_a_frozenset_is_left_alone_in_every_protocol(tmp_path: Path) -> None:
    state = {"w": torch.ones(2), "_extra_state": frozenset([1]), "beside": [frozenset([1])]}
    for protocol in (2, 4):
        torch.save(state, tmp_path / "it.pt", pickle_protocol=protocol)
        found = outcome(tmp_path / "it.pt")
        assert isinstance(found, Archive)
        assert list(found.state_dicts[0].tensors) == ["w"] and found.state_dicts[0].entries["_extra_state"] == Refused("a set")


# --- views of storages, in the old format -----------------------------------------------------------------------------------------------


def legacy_of(references: list[tuple[str, tuple[str, int, int] | None]]) -> bytes:
    """A legacy file of a tensor over each reference: a storage of ten elements, or a view of one."""
    tensors = b""
    for number, (key, view) in enumerate(references):
        seen = b"N" if view is None else b"(" + text(view[0]) + long(view[1]) + long(view[2]) + b"t"
        where = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text(key) + text("cpu") + b"K\x0a" + seen + b"tQ"
        length = 10 if view is None else view[2]
        tensors += (
            text(f"t{number}")
            + b"ctorch._utils\n_rebuild_tensor_v2\n("
            + where
            + b"K\x00"
            + long(length)
            + b"\x85K\x01\x85\x89"
            + HOOKS
            + b"tR"
        )
    keys = list(dict.fromkeys(key for key, _ in references))
    data = b"".join(struct.pack("<q10f", 10, *range(100 * int(key), 100 * int(key) + 10)) for key in keys)
    return legacy(b"\x80\x02}(" + tensors + b"u.", b"\x80\x02](" + b"".join(map(text, keys)) + b"e.") + data


KEYS = st.sampled_from(["0", "1", "2"])
VIEWS = st.tuples(st.sampled_from(["0", "1", "7", "8", "9"]), st.integers(0, 4), st.integers(1, 4))


@settings(max_examples=examples(300), deadline=None)
@given(references=st.lists(st.tuples(KEYS, st.none() | VIEWS), min_size=1, max_size=5))
def test_views_of_legacy_storages(
    references: list[tuple[str, tuple[str, int, int] | None]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    assert_like_torch(legacy_of(references), tmp_path_factory.mktemp("views"))


@pytest.mark.parametrize(
    ("references", "refused"),
    [
        ([("0", ("7", 0, 4)), ("0", ("8", 4, 4)), ("0", None)], False),
        ([("0", ("7", 0, 4)), ("0", ("7", 0, 4))], False),
        ([("0", ("7", 0, 4)), ("0", ("7", 4, 4))], True),
        ([("0", ("7", 0, 4)), ("1", ("7", 0, 4))], True),
        ([("0", ("1", 0, 4)), ("1", None)], True),
        ([("1", None), ("0", ("1", 0, 4))], True),
        ([("0", ("0", 2, 4))], True),
    ],
)
def test_a_view_key_that_is_used_again(references: list[tuple[str, tuple[str, int, int] | None]], refused: bool, tmp_path: Path) -> None:
    data = legacy_of(references)
    assert_like_torch(data, tmp_path)
    assert isinstance(outcome(_put(data, tmp_path)), Archive) != refused


# --- everything at once -----------------------------------------------------------------------------------------------------------------

# Without a gradient: of another dtype torch does not take it, and to us it is nothing.
ATTRIBUTES = st.sampled_from([*(state for name, state in STATES.items() if name != "a gradient"), FOUR, FIVE])


def wrapped(inner: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    return st.one_of(
        st.builds(parameter, inner),
        st.builds(with_state, inner, ATTRIBUTES),
        st.builds(lambda tensor, state: tensor + state + b"b", inner, ATTRIBUTES),
        st.builds(
            lambda tensor, state, kind: subclass("_rebuild_parameter", b"(" + tensor + b"\x89" + HOOKS + b"t", state, kind),
            inner,
            ATTRIBUTES,
            st.sampled_from(["torch._tensor\nTensor", "torch\nTensor", "torch.nn.parameter\nParameter"]),
        ),
    )


PARAMETER = "torch.nn.parameter\nParameter"
REAL = attributes(real=plain("1", b"K\x02"))  # writes into the storage that both tensors have
TENSORS = st.recursive(st.sampled_from([plain(), plain("1"), complex_tensor()]), wrapped, max_leaves=4)


@settings(max_examples=examples(300), deadline=None)
@given(tensors=st.lists(TENSORS, min_size=1, max_size=3))
@example(tensors=[complex_tensor(), subclass("_rebuild_parameter", b"(" + complex_tensor() + b"\x89" + HOOKS + b"t", REAL, PARAMETER)])
def test_tensors_in_any_wrapping(tensors: list[bytes], tmp_path_factory: pytest.TempPathFactory) -> None:
    named = {f"t{number}": tensor for number, tensor in enumerate(tensors)}
    assert_like_torch(zipped(dict_of(**named), RECORDS), tmp_path_factory.mktemp("tensors"))


QUANTIZED_DTYPES = [torch.qint8, torch.quint8, torch.qint32]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("by_channel", [False, True])
@pytest.mark.parametrize("dtype", QUANTIZED_DTYPES, ids=str)
@pytest.mark.parametrize("modern", [True, False], ids=["zip", "legacy"])
def test_a_quantized_tensor_blocks_by_its_key_and_the_others_are_read(
    dtype: torch.dtype, by_channel: bool, modern: bool, tmp_path: Path
) -> None:
    if by_channel:
        tensor = torch.quantize_per_channel(torch.randn(4, 3), torch.ones(4), torch.zeros(4, dtype=torch.long), 0, dtype)
    else:
        tensor = torch.quantize_per_tensor(torch.randn(4, 3), 0.1, 0, dtype)
    path = str(tmp_path / "q.pt")
    torch.save({"layer.weight": tensor, "layer.bias": torch.ones(4)}, path, _use_new_zipfile_serialization=modern)
    (state_dict,) = cs.inspect(path).state_dicts
    assert list(state_dict.tensors) == ["layer.bias"]
    assert state_dict.entries == {"layer.weight": Refused("a quantized tensor")}
    with pytest.raises(CheckpointError, match=r"layer\.weight: a quantized tensor"):
        cs.merge(path, None, str(tmp_path / "out.pt"))
    cs.merge(path, None, str(tmp_path / "out.pt"), drop=["layer.weight"])
    assert list(torch.load(tmp_path / "out.pt")) == ["layer.bias"]


def test_a_plain_tensor_is_never_made_of_a_quantized_storage(tmp_path: Path) -> None:
    body = b"}" + text("w") + plain().replace(b"FloatStorage", b"QInt8Storage") + b"s."
    data = zipped(body, {"0": bytes(10)})
    path = tmp_path / "q.pt"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="a plain tensor has the storage of a quantized one"):
        cs.inspect(str(path))
