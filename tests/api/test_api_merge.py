"""`merge` end to end: every source format, every kind of target, every output, judged by torch's and safetensors' own readers."""

from __future__ import annotations

import json
import os
import zipfile
from collections import OrderedDict
from pathlib import Path

import api_support as support
import pytest
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import ckptsurgeon as cs
from ckptsurgeon.dtypes import TABLE
from ckptsurgeon.errors import CheckpointError, OutputError, PlanError, UnsafeError

OUTPUTS = ("out.pt", "out.safetensors")
TARGETS = ("model", "skeleton", "checkpoint", "none")


def target_of(kind: str, folder: Path, state: dict[str, Tensor]) -> str | None:
    if kind == "none":
        return None
    if kind == "checkpoint":
        torch.save(OrderedDict((key, torch.zeros_like(tensor)) for key, tensor in state.items()), folder / "target.pt")
        return str(folder / "target.pt")
    spec = support.nets(folder) + ":Net"
    if kind == "model":
        return spec
    from ckptsurgeon.formats.plain.skeleton import to_json

    (folder / "net.json").write_text(json.dumps(to_json(cs.skeleton(spec))))
    return str(folder / "net.json")


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", support.SOURCES)
def test_every_source_target_and_output(source: str, target: str, output: str, tmp_path: Path) -> None:
    net = support.network()
    state = net.state_dict()
    path = support.SOURCES[source](state, tmp_path)
    out = tmp_path / output
    report = cs.merge(path, target_of(target, tmp_path, state), out)
    prefix = "model." if source == "lightning" and target == "none" else ""
    expected = {prefix + key: tensor for key, tensor in state.items()}
    support.same(support.load(out), expected)
    assert set(report.transferred) == set(expected)
    assert report.fresh == report.kept == report.dropped == ()
    assert report.coverage.tensors == report.coverage.elements == 1.0
    assert report.nbytes == out.stat().st_size
    assert report.output == str(out)
    if not prefix:
        fresh = support.network(seed=5)
        fresh.load_state_dict(support.load(out), strict=True)
        support.same(fresh.state_dict(), state)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("source", ["legacy", "zip", "training"])
