"""Real models of transformers, tiny: saved by its own code, merged into a variant, loaded by its own code and by torch's strict load."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import api_support as support
import pytest
import torch

import ckptsurgeon as cs

transformers = pytest.importorskip("transformers")

NETS = """
import transformers as tr


def bert(num_labels=2):
    config = tr.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, max_position_embeddings=32,
        num_labels=num_labels,
    )
    return tr.BertForSequenceClassification(config)


def gpt2_config(**words):
    return tr.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, pad_token_id=0, **words)


def gpt2():
    return tr.GPT2LMHeadModel(gpt2_config())


def gpt2_classes(num_labels=3):
    return tr.GPT2ForSequenceClassification(gpt2_config(num_labels=num_labels))


def llama_config(**words):
    return tr.LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=32, pad_token_id=0, **words,
    )


def llama():
    return tr.LlamaForCausalLM(llama_config())


def llama_classes(num_labels=5):
    return tr.LlamaForSequenceClassification(llama_config(num_labels=num_labels))
"""

SPACE: dict[str, Any] = {}
exec(NETS, SPACE)


def saved(name: str, folder: Path, sharded: bool) -> tuple[Any, Path]:
    torch.manual_seed(1)
    model = SPACE[name]()
    model.save_pretrained(folder / "hf", **({"max_shard_size": "5KB"} if sharded else {}))
    assert (len(list((folder / "hf").glob("*.safetensors"))) > 1) == sharded
    return model, folder / "hf"


CASES = [
    ("bert", "bert(num_labels=7)", "classifier"),
    ("gpt2", "gpt2_classes(num_labels=3)", "score"),
    ("llama", "llama_classes()", "score"),
]


@pytest.mark.parametrize("output", ["out.pt", "out.safetensors"])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(("name", "variant", "head"), CASES)
def test_into_a_variant_with_another_head(name: str, variant: str, head: str, sharded: bool, output: str, tmp_path: Path) -> None:
    model, folder = saved(name, tmp_path, sharded)
    report = cs.merge(folder, f"{support.nets(tmp_path, NETS)}:{variant}", tmp_path / output)
    fresh = eval(variant, SPACE)
    fresh.load_state_dict(support.load(tmp_path / output), strict=True)
    theirs = model.state_dict()
    for key, tensor in fresh.state_dict().items():
        if not key.startswith(head):
            assert support.bits(tensor) == support.bits(theirs[key]), key
    assert {key.partition(".")[0] for key in report.fresh} == {head}
    assert report.verification is not None and report.verification.ok


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_into_the_same_model_every_tensor_is_there_again(name: str, sharded: bool, tmp_path: Path) -> None:
    """GPT-2's file lacks lm_head.weight, which the model ties to its embedding."""
    model, folder = saved(name, tmp_path, sharded)
    report = cs.merge(folder, f"{support.nets(tmp_path, NETS)}:{name}", tmp_path / "out.pt")
    assert report.fresh == () and report.coverage.tensors == 1.0
    torch.manual_seed(2)
    fresh = SPACE[name]()
    fresh.load_state_dict(support.load(tmp_path / "out.pt"), strict=True)
    support.same(fresh.state_dict(), model.state_dict())


@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_what_we_write_transformers_loads(name: str, tmp_path: Path) -> None:
    model, folder = saved(name, tmp_path, True)
    home = tmp_path / "home"
    home.mkdir()
    cs.merge(folder, f"{support.nets(tmp_path, NETS)}:{name}", home / "model.safetensors", tied="alias")
    (home / "config.json").write_bytes((folder / "config.json").read_bytes())
    loaded, info = type(model).from_pretrained(home, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    support.same(loaded.state_dict(), model.state_dict())
    ids = torch.arange(1, 9)[None]
    # the same weights, bit for bit; where they lie in memory may round a product differently
    assert torch.allclose(loaded.eval()(ids).logits, model.eval()(ids).logits, atol=1e-6)


@pytest.mark.parametrize("sharded", [False, True])
def test_transfer_into_a_tied_model(sharded: bool, tmp_path: Path) -> None:
    model, folder = saved("gpt2", tmp_path, sharded)
    torch.manual_seed(3)
    fresh = SPACE["gpt2"]()
    report = cs.transfer(folder, fresh)
    support.same(fresh.state_dict(), model.state_dict())
    assert fresh.lm_head.weight is fresh.transformer.wte.weight
    assert "lm_head.weight" in report.transferred and report.fresh == ()


def test_transfer_of_a_body_into_a_model_with_a_head(tmp_path: Path) -> None:
    model, folder = saved("llama", tmp_path, False)
    cs.merge(folder, None, tmp_path / "body.safetensors", drop="lm_head.*", rename={"model.{**rest}": "{rest}"})
    torch.manual_seed(3)
    fresh = SPACE["llama_classes"]()
    report = cs.transfer(tmp_path / "body.safetensors", fresh)
    assert report.fresh == ("score.weight",)
    assert torch.equal(fresh.model.embed_tokens.weight, model.model.embed_tokens.weight)
