"""The hostile files of two readings are real: torch, zipfile, tarfile and safetensors disagree about them; and what is honest is read."""

from __future__ import annotations

import io
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from formats_support import bits, only, outcome, stored
from hostile_json import HEADERS, safetensor
from hostile_pickles import text, zipped
from hostile_readings import CODECS, ONE, REPLACED, SPELLINGS, TARS, TWO, as_tar
from hypothesis import given
from hypothesis import strategies as st

from ckptsurgeon.errors import FormatError, UnsafeError
from ckptsurgeon.formats.sniff import _begins_as_tar
from ckptsurgeon.tensors import Archive

ONE_DICT = {"w": torch.ones(2)}


def put(data: bytes, folder: Path) -> Path:
    (folder / "it.pt").write_bytes(data)
    return folder / "it.pt"


HONEST = [name for table in (REPLACED, CODECS, SPELLINGS, TARS) for name in table if "honest" in name or "room" in name]


@pytest.mark.parametrize("name", HONEST)
def test_what_is_honest_is_read_as_torch_reads_it(name: str, tmp_path: Path) -> None:
    data = next(table[name] for table in (REPLACED, CODECS, SPELLINGS, TARS) if name in table)()
    found, truth = outcome(put(data, tmp_path)), torch.load(io.BytesIO(data), weights_only=True)
    assert isinstance(found, Archive)
    for key, meta in only(found).tensors.items():
        assert meta.span is not None
        value = -stored(meta) if meta.span.lazy else stored(meta)
        assert bits(value) == bits(truth[key].resolve_neg())


# --- entries whose names differ in case only ------------------------------------------------------------------------------------------


def test_torch_finds_entries_without_regard_to_case(tmp_path: Path) -> None:
    alone = SPELLINGS["the pickle in capitals only"]()
    assert torch.load(io.BytesIO(alone), weights_only=True)["w"].shape == (6,)
    with zipfile.ZipFile(io.BytesIO(alone)) as other:
        assert not [name for name in other.namelist() if name.endswith("data.pkl")]
    turned = torch.load(io.BytesIO(SPELLINGS["a byte order in capitals only"]()), weights_only=True)["w"]
    assert not torch.equal(turned, torch.arange(6.0))  # torch turned the bytes around
    for name in ("the pickle in capitals only", "a byte order in capitals only"):
        assert isinstance(outcome(put(SPELLINGS[name](), tmp_path)), FormatError)


@pytest.mark.parametrize("which", ["data.pkl", "data/0", "data/1", "byteorder", "version"])
@pytest.mark.parametrize("change", [str.upper, str.title, str.swapcase])
def test_any_entry_in_another_spelling(which: str, change: object, tmp_path: Path) -> None:
    torch.save({"a": torch.ones(4), "b": torch.zeros(3)}, tmp_path / "good.pt")
    name = change(which)  # type: ignore[operator]
    for keep in (True, False):
        with zipfile.ZipFile(tmp_path / "good.pt") as source, zipfile.ZipFile(tmp_path / "it.pt", "w") as made:
            for entry in source.namelist():
                own = entry.partition("/")[2]
                if own == which:
                    made.writestr(f"good/{name}", source.read(entry))
                if own != which or keep:
                    made.writestr(entry, source.read(entry))
        found = outcome(tmp_path / "it.pt")
        assert isinstance(found, FormatError), found


# --- tar ------------------------------------------------------------------------------------------------------------------------------


def test_torch_tries_tar_before_the_old_format(tmp_path: Path) -> None:
    data = TARS["a tar header in a legacy file"]()
    path = put(data, tmp_path)
    assert torch.load(io.BytesIO(data), weights_only=True)["t0"].tolist() == [0.0]  # not from a file: the pickles are read
    with pytest.raises(RuntimeError, match="tar"):
        torch.load(path, weights_only=True)
    assert tarfile.is_tarfile(path) and isinstance(outcome(path), FormatError)


@pytest.mark.parametrize("name", [name for name in TARS if "room" not in name])
def test_tar_takes_each_for_its_own(name: str, tmp_path: Path) -> None:
    path = put(TARS[name](), tmp_path)
    assert tarfile.is_tarfile(path) and isinstance(outcome(path), FormatError)


def _accepted(head: bytes) -> bool:
    """The oracle: Python's tarfile on a file of these bytes, followed by nothing."""
    try:
        with tarfile.open(fileobj=io.BytesIO(head), mode="r:"):
            return True
    except tarfile.TarError:
        return False


def _sum_of(head: bytes, signed: bool) -> int:
    rest = head[:148] + head[156:]
    return 256 + sum(struct.unpack(f"{len(rest)}{'b' if signed else 'B'}", rest))


FIELDS = st.sampled_from(["%06o\0 ", "%07o ", "%o\0", " %o", "0o%o", "+%o", "%o_", "-%o", "%o8", "\x1c%o", "%x"])


