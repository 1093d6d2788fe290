"""Streams of a layer, names among more of their kind, and the order of keys that other names undo."""

from __future__ import annotations

import pytest
from rows_support import ORDERS, Rows, norm, sides, sure

from ckptsurgeon.matching.matcher import match


@ORDERS
@pytest.mark.parametrize(("plain", "added"), [("", "_img"), ("img_", "txt_")], ids=["an image added", "a text added"])
def test_an_added_stream_is_the_one_that_the_other_side_says(plain: str, added: str, in_order: bool) -> None:
    def name(stream: str, part: str) -> str:
        return f"{part}{stream}" if stream.startswith("_") else f"{stream}{part}"

    source: Rows = [
        (f"blocks.{at}.cross_attn.{name(stream, part)}.weight", (8, 8)) for at in range(3) for stream in (plain, added) for part in "kv"
    ]
    target: Rows = [
        (f"blocks.{at}.attn2.{part}.weight", (8, 8)) for at in range(3) for part in ("to_k", "to_v", "add_k_proj", "add_v_proj")
    ]
    found = sure(match(*sides(source, target, in_order)))
    assert found["blocks.1.attn2.add_k_proj.weight"] == f"blocks.1.cross_attn.{name(added, 'k')}.weight"
    assert found["blocks.1.attn2.to_v.weight"] == f"blocks.1.cross_attn.{name(plain, 'v')}.weight"


@ORDERS
def test_the_first_of_three_norms_is_not_certain_to_be_the_first_of_two(in_order: bool) -> None:
    source: Rows = []
    target: Rows = []
    for at in range(3):
        source += [(f"out_blocks.{at}.norm{n}.weight", (8,)) for n in (1, 2, 3)]
        target += [(f"net.out_blocks.{at}.{name}.weight", (8,)) for name in ("skip.norm", "block.norm1", "block.norm3")]
        for rows, there in ((source, ""), (target, "net.")):
            rows += [(f"{there}out_blocks.{at}.{'block.' if there else ''}mlp.fc{n}.weight", (8 * n, 9)) for n in (1, 2)]
    found = sure(match(*sides(source, target, in_order)))
    assert not [key for key in found if key.endswith("block.norm1.weight")]


def test_keys_in_the_alphabets_order_have_none_of_their_own_under_other_names() -> None:
    names = ["norm1", "norm2", "norm3", "catext_norm"]
    told = ["encoder_attn_layer_norm", "self_attn_layer_norm", "final_layer_norm", "encoder_attn_text_layer_norm"]
    source: Rows = [(f"module.decoder.layers.{at}.{name}.weight", (8,)) for at in range(3) for name in names]
    source += [(f"bbox_embed.{at}.weight", (4, 8 + at)) for at in range(3)]
    target: Rows = [(f"model.decoder.layers.{at}.{name}.weight", (8,)) for at in range(3) for name in told]
    target += [(f"bbox_embed.{at}.weight", (4, 8 + at)) for at in range(3)]
    for link in match(*sides(source, target, in_order=False)).links:
        assert "same order" not in link.evidence


@ORDERS
def test_what_tensorflow_puts_behind_a_name_says_nothing(in_order: bool) -> None:
    source: Rows = [
        (f"bert/encoder/layer_{at}/{name}:0", shape)
        for at in range(3)
        for name, shape in (("dense/kernel", (8, 24)), ("norm/gamma", (8,)), ("norm/beta", (8,)))
    ]
    target: Rows = [
        (f"encoder.layer.{at}.{name}", shape)
        for at in range(3)
        for name, shape in (("dense.weight", (24, 8)), ("norm.weight", (8,)), ("norm.bias", (8,)))
    ]
    found = sure(match(*sides(source, target, in_order)))
    assert found["encoder.layer.1.dense.weight"] == "bert/encoder/layer_1/dense/kernel:0"
    assert found["encoder.layer.2.norm.bias"] == "bert/encoder/layer_2/norm/beta:0"


