"""Models that PEFT has wrapped: what was trained beside a frozen weight is never left out without a word. Oracle: peft, if installed."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from forked import program
from safetensors.torch import load_file, save_file
from torch import nn

import ckptsurgeon as cs
from ckptsurgeon.low_rank import is_factor, lost_factors, unwrapped


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.layers = nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(8, 8), "v_proj": nn.Linear(8, 6)}) for _ in range(2)])
        self.conv = nn.Conv1d(8, 8, 3)
        self.norm = nn.LayerNorm(8)
        self.score = nn.Linear(8, 3)


def wrapped(net: nn.Module) -> dict[str, torch.Tensor]:
    """What PEFT saves of a model with LoRA on its projections, and a head that is trained whole."""
    found = {}
    for key, value in net.state_dict().items():
        head, _, last = key.rpartition(".")
        if head.endswith("_proj"):
            found[f"base_model.model.{head}.base_layer.{last}"] = value
            if last == "weight":
                found[f"base_model.model.{head}.lora_A.default.weight"] = torch.randn(2, value.shape[1])
                found[f"base_model.model.{head}.lora_B.default.weight"] = torch.randn(value.shape[0], 2)
        elif head == "score":
            found[f"base_model.model.score.original_module.{last}"] = torch.zeros_like(value)
            found[f"base_model.model.score.modules_to_save.default.{last}"] = value
        else:
            found[f"base_model.model.{key}"] = value
    return found


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, nn.Module]:
    net = Net()
    torch.save(wrapped(net), tmp_path / "a.pt")
    save_file({key: torch.zeros_like(value) for key, value in net.state_dict().items()}, tmp_path / "t.safetensors")
    return tmp_path / "a.pt", tmp_path / "t.safetensors", net


def said(words: object) -> bool:
    return "LoRA" in str(words) and "merge_and_unload" in str(words) and "--drop '**.lora_*.**'" in str(words)


def test_what_is_left_out_is_a_warning_everywhere(files, tmp_path: Path) -> None:
    source, target, net = files
    assert any(map(said, cs.diff(source, target).warnings)) and "warning: " in str(cs.diff(source, target))
    matched = cs.match(source, target)
    assert any(map(said, matched.warnings)) and matched.coverage.tensors == 1
    merged = cs.merge(source, target, tmp_path / "o.safetensors", match=True)
    fresh = Net()
    for found in (cs.plan(source, target, match=True), merged, cs.transfer(source, fresh, match=True)):
        (finding,) = [one for one in found.findings if one.code == "lost-factors"]
        assert finding.level == "warning" and said(finding.message)
    assert "lora" in str(merged).lower() and "warning" in str(merged)
    got = load_file(tmp_path / "o.safetensors")
    assert all(torch.equal(got[key], value) for key, value in net.state_dict().items())
    assert all(torch.equal(fresh.state_dict()[key], value) for key, value in net.state_dict().items())


def test_a_rule_that_drops_them_says_that_it_is_meant(files, tmp_path: Path) -> None:
    source, target, _ = files
    merged = cs.merge(source, target, tmp_path / "o.safetensors", match=True, drop=["**.lora_*.**"])
    assert not [one for one in merged.findings if one.code == "lost-factors"]
    assert not cs.match(source, target, drop=["**.lora_*.**"]).warnings
    assert not cs.diff(source, target, drop=["**.lora_*.**"]).warnings


def test_factors_that_go_somewhere_are_no_loss(files, tmp_path: Path) -> None:
    source, _, _ = files
    assert not cs.merge(source, None, tmp_path / "same.pt").findings
    again = cs.merge(source, source, tmp_path / "again.pt", match=True)
    assert not [one for one in again.findings if one.code == "lost-factors"]
    assert not cs.diff(source, source).warnings


def test_a_plain_model_goes_into_a_wrapped_one(files, tmp_path: Path) -> None:
    """Its factors stay fresh."""
    source, _, net = files
    save_file(net.state_dict(), tmp_path / "plain.safetensors")
    cs.merge(tmp_path / "plain.safetensors", source, tmp_path / "o.pt", match=True)
    got, own = torch.load(tmp_path / "o.pt", weights_only=True), torch.load(source, weights_only=True)
    for key, value in own.items():
        stands = unwrapped(own).get(key, key)
        if stands is not None:
            assert torch.equal(got[key], net.state_dict()[stands.removeprefix("base_model.model.")])
        else:
            assert torch.equal(got[key], value)


@pytest.mark.parametrize(
    ("key", "yes"),
    [
        ("a.lora_A.default.weight", True),
        ("a.lora_B", True),
        ("a.lora_magnitude_vector.default.weight", True),
        ("lora_te_text_model.lora_down.weight", True),
        ("base_model.vera_A.default", True),
        ("layers.0.attn.q_proj.lora_a.weight", True),  # torchtune
        ("to_q.lora_linear_layer.down.weight", True),  # diffusers
        ("attn1.processor.to_q_lora.up.weight", True),
        ("to_q.lora.down.weight", True),
        ("lora.A", True),
        ("explora.down.weight", False),
        ("lora.downsample.weight", False),
        ("explora_A.weight", False),
        ("base_layer.0.weight", False),
        ("lora.weight", False),
        ("hra.weight", False),
    ],
)
def test_names_of_factors(key: str, yes: bool) -> None:
    assert is_factor(key) is yes and (lost_factors([key]) is not None) is yes


def test_a_base_layer_without_factors_is_a_name_like_any_other() -> None:
    """As DLA's is."""
    assert unwrapped(["base_layer.0.weight", "level.base_layer.weight", "level.weight"]) == {}


