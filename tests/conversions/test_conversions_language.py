"""Language models between published implementations, on one input: GPT-2, BERT, Llama, Mixtral."""

from __future__ import annotations

import math
from pathlib import Path

import conversions_support as support
import pytest
import torch
from conversions_support import agree, all_seen, back, convert, hf, rules, save, source, spec, tokens
from torch import nn

import ckptsurgeon as cs
from ckptsurgeon.errors import RuleError

pytest.importorskip("transformers")
HALF = 1e-5  # transformers computes RMSNorm, rotary angles and router shares in float32, whatever the model's dtype


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        found = model(tokens())
    return getattr(found, "logits", found)


# --- GPT-2


def test_gpt2_of_conv1d_to_a_gpt_of_linear_layers_and_back(tmp_path: Path) -> None:
    given = source(hf("gpt2"))
    path = save(given, tmp_path / "hf.pt")
    found, _ = convert(path, spec("nanogpt"), tmp_path / "nano.pt", "gpt2_to_nanogpt")
    agree(logits(found), logits(given))
    all_seen(found, logits)
    back(tmp_path / "nano.pt", hf("gpt2"), tmp_path / "back.pt", "gpt2_to_nanogpt", path)


def test_gpt2_square_weight_that_is_left_as_it_lies_would_be_seen(tmp_path: Path) -> None:
    given = source(hf("gpt2"))
    path = save(given, tmp_path / "hf.pt")
    report = cs.merge(
        path,
        spec("nanogpt"),
        tmp_path / "wrong.pt",
        adapt=[(f"transformer.h.*.{name}.weight", "transpose") for name in ("attn.c_attn", "mlp.*")],
    )
    assert report.coverage.tensors == 1.0  # every shape fits: names and shapes can't tell
    assert (logits(support.loaded(tmp_path / "wrong.pt", spec("nanogpt"))) - logits(given)).abs().max() > 0.1


def test_gpt2_as_the_hub_has_it(tmp_path: Path) -> None:
    """The published file has neither `transformer.` nor the head, and a causal mask in each layer."""
    given = source(hf("gpt2"))
    state = {key.removeprefix("transformer."): tensor for key, tensor in given.state_dict().items() if key != "lm_head.weight"}
    mask = torch.ones(16, 16).tril().view(1, 1, 16, 16)
    masks = {f"h.{layer}.attn.bias": mask.clone() for layer in range(2)}
    path = save(state | masks, tmp_path / "model.safetensors")
    found, report = convert(path, spec("nanogpt"), tmp_path / "nano.pt", "gpt2_to_nanogpt", drop=["h.*.attn.bias"], dropped=masks)
    agree(logits(found), logits(given))
    assert "lm_head.weight" in report.transferred  # it is tied to wte


def test_gpt2_as_transformers_saves_it_in_shards(tmp_path: Path) -> None:
    """save_pretrained leaves the tied head out, and cuts the rest into files."""
    given = source(hf("gpt2"))
    given.save_pretrained(tmp_path / "hf", max_shard_size="16KB")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
    found, _ = convert(tmp_path / "hf", spec("nanogpt"), tmp_path / "nano.pt", "gpt2_to_nanogpt")
    agree(logits(found), logits(given))


@pytest.mark.slow
def test_gpt2_by_the_command_line(tmp_path: Path) -> None:
    given = source(hf("gpt2"))
    save(given, tmp_path / "hf.pt")
    out = support.cli_json("merge", "hf.pt", spec("nanogpt"), "-o", "nano.pt", "--rules", rules("gpt2_to_nanogpt"), cwd=tmp_path)
    assert (out["fresh"], out["dropped"]) == ([], [])
    assert out["coverage"] == {"tensors": 1.0, "elements": 1.0}
    agree(logits(support.loaded(tmp_path / "nano.pt", spec("nanogpt"))), logits(given))


def test_gpt2_into_a_live_model(tmp_path: Path) -> None:
    given = source(hf("gpt2"))
    found = support.build(spec("nanogpt"))
    report = cs.transfer(save(given, tmp_path / "hf.pt"), found, rules=rules("gpt2_to_nanogpt"))
    assert (report.fresh, report.dropped) == ((), ())
    agree(logits(found), logits(given))
    assert found.lm_head.weight is found.transformer["wte"].weight


# --- BERT