def test_torch_metadata_and_the_batch_norm_version_are_kept(source: str, target: str, tmp_path: Path) -> None:
    state = support.network().state_dict()
    path = support.SOURCES[source](state, tmp_path)
    cs.merge(path, target_of(target, tmp_path, state), tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert type(found) is OrderedDict
    assert {key: dict(value) for key, value in found._metadata.items()} == {key: dict(value) for key, value in state._metadata.items()}
    assert found._metadata["norm"]["version"] == 2


def test_a_model_target_gives_its_own_metadata_to_a_source_without(tmp_path: Path) -> None:
    state = support.network().state_dict()
    path = support.SOURCES["safetensors"](state, tmp_path)
    cs.merge(path, support.nets(tmp_path) + ":Net", tmp_path / "out.pt")
    assert torch.load(tmp_path / "out.pt", weights_only=True)._metadata["norm"] == {"version": 2}


def test_ties_stay_ties_in_a_zip(tmp_path: Path) -> None:
    path = support.SOURCES["legacy"](support.network().state_dict(), tmp_path)
    for name, target in (("a.pt", None), ("b.pt", support.nets(tmp_path) + ":Net")):
        report = cs.merge(path, target, tmp_path / name)
        for mmap in (False, True):
            found = torch.load(tmp_path / name, weights_only=True, mmap=mmap)
            assert found["embed.weight"].data_ptr() == found["out.weight"].data_ptr()
            assert len({tensor.untyped_storage().data_ptr() for tensor in found.values()}) == len(found) - 1
        assert not [finding for finding in report.findings if finding.code.startswith("tied")]
        with zipfile.ZipFile(tmp_path / name) as archive:
            assert archive.testzip() is None


def test_tied_keys_are_copies_in_safetensors_with_what_they_cost(tmp_path: Path) -> None:
    state = support.network().state_dict()
    path = support.SOURCES["zip"](state, tmp_path)
    report = cs.merge(path, support.nets(tmp_path) + ":Net", tmp_path / "out.safetensors")
    (finding,) = [finding for finding in report.findings if finding.code == "tied-copy"]
    assert finding.level == "note"
    assert {"embed.weight", "out.weight"} == {finding.key, "embed.weight"}
    assert f"costs {7 * 4 * 4} B" in finding.message
    support.network(seed=3).load_state_dict(safetensors.torch.load_file(tmp_path / "out.safetensors"), strict=True)


def test_tied_alias_is_what_the_library_opens(tmp_path: Path) -> None:
    net = support.network()
    path = support.SOURCES["zip"](net.state_dict(), tmp_path)
    out = tmp_path / "out.safetensors"
    report = cs.merge(path, support.nets(tmp_path) + ":Net", out, tied="alias")
    assert [finding.code for finding in report.findings if finding.code.startswith("tied")].count("tied-alias") == 1
    with safetensors.safe_open(out, "pt") as file:
        assert file.metadata()["out.weight"] == "embed.weight"
        assert "out.weight" not in set(file.keys())
    fresh = support.network(seed=9)
    missing, unexpected = safetensors.torch.load_model(fresh, out, strict=True)
    assert (list(missing), list(unexpected)) == ([], [])
    support.same(fresh.state_dict(), net.state_dict())


def test_only_the_ties_that_the_target_has_become_aliases(tmp_path: Path) -> None:
    weight = torch.randn(3, 3)
    torch.save({"a.weight": weight, "b.weight": weight}, tmp_path / "tied.pt")
    source = "from torch import nn\n\ndef apart():\n    return nn.ModuleDict({name: nn.Linear(3, 3, bias=False) for name in 'ab'})\n"
    spec = support.nets(tmp_path, source)
    cs.merge(tmp_path / "tied.pt", f"{spec}:apart", tmp_path / "out.safetensors", tied="alias")
    support.same(safetensors.torch.load_file(tmp_path / "out.safetensors"), {"a.weight": weight, "b.weight": weight})


def test_tied_takes_two_words(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="'both'"):
        cs.merge(support.PARAMS, None, tmp_path / "out.safetensors", tied="both")
    assert os.listdir(tmp_path) == []


def test_without_provenance_the_bytes_are_the_librarys(tmp_path: Path) -> None:
    state = {key: tensor.clone() for key, tensor in support.network().state_dict().items()}
    state["ключ with space"] = torch.randn(2).to(torch.bfloat16)
    state["eight"] = torch.randn(5).to(torch.float8_e4m3fn)
    state["empty"] = torch.zeros(0, 3)
    state["scalar"] = torch.tensor(True)
    torch.save(state, tmp_path / "in.pt")
    safetensors.torch.save_file(state, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    cs.merge(tmp_path / "in.pt", None, tmp_path / "ours.safetensors", provenance=False)
    cs.merge(tmp_path / "theirs.safetensors", None, tmp_path / "again.safetensors", provenance=False)
    theirs = (tmp_path / "theirs.safetensors").read_bytes()
    assert (tmp_path / "ours.safetensors").read_bytes() == theirs
    assert (tmp_path / "again.safetensors").read_bytes() == theirs


def odd_tensors() -> dict[str, Tensor]:
    base = torch.arange(60, dtype=torch.float32)
    big = torch.randn(6, 5, 4)
    return {
        "transposed": big.permute(2, 0, 1),
        "every other": base[::2],
        "view one": base[:20].view(4, 5),
        "view two": base[20:40].view(4, 5),
        "overlapping": base[10:30],
        "expanded": torch.randn(1, 3).expand(4, 3),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(3, 0, 2),
        "last": base[59:],
        "channels last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "nan": torch.tensor([float("nan"), -0.0, float("inf")]),
    }


@pytest.mark.parametrize("output", OUTPUTS)
@pytest.mark.parametrize("legacy", [False, True])
def test_every_layout(legacy: bool, output: str, tmp_path: Path) -> None:
    state = odd_tensors()
    torch.save(state, tmp_path / "in.pt", _use_new_zipfile_serialization=not legacy)
    report = cs.merge(tmp_path / "in.pt", None, tmp_path / output)
    support.same(support.load(tmp_path / output), state)
    assert any(finding.code == "overlap" for finding in report.findings)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.code)
def test_every_dtype(row: object, legacy: bool, tmp_path: Path) -> None:
    dtype = getattr(torch, row.torch)  # type: ignore[attr-defined]
    top = 2 if row.code == "BOOL" else 256  # type: ignore[attr-defined]
    raw = torch.randint(0, top, (12 * dtype.itemsize,), dtype=torch.uint8)
    state = {
        "dense": raw.view(dtype).view(3, 4),
        "turned": raw.flip(0).contiguous().view(dtype).view(3, 4).t(),
        "none": torch.empty(0, dtype=dtype),
    }
    torch.save(state, tmp_path / "in.pt", _use_new_zipfile_serialization=not legacy)
    cs.merge(tmp_path / "in.pt", None, tmp_path / "out.pt")
    support.same(support.load(tmp_path / "out.pt"), state)
    if row.safetensors:  # type: ignore[attr-defined]
        cs.merge(tmp_path / "in.pt", None, tmp_path / "out.safetensors")
        support.same(support.load(tmp_path / "out.safetensors"), state)
        cs.merge(tmp_path / "out.safetensors", None, tmp_path / "back.pt")
        support.same(support.load(tmp_path / "back.pt"), state)
    else:
        with pytest.raises(OutputError) as caught:
            cs.merge(tmp_path / "in.pt", None, tmp_path / "out.safetensors")
        assert caught.value.key in state
        assert not (tmp_path / "out.safetensors").exists()


@pytest.mark.parametrize("output", OUTPUTS)
def test_a_deflated_zip(output: str, tmp_path: Path) -> None:
    state = {**odd_tensors(), "large": torch.zeros(3 << 20), "noise": torch.randn(1 << 20)}
    torch.save(state, tmp_path / "in.pt")
    with zipfile.ZipFile(tmp_path / "in.pt") as stored, zipfile.ZipFile(tmp_path / "packed.pt", "w", zipfile.ZIP_DEFLATED) as packed:
        for name in stored.namelist():
            packed.writestr(name, stored.read(name))
    assert (tmp_path / "packed.pt").stat().st_size < (tmp_path / "in.pt").stat().st_size / 2
    cs.merge(tmp_path / "packed.pt", None, tmp_path / output)
    support.same(support.load(tmp_path / output), state)


EXTRA = """
import torch
from torch import nn


class Counter(nn.Module):
    def __init__(self, count=1):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.state = {"count": count, "names": ["a", "b"], "rate": float("nan"), "raw": b"\\x00\\xff", "pair": (1, None)}

    def get_extra_state(self):
        return self.state

    def set_extra_state(self, state):
        self.state = state


class Two(nn.Module):
    def __init__(self, count=5, more=False):
        super().__init__()
        self.one = Counter(count)
        self.two = Counter(count + 1)
        if more:
            self.three = Counter(99)
"""


def counters(**arguments: object) -> nn.Module:
    space: dict[str, object] = {}
    exec(EXTRA, space)
    return space["Two"](**arguments)  # type: ignore[operator, no-any-return]


def test_extra_state_is_carried_in_a_zip(tmp_path: Path) -> None:
    torch.save(counters(count=40).state_dict(), tmp_path / "in.pt")
    spec = support.nets(tmp_path, EXTRA) + ":Two(more=True)"
    report = cs.merge(tmp_path / "in.pt", spec, tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert found["one._extra_state"]["count"] == 40
    assert found["two._extra_state"] == found["two._extra_state"] | {"count": 41, "pair": (1, None), "raw": b"\x00\xff"}
    assert found["three._extra_state"]["count"] == 99  # the model's own
    assert report.fresh == ("three.weight",)
    counters(more=True).load_state_dict(found, strict=True)


def test_extra_state_is_refused_by_key_in_safetensors(tmp_path: Path) -> None:
    torch.save(counters().state_dict(), tmp_path / "in.pt")
    with pytest.raises(OutputError) as caught:
        cs.merge(tmp_path / "in.pt", None, tmp_path / "out.safetensors")
    assert caught.value.key == "one._extra_state"
    assert ".pt" in (caught.value.hint or "")
    assert sorted(os.listdir(tmp_path)) == ["in.pt"]


def test_an_extra_state_that_is_another_mapping_than_a_dict(tmp_path: Path) -> None:
    source = EXTRA.replace(
        'self.state = {"count"', 'from collections import OrderedDict\n        self.state = OrderedDict(x=1) or {"count"'
    )
    spec = support.nets(tmp_path, source)
    torch.save({"one.weight": torch.zeros(2)}, tmp_path / "in.pt")
    cs.merge(tmp_path / "in.pt", f"{spec}:Two", tmp_path / "out.pt")
    assert torch.load(tmp_path / "out.pt", weights_only=True)["two._extra_state"] == {"x": 1}


def test_extra_state_that_would_have_to_be_imported_is_refused(tmp_path: Path) -> None:
    state = counters().state_dict()
    state["one._extra_state"] = Path("x")
    torch.save(state, tmp_path / "in.pt")
    with pytest.raises(UnsafeError) as caught:
        cs.merge(tmp_path / "in.pt", None, tmp_path / "out.pt")
    assert "one._extra_state" in str(caught.value)
    report = cs.merge(tmp_path / "in.pt", None, tmp_path / "out.pt", drop="one._extra_state")
    assert set(report.transferred) == {"one.weight", "two.weight"}


@pytest.mark.parametrize("target", ["skeleton", "model file"])
def test_a_source_without_values_is_refused(target: str, tmp_path: Path) -> None:
    net = support.network()
    from ckptsurgeon.formats.plain.skeleton import to_json

    (tmp_path / "net.json").write_text(json.dumps(to_json(cs.skeleton(net))))
    source = tmp_path / "net.json" if target == "skeleton" else cs.skeleton(net)
    with pytest.raises(PlanError, match="no values behind it"):
        cs.merge(source, support.nets(tmp_path) + ":Net", tmp_path / "out.pt")
    assert not (tmp_path / "out.pt").exists()


def test_a_live_model_and_a_live_state_dict_as_target(tmp_path: Path) -> None:
    net = support.network(seed=4)
    state = {key: tensor.clone() for key, tensor in net.state_dict().items()}
    torch.save({key: tensor for key, tensor in support.network(seed=8).state_dict().items() if "head" not in key}, tmp_path / "in.pt")
    report = cs.merge(tmp_path / "in.pt", net, tmp_path / "out.pt")
    assert report.fresh == ("head.weight", "head.bias")
    assert torch.equal(support.load(tmp_path / "out.pt")["head.weight"], state["head.weight"])
    support.same(net.state_dict(), state)  # the model itself is left alone
    with pytest.raises(CheckpointError, match="no model is known"):
        cs.merge(tmp_path / "in.pt", state, tmp_path / "other.pt")
    cs.merge(tmp_path / "in.pt", state, tmp_path / "other.pt", init={"head.*": "zeros"})
    expected = {**torch.load(tmp_path / "in.pt", weights_only=True), "head.weight": torch.zeros(3, 4), "head.bias": torch.zeros(3)}
    support.same(support.load(tmp_path / "other.pt"), expected)


def test_rules_and_keyword_rules_both_hold(tmp_path: Path) -> None:
    from ckptsurgeon.rules.rules import Rule

    torch.save({"a": torch.ones(1), "b": torch.ones(2), "c": torch.ones(3)}, tmp_path / "in.pt")
    cs.merge(tmp_path / "in.pt", None, tmp_path / "out.pt", drop=["a"], rules=[Rule("rename", "b", "d")])
    assert set(support.load(tmp_path / "out.pt")) == {"c", "d"}


def test_a_checkpoint_opened_under_another_root_is_no_silent_choice(tmp_path: Path) -> None:
    torch.save({"model": {"w": torch.ones(2)}, "ema": {"w": torch.zeros(2)}}, tmp_path / "in.pt")
    source = cs.open(tmp_path / "in.pt", root="model")
    with pytest.raises(CheckpointError, match="under the root 'model'"):
        cs.merge(source, None, tmp_path / "out.pt", root="ema")
    cs.merge(source, None, tmp_path / "out.pt", root="model")
    assert torch.equal(support.load(tmp_path / "out.pt")["w"], torch.ones(2))


def test_what_else_a_training_checkpoint_held_is_reported(tmp_path: Path) -> None:
    path = support.SOURCES["training"](support.network().state_dict(), tmp_path)
    made = cs.plan(path, support.nets(tmp_path) + ":Net")
    assert {"epoch", "optimizer", "losses"} <= set(made.left_behind)


def test_what_else_the_sources_hold_is_told(tmp_path: Path) -> None:
    source, out = tmp_path / "run.pt", tmp_path / "out.pt"
    weights = {"w": torch.ones(2)}
    torch.save({"model": weights, "ema": {"w": torch.zeros(2)}, "epoch": 3, "stats": (torch.ones(3), torch.ones(1))}, source)
    report = cs.merge(source, None, out, root="model")
    assert report.left_behind == ("ema (1 tensor)", "epoch", "stats.0", "stats.1")
    assert report.to_dict()["left_behind"] == list(report.left_behind)
    assert "  left behind     4   ema (1 tensor), epoch, stats.* (2)" in str(report).splitlines()
    model = nn.ParameterDict({"w": torch.zeros(2)})
    assert cs.transfer(source, model, root="model").left_behind == report.left_behind
    again = cs.merge(out, None, tmp_path / "again.pt")
    assert again.left_behind == () and "left behind" not in str(again)
