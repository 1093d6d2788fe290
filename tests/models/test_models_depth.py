"""Depth: from the module tree where its blocks can be told, by pattern elsewhere, and never by a guess."""

import pytest
import torch
from torch import nn

from ckptsurgeon.errors import ModelError
from ckptsurgeon.models.training.depth import depths, stacks


def block(width=2):
    return nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))


class Basic(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2)


class ResNet(nn.Module):
    """layer1 to layer4, of one or two blocks; no numbered child at the top."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2)
        for number, blocks in enumerate((2, 1, 2, 1), start=1):
            setattr(self, f"layer{number}", nn.Sequential(*(Basic() for _ in range(blocks))))
        self.fc = nn.Linear(2, 3)


def levels(found):
    """Each depth's parameters, folded to module names."""
    rows = {}
    for name, depth in found.of.items():
        rows.setdefault(depth, []).append(name)
    return rows


transformers = pytest.importorskip("transformers")
SMALL = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}


def bert():
    return transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=12, **SMALL))


def gpt2():
    config = transformers.GPT2Config(vocab_size=12, n_embd=8, n_layer=3, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config)


def vit():
    return transformers.ViTForImageClassification(transformers.ViTConfig(image_size=8, patch_size=4, **SMALL))


def t5():
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=12, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_decoder_layers=2, num_heads=2)
    )


@pytest.mark.parametrize(
    ("make", "pattern", "stem", "head"),
    [
        (bert, "bert.encoder.layer.{i}.**", "bert.embeddings.", ("bert.pooler.", "classifier.")),
        (gpt2, "transformer.h.{i}.**", ("transformer.wte.", "transformer.wpe."), "transformer.ln_f."),
        (vit, None, "vit.embeddings.", ("vit.layernorm.", "classifier.")),
    ],
    ids=["bert", "gpt2", "vit"],
)
def test_transformers_are_told_by_their_blocks(make, pattern, stem, head):
    model = make()
    found = depths(model)
    if pattern is not None:
        assert found.patterns == (pattern,)
    assert found.top == 4 and [found.label(depth) for depth in range(5)] == ["stem", "layer 0", "layer 1", "layer 2", "head"]
    rows = levels(found)
    assert all(name.startswith(stem) for name in rows[0]) and all(name.startswith(head) for name in rows[4])
    for layer in range(3):
        assert rows[layer + 1] and all(f".{layer}." in name for name in rows[layer + 1])
    assert list(found.of) == [name for name, _ in model.named_parameters()]


def test_a_tied_parameter_lies_as_low_as_the_lowest_of_its_names():
    model = gpt2()
    assert model.lm_head.weight is model.transformer.wte.weight
    assert depths(model).of["transformer.wte.weight"] == 0 and "lm_head.weight" not in depths(model).of


def test_a_residual_networks_stages_are_gone_into():
    model = ResNet()
    assert stacks(model) == ("layer{i}.{j}.**",)
    rows = levels(depths(model))
    assert rows[0] == ["conv1.weight", "conv1.bias", "bn1.weight", "bn1.bias"] and rows[7] == ["fc.weight", "fc.bias"]
    assert [rows[depth][0] for depth in range(1, 7)] == [f"layer{at}.conv1.weight" for at in ("1.0", "1.1", "2.0", "3.0", "3.1", "4.0")]
    stages = depths(model, "layer{i}.**")
    assert stages.top == 5 and stages.of["layer3.1.conv1.weight"] == 3


def test_more_than_one_stack_is_refused_with_the_candidates():
    with pytest.raises(ModelError, match="2 stacks") as caught:
        depths(t5())
    assert caught.value.problems == ("encoder.block.{i}.** (2 layers)", "decoder.block.{i}.** (2 layers)")
    assert "layers=['encoder.block.{i}.**', 'decoder.block.{i}.**']" in caught.value.hint
    found = depths(t5(), ["encoder.block.{i}.**", "decoder.block.{i}.**"])
    assert found.top == 5 and found.of["shared.weight"] == 0
    assert found.of["decoder.block.1.layer.0.SelfAttention.q.weight"] == 4 and found.of["decoder.final_layer_norm.weight"] == 5


def test_a_stack_in_which_nothing_matters_is_no_candidate():
    model = nn.ModuleDict({"encoder": nn.ModuleList(map(block, [2, 2])), "decoder": nn.ModuleList(map(block, [2, 2, 2]))})
    assert len(stacks(model)) == 2
    assert depths(model, None, {"encoder.0.0.weight"}).patterns == ("encoder.{i}.**",)


