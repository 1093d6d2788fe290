"""Rivals that are none: idle layers of another number, names that say more, parts of another block or of another kind."""

from __future__ import annotations

from rows_support import ORDERS, Rows, norm, sides, sure

from ckptsurgeon.matching.matcher import match


@ORDERS
def test_a_norm_that_a_block_has_twice_is_no_rival_of_those_of_other_numbers(in_order: bool) -> None:
    source: Rows = []
    target: Rows = []
    for stage, width in ((1, 6), (2, 10)):
        for at in range(2):
            here, there = f"cnet.layer{stage}.{at}", f"encoder.layer{stage}.{at}"
            for n in (1, 2):
                taken = 3 if (stage, at, n) == (1, 0, 1) else 6 if (at, n) == (0, 1) else width
                source += [(f"{here}.conv{n}.weight", (width, taken, 3, 3)), *norm(f"{here}.norm{n}", width)]
                target += [(f"{there}.convnormrelu{n}.0.weight", (width, taken, 3, 3)), *norm(f"{there}.convnormrelu{n}.1", width)]
            if at == 0:  # its norm has two names
                source += norm(f"{here}.norm3", width)
                source += [(f"{here}.downsample.0.weight", (width, 5, 1, 1)), *norm(f"{here}.downsample.1", width)]
                target += [(f"{there}.downsample.0.weight", (width, 5, 1, 1)), *norm(f"{there}.downsample.1", width)]
    found = sure(match(*sides(source, target, in_order)))
    for stage in (1, 2):
        for n in (1, 2):
            assert found[f"encoder.layer{stage}.0.convnormrelu{n}.1.weight"] == f"cnet.layer{stage}.0.norm{n}.weight"


@ORDERS
def test_a_name_that_says_no_more_is_nearer(in_order: bool) -> None:
    def side(head: str, names: list[str]) -> Rows:
        return [(f"{head}.{at}.self_attn.{name}.weight", (8, 8)) for at in range(3) for name in names]

    source = side("encoder.layers", ["linear_q", "linear_k", "linear_v", "linear_out", "linear_pos"])
    target = side("layers", ["q_proj", "k_proj", "v_proj", "o_proj", "relative_k_proj"])
    found = sure(match(*sides(source, target, in_order)))
    assert found["layers.1.self_attn.k_proj.weight"] == "encoder.layers.1.self_attn.linear_k.weight"
    assert found["layers.1.self_attn.relative_k_proj.weight"] == "encoder.layers.1.self_attn.linear_pos.weight"


@ORDERS
def test_embeddings_for_the_head_are_the_output_head(in_order: bool) -> None:
    layers: Rows = [(f"layers.{at}.mlp.{name}.weight", (8, 8 + at)) for at in range(3) for name in ("up", "down")]
    source: Rows = [("word_embeddings.weight", (40, 8)), *((f"net.{key}", shape) for key, shape in layers)]
    target: Rows = [("embed_tokens.weight", (40, 8)), *layers, ("lm_head.weight", (40, 8))]
    found = sure(match(*sides([*source, ("word_embeddings_for_head.weight", (40, 8))], target, in_order)))
    assert found["lm_head.weight"] == "word_embeddings_for_head.weight" and found["embed_tokens.weight"] == "word_embeddings.weight"


@ORDERS
def test_a_classifier_over_one_place_is_a_head_whatever_either_side_calls_it(in_order: bool) -> None:
    body: Rows = [(f"features.{at}.conv.weight", (8 + at, 7 + at, 3, 3)) for at in range(6)]
    heads = [[(f"{name}.weight", (10, 13, 1, 1)), (f"{name}.bias", (10,))] for name in ("last_linear", "classifier")]
    found = sure(match(*sides(*([*body, *head] for head in heads), in_order)))
    assert found["classifier.weight"] == "last_linear.weight" and found["classifier.bias"] == "last_linear.bias"


@ORDERS
def test_what_is_left_of_a_block_goes_to_no_other_block_of_its_list(in_order: bool) -> None:
    def side(names: list[str]) -> Rows:
        blocks = [f"encoder.block.{at}.layer" for at in range(3)]
        rest: Rows = [(f"{block}.1.DenseReluDense.wo.weight", (8, 32)) for block in blocks]
        return [*rest, *((f"{block}.1.DenseReluDense.{name}.weight", (32, 8)) for block in blocks for name in names)]

    found = match(*sides(side(["wi"]), side(["wi_0", "wi_1"]), in_order))
    assert {link.sources[0].split(".")[2] == link.targets[0].split(".")[2] for link in found.links} == {True}


@ORDERS
def test_the_bias_of_a_query_is_not_that_of_a_query_of_positions(in_order: bool) -> None:
    source: Rows = []
    target: Rows = []
    for at in range(3):
        here, there = f"encoder.layer.{at}.attention", f"encoder.blocks.{at}.attention"
        source += [
            (f"{here}.{name}.{leaf}", shape) for name in ("query", "key", "value") for leaf, shape in (("weight", (8, 8)), ("bias", (8,)))
        ]
        target += [(f"{there}.in_proj.weight", (24, 8)), (f"{there}.pos_q_proj.weight", (8, 9)), (f"{there}.pos_q_proj.bias", (8,))]
        for side, path in ((source, here), (target, there)):
            side += [(f"{path}.out.weight", (8, 8)), (f"{path}.out.bias", (8,))]
    found = sure(match(*sides(source, target, in_order)))
    assert not [key for key in found if "pos_q_proj" in key]


@ORDERS
def test_a_letter_of_the_alphabet_is_no_key_or_query(in_order: bool) -> None:
    source: Rows = [(f"net.{at}.part.{name}.weight", (8, 8)) for at in range(3) for name in ("chi", "phi", "theta", "psi")]
    target: Rows = [(f"layers.{at}.attn.{name}.weight", (8, 8)) for at in range(3) for name in ("k", "q", "v", "out")]
    assert not sure(match(*sides(source, target, in_order)))
