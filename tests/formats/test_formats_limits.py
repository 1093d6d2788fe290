"""Every limit of the table: refused beyond it, with a hint that names the flag; accepted with the very flag that the hint names."""

from __future__ import annotations

import io
import json
import re
import struct
import threading
import zipfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from formats_support import only, save_legacy, save_zip

import ckptsurgeon as cs
from ckptsurgeon.errors import CheckpointError, LimitError
from ckptsurgeon.formats import read, read_tree
from ckptsurgeon.formats.labels import read_labels
from ckptsurgeon.formats.pickle.machine import run
from ckptsurgeon.formats.plain import skeleton
from ckptsurgeon.limit_table import BY_NAME, TABLE, allowed, current, limits, shown
from ckptsurgeon.sizes import parsed
from ckptsurgeon.tensors import Checkpoint, Refused


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + struct.pack("<I", len(raw)) + raw


STORAGE = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + b"K\x02tQ"
REF = b"ctorch._utils\n_rebuild_tensor_v2\n(" + STORAGE + b"K\x00K\x02\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR"  # a tensor


def beside(value: bytes, method: int = zipfile.ZIP_STORED) -> bytes:
    """A torch zip of one tensor `w`, and `value` beside it."""
    buffer = BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("a/data.pkl", b"\x80\x02}" + text("w") + REF + b"s" + text("more") + value + b"s.", method)
        archive.writestr("a/data/0", bytes(8))
    return buffer.getvalue()


def saved(value: Any, save: Callable[[Any, Any], None] = save_zip) -> bytes:
    buffer = BytesIO()
    save(value, buffer)
    return buffer.getvalue()


def nested(depth: int) -> dict[str, Any]:
    value: dict[str, Any] = {"w": torch.ones(1)}
    for _ in range(depth):
        value = {"d": value}
    return value


WEIGHTS = {"a": torch.ones(2), "b": torch.ones(3)}
TENSORS = safetensors.torch.save(WEIGHTS)
SKELETON = json.dumps(
    {"version": 1, "kind": "skeleton", "tensors": [{"name": name, "dtype": "F32", "shape": [2]} for name in "ab"]}
).encode()
SET = b"cbuiltins\nset\nq\x000"


# The limit, what it is lowered to (None: its default), and a file that goes beyond.
def repacked(raw: bytes) -> bytes:
    """A torch zip with its entries deflated."""
    source, out = zipfile.ZipFile(io.BytesIO(raw)), io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as made:
        for name in source.namelist():
            made.writestr(name, source.read(name))
    return out.getvalue()


