"""The table of codes: each can really be produced, is told with the right key, and can be selected and ignored."""

from __future__ import annotations

import json
import os
import pickle
import random
import zipfile
from collections.abc import Callable
from pathlib import Path

import api_support as support
import pytest
import safetensors.torch
import torch

import ckptsurgeon as cs
from ckptsurgeon import finding_codes
from ckptsurgeon.api import _opening
from ckptsurgeon.errors import CheckpointError, SettingsError
from ckptsurgeon.report import CheckReport

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:" + "0" * 64 + "\nsize 12345\n"


def told(report: CheckReport, number: int = 0) -> list[tuple[str, str | None]]:
    return [(finding.code, finding.key) for finding in report.files[number].findings]


def saved(value: object, folder: Path, name: str = "in.pt", **options: bool) -> Path:
    torch.save(value, folder / name, **options)
    return folder / name


def small(folder: Path) -> Path:
    return saved({"w": torch.ones(2), "n": torch.arange(3)}, folder)


def written(folder: Path, data: str | bytes, name: str = "in.pt") -> Path:
    (folder / name).write_bytes(data.encode() if isinstance(data, str) else data)
    return folder / name


def flipped(path: Path, key: str = "data/0") -> Path:
    """The file with one bit of a storage turned; zipfile says where."""
    with zipfile.ZipFile(path) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith(key))
    raw = bytearray(path.read_bytes())
    start = info.header_offset + 30 + int.from_bytes(raw[info.header_offset + 26 : info.header_offset + 28], "little")
    start += int.from_bytes(raw[info.header_offset + 28 : info.header_offset + 30], "little")
    raw[start] ^= 1
    path.write_bytes(raw)
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() == info.filename
    return path


def changing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> CheckReport:
    """Somebody appends to the file between the reading of its header and of its data."""
    path, read = small(folder), _opening.read

    def and_then(given: str | os.PathLike[str]) -> object:
        archive = read(given)
        with path.open("ab") as file:
            file.write(b"more")
        return archive

    monkeypatch.setattr(_opening, "read", and_then)
    return cs.check(path, full=True)


def hugging_face(folder: Path) -> Path:
    home = support.SOURCES["shards"]({"a": torch.ones(2), "b": torch.ones(3)}, folder)
    saved({"state": {}, "param_groups": []}, home, "optimizer.pt")
    return home


def two_roots(folder: Path) -> Path:
    return saved({"model": {"w": torch.ones(2)}, "ema": {"w": torch.zeros(2)}}, folder)


def limited(folder: Path) -> CheckReport:
    with cs.limits(tensors=1):
        return cs.check(small(folder))


Make = Callable[[Path, pytest.MonkeyPatch], CheckReport]
GOAL = {"w": torch.ones(2), "n": torch.arange(3)}
MAKERS: dict[str, tuple[Make, str | None, str]] = {  # how to come by it, its key, and a part of what is said
    "CK100": (changing, None, "changed while it was read"),
    "CK101": (lambda f, _: cs.check(f / "missing.pt"), None, "does not exist"),
    "CK102": (lambda f, _: cs.check(written(f, "<html></html>")), None, "HTML page"),
    "CK103": (lambda f, _: limited(f), None, "--limit tensors="),
    "CK104": (lambda f, _: cs.check(two_roots(f), against={"w": torch.ones(2)}), None, "fit equally well"),
    "CK105": (lambda f, _: cs.check(written(f, POINTER)), None, "git lfs pull"),
    "CK106": (lambda f, _: cs.check(flipped(small(f)), full=True), "w", "checksum"),
    "CK107": (lambda f, _: cs.check(hugging_face(f)), None, "optimizer.pt"),
    "CK108": (lambda f, _: cs.check(saved({"param_shapes": [{"w": (2,)}], "module": {"w": torch.empty(0)}}, f)), None, "ZeRO"),
    "CK201": (lambda f, _: cs.check(saved({"model": {"w": torch.ones(2)}, "config": Path("x")}, f)), None, "pathlib"),
    "CK202": (lambda f, _: cs.check(saved({"w": torch.ones(2), "s": torch.eye(2).to_sparse()}, f)), "s", "sparse tensor"),
    "CK203": (
        lambda f, _: cs.check(saved({"l.weight": torch.ones(4, 5).to(torch.int8), "l.SCB": torch.ones(4)}, f)),
        "l.weight",
        "8-bit codes",
    ),
    "CK301": (lambda f, _: cs.check(small(f), against={**GOAL, "b": torch.ones(1)}), "b", "in the target only"),
    "CK302": (lambda f, _: cs.check(small(f), against={"w": torch.ones(2)}), "n", "in the file only"),
    "CK303": (lambda f, _: cs.check(small(f), against={**GOAL, "w": torch.ones(3)}), "w", "has shape (2,), the target (3,)"),
    "CK304": (lambda f, _: cs.check(small(f), against={**GOAL, "w": torch.ones(2).half()}), "w", "is F32, in the target F16"),
    "CK401": (lambda f, _: cs.check(saved({"w": torch.tensor([1.0, torch.inf])}, f), finite=True), "w", "1 value"),
    "CK501": (lambda f, _: cs.check(small(f), max_size="1kB"), None, "1,000 are allowed"),
    "CK502": (lambda f, _: cs.check(small(f), allow="safetensors"), None, "is torch-zip; allowed: safetensors"),
    "CK503": (lambda f, _: cs.check(small(f), dtypes="bfloat16"), "w", "is F32; expected: BF16"),
}


