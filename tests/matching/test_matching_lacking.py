"""What the source lacks stays fresh: no other layer is certain to stand in for it."""

from __future__ import annotations

import re

import pytest
from pairs_support import PAIRS, read_pair, sorted_keys
from rows_support import ORDERS, Rows, norm, side, sides, sure

from ckptsurgeon.matching.choose import choose
from ckptsurgeon.matching.evidence.lists import in_each_longest_rise
from ckptsurgeon.matching.evidence.score import Clues
from ckptsurgeon.matching.matcher import match
from ckptsurgeon.matching.module_tree import Node, both
from ckptsurgeon.planning.links import ENOUGH

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


# Pairs of published implementations, and what is taken from their source, as a trained model may lack it.
TAKEN = [
    ("one of two attentions", "facebook_timesformer__hf_timesformer", r"model\.blocks\.\d+\.temporal_attn\.proj"),
    ("one of two norms", "huawei_tnt__timm_tnt", r"blocks\.\d+\.outer_norm1"),
    ("one of two norms, of a list", "hf446_llava__hf524_llava", r"vision_tower\.vision_model\.encoder\.layers\.\d+\.layer_norm2"),
    ("queries", "nari_dia__hf_dia", r"encoder\.layers\.\d+\.self_attention\.q_proj"),
    ("the text's part of an attention", "lodestone_chroma__diffusers_chroma", r"double_blocks\.\d+\.txt_attn\.proj"),
    ("the text's first layer", "lodestone_chroma__diffusers_chroma", r"double_blocks\.\d+\.txt_mlp\.0"),
]


@ORDERS
@pytest.mark.parametrize(("pair", "taken"), [row[1:] for row in TAKEN], ids=[row[0] for row in TAKEN])
def test_what_is_taken_from_a_source_is_not_made_up(pair: str, taken: str, in_order: bool) -> None:
    whole = read_pair(PAIRS / f"{pair}.json") if in_order else sorted_keys(read_pair(PAIRS / f"{pair}.json"))
    rest = {key: tensor for key, tensor in whole.source.items() if not re.fullmatch(taken, key.rpartition(".")[0])}
    assert len(rest) < len(whole.source)
    for key, source in sure(match(rest, whole.target)).items():
        assert key in whole.truth and (source in whole.truth[key].sources or whole.truth[key].twins), key


@pytest.mark.parametrize("trust", [0.0, 1.0])
@pytest.mark.parametrize("lacked", [1, 4])
def test_a_list_that_skips_a_number_lacks_that_member(lacked: int, trust: float) -> None:
    """The others are not counted anew: `in_layers.2` is no stand-in for `in_layers.1`."""
    source: Rows = [(f"enc_q.in_layers.{at}.weight", (8, 8)) for at in range(8) if at != lacked]
    target: Rows = [(f"wavenet.in_layers.{at}.weight", (8, 8)) for at in range(8)]
    choices = choose(*units(source, target), Clues(trust=trust))
    assert {choice.source.numbers: choice.target.numbers for choice in choices} == {(at,): (at,) for at in range(8) if at != lacked}


def test_the_second_of_each_of_many_is_not_both_of_each_of_half_as_many() -> None:
    source: Rows = [(f"decoder.upsamples.{at}.residual.6.weight", (8, 8, 3)) for at in range(6)]
    target: Rows = [(f"up_blocks.{at}.conv{n}.weight", (8, 8, 3)) for at in range(3) for n in (1, 2)]
    assert all(choice.margin < ENOUGH for choice in choose(*units(source, target), Clues()))


def units(*rows: Rows) -> list[list[Node]]:
    """The layers of two sides."""
    return [list(root.units()) for root in both(*(side(some).values() for some in rows))]


def blocks(head: str, names: dict[str, tuple[int, ...]], many: int = 4) -> Rows:
    return [(f"{head}.{at}.{name}.weight", shape) for at in range(many) for name, shape in names.items()]


