"""What is decided once both sides are laid on each other: what many targets share, lists that go on elsewhere, biases of two layers."""

from __future__ import annotations

import pytest
from rows_support import ORDERS, Rows, side, sides, sure

from ckptsurgeon.matching.evidence.distinguish import nearness
from ckptsurgeon.matching.matcher import match
from ckptsurgeon.matching.module_tree import grow


def linear(path: str, out: int, into: int) -> Rows:
    return [(f"{path}.weight", (out, into)), (f"{path}.bias", (out,))]


def blocks(head: str, first: str, second: str) -> Rows:
    return [row for at in range(3) for row in (*linear(f"{head}.{at}.{first}", 32, 8), *linear(f"{head}.{at}.{second}", 8, 32))]


BODY, OTHER_BODY = blocks("blocks", "mlp.fc1", "mlp.fc2"), blocks("layers", "ff.up", "ff.down")


@pytest.mark.parametrize(
    ("source_path", "target_path", "takers"),
    [
        ("t_embedder.mlp.0", "norm.emb.timestep_embedder.linear_1", (0, 1, 2)),
        ("cond.0", "norm.emb.timestep_embedder.linear_1", ()),  # no word in common
        ("final_layer.linear", "adapter.linear", ()),  # only of what kind it is
        ("blocks.0.t_embedder.fc", "t_embedder.linear", (0,)),  # the first block has it, the others may have none
    ],
)
def test_a_layer_that_each_block_of_the_target_has_to_itself(source_path: str, target_path: str, takers: tuple[int, ...]) -> None:
    source = side(BODY + linear(source_path, 8, 20))
    target = side([*OTHER_BODY, *(row for at in range(3) for row in linear(f"layers.{at}.{target_path}", 8, 20))])
    found = sure(match(source, target))
    own = {f"layers.{at}.{target_path}.{role}": f"{source_path}.{role}" for at in takers for role in ("weight", "bias")}
    assert {key: one for key, one in found.items() if target_path in key} == own


def test_a_layer_that_some_blocks_have_is_no_one_elses() -> None:
    source = side(BODY + linear("t_embedder.fc", 8, 20))
    target = side([*OTHER_BODY, *(row for at in (0, 2) for row in linear(f"layers.{at}.t_embedder.linear", 8, 20))])
    assert not [key for key in sure(match(source, target)) if "embedder" in key]


def pyramid(inner: str, outer: list[str], inputs: list[int]) -> Rows:
    rows = [(f"{inner.format(at)}.weight", (8, width, 1, 1)) for at, width in enumerate(inputs)]
    return rows + [(f"{path}.weight", (8, 8, 3, 3)) for path in outer]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["more.p3", "more.p4"], True),
        (["more.p6", "more.p7"], True),
        (["more.p0", "more.p1"], False),  # counts from the beginning: which list comes first is not told
    ],
)
@pytest.mark.parametrize("in_order", [True, False], ids=["library", "sorted"])
def test_a_list_that_goes_on_in_another(more: list[str], told: bool, in_order: bool) -> None:
    source = pyramid("neck.lateral_convs.{}.conv", [f"neck.fpn_convs.{at}.conv" for at in range(5)], [16, 32, 64])
    target = pyramid(
        "fpn.inner_blocks.{}.0", [*(f"fpn.layer_blocks.{at}.0" for at in range(3)), *(f"fpn.{name}" for name in more)], [16, 32, 64]
    )
    truth = {other: one for (one, _), (other, _) in zip(source, target, strict=True)}
    found = sure(match(*(side(rows if in_order else sorted(rows)) for rows in (source, target))))
    assert found.items() <= truth.items()
    assert (len(found) == len(truth)) == told


@pytest.mark.parametrize(
    ("pair", "other_pair", "biases"),
    [
        (("lin_l", "lin_r"), ("fc_neigh", "fc_self"), True),  # a layer on a graph adds both up
        (("i2h", "h2h"), ("x2h", "hh"), False),  # names tell the matrices; whose bias it is they do not
    ],
)
def test_the_other_of_two_layers_has_the_bias(pair: tuple[str, str], other_pair: tuple[str, str], biases: bool) -> None:
    def layers(head: str, names: tuple[str, str], biased: int) -> Rows:
        rows = []
        for at in range(3):
            for number, name in enumerate(names):
                rows += linear(f"{head}.{at}.{name}", 8 + at, 7 + at)[: 1 + (number == biased)]
        return rows

    source, target = layers("convs", pair, 0), layers("layers", other_pair, 1)
    found = sure(match(side(source), side(target)))
    matrices = {
        f"layers.{at}.{new}.weight": f"convs.{at}.{old}.weight" for at in range(3) for old, new in zip(pair, other_pair, strict=True)
    }
    bias = {f"layers.{at}.{other_pair[1]}.bias": f"convs.{at}.{pair[0]}.bias" for at in range(3)}
    assert found == (matrices | bias if biases else matrices)