@ORDERS
def test_norms_stand_behind_convolutions_whose_names_begin_with_one_word(in_order: bool) -> None:
    source: Rows = []
    target: Rows = []
    for at in range(3):
        here, there = f"features.unit{at + 1}", f"blocks.{at}"
        for n, (one, other, shape) in enumerate((("exp_conv", "conv_pw", (48 + at, 8, 1, 1)), ("conv1", "conv_dw", (48 + at, 1, 3, 3)))):
            source += [*((f"{here}.{one}.convs.{part}.weight", shape) for part in range(2)), *norm(f"{here}.{one}.bn", 96 + 2 * at)]
            target += [*((f"{there}.{other}.{part}.weight", shape) for part in range(2)), *norm(f"{there}.bn{n + 1}", 96 + 2 * at)]
    found = sure(match(*sides(source, target, in_order)))
    assert found["blocks.1.bn1.weight"] == "features.unit2.exp_conv.bn.weight"
    assert found["blocks.1.bn2.weight"] == "features.unit2.conv1.bn.weight"


@ORDERS
def test_that_two_norms_are_called_norms_is_no_reason(in_order: bool) -> None:
    source: Rows = []
    target: Rows = []
    for at in range(3):
        here, there = f"layers.{at}.conv", f"layers.{at}.conv_module"
        source += [(f"layers.{at}.conv_layer_norm.weight", (8,)), (f"{here}.layer_norm.weight", (8,))]
        target += [(f"{there}.layer_norm.weight", (8,)), (f"{there}.depthwise_layer_norm.weight", (8,))]
        for rows, path in ((source, here), (target, there)):
            rows += [
                (f"{path}.{name}.weight", (8, n, 3)) for n, name in enumerate(("pointwise_conv1", "depthwise_conv", "pointwise_conv2"), 1)
            ]
    found = sure(match(*sides(source, target, in_order)))
    assert not [key for key in found if key.endswith("layer_norm.weight")]


@ORDERS
def test_norms_stand_behind_convolutions_of_the_same_mark(in_order: bool) -> None:
    marks = ("s", "t")
    source: Rows = [
        row
        for at in range(3)
        for n, mark in enumerate(marks)
        for row in ((f"base.{at}.conv_{mark}.weight", (8, 8, 1 + n, 3, 3 - n)), *norm(f"base.{at}.bn_{mark}", 8))
    ]
    target: Rows = [
        row
        for at in range(3)
        for n in range(2)
        for row in ((f"features.{at}.{n}.0.weight", (8, 8, 1 + n, 3, 3 - n)), *norm(f"features.{at}.{n}.1", 8))
    ]
    found = sure(match(*sides(source, target, in_order)))
    assert found["features.1.1.1.weight"] == "base.1.bn_t.weight" and found["features.2.0.1.running_var"] == "base.2.bn_s.running_var"


@ORDERS
def test_numbers_of_two_lists_are_not_one_count_where_another_member_stands_elsewhere(in_order: bool) -> None:
    def unit(path: str, names: tuple[str, str], first: int) -> Rows:
        return [(f"{path}.{names[0]}.weight", (8, first, 3, 3)), (f"{path}.{names[1]}.weight", (8, 8, 3, 3))]

    source: Rows = []
    target: Rows = []
    for stage in range(3):
        there = f"down_blocks.{stage}"
        for at, (name, first) in enumerate((("resnets.0", 5 + stage), ("resnets.1", 8), ("downsamplers.0", 8))):
            source += unit(f"input_blocks.{3 * stage + at}.0", ("in_layers.2", "out_layers.3"), first)
            target += unit(f"{there}.{name}", ("conv1", "conv2"), first)
    found = sure(match(*sides(source, target, in_order)))
    for stage in range(3):
        assert (
            found.get(f"down_blocks.{stage}.downsamplers.0.conv1.weight", "input_blocks.2")
            != f"input_blocks.{3 * stage + 1}.0.in_layers.2.weight"
        )