def test_each_code_of_the_table_is_here() -> None:
    assert list(MAKERS) == [row.code for row in finding_codes.TABLE] == sorted(finding_codes.BY_CODE)
    assert len({row.name for row in finding_codes.TABLE}) == len(finding_codes.TABLE)


@pytest.mark.parametrize("code", MAKERS)
def test_each_code_can_be_produced(code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make, key, words = MAKERS[code]
    report = make(tmp_path, monkeypatch)
    (found,) = [finding for finding in report.files[0].findings if finding.code == code]
    assert found.key == key and words in found.message
    others = {"CK104": set(), "CK202": {"CK201"}}.get(code, set())
    assert {finding.code for finding in report.files[0].findings} == {code} | others
    assert report.ok is (found.level != "error") and found.level == {"CK107": "note", "CK203": "note", "CK304": "warning"}.get(
        code, "error"
    )


def test_the_option_in_the_table_is_what_asks_for_it(tmp_path: Path) -> None:
    asked = {"CK106": "--full", "CK401": "--finite", "CK501": "--max-size", "CK502": "--allow", "CK503": "--dtype"}
    asked |= {f"CK30{number}": "--against" for number in range(1, 5)}
    assert {row.code: row.option for row in finding_codes.TABLE if row.option} == asked
    path = flipped(saved({"w": torch.tensor([1.0, torch.nan])}, tmp_path))
    assert cs.check(path).ok  # nobody asked


def test_a_whole_module_is_unsafe_by_the_name_of_its_class(tmp_path: Path) -> None:
    for legacy in (False, True):
        path = saved(torch.nn.Linear(2, 2), tmp_path, _use_new_zipfile_serialization=not legacy)
        (found,) = cs.check(path).files[0].findings
        assert found.code == "CK201" and "whole pickled object of torch.nn.modules.linear.Linear" in found.message


class Evil:
    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, ("touch ran",)


@pytest.mark.parametrize("value", [Evil(), [Evil()], {"a": Evil(), "b": 1}], ids=["it", "in a list", "in a dict"])
def test_ignoring_what_is_malformed_lets_no_code_through(value: object, tmp_path: Path) -> None:
    """A plain pickle is no checkpoint, CK102; one that asks for code is more than that."""
    path = written(tmp_path, pickle.dumps(value))
    assert told(cs.check(path, ignore="CK102")) == [("CK201", None)]
    assert cs.check(written(tmp_path, pickle.dumps([1, 2])), ignore="CK102").ok


def test_a_pointer_in_the_place_of_a_shard(tmp_path: Path) -> None:
    home = support.SOURCES["shards"]({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path)
    written(home, POINTER, "model-00002-of-00002.safetensors")
    (found,) = cs.check(home).files[0].findings
    assert found.code == "CK105" and found.message.startswith("model-00002-of-00002.safetensors: is a Git LFS pointer")


# --- checksums ----------------------------------------------------------------------------------------------------------------------


def rezipped(path: Path, method: int) -> Path:
    """The same archive as zipfile writes it, deflated or stored."""
    with zipfile.ZipFile(path) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in entries:
            archive.writestr(name, data)
    return path


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED], ids=["stored", "deflated"])
def test_every_storage_is_held_against_its_checksum(method: int, tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {f"w{number}": torch.randn(3 + number * 400_000) for number in range(4)}
    assert cs.check(rezipped(saved(state, tmp_path), method), full=True).files[0].findings == ()
    raw = (tmp_path / "in.pt").read_bytes()
    with zipfile.ZipFile(tmp_path / "in.pt") as archive:
        infos = [info for info in archive.infolist() if "/data/" in info.filename]
    assert len(infos) == len(state)
    for key, info in zip(state, infos, strict=True):
        at = info.header_offset + 30 + len(info.filename) + random.Random(key).randrange(info.compress_size)
        (tmp_path / "in.pt").write_bytes(raw[:at] + bytes([raw[at] ^ 0x10]) + raw[at + 1 :])
        assert told(cs.check(tmp_path / "in.pt", full=True)) == [("CK106", key)]
        assert cs.check(tmp_path / "in.pt").ok  # its header says nothing of it


def test_views_of_one_damaged_storage_are_all_named(tmp_path: Path) -> None:
    whole = torch.ones(8)
    path = flipped(saved({"a": whole[:4], "b": whole[4:], "c": torch.ones(1)}, tmp_path))
    assert told(cs.check(path, full=True)) == [("CK106", "a"), ("CK106", "b")]


def test_a_damaged_entry_that_no_key_reads(tmp_path: Path) -> None:
    path = flipped(saved({"w": torch.ones(2)}, tmp_path), ".data/serialization_id")
    assert told(cs.check(path, full=True)) == [("CK106", ".data/serialization_id")]


def test_where_there_are_no_checksums_it_says_so_and_goes_on(tmp_path: Path) -> None:
    torch.serialization.set_crc32_options(False)
    try:
        saved({"w": torch.ones(2)}, tmp_path)
    finally:
        torch.serialization.set_crc32_options(True)
    with zipfile.ZipFile(tmp_path / "in.pt") as archive:
        zeroes = sum(not info.CRC for info in archive.infolist())
    paths = [tmp_path / "in.pt", saved({"w": torch.ones(2)}, tmp_path, "old.pt", _use_new_zipfile_serialization=False)]
    safetensors.torch.save_file({"w": torch.ones(2)}, tmp_path / "in.safetensors")
    report = cs.check([*paths, tmp_path / "in.safetensors"], full=True)
    assert report.ok and [[(one.code, one.level) for one in file.findings] for file in report.files[1:]] == [[("CK106", "note")]] * 2
    assert [one.level for one in report.files[0].findings] == ["note"] * bool(zeroes)
    assert "note" in str(report) and "CK106" not in str(report)  # counted; -v shows them


# --- which are told -----------------------------------------------------------------------------------------------------------------


def bad(folder: Path) -> Path:
    return saved({"model": {"w": torch.tensor([1.0, torch.nan])}, "config": Path("x")}, folder)


@pytest.mark.parametrize(
    ("select", "ignore", "expected"),
    [
        ((), (), {"CK201", "CK503"}),
        ("CK2", (), {"CK201"}),
        ("ck201", (), {"CK201"}),
        ("unsafe", (), {"CK201"}),
        ("CK5,CK2", (), {"CK201", "CK503"}),
        (["CK5", "CK2"], "CK201", {"CK503"}),
        ((), "CK2", set()),
        ("CK", "CK2", {"CK503"}),
        ("CK401", (), {"CK401"}),  # asks for it
        ("CK4,CK2", (), {"CK401", "CK201"}),
        ("CK1", (), set()),
    ],
)
def test_select_and_ignore(select: object, ignore: object, expected: set[str], tmp_path: Path) -> None:
    dtypes = "F16" if "CK503" in expected else ()  # what would not be told may not be asked for
    report = cs.check(bad(tmp_path), dtypes=dtypes, select=select, ignore=ignore)  # type: ignore[arg-type]
    assert {code for code, _ in told(report)} == expected and report.ok is not bool(expected)


def test_what_can_not_be_read_is_told_whatever_is_selected(tmp_path: Path) -> None:
    path = written(tmp_path, "<html>")
    assert told(cs.check(path, select="CK503", dtypes="F16")) == [("CK102", None)]
    assert cs.check(path, ignore="CK102").ok


def test_selecting_what_nothing_looks_for_is_said(tmp_path: Path) -> None:
    notes: list[str] = []
    cs.check(small(tmp_path), select=["CK303", "CK2"], note=notes.append)
    assert notes == ["nothing is looked for under CK303 without --against"]
    notes.clear()
    cs.check(small(tmp_path), select=["CK3", "CK4"], against=GOAL, note=notes.append)
    assert notes == []


@pytest.mark.parametrize(
    ("words", "key", "near"),
    [
        ({"select": "CK999"}, "--select", None),
        ({"ignore": ["CK2", "CKX"]}, "--ignore", None),
        ({"ignore": "unsave"}, "--ignore", "unsafe"),
        ({"dtypes": "F33"}, "--dtype", None),
        ({"dtypes": "bfloat61"}, "--dtype", "bfloat16"),
        ({"allow": "safetensor"}, "--allow", "safetensors"),
        ({"allow": "gguf"}, "--allow", None),
        ({"max_size": "big"}, "--max-size", None),
        ({"max_size": "5XB"}, "--max-size", None),
        ({"max_size": "-5MB"}, "--max-size", None),
        ({"jobs": 0}, "--jobs", None),
    ],
    ids=str,
)
def test_words_that_mean_nothing(words: dict[str, object], key: str, near: str | None, tmp_path: Path) -> None:
    with pytest.raises(SettingsError) as caught:
        cs.check(small(tmp_path), **words)  # type: ignore[arg-type]
    assert caught.value.key == key and caught.value.hint and caught.value.exit_code == 2
    assert near is None or f"is it {near}?" in caught.value.reason


def test_a_word_that_means_nothing_is_told_before_a_model_is_built(tmp_path: Path) -> None:
    with pytest.raises(SettingsError):
        cs.check(small(tmp_path), against="no_such_module:Net", select="CK999")
    with pytest.raises(CheckpointError):
        cs.check(small(tmp_path), against=tmp_path / "missing.json")


# --- sizes, dtypes, formats ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "most"),
    [("500", 500), ("500B", 500), ("2k", 2000), ("2KB", 2000), ("1.5kb", 1500), ("2KiB", 2048), ("1_000", 1000), ("0.001 MB", 1000)],
)
def test_sizes_as_people_write_them(words: str, most: int, tmp_path: Path) -> None:
    for size, ok in ((most, True), (most + 1, False)):
        path = written(tmp_path, b"x" * size)
        report = cs.check(path, max_size=words, ignore="CK102")
        assert report.ok is ok and cs.check(path, max_size=most, ignore="CK102").ok is ok
        assert ok or f"has {size:,} bytes, and {most:,} are allowed" in report.files[0].findings[0].message