@ORDERS
def test_a_layer_that_is_called_after_another_thing_is_not_certain_beside_one_that_is_left(in_order: bool) -> None:
    body = [(f"encoder.layers.{at}.{name}.weight", shape) for at in range(3) for name, shape in (("fc1", (32, 8)), ("fc2", (8, 32)))]
    renamed = [(key.replace("encoder", "model.enc").replace("fc", "dense"), shape) for key, shape in body]
    layer = [("weight", (5, 8)), ("bias", (5,))]
    source = [*body, *((f"final_proj.{role}", shape) for role, shape in layer)]
    target = [*renamed, *((f"{name}.{role}", shape) for name in ("speaker_proj", "project_hid") for role, shape in layer)]
    assert not [key for key in sure(match(*sides(source, target, in_order))) if key.startswith(("speaker", "project"))]


def test_a_list_of_which_a_member_lacks_something_tells_no_direction() -> None:
    units = {f"unit{n}.conv{m}": (8, 8, 3, 3) for n in (1, 2) for m in (1, 2)} | {"out": (8, 9, 1, 1)}
    source = [row for row in blocks("refinenets", units) if row[0] != "refinenets.2.unit2.conv2.weight"]
    source = [(key.replace("refinenets.", "refinenet"), shape) for key, shape in source]
    names = {f"residual{n}.convolution{m}": (8, 8, 3, 3) for n in (1, 2) for m in (1, 2)} | {"projection": (8, 9, 1, 1)}
    assert not sure(match(*sides(source, blocks("neck.fusion_stage.layers", names))))


def test_members_that_go_to_one_are_held_against_the_order_of_the_rest() -> None:
    """Two lists in one: `layers.1` goes to a part of the second member, so that two numbers go to one; a crossed pair is not certain."""
    moves = [(0, 0), (1, 1), (2, 2), (3, 1), (4, 3), (5, 3)]
    assert in_each_longest_rise([target for _, target in moves]) == {0, 1, 4, 5}


@ORDERS
def test_an_embedding_is_not_cut_into_the_layers_that_a_source_lacks(in_order: bool) -> None:
    """Its vocabulary is as many rows as all queries have."""
    names = {"q": "self_attn.q_proj", "o": "self_attn.o_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
    shapes = {"q": (8, 8), "o": (8, 8), "up": (20, 8), "down": (8, 20)}
    source: Rows = [("model.embed_tokens.weight", (24, 8)), ("lm_head.weight", (24, 8))]
    source += [(f"model.layers.{at}.{name}.weight", shapes[part]) for at in range(3) for part, name in names.items() if part != "q"]
    there = {"q": "attn.q_proj", "o": "attn.output_proj", "up": "mlp.w3", "down": "mlp.w2"}
    target: Rows = [("tok_embeddings.weight", (24, 8)), ("output.weight", (24, 8))]
    target += [(f"layers.{at}.{name}.weight", shapes[part]) for at in range(3) for part, name in there.items()]
    found = {key: link.sources for link in match(*sides(source, target, in_order)).links for key in link.targets}
    assert not [key for key, keys in found.items() if "embed_tokens" in keys[0] and key != "tok_embeddings.weight"]


@pytest.mark.parametrize(("first", "second"), [("intermediate", "output"), ("w_in", "w_out")])
@pytest.mark.parametrize("attention", ["attn.out", "attn.proj", "o"])
def test_the_output_of_an_mlp_is_none_of_an_attention(attention: str, first: str, second: str) -> None:
    """An MLP as wide as the model: shapes tell nothing, and both layers are called an output."""
    around = "attn." if "." in attention else ""
    parts = {attention: "dense", "ffn.fc2": second, "ffn.fc1": first} | {f"{around}{letter}": f"{letter}_proj" for letter in "qkv"}
    here, there = (side([(f"layers.{at}.{name}.weight", (8, 8)) for at in range(3) for name in names]) for names in (parts, parts.values()))
    assert not [link for link in match(here, there).certain if attention in link.sources[0] and second in link.targets[0]]
