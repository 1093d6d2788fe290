"""What the source lacks stays fresh: no other layer is certain to stand in for it."""

from __future__ import annotations

import pytest
from rows_support import ORDERS, Rows, norm, sides, sure

from ckptsurgeon.matching.matcher import match

HERE = {"q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj", "o": "self_attn.out_proj"}
THERE = {"q": "attention.self.query", "k": "attention.self.key", "v": "attention.self.value", "o": "attention.output.dense"}


@ORDERS
@pytest.mark.parametrize("lacked", ["q", "v"])
def test_an_output_stands_in_for_no_query_and_no_value(lacked: str, in_order: bool) -> None:
    source: Rows = [(f"layers.{at}.{name}.weight", (8, 8)) for at in range(4) for part, name in HERE.items() if part != lacked]
    target: Rows = [(f"encoder.layer.{at}.{name}.weight", (8, 8)) for at in range(4) for name in THERE.values()]
    for rows, head, names in ((source, "layers", ("fc1", "fc2")), (target, "encoder.layer", ("intermediate.dense", "output.dense"))):
        rows += [(f"{head}.{at}.{name}.weight", shape) for at in range(4) for name, shape in zip(names, ((32, 8), (8, 32)), strict=True)]
    found = sure(match(*sides(source, target, in_order)))
    for at in range(4):
        assert f"encoder.layer.{at}.{THERE[lacked]}.weight" not in found


@ORDERS
def test_the_projection_of_an_attention_stands_in_for_no_query(in_order: bool) -> None:
    source: Rows = [row for at in range(4) for row in ((f"blocks.{at}.attn.kv.weight", (16, 8)), (f"blocks.{at}.attn.proj.weight", (8, 8)))]
    target: Rows = [(f"layer.{at}.attention.self.{name}.weight", (8, 8)) for at in range(4) for name in ("query", "key", "value")]
    found = sure(match(*sides(source, target, in_order)))
    assert not [key for key in found if "query" in key]


@ORDERS
def test_one_towers_layers_stand_in_for_none_of_the_other(in_order: bool) -> None:
    parts = {"c_fc": (32, 8), "c_proj": (8, 32)}
    source: Rows = []
    for head, many in (("visual.transformer", 3), ("transformer", 3)):
        source += [(f"{head}.resblocks.{at}.mlp.{name}.weight", shape) for at in range(many) for name, shape in parts.items()]
    source += [(f"visual.transformer.resblocks.{at}.ln_1.weight", (8,)) for at in range(3)]
    target: Rows = []
    for head in ("vision_model", "text_model"):
        target += [
            (f"{head}.layers.{at}.mlp.{name}.weight", shape)
            for at in range(3)
            for name, shape in zip(("fc1", "fc2"), parts.values(), strict=True)
        ]
        target += [(f"{head}.layers.{at}.layer_norm1.weight", (8,)) for at in range(3)]
    found = sure(match(*sides(source, target, in_order)))
    assert not [key for key, name in found.items() if key.startswith("text_model") and name.startswith("visual")]


@ORDERS
def test_a_norm_stands_in_for_none_of_another_layer_of_its_block(in_order: bool) -> None:
    source: Rows = []
    target: Rows = []
    for stage, width in enumerate((8, 12, 20)):
        for at in range(3):
            here, there = f"layer{stage}.{at}", f"stages.{stage}.layers.{at}"
            for n in range(3):
                shape = (width, width, 1 + n, 1 + n)
                source += [(f"{here}.conv{n + 1}.weight", shape), *norm(f"{here}.bn{n + 1}", width)]
                target += [(f"{there}.layer.{n}.convolution.weight", shape), *norm(f"{there}.layer.{n}.normalization", width)]
            if at == 0:  # the source has no norm of its shortcut
                source += [(f"{here}.downsample.0.weight", (width, 5, 1, 1))]
                target += [(f"{there}.shortcut.convolution.weight", (width, 5, 1, 1)), *norm(f"{there}.shortcut.normalization", width)]
    found = sure(match(*sides(source, target, in_order)))
    assert not [key for key in found if "shortcut.normalization" in key]


@ORDERS
def test_what_is_in_a_module_goes_where_the_rest_of_it_goes(in_order: bool) -> None:
    source: Rows = []
    target: Rows = []
    for at in range(3):
        width = 8 * 2**at
        here, there = f"levels.{at}.downsample", f"stages.{at + 1}.downsample"
        shapes = ((f"conv.{width}", width + 1), ("reduction", width + 2), ("proj", width + 3))
        for path, rows in ((here, source), (there, target)):
            rows += [(f"{path}.{name if path == here or '.' not in name else 'block.dw'}.weight", (wide, 3)) for name, wide in shapes]
            rows += [(f"{path}.norm1.weight", (width,)), (f"{path}.norm2.weight", (2 * width,))]
    found = sure(match(*sides(source, target, in_order)))
    for key, name in found.items():
        assert int(name.split(".")[1]) + 1 == int(key.split(".")[1]), (key, name)


@ORDERS
def test_a_layer_of_equal_name_and_shape_is_another_one(in_order: bool) -> None:
    layers: Rows = [(f"encoder.blocks.{at}.conv.weight", (8, 8 + at, 3, 3)) for at in range(3)]
    source: Rows = [*layers, ("encoder.mid.attn.proj.weight", (5, 7))]
    target: Rows = [(f"net.{key}", shape) for key, shape in (*source, ("decoder.mid.attn.proj.weight", (5, 7)))]
    found = sure(match(*sides(source, [(key.replace("blocks", "layers"), shape) for key, shape in target], in_order)))
    assert "net.decoder.mid.attn.proj.weight" not in found


@ORDERS
def test_a_layers_fused_matrix_is_not_cut_into_one_part_for_each_layer(in_order: bool) -> None:
    source: Rows = [(f"blocks.{at}.attn.qkv.weight", (24, 8)) for at in range(3)]
    target: Rows = [(f"encoder.layer.{at}.attention.value.weight", (8, 8)) for at in range(3)]
    assert not [link for link in match(*sides(source, target, in_order)).links if len(link.targets) == 3]