@given(filler=st.binary(min_size=512, max_size=512), signed=st.booleans(), away=st.sampled_from([0, 0, 0, 1]), field=FIELDS | st.none())
def test_what_begins_as_tar(filler: bytes, signed: bool, away: int, field: str | None) -> None:
    total = _sum_of(filler, signed) + away
    if field is None:
        raw = bytes([0o377 if total < 0 else 0o200]) + (total % 256**7).to_bytes(7, "big")
    else:
        raw = (field % total).encode()[:8].ljust(8, b"\0")
    head = filler[:148] + raw + filler[156:]
    if _accepted(head):
        assert _begins_as_tar(head)
    if not away and field in ("%06o\0 ", "%07o ", None) and 0 < total < 8**6:
        assert _begins_as_tar(head)
    if away:
        assert not _begins_as_tar(head) or _sum_of(head, not signed) == total


@given(st.binary(min_size=512, max_size=600))
def test_other_bytes_do_not_begin_as_tar(data: bytes) -> None:
    head = data[:512]
    assert _begins_as_tar(head) == _accepted(head) or head.count(0) == 512
    assert _accepted(as_tar(data)[:512]) <= _begins_as_tar(as_tar(data)[:512])


# --- codecs ---------------------------------------------------------------------------------------------------------------------------


def _state(text_value: str, codec: str) -> bytes:
    value = b"c_codecs\nencode\n(" + text(text_value) + text(codec) + b"tR"
    return zipped(b"\x80\x02}(" + text("w") + ONE + text("_extra_state") + value + b"u.", {"0": TWO})


WORDS = st.text(st.characters(min_codepoint=0, max_codepoint=0x17F), max_size=6)
SPELLED = st.sampled_from(
    ["latin1", "utf-8", "utf-16", "ascii", "rot13", "LATIN1", "utf_8", "latin1 ", "cp1252", "nosuchcodec", "punycode"]
)


@given(words=WORDS, codec=SPELLED)
def test_bytes_are_those_that_torch_gives(words: str, codec: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    data = _state(words, codec)
    found = outcome(put(data, tmp_path_factory.mktemp("codec")))
    if isinstance(found, Archive):
        assert codec in ("latin1", "utf-8")
        assert only(found).entries["_extra_state"] == torch.load(io.BytesIO(data), weights_only=True)["_extra_state"]
    else:
        assert codec not in ("latin1", "utf-8") or (codec == "latin1" and max(words) > "\xff")
        assert isinstance(found, UnsafeError if codec not in ("latin1", "utf-8") else FormatError)


def test_a_codec_that_changes_text_is_real() -> None:
    assert torch.load(io.BytesIO(CODECS["rot13"]()), weights_only=True)["w"].tolist() == [1.0, 2.0]
    assert torch.load(io.BytesIO(_state("abc", "rot13")), weights_only=True)["_extra_state"] == "nop"


# --- numbers in JSON ------------------------------------------------------------------------------------------------------------------

NUMBERS = ["0", "-0", "0.0", "-0.0", "00", "+0", "0e0", "-0e0", " 0", "1", "4", "-4", "true", "null", '"0"', "0x0"]


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("where", ["shape", "begin", "end"])
def test_numbers_of_a_header_are_read_as_safetensors_reads_them(number: str, where: str, tmp_path: Path) -> None:
    shape, begin, end = {"shape": (number, "0", "0"), "begin": ("1", number, "4"), "end": ("0", "0", number)}[where]
    header = f'{{"a":{{"dtype":"F32","shape":[{shape}],"data_offsets":[{begin},{end}]}}}}'.encode()
    for size in (0, 4):
        data = safetensor(header, bytes(size))
        try:
            truth = {key: tuple(value.shape) for key, value in safetensors.torch.load(data).items()}
        except safetensors.SafetensorError:
            truth = None
        found = outcome(put(data, tmp_path))
        assert (None if not isinstance(found, Archive) else {key: meta.shape for key, meta in only(found).tensors.items()}) == truth


def test_minus_zero_in_text_is_text(tmp_path: Path) -> None:
    data = safetensor({"__metadata__": {"a": "-0"}, **HEADERS["a gap after"][0]}, bytes(4))
    found = outcome(put(data, tmp_path))
    assert isinstance(found, Archive) and found.metadata["a"] == "-0"


@pytest.mark.parametrize("new_format", [True, False])
@pytest.mark.parametrize("value", [{"": ONE_DICT}, {"": ONE_DICT, "epoch": 1}, {"": {"": ONE_DICT}}, {"": ONE_DICT, "model": ONE_DICT}])
def test_a_nested_dict_without_a_name_is_no_top_dict(value: dict[str, object], new_format: bool, tmp_path: Path) -> None:
    """Its keys would be told as those of the top dict, in which torch has none of them."""
    torch.save(value, tmp_path / "it.pt", _use_new_zipfile_serialization=new_format)
    assert "w" not in torch.load(tmp_path / "it.pt")
    error = outcome(tmp_path / "it.pt")
    assert isinstance(error, FormatError) and "empty name" in error.reason