def test_towers_side_by_side_are_one_pattern():
    model = nn.ModuleDict(
        {
            side: nn.ModuleDict({"embed": nn.Linear(2, 2), "layers": nn.ModuleList(map(block, [2] * count)), "norm": nn.LayerNorm(2)})
            for side, count in (("text_model", 2), ("vision_model", 3))
        }
    )
    of = depths(model, "*_model.layers.{i}.**").of
    assert of["text_model.embed.weight"] == of["vision_model.embed.weight"] == 0
    assert of["text_model.layers.1.0.weight"] == of["vision_model.layers.1.0.weight"] == 2
    assert of["text_model.norm.weight"] == 3 and of["vision_model.norm.weight"] == 4


def test_a_network_without_repeated_blocks_is_refused_and_can_be_told_by_order():
    model = nn.ModuleDict({name: nn.Linear(2, 2) for name in ("conv1", "norm1", "conv2", "fc1", "fc2")})
    with pytest.raises(ModelError, match="no repeated blocks") as caught:
        depths(model)
    assert "layers=['conv1.**', 'norm1.**', 'conv2.**', 'fc1.**', 'fc2.**']" in caught.value.hint
    of = depths(model, ["conv1.*", "conv2.*", "fc1.*"]).of
    assert [of[f"{name}.weight"] for name in model] == [1, 1, 2, 3, 4]  # norm1 stands between two layers: with the one before
    assert depths(model, "conv{i}.*").of["fc2.bias"] == 3


def test_blocks_of_two_kinds_are_not_stages_and_experts_are_no_layers():
    lucid = nn.ModuleDict({"layers": nn.ModuleList(nn.ModuleList([nn.MultiheadAttention(2, 1), block()]) for _ in range(3))})
    assert stacks(lucid) == ("layers.{i}.**",)
    experts = nn.ModuleDict(
        {"h": nn.ModuleList(nn.ModuleDict({"experts": nn.ModuleList(map(block, [2, 2])), "a": block()}) for _ in range(2))}
    )
    assert stacks(experts) == ("h.{i}.**",)
    assert stacks(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))) == ()


def test_numbers_in_names_count_as_numbers():
    model = nn.ModuleDict({f"layer{number}": block() for number in range(11)} | {"layer_norm": nn.LayerNorm(2)})
    found = depths(model)
    assert found.of["layer2.0.weight"] == 3 and found.of["layer10.0.weight"] == 11 and found.of["layer_norm.weight"] == 12
    lstm = nn.LSTM(2, 2, num_layers=3)
    assert depths(lstm, "{p}_l{i}").of["weight_hh_l2"] == 3


def test_what_stands_between_layers_goes_with_the_one_before():
    model = nn.ModuleDict({"block1": block(), "transition1": nn.Linear(2, 2), "block2": block(), "head": nn.Linear(2, 2)})
    of = depths(model, "block{i}.**").of
    assert of["transition1.weight"] == 1 and of["block2.0.weight"] == 2 and of["head.weight"] == 3


@pytest.mark.parametrize(("layers", "message"), [("blok.{i}.**", "match no parameter"), ([], "layers is empty")])
def test_layers_that_are_not_there(layers, message):
    with pytest.raises(ModelError, match=message) as caught:
        depths(ResNet(), layers)
    assert caught.value.hint


def test_nothing_is_changed_and_meta_will_do():
    with torch.device("meta"):
        model = ResNet()
    model.layer1.requires_grad_(False)
    assert depths(model).of["layer1.0.conv1.weight"] == 1
    assert not model.layer1[0].conv1.weight.requires_grad


def test_what_stands_before_an_upper_stack_is_one_below_it():
    model = nn.ModuleDict(
        {side: nn.ModuleDict({"embed": nn.Linear(2, 2), "layers": nn.ModuleList(map(block, [2, 2]))}) for side in ("encoder", "decoder")}
    )
    of = depths(model, ["encoder.layers.{i}.**", "decoder.layers.{i}.**"]).of
    assert of["encoder.embed.weight"] == 0 and of["decoder.embed.weight"] == 2 and of["decoder.layers.0.0.weight"] == 3


def test_a_part_that_is_a_number_only_at_times_says_nothing():
    model = nn.ModuleDict({"h": nn.ModuleList(nn.ModuleDict({"0": block(), "mlp": block()}) for _ in range(2))})
    assert set(depths(model, "h.{i}.{p}.**").of.values()) == {1, 2}
