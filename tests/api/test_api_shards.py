"""Outputs in shards: cut where huggingface_hub cuts, read by from_pretrained, safetensors, torch and our own reader; ties in one file."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import api_support as support
import pytest
import torch
from huggingface_hub import split_torch_state_dict_into_shards
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from profiles import examples
from safetensors.torch import load_file
from torch import nn

import ckptsurgeon as cs
from ckptsurgeon.errors import CastError, OutputError, PlanError, SettingsError, VerificationError

PATTERNS = {"safetensors": "model{suffix}.safetensors", "torch": "pytorch_model{suffix}.bin"}


def read(path: Path) -> dict[str, torch.Tensor]:
    """A file as its own library reads it."""
    return load_file(path) if path.suffix == ".safetensors" else torch.load(path, weights_only=True)


def read_folder(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, list[str]]]:
    """All tensors of a folder, and the keys of each file; its index must say the same."""
    files = {name: read(folder / name) for name in sorted(os.listdir(folder)) if not name.endswith(".index.json")}
    indexes = [name for name in os.listdir(folder) if name.endswith(".index.json")]
    assert len(indexes) == (len(files) > 1)
    if indexes:
        index = json.loads((folder / indexes[0]).read_text())
        assert index["weight_map"] == {key: name for name, state in files.items() for key in state}
    return {key: value for state in files.values() for key, value in state.items()}, {name: list(state) for name, state in files.items()}


DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.uint8]
TENSORS = st.lists(st.tuples(st.integers(0, 30), st.sampled_from(DTYPES), st.one_of(st.none(), st.integers(0, 5))), min_size=1, max_size=9)


def made(rows: list[tuple[int, torch.dtype, int | None]]) -> dict[str, torch.Tensor]:
    """A state_dict; a row may be the same tensor as an earlier one."""
    state: dict[str, torch.Tensor] = {}
    for number, (size, dtype, tie) in enumerate(rows):
        earlier = list(state.values())
        state[f"layer{number}.weight"] = earlier[tie] if tie is not None and tie < len(earlier) else (torch.arange(size) + number).to(dtype)
    return state


@given(rows=TENSORS, most=st.integers(1, 400), format=st.sampled_from([*PATTERNS]), tied=st.booleans())
@settings(max_examples=examples(60), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_shards_are_those_of_huggingface_hub_and_hold_every_tensor(
    rows: list[Any], most: int, format: str, tied: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("shards")
    state = made(rows if tied else [(size, dtype, None) for size, dtype, _ in rows])
    torch.save(state, folder / "in.pt")
    report = cs.merge(folder / "in.pt", None, folder / "out", format=format, max_shard_size=most)
    found, files = read_folder(folder / "out")
    support.same(found, state)
    support.same({key: torch.from_numpy(_read(folder / "out", key)) for key in state}, {k: v.view(torch.uint8) for k, v in state.items()})
    assert {name for name, _ in report.files} == set(os.listdir(folder / "out"))
    assert all(size == (folder / "out" / name).stat().st_size for name, size in report.files)
    where = {key: name for name, keys in files.items() for key in keys}
    by_storage: dict[int, set[str]] = {}
    for key, value in state.items():
        if value.numel():
            by_storage.setdefault(value.data_ptr(), set()).add(where[key])
    assert all(len(names) == 1 for names in by_storage.values())
    for keys in files.values():
        distinct = {state[key].data_ptr() if format == "torch" and state[key].numel() else key: state[key].nbytes for key in keys}
        assert sum(distinct.values()) <= most or len({state[key].data_ptr() for key in keys}) == 1
    if format == "torch" or not tied:  # safetensors gets a tied tensor twice, which counts
        theirs = split_torch_state_dict_into_shards(
            {key: value for key, value in state.items() if value.numel()} if tied else state,
            filename_pattern=PATTERNS[format],
            max_shard_size=f"{most / 1000}KB",
        )
        if not any(value.numel() == 0 for value in state.values()):
            assert {name: set(keys) for name, keys in files.items()} == {k: set(v) for k, v in theirs.filename_to_tensors.items()}
            index = folder / "out" / (PATTERNS[format].format(suffix="") + ".index.json")
            assert not index.exists() or json.loads(index.read_text())["metadata"] == theirs.metadata


def _read(folder: Path, key: str) -> Any:
    import numpy

    from ckptsurgeon.streaming.reading import Reader

    checkpoint = cs.open(folder)
    with Reader([checkpoint]) as reader:
        return numpy.frombuffer(bytes(reader.read(checkpoint[key])), dtype=numpy.uint8).copy()


@pytest.mark.parametrize(("size", "count"), [("1KB", 4), ("1KiB", 2), (1024, 2), ("0.0005MB", 4), ("1GB", 1)])
def test_sizes_are_powers_of_1000_and_with_an_i_of_1024(size: int | str, count: int, tmp_path: Path) -> None:
    torch.save({f"t{number}": torch.zeros(512, dtype=torch.uint8) for number in range(4)}, tmp_path / "in.pt")
    cs.merge(tmp_path / "in.pt", None, tmp_path / "out", max_shard_size=size)
    _, files = read_folder(tmp_path / "out")
    assert len(files) == count and (count > 1 or [*files] == ["model.safetensors"])


@pytest.mark.parametrize("size", ["many", "0", 0, "-5GB", "5 XB"])
def test_what_is_no_size(size: int | str, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "in.pt")
    with pytest.raises(SettingsError, match="is no size"):
        cs.merge(tmp_path / "in.pt", None, tmp_path / "out", max_shard_size=size)


def test_a_folder_as_the_output_means_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"w": torch.ones(2)}, "in.pt")
    os.mkdir("there")
    for output, names in (("new/", ["model.safetensors"]), ("there", ["model.safetensors"])):
        cs.merge("in.pt", None, output)
        assert os.listdir(output) == names
    cs.merge("in.pt", None, "there", format="torch", overwrite=True)
    assert os.listdir("there") == ["pytorch_model.bin"]


@pytest.mark.parametrize("name", ["out.pt", "out.safetensors", "plain"])
def test_a_path_of_a_file_is_not_made_a_folder(name: str, tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "in.pt")
    (tmp_path / "plain").write_bytes(b"mine")
    with pytest.raises(OutputError, match="names a file"):
        cs.merge(tmp_path / "in.pt", None, tmp_path / name, max_shard_size="5GB")
    assert sorted(os.listdir(tmp_path)) == ["in.pt", "plain"]


def test_the_plan_has_the_size_on_record_and_apply_follows_it(tmp_path: Path) -> None:
    torch.save({f"t{number}": torch.zeros(100) for number in range(4)}, tmp_path / "in.pt")
    plan = cs.plan(tmp_path / "in.pt", max_shard_size="400B")
    assert plan.max_shard_size == 400 and "Shards of at most 400" in str(plan)
    (tmp_path / "plan.json").write_text(plan.to_json())
    cs.apply(tmp_path / "plan.json", tmp_path / "out")
    assert len(read_folder(tmp_path / "out")[1]) == 4
    with pytest.raises(OutputError, match="names a file"):
        cs.apply(tmp_path / "plan.json", tmp_path / "out.pt")
    cs.apply(tmp_path / "plan.json", tmp_path / "two", max_shard_size="1KB")
    assert len(read_folder(tmp_path / "two")[1]) == 2


def test_the_same_shards_again_byte_for_byte_each_with_its_record(tmp_path: Path) -> None:
    torch.save({f"t{number}": torch.zeros(100) for number in range(4)}, tmp_path / "in.pt")
    for format in PATTERNS:
        for name in ("one", "two"):
            cs.merge(tmp_path / "in.pt", None, tmp_path / f"{name}-{format}", format=format, max_shard_size=800)
        one, two = ({p.name: p.read_bytes() for p in sorted((tmp_path / f"{name}-{format}").iterdir())} for name in ("one", "two"))
        assert one == two and len(one) == 3
        records = [cs.open(tmp_path / f"one-{format}" / name).provenance for name in one if not name.endswith(".json")]
        assert len(records) == 2 and records[0] == records[1] and records[0]["fresh"] == []
        assert cs.open(tmp_path / f"one-{format}").provenance == records[0]


@pytest.mark.parametrize("tied", ["copy", "alias"])
def test_tied_keys_of_a_model_are_in_one_shard_and_load(tied: str, tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(support.NETS)
    spec = f"{tmp_path / 'nets.py'}:Net"
    space: dict[str, Any] = {}
    exec(support.NETS, space)
    torch.manual_seed(3)
    model = space["Net"]()
    torch.save(model.state_dict(), tmp_path / "in.pt")
    report = cs.merge(tmp_path / "in.pt", spec, tmp_path / "out", max_shard_size=120, tied=tied)
    _, files = read_folder(tmp_path / "out")
    home = next(keys for keys in files.values() if "embed.weight" in keys)
    assert ("out.weight" in home) is (tied == "copy") and len(files) > 3
    assert report.verification is not None and report.verification.ok and report.verification.bitwise
    assert cs.verify(tmp_path / "out", spec).ok
    fresh = space["Net"]()
    cs.transfer(tmp_path / "out", fresh)
    support.same(fresh.state_dict(), model.state_dict())


def test_values_that_are_no_tensors_stand_in_the_first_shard_of_torch_files(tmp_path: Path) -> None:
    state = {"a.weight": torch.ones(40), "a._extra_state": {"scale": 2}, "b.weight": torch.ones(40)}
    torch.save(state, tmp_path / "in.pt")
    cs.merge(tmp_path / "in.pt", None, tmp_path / "out", format="torch", max_shard_size=160)
    found, files = read_folder(tmp_path / "out")
    assert found["a._extra_state"] == {"scale": 2} and [len(keys) for keys in files.values()] == [2, 1]
    opened = cs.open(tmp_path / "out")
    assert opened.entries == {"a._extra_state": {"scale": 2}} and set(opened) == {"a.weight", "b.weight"}
    with pytest.raises(OutputError, match="holds nothing else"):
        cs.merge(tmp_path / "in.pt", None, tmp_path / "safe", max_shard_size=160)


def test_casts_of_all_shards_are_refused_at_once_and_nothing_is_left(tmp_path: Path) -> None:
    torch.save({f"t{number}": torch.full((100,), 1e9) for number in range(4)}, tmp_path / "in.pt")
    with pytest.raises(CastError) as caught:
        cs.merge(tmp_path / "in.pt", None, tmp_path / "out", max_shard_size=400, dtype="F16")
    assert [problem.partition(":")[0] for problem in caught.value.problems] == ["t0", "t1", "t2", "t3"]
    assert os.listdir(tmp_path) == ["in.pt"]
    report = cs.merge(tmp_path / "in.pt", None, tmp_path / "out", max_shard_size=400, dtype="BF16")
    support.same(read_folder(tmp_path / "out")[0], {f"t{number}": torch.full((100,), 1e9).bfloat16() for number in range(4)})
    assert [cast.key for cast in report.casts] == ["t0", "t1", "t2", "t3"]


def test_a_training_checkpoint_is_one_file(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(model.parameters())
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "in.pt")
    with pytest.raises(SettingsError, match="a folder gets weights alone"):
        cs.merge(tmp_path / "in.pt", torch.nn.Linear(2, 2), f"{tmp_path}/out/", with_optimizer=True, format="torch")


def test_resume_is_for_folders_and_for_what_is_proven(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "in.pt")
    with pytest.raises(SettingsError, match="none are written"):
        cs.merge(tmp_path / "in.pt", None, tmp_path / "out.pt", resume=True)
    with pytest.raises(SettingsError, match="--no-verify proves none"):
        cs.merge(tmp_path / "in.pt", None, f"{tmp_path}/out/", resume=True, verify=False)


def test_a_shard_that_is_damaged_as_it_is_written_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptsurgeon.storage import copying

    torch.save({f"t{number}": torch.full((100,), float(number)) for number in range(4)}, tmp_path / "in.pt")
    real, seen = copying.copy_range, []

    def wrong(source: Any, offset: int, output: int, place: int, count: int, *rest: Any) -> copying.Copied:
        copied = real(source, offset, output, place, count, *rest)
        seen.append(place)
        if len(seen) == 3:
            os.pwrite(output, b"\x55", place + 5)
        return copied

    monkeypatch.setattr(copying, "copy_range", wrong)
    with pytest.raises(VerificationError) as caught:
        cs.merge(tmp_path / "in.pt", None, tmp_path / "out", max_shard_size=400)
    assert caught.value.problems == ("t2: its bytes differ",) and str(tmp_path / "out") in str(caught.value)
    assert ".ckptsurgeon-" not in str(caught.value) and os.listdir(tmp_path) == ["in.pt"]


@pytest.mark.parametrize("format", [*PATTERNS])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_transformers_loads_the_folder(name: str, format: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    transformers = pytest.importorskip("transformers")
    from test_api_transformers import NETS

    (tmp_path / "nets.py").write_text(NETS)
    space: dict[str, Any] = {}
    exec(NETS, space)
    torch.manual_seed(1)
    model = space[name]()
    torch.save(model.state_dict(), tmp_path / "in.pt")
    report = cs.merge(tmp_path / "in.pt", f"{tmp_path / 'nets.py'}:{name}", tmp_path / "out", max_shard_size="3KB", format=format)
    assert report.verification is not None and report.verification.ok
    assert len(os.listdir(tmp_path / "out")) > 4
    model.config.save_pretrained(tmp_path / "out")
    loaded = type(model).from_pretrained(tmp_path / "out", weights_only=True)
    support.same(loaded.state_dict(), model.state_dict())
    assert transformers.__version__


def test_a_plan_with_another_thing_for_a_size_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "in.pt")
    plan = cs.plan(tmp_path / "in.pt", max_shard_size="1GB")
    broken = json.loads(plan.to_json())
    for size in (-1, "5GB", 1.5, True):
        (tmp_path / "plan.json").write_text(json.dumps({**broken, "max_shard_size": size}))
        with pytest.raises(PlanError, match="is not a whole plan"):
            cs.apply(tmp_path / "plan.json", tmp_path / "out")


@pytest.mark.parametrize("indexed", [True, False])
def test_one_shard_alone_says_what_to_give_instead(indexed: bool, tmp_path: Path) -> None:
    torch.save({f"{name}.w": torch.ones(100) for name in "abc"}, tmp_path / "in.pt")
    cs.merge(tmp_path / "in.pt", None, tmp_path / "out", max_shard_size=500)
    index = tmp_path / "out" / "model.safetensors.index.json"
    if not indexed:
        index.unlink()
    path = next(iter(sorted((tmp_path / "out").glob("*.safetensors"))))
    words = (
        f"is one shard of several; give {index} for" if indexed else "is one shard of several by its name; for the whole checkpoint give"
    )
    notes: list[str] = []
    cs.diff(path, tmp_path / "in.pt", note=notes.append)
    cs.diff(tmp_path / "in.pt", path, note=notes.append)
    assert len(notes) == 2 and all(note.startswith(f"{path} {words}") for note in notes)
    model = nn.ModuleDict({name: nn.ParameterDict({"w": nn.Parameter(torch.zeros(100))}) for name in "abc"})
    for report in (cs.merge(path, None, tmp_path / "one.pt"), cs.transfer(path, model)):
        assert any(row.level == "note" and words in row.message for row in report.findings)
    checked = cs.check(path)
    assert checked.ok and [(row.code, row.level) for row in checked.files[0].findings] == [("CK108", "note")]
    assert words in checked.files[0].findings[0].message


def test_a_whole_checkpoint_is_no_shard(tmp_path: Path) -> None:
    torch.save({f"{name}.w": torch.ones(100) for name in "abc"}, tmp_path / "in.pt")
    cs.merge(tmp_path / "in.pt", None, tmp_path / "out", max_shard_size=500)
    cs.merge(tmp_path / "in.pt", None, tmp_path / "model-00001-of-00001.safetensors")
    notes: list[str] = []
    for path in (tmp_path / "out", tmp_path / "model-00001-of-00001.safetensors"):
        cs.diff(path, tmp_path / "in.pt", note=notes.append)
        assert not cs.check(path).files[0].findings
    assert not notes
