"""`match` from Python: links, rules and text; and `plan`, `merge` and `transfer` that match by themselves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import ckptsurgeon as cs
from ckptsurgeon.rules.rulefile import parse_rules
from ckptsurgeon.tensors import Checkpoint, TensorMeta, contiguous_stride


class Here(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 16)
        self.blocks = nn.ModuleList(nn.ModuleDict({"norm": nn.LayerNorm(16), "fc": nn.Linear(16, 16)}) for _ in range(3))


class There(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(4, 16)
        self.layers = nn.Sequential(*(nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 16)) for _ in range(3)))
        self.head = nn.Linear(16, 2)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    torch.save(Here().state_dict(), tmp_path / "here.pt")
    return tmp_path / "here.pt"


def is_right(state: dict[str, torch.Tensor], source: dict[str, torch.Tensor]) -> bool:
    pairs = {"embed": "stem"} | {f"layers.{i}.{j}": f"blocks.{i}.{name}" for i in range(3) for j, name in enumerate(("norm", "fc"))}
    return all(
        torch.equal(state[f"{one}.{leaf}"], source[f"{other}.{leaf}"]) for one, other in pairs.items() for leaf in ("weight", "bias")
    )


def test_the_rules_are_those_of_the_text_and_lead_to_the_same(saved: Path, tmp_path: Path) -> None:
    found = cs.match(saved, There())
    assert found.refusal() is None and len(found.certain) == 14 and found.unmatched == ("head.weight", "head.bias")
    assert parse_rules(found.toml, "r") == found.rules
    assert str(found).startswith(f"{saved} → There\n")
    (tmp_path / "rules.toml").write_text(found.toml)
    one, other = There(), There()
    cs.transfer(saved, one, rules=found.rules)
    cs.transfer(saved, other, rules=tmp_path / "rules.toml")
    assert is_right(one.state_dict(), torch.load(saved)) and is_right(other.state_dict(), torch.load(saved))


def test_transfer_matches_by_itself_from_a_file_and_from_memory(saved: Path) -> None:
    for source in (saved, torch.load(saved), cs.open(saved)):
        model = There()
        report = cs.transfer(source, model, match=True)
        assert report.fresh == ("head.weight", "head.bias") and is_right(model.state_dict(), torch.load(saved))


def test_plan_and_merge_match_by_themselves(saved: Path, tmp_path: Path) -> None:
    made = cs.plan(saved, There(), match=True)
    assert made.coverage.counts == (14, 16)
    assert all("(matched: " in step.reason for step in made.steps if step.sources)
    assert cs.merge(saved, There(), tmp_path / "out.pt", match=True).coverage.counts == (14, 16)
    assert is_right(torch.load(tmp_path / "out.pt"), torch.load(saved))


def test_a_refusal_raises_where_a_model_would_be_filled_and_is_told_where_one_looks(saved: Path) -> None:
    other = nn.Conv2d(3, 7, 5)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    found = cs.match(saved, other)
    assert found.refusal() is not None and found.refusal(0.0) is not None
    with pytest.raises(cs.CheckpointError, match="too little in common") as caught:
        cs.transfer(saved, other, match=True)
    assert caught.value.exit_code == 1 and caught.value.hint
    assert all(torch.equal(value, before[key]) for key, value in other.state_dict().items())


def test_tied_weights_of_the_target_get_one_source(tmp_path: Path) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte, self.body = nn.Embedding(50, 8), nn.Linear(8, 8)
            self.lm_head = nn.Linear(8, 50, bias=False)
            self.lm_head.weight = self.wte.weight

    torch.save({"emb.weight": torch.randn(50, 8), "mid.weight": torch.randn(8, 8), "mid.bias": torch.randn(8)}, tmp_path / "a.pt")
    model = Tied()
    report = cs.transfer(tmp_path / "a.pt", model, match=True)
    assert report.fresh == () and torch.equal(model.lm_head.weight, torch.load(tmp_path / "a.pt")["emb.weight"])
    assert model.lm_head.weight is model.wte.weight


def test_what_goes_wrong_is_an_error_of_ours(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(cs.CheckpointError, match="no match is asked for"):
        cs.plan(saved, There(), accept_uncertain=True)
    with pytest.raises(cs.CheckpointError, match="share that outputs may differ"):
        cs.match(saved, There(), forward="a:b", source_model=There(), tolerance=2)
    with pytest.raises(cs.CheckpointError, match="needs both"):
        cs.match(saved, There(), forward="a:b")
    with pytest.raises(cs.CheckpointError, match="does not exist"):
        cs.match(tmp_path / "gone.pt", There())


def test_forward_with_live_models(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "given.py").write_text("import torch\n\ndef inputs():\n    return torch.ones(2, 3)\n")
    torch.manual_seed(3)
    one, other = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5)), nn.Sequential()
    for name, layer in (("first", nn.Linear(3, 4)), ("act", nn.ReLU()), ("last", nn.Linear(4, 5))):
        other.add_module(name, layer)
    torch.save(one.state_dict(), "seq.pt")
    found = cs.match("seq.pt", other, source_model=one, forward="given:inputs")
    assert found.forward is not None and found.forward.same
    ((name, difference, scale),) = found.forward.outputs
    assert name == "output" and difference == 0 and scale == pytest.approx(float(one(torch.ones(2, 3)).detach().abs().max()))
    wrong = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 5))
    assert not cs.match("seq.pt", wrong, source_model=one, forward="given:inputs").forward.same


@pytest.mark.slow
def test_large_sides_are_said_to_take_a_while() -> None:
    """A mixture of experts of a thousand tensors: how far it is says what is being done."""

    def skeleton(path: str, experts: int) -> Checkpoint:
        keys = [f"layers.{i}.{path}.{e}.{w}.weight" for i in range(20) for e in range(experts) for w in ("gate", "up", "down")]
        tensors = {key: TensorMeta(key, "F32", (4, 2), contiguous_stride((4, 2))) for key in keys}
        return Checkpoint(f"{path}.json", "skeleton", path, tensors, kind="skeleton")

    for experts in (20, 3):
        for verb in (cs.match, cs.diff):
            phases: list[cs.Progress] = []
            verb(skeleton("mlp.experts", experts), skeleton("moe.experts", experts), progress=phases.append)
            assert ("matching", 60 * experts, "tensors") in {(event.phase, event.total, event.unit) for event in phases}
