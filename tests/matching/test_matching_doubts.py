"""What looks like a match and may be none is doubted: shape alone, equals that are idle, lists that are counted the other way."""

from __future__ import annotations

import pytest
from pairs_support import meta

from ckptsurgeon.matching.matcher import match
from ckptsurgeon.tensors import TensorMeta

Side = dict[str, TensorMeta]


def side(shapes: dict[str, tuple[int, ...]]) -> Side:
    return {key: meta(key, shape) for key, shape in shapes.items()}


def sure(source: Side, target: Side) -> dict[str, tuple[str, ...]]:
    return {key: link.sources for link in match(source, target).certain for key in link.targets}


def layers(path: str, names: tuple[str, ...], count: int = 2) -> dict[str, tuple[int, ...]]:
    return {f"{path}.{i}.{name}.weight": (8, 8) for i in range(count) for name in names}


QKVO = ("attn.q", "attn.k", "attn.v", "attn.out")
OTHER = ("attention.query", "attention.key", "attention.value", "attention.out_proj")


def test_strangers_at_the_top_are_not_linked_by_their_shape() -> None:
    source = side(layers("blocks", QKVO) | {"projector.alpha": (31, 7)})
    target = side(layers("layers", OTHER) | {"queries.beta": (31, 7)})
    assert "queries.beta" not in sure(source, target)
    assert len(sure(source, target)) == 8