def test_the_size_of_a_folder_is_that_of_its_files(tmp_path: Path) -> None:
    home = support.SOURCES["shards"]({"a": torch.ones(2000), "b": torch.ones(2000)}, tmp_path)
    total = sum(path.stat().st_size for path in home.iterdir())
    assert cs.check(home, max_size=total).ok and told(cs.check(home, max_size=total - 1)) == [("CK501", None)]


DTYPES = {"half": torch.ones(1).half(), "single": torch.ones(1), "long": torch.arange(2), "byte": torch.ones(1).byte()}
DTYPES |= {"mask": torch.tensor([True]), "wave": torch.ones(1, dtype=torch.complex64), "small": torch.ones(1).to(torch.float8_e4m3fn)}


@pytest.mark.parametrize(
    ("expected", "strangers"),
    [
        ("F16", {"single", "wave", "small"}),
        ("float16,torch.float32", {"wave", "small"}),
        (["half", "f32", "complex64", "float8_e4m3fn"], set()),
        ("F16,F32,C64,F8_E4M3,I64", {"byte"}),  # one integer named: the others count
        ("F16,F32,C64,F8_E4M3,U8,I64,BOOL", set()),
        ("I64", {"half", "single", "wave", "small", "byte"}),
        ("", set()),
    ],
)
def test_expected_dtypes(expected: str | list[str], strangers: set[str], tmp_path: Path) -> None:
    report = cs.check(saved(DTYPES, tmp_path), dtypes=expected)
    assert set(told(report)) == {("CK503", key) for key in strangers}