BEYOND: dict[str, tuple[str, int | None, Callable[[], bytes]]] = {
    "pickle, zip": ("pickle-bytes", 30, lambda: saved(WEIGHTS)),
    "pickle, legacy": ("pickle-bytes", 30, lambda: saved(WEIGHTS, save_legacy)),
    "opcodes": ("pickle-steps", 20, lambda: saved(WEIGHTS)),
    "memo, BINPUT and LONG_BINPUT": ("pickle-memo", 3, lambda: beside(b"N" + b"".join(b"r%c\0\0\0" % place for place in range(9)))),
    "memo, MEMOIZE": ("pickle-memo", 3, lambda: beside(b"N" + b"\x94" * 9)),
    "memo, PUT": ("pickle-memo", 3, lambda: beside(b"N" + b"".join(b"p%d\n" % place for place in range(9)))),
    "a text copied": ("pickle-copies", None, lambda: beside(SET + text("m" * 500_000) + b"\x85q\x010N" + b"h\x00h\x01R0" * 9)),
    "arguments walked": ("pickle-copies", None, lambda: beside(SET + b"(" + b"N" * 400_000 + b"tq\x010N" + b"h\x00h\x01R0" * 9)),
    "names put together": (
        "pickle-copies",
        None,
        lambda: beside(
            b"".join(text("m" * 450 + str(place)) + b"r" + struct.pack("<I", place) + b"0" for place in range(80))
            + b"N"
            + b"".join(b"h%ch%c\x930" % (one, other) for one in range(80) for other in range(80))
        ),
    ),
    "an integer": ("integer-bytes", None, lambda: beside(b"\x8b" + struct.pack("<I", 5000) + bytes(5000))),
    "an integer in digits": ("integer-bytes", 1000, lambda: beside(b"L" + b"1" * 1500 + b"L\n")),
    "a global": ("global-characters", None, lambda: beside(b"c" + b"m" * 1000 + b"\nname\n")),
    "nested": ("nesting", None, lambda: saved(nested(70))),
    "keys of one tensor": (
        "dense-keys",
        None,
        lambda: beside(
            b"}" + text("w") + REF + b"q\x01s(" + b"".join(b"J" + struct.pack("<i", key) + b"h\x01" for key in range(21_000)) + b"u"
        ),
    ),
    "containers": ("containers", 50, lambda: beside(b"](" + b"}" * 80 + b"e")),
    "globals": ("globals", None, lambda: beside(b"".join(b"ca\n%x\n0" % number for number in range(10_001)) + b"N")),
    "tensors, zip": ("tensors", 1, lambda: saved(WEIGHTS)),
    "tensors, legacy": ("tensors", 1, lambda: saved(WEIGHTS, save_legacy)),
    "tensors, in two roots": ("tensors", 3, lambda: saved({"model": dict(WEIGHTS), "ema": dict(WEIGHTS)})),
    "tensors, safetensors": ("tensors", 1, lambda: TENSORS),
    "tensors, skeleton": ("tensors", 1, lambda: SKELETON),
    "names": ("name-characters", None, lambda: saved({"p" * 400_000: {str(index): {"w": torch.ones(1)} for index in range(9)}})),
    "JSON, safetensors": ("json-bytes", 50, lambda: TENSORS),
    "JSON, skeleton": ("json-bytes", 50, lambda: SKELETON),
    "zip entries": ("zip-entries", 3, lambda: saved(WEIGHTS)),
    "zip directory": ("zip-directory-bytes", 100, lambda: saved(WEIGHTS)),
    "inflated": ("inflated-bytes", None, lambda: beside(text("m" * 2_000_000), zipfile.ZIP_DEFLATED)),
    "views together": ("claimed-bytes", None, lambda: saved({f"w{i}": torch.ones(1).expand(1 << 27) for i in range(40)})),
    "together, legacy": ("claimed-bytes", None, lambda: saved({i: torch.ones(1).expand(1 << 27) for i in range(40)}, save_legacy)),
    "views together, in many dicts": (
        "claimed-bytes",
        None,
        lambda: saved({f"m{i}": {"w": torch.ones(1).expand(1 << 27), "a": torch.ones(2)} for i in range(40)}),
    ),
    "dense views of one storage": ("claimed-bytes", 38_400, lambda: saved(dict(enumerate(torch.ones(600).unfold(0, 500, 2))))),
    "inflated data": ("inflated-data-bytes", 100_000, lambda: repacked(saved({"w": torch.zeros(1_000_000)}))),
    "a view of stride 0": ("view-bytes", None, lambda: saved({"w": torch.ones(1).expand(1 << 28, 2)})),
}  # fmt: skip


def offered(error: CheckpointError) -> dict[str, str]:
    """The flag that an error's hint names."""
    found = re.search(r"--limit ([a-z-]+)=(\w+)", error.hint or "")
    assert found is not None, error
    return {found[1].replace("-", "_"): found[2]}


@pytest.mark.parametrize("case", BEYOND)
def test_refused_beyond_it_and_read_with_the_flag_that_the_error_names(case: str, tmp_path: Path) -> None:
    name, lowered, make = BEYOND[case]
    path = tmp_path / "it"
    path.write_bytes(make())
    lower = {} if lowered is None else {name.replace("-", "_"): lowered}
    raised: dict[str, str] = {}
    for _ in range(9):  # a file can be beyond a limit at a second place, further on
        with limits(**lower), limits(**raised):
            try:
                assert read(str(path)).state_dicts
                break
            except LimitError as error:
                assert error.path == str(path) and (lowered is None or f"{allowed(name):,}" in error.reason)
                assert offered(error).keys() == {name.replace("-", "_")}, error
                assert f"ckptsurgeon.limits({name.replace('-', '_')}=" in (error.hint or "")
                raised = offered(error)
    else:
        raise AssertionError("never read")
    assert raised, "the limit was not met"
    if lowered is not None:
        assert read(str(path)).state_dicts