def hidden(model: nn.Module) -> torch.Tensor:
    ids = tokens(length=12)
    types = (torch.arange(12) > 6).long().expand_as(ids)
    mask = torch.arange(12).expand_as(ids) < torch.tensor([[12], [9]])
    with torch.no_grad():
        if hasattr(model, "config"):
            found = model(ids, attention_mask=mask.long(), token_type_ids=types).last_hidden_state
        else:
            found = model(ids, types, mask.long())
    return found[mask]


def test_bert_to_a_transformer_encoder_and_back(tmp_path: Path) -> None:
    given = source(hf("bert"))
    path = save(given, tmp_path / "bert.safetensors")
    found, _ = convert(path, spec("torch_bert"), tmp_path / "torch.safetensors", "bert_to_torch_encoder")
    agree(hidden(found), hidden(given))
    all_seen(support.loaded(path, hf("bert")), hidden, ["*.key.bias"])  # in_proj_bias holds it, with two that are seen
    back(tmp_path / "torch.safetensors", hf("bert"), tmp_path / "back.safetensors", "bert_to_torch_encoder", path)


def test_bert_with_a_pooler_and_heads_leaves_them_behind_by_name(tmp_path: Path) -> None:
    state = source(hf("bert")).state_dict()
    more = {"cls.predictions.bias": torch.ones(50).double(), "bert.pooler.dense.weight": torch.ones(16, 16).double()}
    path = save({f"bert.{key}": tensor for key, tensor in state.items()} | more, tmp_path / "bert.pt")
    # `bert.` explains the few embeddings that keep their names, which is not enough for a prefix to go unasked.
    (tmp_path / "bare.toml").write_text('[[rename]]\nfrom = "bert.{**rest}"\nto = "{**rest}"\n\n[[stage]]\n')
    names = (str(tmp_path / "bare"), "bert_to_torch_encoder")
    found, _ = convert(path, spec("torch_bert"), tmp_path / "torch.pt", names, dropped=more)
    agree(hidden(found), hidden(source(hf("bert"))))


# --- Llama


def test_llama_from_metas_layout(tmp_path: Path) -> None:
    given = source(spec("meta_llama"))
    path = save(given, tmp_path / "consolidated.00.pth")
    found, _ = convert(path, hf("llama"), tmp_path / "hf.safetensors", "meta_llama_to_hf")
    agree(logits(found), logits(given), HALF)
    all_seen(found, logits, within=HALF)


def test_llama_to_metas_layout(tmp_path: Path) -> None:
    path = save(source(hf("llama")), tmp_path / "hf.safetensors")
    given = source(hf("llama"))
    report = cs.merge(path, spec("meta_llama"), tmp_path / "meta.pth", rules=rules("meta_llama_to_hf"), reverse=True)
    support.account(report)
    agree(logits(support.loaded(tmp_path / "meta.pth", spec("meta_llama"))), logits(given), HALF)
    convert(tmp_path / "meta.pth", hf("llama"), tmp_path / "back.safetensors", "meta_llama_to_hf")
    support.same(support.load(tmp_path / "back.safetensors"), support.load(path))


def test_llama_whose_rotary_rows_stay_would_be_seen(tmp_path: Path) -> None:
    given = source(spec("meta_llama"))
    path = save(given, tmp_path / "consolidated.00.pth")
    stays = [(f"layers.{{i}}.attention.w{p}.weight", f"model.layers.{{i}}.self_attn.{p}_proj.weight") for p in "qk"]
    wrong = [rule for rule in cs_rules("meta_llama_to_hf") if rule.kind == "rename"]
    report = cs.merge(path, hf("llama"), tmp_path / "wrong.pt", rename=stays, rules=wrong)
    assert report.coverage.tensors == 1.0
    assert (logits(support.loaded(tmp_path / "wrong.pt", hf("llama"))) - logits(given)).abs().max() > 0.1


def cs_rules(name: str) -> tuple:
    from ckptsurgeon.api._rules import load_rules

    return load_rules(rules(name))


# --- Mixtral


def test_mixtral_experts_one_by_one_to_stacked_ones_and_back(tmp_path: Path) -> None:
    given = source(spec("mixtral"))
    path = save(given, tmp_path / "v4.safetensors")
    found, _ = convert(path, hf("mixtral"), tmp_path / "v5.safetensors", "mixtral_experts_stacked")
    agree(logits(found), logits(given), HALF)
    all_seen(found, logits, within=HALF)
    back(tmp_path / "v5.safetensors", spec("mixtral"), tmp_path / "back.safetensors", "mixtral_experts_stacked", path)