@pytest.mark.parametrize(
    ("allow", "good"),
    [
        ("safetensors", {"safetensors", "shards"}),
        ("torch", {"legacy", "zip", "bin-shards", "training", "lightning"}),
        ("torch-zip", {"zip", "training", "lightning"}),
        ("torch-legacy,safetensors", {"legacy", "safetensors", "shards"}),
        (["skeleton", "Torch-Zip"], {"zip", "training", "lightning", "skeleton"}),
    ],
)
def test_allowed_formats(allow: str | list[str], good: set[str], tmp_path: Path) -> None:
    paths = {}
    for name, make in support.SOURCES.items():
        (tmp_path / name).mkdir()
        paths[name] = make({"a": torch.ones(2), "b": torch.ones(3)}, tmp_path / name)
    paths["skeleton"] = written(tmp_path, json.dumps({"ckptsurgeon": "skeleton", "version": 1, "tensors": []}), "net.json")
    from ckptsurgeon.formats.plain.skeleton import to_json

    paths["skeleton"].write_text(json.dumps(to_json(cs.open(paths["zip"]))))
    report = cs.check(paths.values(), allow=allow)
    assert {name for name, file in zip(paths, report.files, strict=True) if file.ok} == good
    assert {finding.code for file in report.files for finding in file.findings} == {"CK502"}