def test_every_limit_is_tested_here() -> None:
    apart = {"shards", "extra-state-bytes", "metadata-entries", "label-bytes", "regex-seconds", "all-regex-seconds"}
    apart |= {"dcp-metadata-bytes", "toml-bytes", "toml-nesting", "toml-keys", "choices", "match-segments", "match-characters"}
    assert {name for name, _, _ in BEYOND.values()} | apart == BY_NAME.keys() == {limit.name for limit in TABLE}
    assert all(limit.bounds and limit.default > 0 for limit in TABLE)


def test_the_guide_lists_every_limit() -> None:
    page = (Path(__file__).parents[2] / "ckptsurgeon" / "guide" / "safety.md").read_text()
    rows = re.findall(r"^\| `([a-z-]+)` \| (\w+) \| (.+) \|$", page.partition("Every limit,")[2].partition("\n## ")[0], re.MULTILINE)
    assert rows == [(limit.name, shown(limit, limit.default), limit.bounds) for limit in TABLE]


@pytest.mark.parametrize("name", ["shards", "tensors", "json-bytes"])
def test_limits_of_an_index(name: str, tmp_path: Path) -> None:
    for part in "ab":
        safetensors.torch.save_file({part: WEIGHTS[part]}, tmp_path / f"{part}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {part: f"{part}.safetensors" for part in "ab"}, "metadata": {"more": "x" * 300}}))
    with limits(**{name.replace("-", "_"): 100 if name == "json-bytes" else 1}), pytest.raises(LimitError) as caught:
        read(str(index))
    with limits(**offered(caught.value)):
        assert len(only(read(str(index))).tensors) == 2


def test_an_extra_state_beyond_its_limit_is_left_by_name(tmp_path: Path) -> None:
    save_zip({"w": torch.ones(1), "m._extra_state": {"text": "x" * 500}}, tmp_path / "it")
    with limits(extra_state_bytes=100):
        entry = only(read(str(tmp_path / "it"))).entries["m._extra_state"]
    assert isinstance(entry, Refused) and "--limit extra-state-bytes=" in entry.reason
    assert only(read(str(tmp_path / "it"))).entries["m._extra_state"] == {"text": "x" * 500}


def test_metadata_that_is_shared_has_a_limit_where_it_is_written_out(tmp_path: Path) -> None:
    checkpoint = Checkpoint("x", "model", "", {}, module_metadata={str(path): dict.fromkeys("abc", 1) for path in range(4)})
    with limits(metadata_entries=11), pytest.raises(LimitError) as caught:
        skeleton.to_json(checkpoint)
    with limits(**offered(caught.value)):
        assert len(skeleton.to_json(checkpoint)["module_metadata"]) == 4


def test_a_list_of_labels_has_a_limit(tmp_path: Path) -> None:
    (tmp_path / "tokens.txt").write_text("a\nb\n")
    with limits(label_bytes=3), pytest.raises(LimitError) as caught:
        read_labels(tmp_path / "tokens.txt")
    with limits(**offered(caught.value)):
        assert read_labels(tmp_path / "tokens.txt") == ("a", "b")


def test_views_over_all_shards_have_a_limit(tmp_path: Path) -> None:
    weight_map = {f"w{i}": f"{i}.bin" for i in range(40)}
    for key, name in weight_map.items():
        save_zip({key: torch.ones(1).expand(1 << 27)}, tmp_path / name)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(LimitError, match="together") as caught:
        read(str(tmp_path))
    with limits(**offered(caught.value)):
        assert len(only(read(str(tmp_path))).tensors) == 40


@pytest.mark.parametrize("save", [save_zip, save_legacy])
def test_what_real_files_claim_is_no_bomb(save: Callable[[Any, Any], None], tmp_path: Path) -> None:
    """Ties, several dicts of one model's tensors, slices of a fused one, and ordinary expanded buffers: far under any bound."""
    weight = torch.ones(300, 40)
    model = {f"{i}.q": weight[i * 100 : i * 100 + 100] for i in range(3)} | {"tied": weight, "head": weight, "t": weight.T}
    save({name: dict(model) for name in ("model", "ema", "best")} | {"b": {"mask": torch.ones(1).expand(12, 512, 512)}}, tmp_path / "it")
    with limits(claimed_bytes=16_000_000):  # a thousandth of the default
        assert len(read(str(tmp_path / "it")).state_dicts) == 4


def test_a_sparse_terabyte_claims_nothing_beyond_it(tmp_path: Path) -> None:
    head = json.dumps({"w": {"dtype": "U8", "shape": [1 << 40], "data_offsets": [0, 1 << 40]}}).encode()
    with (tmp_path / "it").open("wb") as file:
        file.write(struct.pack("<Q", len(head)) + head)
        file.truncate(8 + len(head) + (1 << 40))
    with limits(claimed_bytes=1, inflated_data_bytes=1):
        assert only(read(str(tmp_path / "it"))).tensors["w"].nbytes == 1 << 40


def test_what_a_training_state_claims_has_a_limit(tmp_path: Path) -> None:
    state = {i: {"exp_avg": torch.ones(1).expand(1 << 27)} for i in range(40)}
    save_zip({"model": {"w": torch.ones(1)}, "optimizer": {"state": state, "param_groups": []}}, tmp_path / "it")
    with pytest.raises(LimitError, match="together") as caught:
        read_tree(str(tmp_path / "it"))
    with limits(**offered(caught.value)):
        assert read_tree(str(tmp_path / "it")).value


def test_a_training_state_has_the_same_limits(tmp_path: Path) -> None:
    save_zip(nested(70), tmp_path / "deep")
    save_zip({"p" * 400_000: {str(index): {"k": index} for index in range(9)}, "w": torch.ones(1)}, tmp_path / "long")
    for name in ("deep", "long"):
        with pytest.raises(LimitError) as caught:
            read_tree(str(tmp_path / name))
        with limits(**offered(caught.value)):
            assert read_tree(str(tmp_path / name)).value


def test_the_deepest_that_can_be_asked_for_is_read(tmp_path: Path) -> None:
    most = BY_NAME["nesting"].most
    save_zip(nested(most), tmp_path / "it")
    with limits(nesting=most):
        assert only(read(str(tmp_path / "it"))).root.count("d") == most
        assert read_tree(str(tmp_path / "it")).value
    save_zip(nested(most + 1), tmp_path / "it")
    with limits(nesting=most), pytest.raises(LimitError, match="beyond what the limit nesting can be raised to"):
        raise_hint(tmp_path / "it")


def raise_hint(path: Path) -> None:
    try:
        read(str(path))
    except LimitError as error:
        raise LimitError(error.hint or "") from error


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("tensor", 3, "is it tensors?"),
        ("", 3, "pickle-bytes"),
        ("tensors", 0, "above zero"),
        ("tensors", -1, "above zero"),
        ("tensors", True, "above zero"),
        ("tensors", 1.5, "pickle_bytes="),
        ("tensors", "many", "such as 4000000"),
        ("pickle-bytes", "2 apples", "such as 1GB"),
        ("pickle-bytes", "", "such as 1GB"),
        ("pickle-bytes", "9" * 30, "above zero"),
        ("nesting", 151, "up to 150"),
    ],
)
def test_what_is_no_limit(name: str, value: Any, words: str) -> None:
    with pytest.raises(CheckpointError) as caught, cs.limits(**{name: value}):
        pass
    assert words in (caught.value.hint or "")
    assert current() == {}


