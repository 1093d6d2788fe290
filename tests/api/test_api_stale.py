"""A plan is stale when a source or a target was saved anew with other values, in every format. The oracle is what the files hold."""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import api_support as support
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import ckptsurgeon as cs
from ckptsurgeon.cli import main
from ckptsurgeon.errors import PlanError, StaleError
from ckptsurgeon.streaming import sampling

State = dict[str, torch.Tensor]


def _zip_without(state: State, path: Path) -> None:
    with support.without_checksums():
        torch.save(state, path)


def _shards(state: State, path: Path) -> None:
    path.mkdir(exist_ok=True)
    names = {key: f"model-{number:05}-of-00002.safetensors" for number, key in zip((1, 2), ("first", "last"), strict=True)}
    for key, name in names.items():
        save_file({key: state[key]}, path / name)
    (path / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))


def _deflated_without(state: State, path: Path) -> None:
    """Deflated storages of a file without checksums: every CRC in zipfile's headers is made zero."""
    torch.save(state, path)
    with zipfile.ZipFile(path) as archive:
        entries = [(info.filename, archive.read(info)) for info in archive.infolist()]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in entries:
            archive.writestr(name, data, zipfile.ZIP_DEFLATED if "/data/" in name else zipfile.ZIP_STORED)
        infos = [(info.header_offset, info.CRC) for info in archive.infolist()]
    raw = path.read_bytes()
    for _, crc in infos:
        raw = raw.replace(crc.to_bytes(4, "little"), bytes(4)) if crc else raw
    path.write_bytes(raw)


FORMATS: dict[str, Callable[[State, Path], None]] = {
    "safetensors": save_file,
    "zip": torch.save,
    "zip without checksums": _zip_without,
    "deflated without checksums": _deflated_without,
    "legacy": lambda state, path: torch.save(state, path, _use_new_zipfile_serialization=False),
    "shards": _shards,
}