def test_mixtral_as_transformers_converts_it_itself(tmp_path: Path) -> None:
    """transformers 5 reads a checkpoint of transformers 4 by its own conversion: its tensors and ours are the same."""
    model = support.build(hf("mixtral"))
    path = save(source(spec("mixtral")), tmp_path / "model.safetensors")
    model.config.save_pretrained(tmp_path)
    theirs = type(model).from_pretrained(tmp_path, dtype=torch.float64)
    ours, _ = convert(path, hf("mixtral"), tmp_path / "v5.safetensors", "mixtral_experts_stacked")
    support.same(ours.state_dict(), theirs.state_dict())


def test_mixtral_experts_in_a_plan_stand_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    made = cs.plan(save(source(spec("mixtral")), tmp_path / "v4.pt"), hf("mixtral"), rules=rules("mixtral_experts_stacked"))
    step = next(step for step in made.steps if step.target == "model.layers.1.mlp.experts.gate_up_proj")
    wanted = [f"model.layers.1.block_sparse_moe.experts.{e}.w{w}.weight" for e in range(11) for w in (1, 3)]
    assert [key for _, key in step.sources] == wanted  # 10 after 9
    assert [op["op"] for op in step.ops] == ["concat", "stack"]


@pytest.mark.slow
def test_mixtral_by_the_command_line_as_a_plan_that_is_applied_later(tmp_path: Path) -> None:
    """The way back, as transformers 4 needs it."""
    given = source(hf("mixtral"))
    save(given, tmp_path / "v5.safetensors")
    words = ("--rules", rules("mixtral_experts_stacked"), "--reverse", "-o", "plan.json")
    out = support.cli_json("plan", "v5.safetensors", spec("mixtral"), *words, cwd=tmp_path)
    assert (out["dropped"], [step["target"] for step in out["steps"] if step["fresh"]]) == ([], [])
    support.cli("apply", "plan.json", "-o", "v4.safetensors", cwd=tmp_path)
    agree(logits(support.loaded(tmp_path / "v4.safetensors", spec("mixtral"))), logits(given), HALF)


def test_mixtral_with_an_expert_missing_is_refused(tmp_path: Path) -> None:
    state = {key: tensor for key, tensor in source(spec("mixtral")).state_dict().items() if ".1.block_sparse_moe.experts.3.w3" not in key}
    with pytest.raises(RuleError) as caught:
        cs.plan(save(state, tmp_path / "v4.pt"), hf("mixtral"), rules=rules("mixtral_experts_stacked"))
    assert "w3.weight' names for e=3" in str(caught.value)


# --- GPT-NeoX


def test_neox_with_q_k_v_fused_by_head_to_split_ones_and_back(tmp_path: Path) -> None:
    given = source(hf("neox"))
    path = save(given, tmp_path / "neox.safetensors")
    found, _ = convert(path, hf("starcoder2"), tmp_path / "starcoder2.safetensors", "neox_to_starcoder2")
    agree(logits(found), logits(given))
    all_seen(found, logits)  # keys' biases too: they are turned with the position
    again, _ = convert(tmp_path / "starcoder2.safetensors", hf("neox"), tmp_path / "back.safetensors", "starcoder2_to_neox")
    support.same(again.state_dict(), given.state_dict())


def test_neox_rules_that_cannot_be_turned_say_which(tmp_path: Path) -> None:
    with pytest.raises(RuleError, match="turned round") as caught:
        cs.plan(save(source(hf("starcoder2")), tmp_path / "a.pt"), hf("neox"), rules=rules("neox_to_starcoder2"), reverse=True)
    assert str(caught.value).count("loses what would be needed") == 2


def test_the_reference_models_are_what_they_say() -> None:
    """Without any conversion: attention is causal, and rotary positions are relative."""
    import conversions_models as models

    model = source(spec("meta_llama"))
    ids = tokens()
    with torch.no_grad():
        one, other = model(ids), model(torch.cat((ids[:, :6], (ids[:, 6:] + 1) % 50), 1))
    torch.testing.assert_close(one[:, :6], other[:, :6])
    assert (one[:, 6:] - other[:, 6:]).abs().max() > 0.1
    x = torch.randn(1, 1, 1, 8, dtype=torch.float64).expand(1, 1, 5, 8)
    for rotate in (models.rotate_pairs, models.rotate_halves):
        turned = rotate(x)
        torch.testing.assert_close((turned[0, 0, 0] * turned[0, 0, 1]).sum(), (turned[0, 0, 3] * turned[0, 0, 4]).sum())
        assert math.isclose(turned.norm(dim=-1).std().item(), 0, abs_tol=1e-12)