@pytest.mark.parametrize(
    ("words", "number"),
    [("5", 5), ("1_000", 1000), ("1,000", 1000), ("2KiB", 2048), ("2 kb", 2000), ("2k", 2000), ("3MiB", 3 << 20), ("1 TiB", 1 << 40),
     ("7B", 7), ("7iB", None), ("-1", None), ("1.5G", 1_500_000_000), ("0x10", None), ("\u0663", None)],
)  # fmt: skip
def test_amounts(words: str, number: int | None) -> None:
    assert parsed(words) == number


def test_they_hold_for_their_block_only_and_add_up(tmp_path: Path) -> None:
    assert allowed("tensors") == BY_NAME["tensors"].default
    with cs.limits(tensors=7), cs.limits(nesting="9"):
        assert (allowed("tensors"), allowed("nesting")) == (7, 9)
        assert current() == {"tensors": 7, "nesting": 9}
        seen: list[int] = []
        given = current()

        def elsewhere() -> None:
            with limits(**given):
                seen.append(allowed("tensors"))
            seen.append(allowed("tensors"))

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert seen == [7, BY_NAME["tensors"].default]
    assert current() == {}


def test_steps_are_counted_exactly() -> None:
    with limits(pickle_steps=3), pytest.raises(LimitError, match="more than 3 steps"):
        run(b"\x80\x02NNN.")
    with limits(pickle_steps=3):
        assert run(b"\x80\x02N.").value is None