def test_of_two_copies_that_were_trained_none_stands_for_the_module() -> None:
    keys = ["h.original_module.weight", "h.modules_to_save.a.weight", "h.modules_to_save.b.weight"]
    assert unwrapped(keys) == {}


FACTORS = (
    "a.lora_A.default.weight",
    "a.lora_B",
    "b.ia3_l.default",
    "c.hada_w1_a.default",
    "q.lora_a.weight",
    "q.lora.up.weight",
    "k_lora.B",
)


def test_each_kind_of_factor_has_a_drop_that_matches_it(tmp_path: Path) -> None:
    state = {"norm.weight": torch.ones(3)}
    state |= {key: torch.ones(2) for key in FACTORS}
    torch.save(state, tmp_path / "a.pt")
    save_file({"norm.weight": torch.zeros(3)}, tmp_path / "t.safetensors")
    (words,) = cs.diff(tmp_path / "a.pt", tmp_path / "t.safetensors").warnings
    drops = [part.split("'")[1] for part in words.split("--drop ")[1:]]
    assert not cs.diff(tmp_path / "a.pt", tmp_path / "t.safetensors", drop=drops).warnings


def test_the_command_line_says_it_too(files) -> None:
    source, target, _ = files
    for words in (["diff"], ["match"], ["plan", "--match"], ["merge", "--match", "-o", str(source.parent / "o.pt")]):
        ended = program(words[0], source, target, *words[1:])
        assert "warning" in ended.out and "LoRA" in ended.out, (words, ended)


# --- with peft itself


def test_what_peft_saves_is_recognised(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    configs = [
        peft.LoraConfig(target_modules=["q_proj", "embed", "conv"], modules_to_save=["score"]),
        peft.LoraConfig(target_modules=["q_proj", "v_proj"], use_dora=True),
        peft.IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        peft.LoHaConfig(target_modules=["q_proj", "conv"]),
        peft.LoKrConfig(target_modules=["q_proj"]),
        peft.VeraConfig(target_modules=["q_proj"], r=2),
        peft.LNTuningConfig(target_modules=["norm"]),
    ]
    for config in configs:
        torch.manual_seed(0)
        net = Net()
        model = peft.get_peft_model(copy.deepcopy(net), config)
        for name, value in model.named_parameters():
            if is_factor(name):
                value.data.normal_()
        state = model.state_dict()
        assert sorted(unwrapped(state)) == sorted(key for key in state if key.removeprefix("base_model.model.") not in net.state_dict())
        torch.save(state, tmp_path / "a.pt")
        save_file({key: torch.zeros_like(value) for key, value in net.state_dict().items()}, tmp_path / "t.safetensors")
        report = cs.merge(tmp_path / "a.pt", tmp_path / "t.safetensors", tmp_path / "o.safetensors", match=True, overwrite=True)
        assert [one for one in report.findings if one.code == "lost-factors"], config
        got = load_file(tmp_path / "o.safetensors")
        assert all(torch.equal(got[key], value) for key, value in net.state_dict().items()), config
        torch.save(model.merge_and_unload().state_dict(), tmp_path / "m.pt")  # what the warning says to do
        assert not cs.diff(tmp_path / "m.pt", tmp_path / "t.safetensors").warnings
