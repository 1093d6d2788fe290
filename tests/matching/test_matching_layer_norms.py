"""Norms and scales of a layer that go by what their names say of the attention and the MLP, and single letters for a tensor's role."""

from __future__ import annotations

import pytest
from rows_support import ORDERS, Rows, side, sides, sure

from ckptsurgeon.matching.matcher import match
from ckptsurgeon.tensors import TensorMeta

WIDE = 12


def layers(head: str, parts: dict[str, str], norms: dict[str, str], in_order: bool) -> dict[str, TensorMeta]:
    """Three layers of attention and MLP, with norms behind them, under these names."""
    keys: Rows = [
        (f"{head}.{at}.{name}.weight", (rows, columns))
        for at in range(3)
        for name, rows, columns in ((parts["attn"], WIDE, WIDE), (parts["up"], 3 * WIDE, WIDE), (parts["down"], WIDE, 3 * WIDE))
    ]
    keys += [(f"{head}.{at}.{name}.{leaf}", (WIDE,)) for at in range(3) for name in norms.values() for leaf in ("weight", "bias")]
    return side(keys, in_order)


@ORDERS
@pytest.mark.parametrize(
    "names",
    [{"a": "norm1", "b": "norm2"}, {"a": "attn_ln", "b": "mlp_ln"}],
    ids=["counted", "named"],
)
def test_where_a_norm_stands_behind_the_mlp_the_one_behind_the_attention_is_the_first(names: dict[str, str], in_order: bool) -> None:
    source = layers("encoder.layer", {"attn": "attn.out", "up": "mlp.fc1", "down": "mlp.fc2"}, names, in_order)
    post = {"a": "post_attention_layernorm", "b": "post_mlp_layernorm"}
    target = layers("layers", {"attn": "attention.out_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}, post, in_order)
    found = match(source, target).by_target
    for role in "ab":
        link = found[f"layers.1.{post[role]}.weight"]
        assert (link.certain, link.sources) == (True, (f"encoder.layer.1.{names[role]}.weight",))


@ORDERS
def test_of_a_layers_norms_the_one_that_says_nothing_is_behind_the_mlp(in_order: bool) -> None:
    attentions = {"self": "self_attn.out_proj", "cross": "cross_attn.out_proj", "up": "mlp.fc1", "down": "mlp.fc2"}
    shapes = {"self": (WIDE, WIDE), "cross": (WIDE, WIDE), "up": (3 * WIDE, WIDE), "down": (WIDE, 3 * WIDE)}

    def layer(head: str, norms: list[str]) -> dict[str, TensorMeta]:
        order = [attentions["self"], norms[0], attentions["cross"], norms[1], attentions["up"], attentions["down"], norms[2]]
        by_name = {name: shapes[part] for part, name in attentions.items()}
        keys: Rows = [(f"{head}.{at}.{name}.weight", by_name.get(name, (WIDE,))) for at in range(2) for name in order]
        return side(keys, in_order)

    told = ["self_attn_layer_norm", "cross_attn_layer_norm", "layer_norm"]
    found = match(layer("transformer.layers", ["norm1", "norm2", "norm3"]), layer("decoder.layers", told))
    certain = sure(found)
    assert [certain[f"decoder.layers.1.{name}.weight"] for name in told] == [f"transformer.layers.1.norm{n}.weight" for n in (1, 2, 3)]


@ORDERS
def test_a_single_letter_names_a_scale_as_it_names_a_weight_or_a_bias(in_order: bool) -> None:
    def layer(head: str, scaling: str, scale: str, bias: str) -> dict[str, TensorMeta]:
        keys: Rows = [(f"{head}.{at}.attn.{name}.weight", (WIDE, WIDE)) for at in range(2) for name in "qkv"]
        keys += [(f"{head}.{at}.attn.{scaling}.{leaf}", (4,)) for at in range(2) for leaf in (scale, bias)]
        return side(keys, in_order)

    found = match(layer("layers", "ssmax_scaling", "s", "b"), layer("blocks", "softmax_scaling", "scale", "bias"))
    certain = sure(found)
    assert certain["blocks.1.attn.softmax_scaling.scale"] == "layers.1.attn.ssmax_scaling.s"
    assert certain["blocks.1.attn.softmax_scaling.bias"] == "layers.1.attn.ssmax_scaling.b"


@ORDERS
def test_the_bias_of_a_router_is_the_experts_bias_under_either_name(in_order: bool) -> None:
    def layer(module: str, bias: str) -> dict[str, TensorMeta]:
        keys: Rows = [(f"layers.{at}.attn.{name}.weight", (WIDE, WIDE)) for at in range(3) for name in "qkvo"]
        keys += [(f"layers.{at}.{module}.weight", (4, WIDE)) for at in range(3)] + [
            (f"layers.{at}.{module}.{bias}", (4,)) for at in range(3)
        ]
        return side(keys, in_order)

    found = match(layer("moe.router", "expert_bias"), layer("mlp.gate", "e_score_correction_bias"))
    certain = sure(found)
    assert certain["layers.2.mlp.gate.e_score_correction_bias"] == "layers.2.moe.router.expert_bias"


@ORDERS
def test_norms_beside_a_vector_of_their_width_go_by_their_names(in_order: bool) -> None:
    """A mixture's gate for the shared experts is a vector in GGUF's names, and one row elsewhere: it is no norm, and takes none's place."""
    source: Rows = []
    target: Rows = []
    for at in range(2):
        one, other = f"blk.{at}", f"model.layers.{at}"
        source += [(f"{one}.attn_output.weight", (WIDE, WIDE)), (f"{one}.ffn_gate_inp.weight", (6, WIDE))]
        source += [(f"{one}.ffn_up_shexp.weight", (20, WIDE)), (f"{one}.ffn_gate_inp_shexp.weight", (WIDE,))]
        source += [(f"{one}.attn_norm.weight", (WIDE,)), (f"{one}.ffn_norm.weight", (WIDE,))]
        target += [(f"{other}.self_attn.o_proj.weight", (WIDE, WIDE)), (f"{other}.mlp.gate.weight", (6, WIDE))]
        target += [(f"{other}.mlp.shared_expert.up_proj.weight", (20, WIDE)), (f"{other}.mlp.shared_expert_gate.weight", (1, WIDE))]
        target += [(f"{other}.input_layernorm.weight", (WIDE,)), (f"{other}.post_attention_layernorm.weight", (WIDE,))]
    found = sure(match(side(source, in_order), side(target, in_order)))
    assert found["model.layers.1.input_layernorm.weight"] == "blk.1.attn_norm.weight"
    assert found["model.layers.1.post_attention_layernorm.weight"] == "blk.1.ffn_norm.weight"
    assert found.get("model.layers.1.mlp.shared_expert_gate.weight", "blk.1.ffn_gate_inp_shexp.weight") == "blk.1.ffn_gate_inp_shexp.weight"


@ORDERS
def test_the_first_transformers_norms_are_weights_and_biases(in_order: bool) -> None:
    """`a_2` and `b_2`, as The Annotated Transformer has them (Rush, 2018), are one norm, and not the biases of two layers."""
    source: Rows = [(f"layers.{at}.sublayer.{which}.norm.{name}", (8,)) for at in range(3) for which in (0, 1) for name in ("a_2", "b_2")]
    target: Rows = [(f"layers.{at}.norm{which + 1}.{name}", (8,)) for at in range(3) for which in (0, 1) for name in ("weight", "bias")]
    assert sure(match(*sides(source, target, in_order))) == {name: key for (key, _), (name, _) in zip(source, target, strict=True)}