def test_what_is_with_a_layer_that_goes_over_needs_no_name() -> None:
    def net(head: str, norm: tuple[str, str, str], layer: str, last: str) -> Rows:
        body = [row for at in range(3) for row in linear(f"{head}.{layer}.{at}.a", 12, 6) + linear(f"{head}.{layer}.{at}.b", 6, 12)]
        norm_path, weight, bias = norm
        return [(f"{head}.{norm_path}.{weight}", (20,)), (f"{head}.{norm_path}.{bias}", (20,)), *linear(f"{head}.{last}", 6, 20), *body]

    source = net("mask_generator", ("input_norm", "weight", "bias"), "conv_layers", "input_conv")
    target = net("masker", ("bottleneck.0", "gamma", "beta"), "TCN", "bottleneck.1")
    found = sure(match(side(source), side([*target, ("masker.scale", (1,))])))
    assert found["masker.bottleneck.0.gamma"] == "mask_generator.input_norm.weight"


def test_a_word_as_it_is_written_tells_what_one_concept_does_not() -> None:
    source = [row for at in range(3) for name in ("res_out", "skip_out")[at == 2 :] for row in linear(f"a.{at}.{name}", 8, 6)]
    target = [row for at in range(3) for name in ("res_conv", "skip_conv") for row in linear(f"b.{at}.{name}", 8, 6)]
    found = sure(match(side(sorted(source)), side(sorted(target))))
    assert found == {key.replace("a.", "b.", 1).replace("out", "conv"): key for key, _ in source}


@pytest.mark.parametrize("sequence", [True, False], ids=["with holes", "without"])
def test_layers_of_a_sequence_are_run_in_its_order(sequence: bool) -> None:
    def net(body: str, up: str, last: str) -> Rows:
        rows = [row for at in range(3) for row in linear(f"{body}.{at}.a", 12, 6) + linear(f"{body}.{at}.b", 6, 12)]
        return rows + [row for at in range(2) for row in linear(f"{up}.{2 * at if sequence else at}", 24, 6)] + linear(last, 3, 6)

    source, target = net("body", "tail.0", "tail.1"), net("blocks", "upsample", "conv_last")
    found = sure(match(side(source), side(target)))
    assert ("upsample.0.weight" in found) == sequence
    assert found.items() <= {other: one for (one, _), (other, _) in zip(source, target, strict=True)}.items()


@pytest.mark.parametrize(
    ("names", "anchor", "near"),
    [
        (("convPa", "convDa"), "convPb", [0, 1]),
        (("score.a", "other.a"), "score.b", [0, 1]),  # by whole parts
        (("layer10", "layer2"), "layer1", [0, 0]),  # numbers are no letters
    ],
)
def test_of_two_the_one_is_nearer_whose_name_begins_alike(names: tuple[str, str], anchor: str, near: list[int]) -> None:
    root = grow(side([(f"{name}.weight", (4, 4)) for name in (*names, anchor)]).values())
    units = {unit.path: unit for unit in root.units()}
    assert nearness([units[name] for name in names], units[anchor]) == near


@ORDERS
@pytest.mark.parametrize("of_source", [False, True], ids=["tied output", "output of its own"])
def test_one_embedding_is_all_that_are_called_so(of_source: bool, in_order: bool) -> None:
    """Encoder's, decoder's and both's tables are one, as is the output layer that the source has not."""
    source: Rows = [("token_embd.weight", (40, 8)), *([("output.weight", (40, 8))] if of_source else [])]
    source += [(f"enc.blk.{at}.{name}.weight", shape) for at in range(3) for name, shape in (("ffn_up", (32, 8)), ("ffn_down", (8, 32)))]
    target: Rows = [("shared.weight", (40, 8)), ("encoder.embed_tokens.weight", (40, 8))]
    target += [(f"encoder.block.{at}.mlp.{name}.weight", shape) for at in range(3) for name, shape in (("wi", (32, 8)), ("wo", (8, 32)))]
    target += [("decoder.embed_tokens.weight", (40, 8)), ("lm_head.weight", (40, 8))]
    found = sure(match(*sides(source, target, in_order)))
    tables = ("shared.weight", "encoder.embed_tokens.weight", "decoder.embed_tokens.weight")
    assert {found.get(name) for name in tables} == {"token_embd.weight"}
    assert found["lm_head.weight"] == ("output.weight" if of_source else "token_embd.weight")