def test_a_bare_parameter_is_what_those_of_its_name_are() -> None:
    """One at the top, that is shaped otherwise; one goes elsewhere, or two are too few, and it may be fresh."""

    def named(path: str, names: tuple[str, ...], tables: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
        return layers(path, names, len(tables)) | {f"{path}.{i}.{name}": (6, 8) for i, name in enumerate(tables)}

    here, there = ("modulation",) * 3, ("scale_shift_table",) * 3
    head: dict[str, tuple[int, ...]] = {"head.modulation": (2, 8)}
    for source_tables, target_tables, told in (
        (here, there, True),
        (here, (*there[1:], "shifts"), False),
        (here[1:], there[1:], True),
        (here[2:], there[2:], False),
    ):
        source, target = side(named("blocks", QKVO, source_tables) | head), side(named("layers", OTHER, target_tables) | {there[0]: (2, 8)})
        assert (sure(source, target).get(there[0]) == ("head.modulation",)) is told, (source_tables, target_tables)


def test_a_role_that_each_side_has_once_speaks_for_a_link() -> None:
    source = side({"embed_in.weight": (99, 8)} | layers("blocks", QKVO) | {"embed_out.weight": (99, 8)})
    target = side({"wte.weight": (99, 8)} | layers("layers", OTHER) | {"lm_head.weight": (99, 8)})
    found = sure(source, target)
    assert found["lm_head.weight"] == ("embed_out.weight",)
    assert found["wte.weight"] == ("embed_in.weight",)


def test_one_of_several_equals_is_no_better_than_the_others() -> None:
    source = side(layers("blocks", QKVO, 3) | {f"blocks.{i}.rotary.freqs": (5,) for i in range(3)})
    target = side(layers("layers", OTHER, 3) | {"rotary.freqs": (5,)})
    found = match(source, target)
    link = next(link for link in found.links if link.targets == ("rotary.freqs",))
    assert not link.certain
    assert link.sources == ("blocks.0.rotary.freqs",)
    assert "blocks.1.rotary.freqs" in link.runner_up


def test_a_codebook_that_the_source_lacks_is_not_another_one() -> None:
    def books(count: int, path: str) -> dict[str, tuple[int, ...]]:
        return {f"{path}.{i}.codebook.{leaf}": (64, 8) for i in range(count) for leaf in ("embed", "embed_avg")}

    source = side(layers("blocks", QKVO) | books(2, "quantizer.vq"))
    target = side(layers("layers", OTHER) | books(4, "quantizer.layers"))
    found = sure(source, target)
    assert {key for key in found if "codebook" in key} <= {
        f"quantizer.layers.{i}.codebook.{leaf}" for i in (0, 1) for leaf in ("embed", "embed_avg")
    }


@pytest.mark.parametrize("in_order", [False, True])
def test_refinement_stages_that_are_all_alike_may_be_counted_the_other_way(in_order: bool) -> None:
    def stages(path: str, conv: str, first: int) -> dict[str, tuple[int, ...]]:
        return {f"{path}{i + first}.{conv}{j}.weight": (8, 8, 3, 3) for i in range(4) for j in (1, 2)}

    source = side(layers("blocks", QKVO) | stages("scratch.refinenet", "conv", 1))
    target = side(layers("layers", OTHER) | stages("neck.fusion_stage.layers.", "convolution", 0))
    if in_order:
        source, target = dict(sorted(source.items())), dict(sorted(target.items()))
    assert not [key for key in sure(source, target) if "fusion" in key]
    last = match(source, target).by_target["neck.fusion_stage.layers.3.convolution2.weight"]
    assert last.doubt == "layout"
    assert [layout.sources for layout in last.choices] == [(f"scratch.refinenet{number}.conv2.weight",) for number in (4, 1)]


def test_of_more_stages_none_is_said_to_be_the_others_mirrored() -> None:
    def stages(path: str, conv: str, count: int) -> dict[str, tuple[int, ...]]:
        return {f"{path}{i}.{conv}{j}.weight": (8, 8, 3, 3) for i in range(count) for j in (1, 2)}

    source = side(layers("blocks", QKVO) | stages("scratch.refinenet", "conv", 5))
    target = side(layers("layers", OTHER) | stages("neck.fusion_stage.layers.", "convolution", 4))
    assert not [link for link in match(source, target).links if link.doubt or (link.certain and "fusion" in link.targets[0])]


def test_a_list_is_called_by_its_own_name_where_underscores_stand_around_the_list_that_it_is_in() -> None:
    """`up_blocks_1_attentions` is a list of attentions, and these are counted alike."""

    def parts(list_name: str, dot: str, down: str) -> dict[str, tuple[int, ...]]:
        names = ("proj_in", "proj_out", f"ff{dot}0", f"ff{dot}2")
        return {f"{list_name}{dot}{i}{dot}{name}.{down}.weight": (8, 5 + at) for i in (0, 1) for at, name in enumerate(names)}

    flat, nested = parts("lora_net_up_blocks_1_attentions", "_", "lora_down"), parts("net.up_blocks.1.attentions", ".", "lora_A")
    assert sure(side(flat), side(nested)) == {name: (key,) for name, key in zip(nested, flat, strict=True)}


@pytest.mark.parametrize("in_order", [False, True])
def test_norms_that_are_counted_go_by_what_stands_before_them(in_order: bool) -> None:
    """Deformable DETR's first norm follows its cross-attention."""
    special = ("offsets", "weights", "value", "out")
    source = side(
        {
            f"decoder.{i}.{key}": shape
            for i in range(2)
            for key, shape in (
                *((f"cross_attn.{part}.weight", (8, 8) if part != "offsets" else (4, 8)) for part in special),
                ("norm1.weight", (8,)),
                *((f"self_attn.{part}.weight", (8, 8)) for part in ("q", "k", "v", "out")),
                ("norm2.weight", (8,)),
                ("linear1.weight", (32, 8)),
                ("linear2.weight", (8, 32)),
                ("norm3.weight", (8,)),
            )
        }
    )
    target = side(
        {
            f"model.layers.{i}.{key}": shape
            for i in range(2)
            for key, shape in (
                *((f"self_attn.{part}_proj.weight", (8, 8)) for part in ("q", "k", "v", "out")),
                ("self_attn_layer_norm.weight", (8,)),
                *((f"encoder_attn.{part}_proj.weight", (8, 8) if part != "offsets" else (4, 8)) for part in special),
                ("encoder_attn_layer_norm.weight", (8,)),
                ("fc1.weight", (32, 8)),
                ("fc2.weight", (8, 32)),
                ("final_layer_norm.weight", (8,)),
            )
        }
    )
    if in_order:
        source, target = dict(sorted(source.items())), dict(sorted(target.items()))
    found = sure(source, target)
    wrong = {f"model.layers.{i}.self_attn_layer_norm.weight": (f"decoder.{i}.norm1.weight",) for i in range(2)}
    assert not wrong.items() & found.items()


def test_a_fused_part_without_a_word_in_common_is_uncertain() -> None:
    source = side({f"layers.{i}.mixer.A_log": (64, 16) for i in range(2)} | {f"layers.{i}.norm.weight": (32,) for i in range(2)})
    target = side(
        {f"model.layers.{i}.self_attn.{n}_proj.weight": (16, 32) for i in range(2) for n in "kv"}
        | {f"model.layers.{i}.norm.weight": (32,) for i in range(2)}
    )
    assert not [key for key in sure(source, target) if "_proj" in key]


def test_experts_side_by_side_in_one_matrix() -> None:
    source = side({f"layers.{i}.moe.experts.{e}.{name}.weight": (10, 8) for i in range(2) for e in range(4) for name in ("w1", "w3")})
    target = side({f"layers.{i}.moe.{name}": (40, 8) for i in range(2) for name in ("w1", "w3")})
    found = match(source, target)
    assert {link.targets[0]: (link.sources, link.op) for link in found.links} == {
        f"layers.{i}.moe.{name}": (tuple(f"layers.{i}.moe.experts.{e}.{name}.weight" for e in range(4)), "concat(dim=0)")
        for i in range(2)
        for name in ("w1", "w3")
    }


def test_query_key_value_and_mlp_of_one_block_in_one_matrix() -> None:
    source = side({f"single.{i}.linear1.weight": (3 * 8 + 32, 8) for i in range(2)} | {f"single.{i}.linear1.bias": (56,) for i in range(2)})
    parts = {"attn.to_q": 8, "attn.to_k": 8, "attn.to_v": 8, "proj_mlp": 32}
    target = side(
        {f"blocks.{i}.{name}.weight": (rows, 8) for i in range(2) for name, rows in parts.items()}
        | {f"blocks.{i}.{name}.bias": (rows,) for i in range(2) for name, rows in parts.items()}
    )
    found = match(source, target)
    assert {link.sources: link.targets for link in found.links if link.sources[0].endswith("weight")} == {
        (f"single.{i}.linear1.weight",): tuple(f"blocks.{i}.{name}.weight" for name in parts) for i in range(2)
    }


def _blocks(*names: str, start: int = 0) -> Side:
    """Two layers whose parts have these names, all of one shape."""
    return side({f"layers.{start + i}.{name}.weight": (8, 8) for i in range(2) for name in names})


@pytest.mark.parametrize(
    ("ours", "theirs", "never"),
    [
        (("ln_1", "ffn_norm"), ("input_layernorm", "ln2"), ("ln_1", "ln2")),
        (("ffn_norm", "input_layernorm"), ("ln1", "post_attention_layernorm"), ("ffn_norm", "ln1")),
        (("post_attention_layernorm", "ln1"), ("attention_norm", "norm2"), ("post_attention_layernorm", "attention_norm")),
        (("fc1", "c_proj"), ("lin2", "w1"), ("fc1", "lin2")),
        (("w1", "c_proj"), ("c_fc", "fc2"), ("w1", "fc2")),
        (("lin1", "w2"), ("up_proj", "fc2"), ("lin1", "fc2")),
        (("conv", "c2"), ("c1", "cv2"), ("c2", "c1")),
        (("dense_4h_to_h", "intermediate"), ("dense_h_to_4h", "lin2"), ("dense_4h_to_h", "dense_h_to_4h")),
    ],
)
def test_names_are_not_linked_where_they_speak_for_the_other_way(
    ours: tuple[str, ...], theirs: tuple[str, ...], never: tuple[str, str]
) -> None:
    """Shapes and places can't tell them, in files whose keys are sorted; the numbers and words of the names speak against the link."""
    source, target = dict(sorted(_blocks(*ours).items())), dict(sorted(_blocks(*theirs, start=1).items()))
    certain = {(link.sources[0].split(".")[2], link.targets[0].split(".")[2]) for link in match(source, target).certain}
    assert never not in certain


def test_lists_that_begin_at_another_number_go_in_their_order() -> None:
    certain = {link.targets[0]: link.sources[0] for link in match(_blocks("norm0", "norm1"), _blocks("ln_1", "ln_2")).certain}
    assert {f"layers.0.ln_{i + 1}.weight": f"layers.0.norm{i}.weight" for i in (0, 1)}.items() <= certain.items()


@pytest.mark.parametrize("same_names", [True, False])
def test_a_fused_bias_of_which_the_target_has_two_parts(same_names: bool) -> None:
    """Swin v2 and BEiT learn no bias of keys: torchvision keeps it as zeros in `qkv.bias`, timm has `q_bias` and `v_bias`."""
    blocks = [f"features.{at}" for at in range(3)]
    kept = {"norm.weight": (8,), "attn.qkv.weight": (24, 8), "attn.proj.weight": (8, 8), "mlp.0.weight": (32, 8)}
    names = blocks if same_names else [f"layers.{at}" for at in range(3)]
    source = {f"{block}.{key}": shape for block in blocks for key, shape in (kept | {"attn.qkv.bias": (24,)}).items()}
    target = {f"{block}.{key}": shape for block in names for key, shape in (kept | {"attn.q_bias": (8,), "attn.v_bias": (8,)}).items()}
    found = {link.targets: link for link in match(side(source), side(target)).certain}
    for block, name in zip(blocks, names, strict=True):
        link = found[f"{name}.attn.q_bias", f"{name}.attn.v_bias"]
        assert (link.sources, link.op) == ((f"{block}.attn.qkv.bias",), "chunk(of=3, parts=[0, 2])")
    for other in ({"attn.q_bias": (8,)}, {"attn.q_bias": (8,), "attn.v_bias": (4,)}, {"attn.query_key_value.bias": (20,)}):
        target = {f"{block}.{key}": shape for block in names for key, shape in (kept | other).items()}
        assert not [link for link in match(side(source), side(target)).links if "parts" in link.op]


_OPPOSED = (
    "user_embedding.weight item_embedding.weight|bos_embed eos_embed|row_embed col_embed|log_alpha alpha|fc_logvar.weight fc_var.weight|"
    "w_in.weight w_out.weight|min_val max_val|sigma sigma_sq|inv_freq freqs|prior.log_std prior.std|"
    "bn.running_mean bn.running_var|pos_emb neg_emb"
)


@pytest.mark.parametrize("names", _OPPOSED.split("|"))
def test_opposites_and_other_quantities_are_no_renaming(names: str) -> None:
    here, there = names.split()
    rest: dict[str, tuple[int, ...]] = {
        f"enc.fc{at}.{role}": (8, 4)[: 2 if role == "weight" else 1] for at in (1, 2) for role in ("weight", "bias")
    }
    for first, second in ((here, there), (there, here)):
        assert second not in sure(side(rest | {first: (5, 4)}), side(rest | {second: (5, 4)}))
    assert "fc_logvar.weight" in sure(side(rest | {"fc_log_var.weight": (5, 4)}), side(rest | {"fc_logvar.weight": (5, 4)}))


@pytest.mark.parametrize("name", ["proj", "pool", "contrastive_head"])
def test_a_layer_of_a_head_of_words_is_no_new_layer(name: str) -> None:
    """The norm behind it has no partner; nor is it the layer before other classes, where all else keeps its name."""
    words: dict[str, tuple[int, ...]] = {
        f"lm_head.{key}": shape for key, shape in (("dense.weight", (8, 8)), ("norm.weight", (8,)), ("bias", (31,)))
    }
    tables: dict[str, tuple[int, ...]] = {"tok.weight": (31, 8)}
    source, target = tables | layers("blocks", QKVO), tables | layers("layers", OTHER)
    for first, second, key in (
        (source | words, target | {f"{name}.weight": (8, 8)}, f"{name}.weight"),
        (target | {f"{name}.weight": (8, 8)}, source | words, "lm_head.dense.weight"),
        (source | words, source | {"classifier.dense.weight": (8, 8), "classifier.out.weight": (3, 8)}, "classifier.dense.weight"),
    ):
        found = sure(side(first), side(second))
        assert key not in found and len(found) == 9