def state(value: float = 1.0) -> State:
    return {"first": torch.arange(24.0).view(6, 4) * value, "last": torch.arange(24.0).view(6, 4) - value}


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Takes every file for one that is too large to be sampled whole."""
    monkeypatch.setattr(sampling, "WHOLE", 0)


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("changed", ["source", "target"])
@pytest.mark.parametrize("save", FORMATS.values(), ids=FORMATS)
def test_what_is_saved_anew_with_other_values_makes_a_plan_stale(
    save: Callable[[State, Path], None], changed: str, full: bool, tmp_path: Path
) -> None:
    save(state(), tmp_path / "source")
    save({**state(), "last": torch.zeros(3)}, tmp_path / "target")
    plan = cs.plan(tmp_path / "source", tmp_path / "target", full=full)
    (tmp_path / "plan.json").write_text(json.dumps(_to_json(plan)))
    for given in (plan, tmp_path / "plan.json"):
        cs.apply(given, tmp_path / "out.pt", overwrite=True)
    one = {**state(5.0), **({"last": torch.ones(3)} if changed == "target" else {})}
    save(one, tmp_path / changed)
    for given in (plan, tmp_path / "plan.json"):
        with pytest.raises(StaleError) as caught:
            cs.apply(given, tmp_path / "new.pt")
        assert caught.value.path and caught.value.path.startswith(str(tmp_path / changed)) and caught.value.hint
        assert not (tmp_path / "new.pt").exists()


def _to_json(plan: Any) -> dict[str, Any]:
    from ckptsurgeon.planning import planfile

    return planfile.to_json(plan)


SAME_HEADER = ("safetensors", "shards", "zip without checksums", "deflated without checksums")  # torch's others have ids in their headers


@pytest.mark.parametrize("name", SAME_HEADER)
def test_what_is_saved_anew_with_the_same_values_does_not(name: str, tmp_path: Path) -> None:
    FORMATS[name](state(), tmp_path / "source")
    plan = cs.plan(tmp_path / "source")
    FORMATS[name](state(), tmp_path / "source")
    cs.apply(plan, tmp_path / "out.pt")


@pytest.mark.parametrize("name", ["safetensors", "legacy", "zip without checksums"])
@pytest.mark.parametrize("key", ["first", "last"])
def test_other_values_under_the_very_same_header(key: str, name: str, tmp_path: Path) -> None:
    path = tmp_path / "source"
    FORMATS[name](state(), path)
    plan, before = cs.plan(path), cs.inspect(path).fingerprint
    raw, value = path.read_bytes(), state()[key]
    path.write_bytes(raw.replace(value.numpy().tobytes(), (value * 2).numpy().tobytes()))
    assert cs.inspect(path).fingerprint == before
    with pytest.raises(StaleError, match="other values"):
        cs.apply(plan, tmp_path / "out.pt")


@pytest.mark.parametrize("save", [save_file, FORMATS["zip without checksums"]])
@pytest.mark.usefixtures("large")
def test_of_five_thousand_tensors_the_last_ones_are_always_looked_at(save: Callable[..., None], tmp_path: Path) -> None:
    many = {f"w{number}": torch.full((4,), float(number)) for number in range(5000)}
    save(many, tmp_path / "source")
    plan = cs.plan(tmp_path / "source")
    save({**many, "w4999": many["w4999"] + 1}, tmp_path / "source")
    with pytest.raises(StaleError):
        cs.apply(plan, tmp_path / "out.pt")


@pytest.mark.parametrize("save", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("place", [0, 13, 999])
def test_of_a_small_file_every_value_counts(place: int, save: Callable[[State, Path], None], tmp_path: Path) -> None:
    value = {"first": torch.zeros(1000), "last": torch.ones(3)}
    save(value, tmp_path / "source")
    plan = cs.plan(tmp_path / "source")
    value["first"][place] = 1
    save(value, tmp_path / "source")
    with pytest.raises(StaleError):
        cs.apply(plan, tmp_path / "out.pt")


@pytest.mark.usefixtures("large")
def test_a_change_that_the_sample_misses_is_found_by_full(tmp_path: Path) -> None:
    big = {"w": torch.zeros(1000)}
    save_file(big, tmp_path / "source")
    plain, full = cs.plan(tmp_path / "source"), cs.plan(tmp_path / "source", full=True)
    big["w"][3] = 1
    save_file(big, tmp_path / "source")
    cs.apply(plain, tmp_path / "out.pt")
    with pytest.raises(StaleError):
        cs.apply(full, tmp_path / "new.pt")


@pytest.mark.usefixtures("large")
def test_the_sample_is_what_the_readme_says(tmp_path: Path) -> None:
    """Computed by safetensors and hashlib."""
    save_file({"a": torch.arange(1000, dtype=torch.float64), "b": torch.arange(5, dtype=torch.int16), "c": torch.empty(0)}, tmp_path / "it")
    found = hashlib.sha256()
    with safe_open(tmp_path / "it", "pt") as file:
        for key in cs.open(tmp_path / "it"):
            raw = file.get_tensor(key).numpy().tobytes()
            size = min(64, len(raw))
            found.update(raw[(len(raw) - size) // 2 :][:size])
    plan = _to_json(cs.plan(tmp_path / "it", full=True))
    assert plan["version"] == 1 and plan["sources"][0]["sample"] == found.hexdigest()
    assert plan["sources"][0]["sha256"] == hashlib.sha256((tmp_path / "it").read_bytes()).hexdigest()
    assert plan["sources"][0]["fingerprint"] == cs.inspect(tmp_path / "it").fingerprint  # the header's, as inspect has it


def test_where_the_header_has_checksums_no_data_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save(state(), tmp_path / "source.pt")
    save_file(state(), tmp_path / "target.safetensors")
    rows = _to_json(cs.plan(tmp_path / "source.pt", tmp_path / "target.safetensors"))
    assert "sample" not in rows["sources"][0] and "sample" in rows["target"] and "sha256" not in rows["target"]


@pytest.mark.parametrize("save", FORMATS.values(), ids=FORMATS)
def test_only_planning_and_applying_look_at_data(
    save: Callable[[State, Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("source", "target"):
        save(state(), tmp_path / name)
    taken: list[str] = []
    for name in ("sample", "digest"):
        real = getattr(sampling, name)
        monkeypatch.setattr(f"ckptsurgeon.api._stale.{name}", lambda found, real=real, name=name: taken.append(name) or real(found))
    cs.inspect(tmp_path / "source")
    cs.diff(tmp_path / "source", tmp_path / "target")
    cs.match(tmp_path / "source", tmp_path / "target")
    cs.check(tmp_path / "source")
    assert not taken
    plan = cs.plan(tmp_path / "source", tmp_path / "target")
    assert set(taken) == {"sample"}
    cs.apply(plan, tmp_path / "out.pt")


@pytest.mark.usefixtures("large")
def test_planning_reads_no_more_than_the_sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({f"w{number}": torch.zeros(10_000) for number in range(50)}, tmp_path / "source")
    header = 8 + int.from_bytes((tmp_path / "source").read_bytes()[:8], "little")
    read: list[int] = []
    for name in ("pread", "preadv"):
        real = getattr(os, name)

        def counting(fd: int, what: Any, offset: int, real: Any = real) -> Any:
            if offset >= header and what != 22 + 0xFFFF:  # where the end of a zip would stand, which no file may be as well
                read.append(what if isinstance(what, int) else sum(map(len, what)))
            return real(fd, what, offset)

        monkeypatch.setattr(os, name, counting)
    for look in (cs.inspect, cs.check, lambda path: cs.diff(path, path)):
        look(tmp_path / "source")
    assert not read
    cs.plan(tmp_path / "source")
    assert read == [64] * 50


def test_the_choice_of_keys() -> None:
    keys = [f"layer.{number}" for number in range(10_000)]
    chosen = sampling.chosen(keys)
    assert len(chosen) == 4096 and chosen == sorted(chosen, key=keys.index) and chosen[-64:] == keys[-64:] and chosen[0] == keys[0]
    places = [keys.index(key) for key in chosen]
    assert max(after - before for before, after in pairwise(places)) <= 3  # spread evenly
    by_text = sorted(keys)
    assert {f"layer.{number}" for number in range(9990, 10_000)} <= set(sampling.chosen(by_text))
    assert sampling.chosen(keys) == chosen and sampling.chosen(keys[:4096]) == keys[:4096]


def test_a_plan_without_a_sample_is_followed_and_a_wrong_one_is_no_plan(tmp_path: Path) -> None:
    """As an earlier version wrote it."""
    save_file(state(), tmp_path / "source")
    value = _to_json(cs.plan(tmp_path / "source"))
    sample = value["sources"][0].pop("sample")
    (tmp_path / "plan.json").write_text(json.dumps(value))
    cs.apply(tmp_path / "plan.json", tmp_path / "out.pt")
    value["sources"][0]["sample"] = sample[:-1]
    (tmp_path / "plan.json").write_text(json.dumps(value))
    with pytest.raises(PlanError, match="sample"):
        cs.load_plan(tmp_path / "plan.json")


def test_the_command_line_ends_with_2(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> int:
        monkeypatch.setattr("sys.argv", ["ckptsurgeon", *words])
        return main._run(False)

    save_file(state(), "s.safetensors")
    assert run("plan", "s.safetensors", "-o", "plan.json", "--full") == 0
    assert run("apply", "plan.json", "-o", "out.pt") == 0
    save_file({**state(), "last": state()["last"] + 1}, "s.safetensors")
    assert run("apply", "plan.json", "-o", "new.pt") == 2
    assert "other values" in capsys.readouterr().err