def test_a_format_is_told_by_content(tmp_path: Path) -> None:
    """A pickle that calls itself safetensors is the oldest trick."""
    path = saved({"w": torch.ones(1)}, tmp_path, "in.safetensors")
    assert told(cs.check(path, allow="safetensors")) == [("CK502", None)]


def test_values_of_what_has_none(tmp_path: Path) -> None:
    from ckptsurgeon.formats.plain.skeleton import to_json

    path = written(tmp_path, json.dumps(to_json(cs.open(small(tmp_path)))), "net.json")
    assert cs.check(path, finite=True).ok


# --- folders ------------------------------------------------------------------------------------------------------------------------


def test_what_a_folder_stands_for(tmp_path: Path) -> None:
    for place in ("b.pt", "a.ckpt", "notes.txt", ".hidden.pt", "sub/deep/c.PTH", "sub/d.safetensors", ".git/e.pt", "config.json"):
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        written(tmp_path, "<html>", place)
    hugging_face(tmp_path)
    report = cs.check(tmp_path)
    places = [os.path.relpath(file.path, tmp_path) for file in report.files]
    assert places == ["a.ckpt", "b.pt", "hf", "sub/d.safetensors", "sub/deep/c.PTH"]
    assert [file.ok for file in report.files] == [False, False, True, False, False]
    assert [os.path.relpath(file.path, tmp_path) for file in cs.check([tmp_path / "sub", tmp_path / "b.pt"]).files] == [
        "sub/d.safetensors",
        "sub/deep/c.PTH",
        "b.pt",
    ]


def test_a_folder_with_nothing_in_it_is_no_yes(tmp_path: Path) -> None:
    (tmp_path / "empty" / "below").mkdir(parents=True)
    assert told(cs.check(tmp_path / "empty")) == [("CK101", None)]


def test_a_folder_that_leads_back_to_itself(tmp_path: Path) -> None:
    small(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path)
    assert len(cs.check(tmp_path).files) == 1


def test_what_stands_beside_a_hugging_face_checkpoint_is_named(tmp_path: Path) -> None:
    home = hugging_face(tmp_path)
    (home / "checkpoint-5").mkdir()
    saved({}, home / "checkpoint-5", "old.bin")
    report = cs.check(home)
    assert [finding.message for finding in report.files[0].findings] == [
        "beside it, and not looked at: optimizer.pt",
        "beside it, and not looked at: checkpoint-5/old.bin",
    ]
    assert str(report) == "1 file checked, all good; 2 notes (-v shows them)"
