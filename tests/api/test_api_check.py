"""`check`, `verify` and `diff` as verbs: every finding of every file at once, and a target of every kind."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import api_support as support
import pytest
import safetensors.torch
import torch

import ckptsurgeon as cs
from ckptsurgeon.errors import ArgumentError, CheckpointError
from ckptsurgeon.formats.plain.skeleton import to_json


def codes(report: object, number: int = 0) -> list[tuple[str, str | None]]:
    return [(finding.code, finding.key) for finding in report.files[number].findings]  # type: ignore[attr-defined]


def test_good_files_of_every_format(tmp_path: Path) -> None:
    state = support.network().state_dict()
    spec = support.nets(tmp_path) + ":Net"
    (tmp_path / "net.json").write_text(json.dumps(to_json(cs.skeleton(spec))))
    for name, make in support.SOURCES.items():
        folder = tmp_path / name
        folder.mkdir()
        path = make(state, folder)
        assert cs.check(path).ok, name
        if name != "lightning":  # its names have a prefix, so that it does not load as it is
            for against in (spec, tmp_path / "net.json", support.network(), cs.skeleton(spec)):
                assert cs.check(path, against=against).ok, name


def test_bad_files_are_findings_beside_the_good(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "good.pt")
    data = (tmp_path / "good.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(data[:-100])
    (tmp_path / "empty.pt").write_bytes(b"")
    (tmp_path / "page.pt").write_text("<!DOCTYPE html><html></html>")
    torch.save({"w": torch.ones(2), "config": Path("x")}, tmp_path / "unsafe.pt")
    names = ["good.pt", "cut.pt", "empty.pt", "page.pt", "unsafe.pt", "missing.pt"]
    report = cs.check([tmp_path / name for name in names])
    assert [file.ok for file in report.files] == [True] + [False] * 5
    assert not report.ok
    assert codes(report, 4)[0][0] == "CK201"
    assert codes(report, 5) == [("CK101", None)]
    assert "6 files checked, 5 not good" in str(report)


def test_what_does_not_fit(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(1), "h": torch.ones(1).half()}, tmp_path / "in.pt")
    goal = {"a": torch.ones(2), "b": torch.ones(4), "d": torch.ones(1), "h": torch.ones(1), "x._extra_state": 3}
    report = cs.check(tmp_path / "in.pt", against=goal)
    assert codes(report) == [("CK301", "d"), ("CK301", "x._extra_state"), ("CK302", "c"), ("CK303", "b"), ("CK304", "h")]
    assert [finding.level for finding in report.files[0].findings] == ["error"] * 4 + ["warning"]


def test_what_is_unsafe_is_told_even_where_the_root_is_not_clear(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(2)}, "ema": {"w": torch.zeros(2)}, "config": Path("x")}, tmp_path / "in.pt")
    report = cs.check(tmp_path / "in.pt", against={"w": torch.ones(2)})
    found = [code for code, _ in codes(report)]
    assert "CK201" in found and "CK104" in found
    assert [code for code, _ in codes(cs.check(tmp_path / "in.pt", against={"w": torch.ones(2)}, root="ema"))].count("CK104") == 0


def test_a_tied_key_may_lack_in_safetensors_only(tmp_path: Path) -> None:
    net = support.network()
    state = {key: tensor for key, tensor in net.state_dict().items() if key != "out.weight"}
    torch.save(state, tmp_path / "in.pt")
    safetensors.torch.save_model(net, str(tmp_path / "in.safetensors"))
    assert cs.check(tmp_path / "in.safetensors", against=net).ok
    safetensors.torch.load_model(support.network(seed=2), tmp_path / "in.safetensors", strict=True)
    assert codes(cs.check(tmp_path / "in.pt", against=net)) == [("CK301", "out.weight")]
    with pytest.raises(RuntimeError, match=r"out\.weight"):
        support.network(seed=2).load_state_dict(torch.load(tmp_path / "in.pt", weights_only=True), strict=True)


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    state = {
        "fine": torch.ones(3),
        "nan": torch.tensor([1.0, float("nan")]),
        "inf": torch.tensor([float("inf")]).half().expand(3),
        "n": torch.arange(3),
    }
    torch.save(state, tmp_path / "in.pt")
    assert cs.check(tmp_path / "in.pt").ok
    report = cs.check(tmp_path / "in.pt", finite=True)
    assert codes(report) == [("CK401", "nan"), ("CK401", "inf")]
    assert "1 value" in report.files[0].findings[0].message and "3 value" in report.files[0].findings[1].message


def test_moments_that_are_not_finite_are_found_as_a_merge_finds_them(tmp_path: Path) -> None:
    net = torch.nn.Linear(2, 2)
    optimizer = torch.optim.Adam(net.parameters())
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    whole = {"model": net.state_dict(), "optimizer": optimizer.state_dict()}
    torch.save(whole, tmp_path / "in.pt")
    assert cs.check(tmp_path / "in.pt", finite=True).ok
    optimizer.state[net.weight]["exp_avg"][0, 0] = float("nan")
    torch.save(whole, tmp_path / "in.pt")
    assert codes(cs.check(tmp_path / "in.pt", finite=True)) == [("CK401", "optimizer.state.0.exp_avg")]
    assert cs.check(tmp_path / "in.pt").ok
    with pytest.raises(cs.VerificationError, match="exp_avg") as caught:
        cs.merge(tmp_path / "in.pt", net, tmp_path / "out.pt", with_optimizer=True, finite=True)
    assert "check --finite" in str(caught.value.hint)


def test_verify_against_what_is_no_model_says_what_it_did(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "in.pt")
    found = cs.verify(tmp_path / "in.pt", {"w": torch.ones(2)})
    assert found.ok and not found.bitwise
    assert "names" in {finding.code for finding in found.findings}
    assert not cs.verify(tmp_path / "in.pt", {"w": torch.ones(3)}).ok


def test_sources_and_targets_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "dump.pkl").write_bytes(pickle.dumps({"a": 1}))
    for source in (tmp_path / "dump.pkl", tmp_path / "missing.pt", tmp_path, 3, "model:Net"):
        with pytest.raises(CheckpointError) as caught:
            cs.diff(source, {"w": torch.ones(1)})
        assert caught.value.hint or caught.value.problems
    with pytest.raises(ArgumentError):
        cs.skeleton(3)


def test_no_path_at_all_is_not_good() -> None:
    """A pattern of a shell or of glob that matched nothing: the gate was not run."""
    with pytest.raises(CheckpointError, match="no path is given"):
        cs.check([])


def test_one_pattern_is_as_good_as_a_list_of_one(tmp_path: Path) -> None:
    torch.save({"a.b.w": torch.ones(2), "c": torch.ones(2)}, tmp_path / "in.pt")
    for pattern in ("a.**", "**"):
        assert cs.inspect(tmp_path / "in.pt", pattern).to_text() == cs.inspect(tmp_path / "in.pt", [pattern]).to_text()


def test_the_verbs_take_paths_of_any_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"w": torch.ones(2)}, tmp_path / "in.pt")
    monkeypatch.chdir(tmp_path)
    for path in ("in.pt", Path("in.pt"), tmp_path / "in.pt"):
        assert len(cs.open(path)) == 1
        assert cs.check(path).ok
        assert cs.diff(path, path).same
