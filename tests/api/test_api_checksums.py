"""What a file's own checksums say is believed by every command that reads the data: no damaged weight is called proven or verified.

The oracle is zipfile, which tells what entry is damaged, and torch, which does not look.
"""

from __future__ import annotations

import contextlib
import json
import shlex
import threading
import zipfile
from pathlib import Path
from typing import Any

import api_support as support
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import ckptsurgeon as cs
from ckptsurgeon.cli import main
from ckptsurgeon.errors import FormatError, StaleError
from ckptsurgeon.formats.plain import skeleton
from ckptsurgeon.report import Verification
from ckptsurgeon.storage import copying
from ckptsurgeon.streaming import checksums

METHODS = {"stored": zipfile.ZIP_STORED, "deflated": zipfile.ZIP_DEFLATED}
OUTPUTS = ["out.pt", "out.safetensors"]


def save(state: Any, path: Path, method: int = zipfile.ZIP_STORED) -> Path:
    """What torch.save writes, with its storages deflated where it is asked."""
    torch.save(state, path)
    if method == zipfile.ZIP_DEFLATED:
        with zipfile.ZipFile(path) as archive:
            entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in entries:
                archive.writestr(name, data, method if "/data/" in name else zipfile.ZIP_STORED)
    return path


def flip(path: Path, entry: str) -> Path:
    """One bit in the middle of an entry turned; zipfile, at least, sees it."""
    with zipfile.ZipFile(path) as archive:
        info = next(info for info in archive.infolist() if info.filename.endswith(entry))
    raw = bytearray(path.read_bytes())
    start = info.header_offset + 30 + int.from_bytes(raw[info.header_offset + 26 : info.header_offset + 28], "little")
    start += int.from_bytes(raw[info.header_offset + 28 : info.header_offset + 30], "little")
    raw[start + info.compress_size // 2] ^= 0x04
    path.write_bytes(raw)
    with zipfile.ZipFile(path) as archive, contextlib.suppress(zipfile.BadZipFile, zipfile.zlib.error):  # type: ignore[attr-defined]
        assert archive.testzip()
    return path


def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {key: torch.randn(6, 4, generator=generator) for key in ("first", "second", "third")}


OPS: dict[str, dict[str, Any]] = {
    "copied": {},
    "cast": {"dtype": "BF16"},
    "turned": {"adapt": {"second": "transpose(dims=(0, 1))"}},
    "cut": {"adapt": {"second": "slice(dim=0, start=0, stop=1)"}},
    "cut across": {"adapt": {"second": "slice(dim=1, start=0, stop=2)"}},
    "joined": {"adapt": {"first + second -> joined": "concat"}},
    "renamed": {"rename": {"second": "other"}},
}


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("asked", OPS.values(), ids=OPS)
def test_a_flipped_bit_is_found_whatever_is_done_with_it(asked: dict[str, Any], method: int, output: str, tmp_path: Path) -> None:
    path = save(weights(), tmp_path / "in.pt", method)
    cs.merge(path, None, tmp_path / output, **asked)
    flip(path, "data/1")
    (tmp_path / output).write_bytes(b"old")
    with pytest.raises(FormatError, match=r"checksum|damaged") as caught:
        cs.merge(path, None, tmp_path / output, overwrite=True, **asked)
    assert caught.value.path == str(path) and caught.value.exit_code == 2
    assert "second" in str(caught.value) or "data/1" in str(caught.value)
    assert (tmp_path / output).read_bytes() == b"old"
    assert sorted(one.name for one in tmp_path.iterdir()) == sorted(["in.pt", output])


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("which", [0, 1])
def test_a_flipped_bit_in_any_source_of_an_average(which: int, output: str, tmp_path: Path) -> None:
    paths = [save(weights(), tmp_path / f"{number}.pt") for number in range(2)]
    flip(paths[which], "data/2")
    with pytest.raises(FormatError, match="third") as caught:
        cs.merge(paths, None, tmp_path / output, average=True)
    assert caught.value.path == str(paths[which])


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_flipped_bit_in_a_value_that_the_target_keeps(output: str, tmp_path: Path) -> None:
    source = save({"first": weights()["first"]}, tmp_path / "in.pt")
    target = flip(save(weights(), tmp_path / "target.pt"), "data/2")
    with pytest.raises(FormatError, match="third") as caught:
        cs.merge(source, target, tmp_path / output)
    assert caught.value.path == str(target)


@pytest.mark.parametrize("output", OUTPUTS)
def test_what_is_not_read_is_not_held_and_check_tells_of_it(output: str, tmp_path: Path) -> None:
    path = flip(save(weights(), tmp_path / "in.pt"), "data/1")
    cs.merge(path, None, tmp_path / output, drop=["second"])
    assert [found.key for found in cs.check(path, full=True).files[0].findings] == ["second"]


@pytest.mark.parametrize("output", OUTPUTS)
def test_without_verification_the_bytes_are_taken_as_they_are(output: str, tmp_path: Path) -> None:
    path = flip(save(weights(), tmp_path / "in.pt"), "data/1")
    report = cs.merge(path, None, tmp_path / output, verify=False)
    assert not report.proven and not [found for found in report.findings if "checksum" in found.code]
    read = torch.load if output == "out.pt" else load_file
    assert torch.equal(read(tmp_path / output)["second"], torch.load(path, weights_only=True)["second"])


def test_a_flipped_bit_in_the_byte_order_or_the_pickle(tmp_path: Path) -> None:
    for entry in ("byteorder", "data.pkl"):
        path = flip(save(weights(), tmp_path / "in.pt"), entry)
        with pytest.raises(FormatError):
            cs.merge(path, None, tmp_path / "out.safetensors")


def test_every_damaged_key_is_named_and_the_hint_is_a_command_that_works(tmp_path: Path) -> None:
    (tmp_path / "a folder").mkdir()
    state = weights()
    path = save({**state, "view": state["first"][2:]}, tmp_path / "a folder/in.pt")
    flip(flip(path, "data/0"), "data/2")
    with pytest.raises(FormatError) as caught:
        cs.merge(path, None, tmp_path / "out.safetensors")
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["first", "third", "view"]
    command = shlex.split((caught.value.hint or "").partition("ckptsurgeon ")[2])
    assert command[:2] == ["check", "--full"]
    assert {found.key for found in cs.check(command[2], full=True).files[0].findings} == {"first", "third", "view"}


def test_a_record_of_which_slices_are_used_is_read_once_and_in_a_second_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = torch.arange(4_000_000.0)
    path = save({f"part{number}": whole[number * 1000 : number * 1000 + 10] for number in range(50)}, tmp_path / "in.pt")
    counted: list[tuple[int, int]] = []

    class Counting:
        @staticmethod
        def crc32(data: Any, crc: int = 0) -> int:
            counted.append((len(data), threading.get_ident()))
            return zipfile.zlib.crc32(data, crc)  # type: ignore[attr-defined,no-any-return]

    monkeypatch.setattr(checksums, "zlib", Counting)
    cs.merge(path, None, tmp_path / "out.safetensors")
    assert sum(size for size, _ in counted) == 16_000_000
    assert threading.get_ident() not in {ident for _, ident in counted}
    assert max(size for size, _ in counted) <= copying.BUFFER  # memory stays flat


def test_a_copy_that_was_counted_for_the_output_is_not_counted_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(weights(), tmp_path / "in.pt")
    monkeypatch.setattr(checksums, "_as_its_record_says", lambda *_: pytest.fail("read again"))
    cs.merge(path, None, tmp_path / "out.pt")


def test_what_fails_in_the_thread_fails_the_merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(weights(), tmp_path / "in.pt")

    def fails(*_: Any) -> bool:
        raise StaleError("became shorter while it was read")

    monkeypatch.setattr(checksums, "_as_its_record_says", fails)
    with pytest.raises(StaleError, match="became shorter"):  # whole records are held by the proof, parts of them in the thread
        cs.merge(path, None, tmp_path / "out.safetensors", adapt={"first": "slice(dim=0, start=0, stop=2)"})
    assert [one.name for one in tmp_path.iterdir()] == ["in.pt"]


def test_the_thread_ends_with_what_it_stands_beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save({"w": torch.zeros(8_000_000)}, tmp_path / "in.pt")

    def fails(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("ckptsurgeon.streaming.writing.prove", fails)
    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        cs.merge(path, None, tmp_path / "out.safetensors")
    assert threading.active_count() == before and [one.name for one in tmp_path.iterdir()] == ["in.pt"]


# --- none at all --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("output", OUTPUTS)
def test_records_without_a_checksum_are_said_and_not_refused(output: str, tmp_path: Path) -> None:
    with support.without_checksums():
        path = save(weights(), tmp_path / "in.pt")
    report = cs.merge(path, None, tmp_path / output, drop=["third"])
    (found,) = [found for found in report.findings if found.code == "no-checksum"]
    assert found.level == "note" and found.message.startswith("2 of the storages") and str(path) in found.message
    assert not [found for found in cs.merge(tmp_path / output, None, tmp_path / "again.pt").findings if found.code == "no-checksum"]


# --- verify -------------------------------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(30, 20), nn.Linear(20, 5)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_verify_says_no_to_a_flipped_bit(method: int, tmp_path: Path) -> None:
    path = save(Net().state_dict(), tmp_path / "in.pt", method)
    honest = cs.verify(path, Net())
    assert honest.ok or method == zipfile.ZIP_DEFLATED  # which torch maps into memory, and so can't read
    flip(path, "data/2")
    if method == zipfile.ZIP_STORED:
        Net().load_state_dict(torch.load(path, weights_only=True))  # torch sees nothing
        found = cs.verify(path, Net())
        assert [(row.code, row.key) for row in found.findings if row.level == "error"] == [("checksum", "two.weight")]
    assert not cs.verify(path, Net()).ok


def test_verify_says_no_on_the_command_line_with_exit_code_1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "nets_here.py").write_text("from torch import nn\ndef net(): return nn.Linear(30, 20)\n")
    monkeypatch.chdir(tmp_path)
    flip(save(nn.Linear(30, 20).state_dict(), tmp_path / "in.pt"), "data/0")
    monkeypatch.setattr("sys.argv", ["ckptsurgeon", "verify", "in.pt", "nets_here:net", "--json"])
    assert main._run(True) == 1
    answer = json.loads(capsys.readouterr().out)
    assert not answer["ok"] and ("checksum", "weight") in {(row["code"], row["key"]) for row in answer["findings"]}


def test_verify_without_checksums_says_so(tmp_path: Path) -> None:
    with support.without_checksums():
        path = save(Net().state_dict(), tmp_path / "in.pt")
    found = cs.verify(path, Net())
    assert found.ok and [row.level for row in found.findings if row.code == "no-checksum"] == ["note"]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_finite_values_of_a_damaged_file_are_held_too(method: int, tmp_path: Path) -> None:
    path = save(Net().state_dict(), tmp_path / "in.pt", method)
    save_file(Net().state_dict(), tmp_path / "target.safetensors")
    assert cs.verify(path, tmp_path / "target.safetensors", finite=True).ok
    flip(path, "data/2")
    found = cs.verify(path, tmp_path / "target.safetensors", finite=True)
    assert ("checksum", "two.weight") in {(row.code, row.key) for row in found.findings} and not found.ok


@pytest.mark.parametrize("finite", [False, True], ids=["", "finite"])
@pytest.mark.parametrize("target", ["model", "file", "skeleton", "itself"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_verify_holds_the_data_whatever_it_is_held_against(method: int, target: str, finite: bool, tmp_path: Path) -> None:
    path = save(Net().state_dict(), tmp_path / "in.pt", method)
    save_file(Net().state_dict(), tmp_path / "target.safetensors")
    (tmp_path / "skeleton.json").write_text(json.dumps(skeleton.to_json(cs.skeleton(tmp_path / "target.safetensors"))))
    against: Any = {"model": Net(), "file": tmp_path / "target.safetensors", "skeleton": tmp_path / "skeleton.json", "itself": path}[target]
    asked: dict[str, Any] = {"finite": finite, **({"device": "meta"} if target == "model" else {})}
    assert cs.verify(path, against, **asked).ok
    flip(path, "data/2")
    errors = [(row.code, row.key) for row in cs.verify(path, against, **asked).findings if row.level == "error"]
    assert errors == [("checksum", "two.weight")]


def test_verify_says_of_a_file_target_too_that_there_are_no_checksums(tmp_path: Path) -> None:
    with support.without_checksums():
        path = save(Net().state_dict(), tmp_path / "in.pt")
    for found in (cs.verify(path, path), cs.verify(path, Net(), device="meta")):
        assert found.ok and [row.level for row in found.findings if row.code == "no-checksum"] == ["note"]


def entries(path: Path) -> list[str]:
    """The names of a file's entries, without the folder that torch puts them in."""
    with zipfile.ZipFile(path) as archive:
        return [info.filename.partition("/")[2] for info in archive.infolist() if info.file_size]


def wrong(found: Verification) -> list[tuple[str, str | None]]:
    """The codes and keys of what verification says no to."""
    assert found.ok == all(row.level != "error" for row in found.findings)
    return [(row.code, row.key) for row in found.findings if row.level == "error"]


@pytest.mark.parametrize("target", ["model", "meta", "file", "skeleton", "itself"])
def test_verify_holds_every_entry_of_the_file(target: str, tmp_path: Path) -> None:
    state = Net().state_dict()
    cs.merge(state_file := save(state, tmp_path / "state.pt"), Net(), path := tmp_path / "in.pt")
    (tmp_path / "skeleton.json").write_text(json.dumps(skeleton.to_json(cs.skeleton(state_file))))
    against: Any = {"file": state_file, "skeleton": tmp_path / "skeleton.json", "itself": path}.get(target, Net())
    asked: dict[str, Any] = {"device": "meta"} if target == "meta" else {}
    whole, names = path.read_bytes(), entries(path)
    assert {"data.pkl", "byteorder", "version", "ckptsurgeon.json"} <= set(names) and cs.verify(path, against, **asked).ok
    places = {f"data/{tensor.span.storage}": key for key, tensor in cs.open(path).items() if tensor.span is not None}
    assert set(places) == {name for name in names if name.startswith("data/")} and len(places) == 4
    for name in names:
        path.write_bytes(whole)
        flip(path, f"/{name}")
        with zipfile.ZipFile(path) as archive:
            assert (archive.testzip() or "").partition("/")[2] == name  # the oracle: this entry, and it is the first
        assert wrong(cs.verify(path, against, **asked)) == [("checksum", places.get(name, name))]


def test_verify_holds_what_stands_beside_the_weights_too(tmp_path: Path) -> None:
    model, average = Net(), Net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    model.two(model.one(torch.ones(30))).sum().backward()
    optimizer.step()
    path = tmp_path / "in.pt"
    torch.save({"model": model.state_dict(), "ema": average.state_dict(), "optimizer": optimizer.state_dict()}, path)
    whole = path.read_bytes()
    used = {f"data/{tensor.span.storage}" for tensor in cs.open(path, root="model").values() if tensor.span is not None}
    beside = [name for name in entries(path) if name.startswith("data/") and name not in used]
    assert len(beside) == 8 and cs.verify(path, Net(), root="model").ok
    for name in beside:
        path.write_bytes(whole)
        flip(path, f"/{name}")
        Net().load_state_dict(torch.load(path, weights_only=True)["model"])  # the weights are whole
        assert wrong(cs.verify(path, Net(), root="model")) == [("checksum", name)]


@pytest.mark.parametrize("entry", ["data.pkl", "byteorder", "version"])
@pytest.mark.parametrize("against", ["nets_here:net", "in.pt", "nowhere:net"])
def test_a_damaged_header_is_exit_code_1_in_verify(
    entry: str, against: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "nets_here.py").write_text("from torch import nn\ndef net(): return nn.Linear(30, 20)\n")
    monkeypatch.chdir(tmp_path)
    flip(save(nn.Linear(30, 20).state_dict(), tmp_path / "in.pt"), f"/{entry}")
    code = 2 if (entry, against) == ("version", "nowhere:net") else 1  # which can be read, so that the target is looked for
    for json_too in (True, False):
        monkeypatch.setattr("sys.argv", ["ckptsurgeon", "verify", "in.pt", against, *(["--json"] if json_too else [])])
        assert main._run(json_too) == code
        out = capsys.readouterr().out
        if code == 1 and json_too:
            answer = json.loads(out)
            assert not answer["ok"] and answer["tensors"] == (0 if entry != "version" else 2)
            assert [row["key"] for row in answer["findings"] if row["level"] == "error"] == [entry]
        elif code == 1:
            assert out.startswith(f"in.pt → {against}: NOT ok\n") and f"  error: {entry}: is not what the file's own checksum says" in out
            assert entry == "version" or "  NOT verified: 1 error; 0 tensors compared\n" in out
    for words in (["merge", "in.pt", "-o", "out.pt"], ["inspect", "in.pt"], ["diff", "in.pt", "in.pt"]):
        monkeypatch.setattr("sys.argv", ["ckptsurgeon", *words])
        assert main._run(False) == (0 if entry == "version" else 2)


def test_a_file_that_is_unreadable_for_another_reason_is_an_error_of_verify(tmp_path: Path) -> None:
    path = save(Net().state_dict(), tmp_path / "in.pt")
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(FormatError, match="truncated"):
        cs.verify(path, Net())
    path.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(FormatError):
        cs.verify(path, Net())


@pytest.mark.parametrize("entry", ["data.pkl", "data/0"])
def test_verify_names_the_damaged_shard(entry: str, tmp_path: Path) -> None:
    state = Net().state_dict()
    shards = {"one.bin": ["one.weight", "one.bias"], "two.bin": ["two.weight", "two.bias"]}
    for name, keys in shards.items():
        save({key: state[key] for key in keys}, tmp_path / name)
    weight_map = {key: name for name, keys in shards.items() for key in keys}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert cs.verify(tmp_path, Net()).ok
    flip(tmp_path / "two.bin", f"/{entry}")
    found = cs.verify(tmp_path, Net())
    assert wrong(found) == [("checksum", "two.weight" if entry == "data/0" else entry)]
    assert [row.message.startswith("two.bin: ") for row in found.findings if row.level == "error"] == [True]


def test_verify_holds_everything_once_in_a_second_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(nn.Linear(300_000, 20).state_dict(), tmp_path / "in.pt")
    counted: list[tuple[int, int]] = []

    class Counting:
        @staticmethod
        def crc32(data: Any, crc: int = 0) -> int:
            counted.append((len(data), threading.get_ident()))
            return zipfile.zlib.crc32(data, crc)  # type: ignore[attr-defined,no-any-return]

    monkeypatch.setattr(checksums, "zlib", Counting)
    assert cs.verify(path, nn.Linear(300_000, 20)).ok
    with zipfile.ZipFile(path) as archive:
        assert sum(size for size, _ in counted) == sum(info.file_size for info in archive.infolist())
    assert threading.get_ident() not in {ident for _, ident in counted}
    assert max(size for size, _ in counted) <= copying.BUFFER  # memory stays flat


def test_what_fails_in_the_thread_fails_the_verification(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(Net().state_dict(), tmp_path / "in.pt")

    def fails(*_: Any) -> bool:
        raise StaleError("became shorter while it was read")

    monkeypatch.setattr(checksums, "_as_it_says", fails)
    with pytest.raises(StaleError, match="became shorter"):
        cs.verify(path, Net())


# --- transfer -----------------------------------------------------------------------------------------------------------------------


def test_transfer_holds_checksums_where_it_is_asked_to(tmp_path: Path) -> None:
    path = flip(save(Net().state_dict(), tmp_path / "in.pt"), "data/2")
    model = Net()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(FormatError, match="checksum") as caught:
        cs.transfer(path, model, checksums=True)
    assert caught.value.path == str(path) and "two.weight" in caught.value.problems[0]
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    cs.transfer(path, model)
    assert torch.equal(model.two.weight, torch.load(path, weights_only=True)["two.weight"])
    cs.transfer(path, model, drop=["two.weight"], checksums=True)  # which is then not read


@pytest.mark.parametrize("apart", [False, True], ids=["beside", "in a second file"])
def test_transfer_holds_the_optimizers_state_too(apart: bool, tmp_path: Path) -> None:
    net = Net()
    optimizer = torch.optim.Adam(net.parameters())
    net.two(net.one(torch.ones(30))).sum().backward()
    optimizer.step()
    path = save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "in.pt")
    weights = path
    if apart:
        weights, path = save(net.state_dict(), tmp_path / "weights.pt"), save(optimizer.state_dict(), path)
    with zipfile.ZipFile(path) as archive:
        last = max((info.filename for info in archive.infolist() if "/data/" in info.filename and info.file_size > 100), key=len)
    flip(path, last.partition("/")[2])
    model = Net()
    taker = torch.optim.Adam(model.parameters())
    with pytest.raises(FormatError, match="checksum"):
        cs.transfer(weights, model, optimizer=taker, optimizer_from=path if apart else None, checksums=True)
    assert not taker.state_dict()["state"]
    cs.transfer(weights, model, checksums=True)


def test_transfer_notes_what_has_no_checksum(tmp_path: Path) -> None:
    with support.without_checksums():
        path = save(Net().state_dict(), tmp_path / "in.pt")
    assert [row.level for row in cs.transfer(path, Net(), checksums=True).findings if row.code == "no-checksum"] == ["note"]
    assert not [row for row in cs.transfer(path, Net()).findings if row.code == "no-checksum"]


def test_transfer_notes_a_source_that_keeps_no_checksums(tmp_path: Path) -> None:
    save_file(Net().state_dict(), tmp_path / "in.safetensors")
    for source in (tmp_path / "in.safetensors", Net(), Net().state_dict()):
        assert [row.level for row in cs.transfer(source, Net(), checksums=True).findings if row.code == "no-checksum"] == ["note"]