@ORDERS
def test_tables_of_other_things_are_not_one_embedding(in_order: bool) -> None:
    source: Rows = [("embed_tokens.weight", (40, 8)), ("h.0.fc.weight", (32, 8)), ("h.1.fc.weight", (32, 8))]
    target: Rows = [
        ("tok_embed.weight", (40, 8)),
        ("pos_embed.weight", (40, 8)),
        ("layers.0.linear.weight", (32, 8)),
        ("layers.1.linear.weight", (32, 8)),
    ]
    assert "pos_embed.weight" not in sure(match(*sides(source, target, in_order)))


@ORDERS
def test_an_output_layer_that_is_x_at_w_is_the_embedding_turned(in_order: bool) -> None:
    layers: Rows = [(f"{at}.fc.{role}", shape) for at in range(3) for role, shape in (("weight", (8, 32)), ("bias", (32,)))]
    source: Rows = [("transformer.wte.weight", (40, 8)), *((f"transformer.h.{key}", shape) for key, shape in layers)]
    target: Rows = [("embed.W_E", (40, 8)), *((f"blocks.{key}", shape) for key, shape in layers), ("unembed.W_U", (8, 40))]
    links = {key: link for link in match(*sides(source, target, in_order)).certain for key in link.targets}
    assert links["unembed.W_U"].sources == ("transformer.wte.weight",) and links["unembed.W_U"].op == "transpose"


@ORDERS
@pytest.mark.parametrize("names", [("w1", "w3", "w2"), ("w1_EFD", "w3_EFD", "w2_EDF")], ids=["w1", "dims in the name"])
def test_square_experts_are_told_by_what_w1_and_w3_stand_for(names: tuple[str, str, str], in_order: bool) -> None:
    source: Rows = [(f"layers.{at}.moe.experts.{name}", (3, 8, 8)) for at in range(2) for name in names]
    target: Rows = [
        (f"model.layers.{at}.mlp.experts.{n}.{name}.weight", (8, 8))
        for at in range(2)
        for n in range(3)
        for name in ("gate_proj", "up_proj", "down_proj")
    ]
    found = {key: link for link in match(*sides(source, target, in_order)).links for key in link.targets}
    down = found["model.layers.1.mlp.experts.2.down_proj.weight"]
    assert down.sources == (f"layers.1.moe.experts.{names[2]}",) and down.certain


@ORDERS
def test_square_stacks_whose_names_say_nothing_are_not_certain(in_order: bool) -> None:
    source: Rows = [(f"layers.{at}.experts.{name}", (3, 8, 8)) for at in range(2) for name in ("alpha", "beta2", "omega")]
    target: Rows = [
        (f"h.{at}.experts.{n}.{name}.weight", (8, 8)) for at in range(2) for n in range(3) for name in ("left", "middle", "right")
    ]
    assert not match(*sides(source, target, in_order)).certain


def test_a_count_of_batches_goes_where_its_norm_goes() -> None:
    """Stages are counted otherwise, and some counts have the same names on both sides."""
    roles = ("weight", "bias", "running_mean", "running_var")

    def stages(numbers: tuple[int, ...]) -> Rows:
        rows: Rows = []
        for width, number in zip((8, 16, 32), numbers, strict=True):
            rows += [(f"stages.{number}.mlp.1.{role}", (width,)) for role in roles]
            rows += [(f"stages.{number}.mlp.1.num_batches_tracked", ())]
        return rows

    found = sure(match(*sides(stages((0, 2, 4)), stages((0, 1, 2)))))
    assert {found[f"stages.{at}.mlp.1.num_batches_tracked"] for at in (1, 2)} == {
        f"stages.{2 * at}.mlp.1.num_batches_tracked" for at in (1, 2)
    }


@ORDERS
def test_words_that_say_nothing_do_not_keep_a_layer_apart(in_order: bool) -> None:
    """`o_proj` is `output`, where one of them has a bias and the other none, beside others of their shape."""
    source: Rows = [
        (f"layers.{at}.attn.{name}_proj.{role}", shape)
        for at in range(3)
        for name in "qkv"
        for role, shape in (("weight", (8, 8)), ("bias", (8,)))
    ]
    source += [(f"layers.{at}.attn.o_proj.weight", (8, 8)) for at in range(3)]
    target: Rows = [
        (f"h.{at}.attention.{name}.{role}", shape)
        for at in range(3)
        for name in ("query", "key", "value", "output")
        for role, shape in (("weight", (8, 8)), ("bias", (8,)))
    ]
    found = sure(match(*sides(source, target, in_order)))
    assert found["h.1.attention.output.weight"] == "layers.1.attn.o_proj.weight"
