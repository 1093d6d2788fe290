"""What stands around a tensor tells of it in any order of keys: the convolution before a norm, the part of a layer it is named after."""

from __future__ import annotations

from math import inf

import pytest
from pairs_support import meta

from ckptsurgeon.matching.evidence.company import behind
from ckptsurgeon.matching.matcher import match
from ckptsurgeon.matching.module_tree import grow
from ckptsurgeon.matching.once_laid.neighbours import strayed
from ckptsurgeon.matching.pairing import Laid
from ckptsurgeon.tensors import TensorMeta

Shapes = dict[str, tuple[int, ...]]


def links(source: Shapes, target: Shapes) -> dict[str, str]:
    """By target key the source key of each certain link, of sides with their keys sorted."""
    sides: list[dict[str, TensorMeta]] = [{key: meta(key, some[key]) for key in sorted(some)} for some in (source, target)]
    return {link.targets[0]: link.sources[0] for link in match(*sides).links if link.certain and len(link.targets) == 1}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}


def linear(name: str, out: int, width: int) -> Shapes:
    return {f"{name}.weight": (out, width), f"{name}.bias": (out,)}


def counted(block: str, mixed: bool) -> Shapes:
    """An inverted residual whose norms are counted: they are of one width, and only the chain of convolutions tells them apart."""
    depthwise = (48,) if not mixed else (24, 24)
    rows: Shapes = {f"{block}.conv_pw.weight": (48, 16, 1, 1), f"{block}.conv_pwl.weight": (16, 48, 1, 1)}
    for at, width in enumerate(depthwise):
        rows[f"{block}.conv_dw.{at}.weight" if mixed else f"{block}.conv_dw.weight"] = (width, 1, 3 + 2 * at, 3 + 2 * at)
    return rows | norm(f"{block}.bn1", 48) | norm(f"{block}.bn2", 48) | norm(f"{block}.bn3", 16)


def nested(block: str, mixed: bool) -> Shapes:
    """The same, each norm in one module with its convolution."""
    depthwise = (48,) if not mixed else (24, 24)
    rows: Shapes = {f"{block}.exp_conv.conv.weight": (48, 16, 1, 1), f"{block}.conv2.conv.weight": (16, 48, 1, 1)}
    for at, width in enumerate(depthwise):
        rows[f"{block}.conv1.convs.{at}.weight" if mixed else f"{block}.conv1.conv.weight"] = (width, 1, 3 + 2 * at, 3 + 2 * at)
    return rows | norm(f"{block}.exp_conv.bn", 48) | norm(f"{block}.conv1.bn", 48) | norm(f"{block}.conv2.bn", 16)


@pytest.mark.parametrize("mixed", [False, True])
def test_a_counted_norm_is_of_the_convolution_at_its_place_in_the_chain(mixed: bool) -> None:
    found = links(
        counted("blocks.0", mixed) | counted("blocks.1", mixed), nested("stages.0.unit1", mixed) | nested("stages.0.unit2", mixed)
    )
    for at in range(2):
        unit = f"stages.0.unit{at + 1}"
        assert [found.get(f"{unit}.{name}.bn.weight") for name in ("exp_conv", "conv1", "conv2")] == [
            f"blocks.{at}.bn{number}.weight" for number in (1, 2, 3)
        ]


def test_a_norm_named_after_a_part_is_of_the_module_that_holds_it() -> None:
    source: Shapes = {}
    target: Shapes = {}
    for at in range(3):
        here, there = (f"attn_layers.layers.{2 * at}", f"attn_layers.layers.{2 * at + 1}"), f"layers.{at}"
        for side, names in ((source, [f"{here[0]}.1.to_{x}" for x in "qkv"]), (target, [f"{there}.attn.{x}_proj" for x in "qkv"])):
            for name in names:
                side.update(linear(name, 32, 32))
        source |= linear(f"{here[1]}.1.ff.0", 128, 32) | linear(f"{here[1]}.1.ff.2", 32, 128)
        target |= linear(f"{there}.ffn.fc1", 128, 32) | linear(f"{there}.ffn.fc2", 32, 128)
        source |= {f"{one}.0.0.gamma": (32,) for one in here}
        target |= {f"{there}.ln_attn.weight": (32,), f"{there}.ln_ffn.weight": (32,)}
    found = links(source, target)
    for at in range(3):
        assert found.get(f"layers.{at}.ln_attn.weight") == f"attn_layers.layers.{2 * at}.0.0.gamma"
        assert found.get(f"layers.{at}.ln_ffn.weight") == f"attn_layers.layers.{2 * at + 1}.0.0.gamma"


@pytest.mark.parametrize("out", ["output_linear", "linears.3"])
def test_matrices_that_an_attention_counts_are_query_key_value_and_output(out: str) -> None:
    source: Shapes = {}
    target: Shapes = {}
    listed = out.partition(".")[0] if "." in out else "linear_layers"
    for at in range(2):
        for number, name in enumerate(("query", "key", "value")):
            source |= linear(f"blocks.{at}.attention.{listed}.{number}", 8, 8)
            target |= linear(f"layer.{at}.attention.{name}", 8, 8)
        source |= linear(f"blocks.{at}.attention.{out}", 8, 8) | linear(f"blocks.{at}.ff.w_1", 32, 8)
        target |= linear(f"layer.{at}.attention.output.dense", 8, 8) | linear(f"layer.{at}.intermediate.dense", 32, 8)
    found = links(source, target)
    for at in range(2):
        for number, name in enumerate(("query", "key", "value")):
            assert found.get(f"layer.{at}.attention.{name}.weight") == f"blocks.{at}.attention.{listed}.{number}.weight"


def test_an_attention_beside_a_cross_attention_is_the_first_of_two() -> None:
    source: Shapes = {}
    target: Shapes = {}
    for at in range(2):
        for here, there in (("attn", "attn1"), ("cross_attn", "attn2")):
            for one, other in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("proj", "to_out.0")):
                source |= linear(f"blocks.{at}.{here}.{one}", 8, 8)
                target |= linear(f"layers.{at}.{there}.{other}", 8, 8)
    found = links(source, target)
    assert found["layers.1.attn2.to_q.weight"] == "blocks.1.cross_attn.q.weight" and len(found) == len(target)


def test_the_one_table_of_a_recurrent_model_is_its_tokens() -> None:
    rnn = {"weight_ih_l0": (96, 16), "weight_hh_l0": (96, 24), "bias_ih_l0": (96,), "bias_hh_l0": (96,)}
    source: Shapes = {"encoder.weight": (50, 16), **{f"rnn.{key}": shape for key, shape in rnn.items()}, **linear("decoder", 50, 24)}
    target: Shapes = {
        "lm.token_embedding.weight": (50, 16), **{f"lm.layers.0.{key}": shape for key, shape in rnn.items()}, **linear("lm.head", 50, 24)
    }  # fmt: skip
    assert links(source, target).get("lm.token_embedding.weight") == "encoder.weight"


@pytest.mark.parametrize("flat_source", [True, False])
@pytest.mark.parametrize("names", [("1", "2.norm", "2.fn"), ("embeds.proj", "blocks.0.norm", "blocks.0.mlp"), ("stem.proj", "a", "b")])
def test_how_the_pixels_of_a_patch_were_flattened_is_a_doubt(flat_source: bool, names: tuple[str, str, str]) -> None:
    first, norm, mlp = names
    flat: Shapes = {f"{first}.weight": (48, 192), f"{first}.bias": (48,), **linear(mlp, 96, 48)}
    flat |= {f"{norm}.weight": (48,), f"{norm}.bias": (48,)}
    kernel: Shapes = {
        "stem.proj.weight": (48, 3, 8, 8), "stem.proj.bias": (48,), "blocks.0.norm.weight": (48,), "blocks.0.norm.bias": (48,),
        **linear("blocks.0.mlp", 96, 48),
    }  # fmt: skip
    source, target = (flat, kernel) if flat_source else (kernel, flat)
    sides = [{key: meta(key, shape) for key, shape in some.items()} for some in (source, target)]
    link = match(*sides).by_target["stem.proj.weight" if flat_source else f"{first}.weight"]
    assert link.doubt == "layout" and link.choices[0].op == "reshape"
    wanted = "reshape(shape=[48, 8, 8, 3]) | permute(dims=[0, 3, 1, 2])" if flat_source else "permute(dims=[0, 2, 3, 1]) | reshape"
    assert link.choices[1].op == wanted


def test_the_first_three_of_four_counted_matrices_are_a_fused_one() -> None:
    source: Shapes = {}
    target: Shapes = {}
    for at in range(2):
        for number in range(4):
            source |= linear(f"layers.{at}.self_attn.linears.{number}", 8, 8)
        target |= {f"layers.{at}.self_attn.in_proj_weight": (24, 8), f"layers.{at}.self_attn.in_proj_bias": (24,)}
        target |= linear(f"layers.{at}.self_attn.out_proj", 8, 8)
    sides = [{key: meta(key, shape) for key, shape in some.items()} for some in (source, target)]
    found = match(*sides).by_target
    for at in range(2):
        head = f"layers.{at}.self_attn"
        assert found[f"{head}.in_proj_weight"].sources == tuple(f"{head}.linears.{number}.weight" for number in range(3))
        assert found[f"{head}.in_proj_weight"].margin > 1 and found[f"{head}.out_proj.weight"].sources == (f"{head}.linears.3.weight",)


def mixer(names: tuple[str, ...]) -> Shapes:
    """Blocks that mix places, then channels; by names for both norms and both MLPs, in this order."""
    rows: Shapes = {"stem.weight": (8, 3, 2, 2), "stem.bias": (8,)}
    for at in range(3):
        shapes = ((8,), (6, 4), (4, 6), (8,), (16, 8), (8, 16))
        for name, shape in zip(names, shapes, strict=True):
            rows |= {f"blocks.{at}.{name}.weight": shape, f"blocks.{at}.{name}.bias": shape[:1]}
    return rows


COUNTED = ("norm1", "tokens.fc1", "tokens.fc2", "norm2", "channels.fc1", "channels.fc2")
WITHIN = ("token_mix.0", "token_mix.2.net.0", "token_mix.2.net.3", "channel_mix.0", "channel_mix.1.net.0", "channel_mix.1.net.3")


def certain(source: Shapes, target: Shapes) -> dict[str, str]:
    """By target key the source key of each certain link, of sides in their own order."""
    one, other = ({key: meta(key, shape) for key, shape in some.items()} for some in (source, target))
    return {link.targets[0]: link.sources[0] for link in match(one, other).certain}


def test_norms_between_the_same_layers_go_together() -> None:
    assert certain(mixer(WITHIN), mixer(COUNTED)) == dict(zip(mixer(COUNTED), mixer(WITHIN), strict=True))


def test_norms_that_stand_elsewhere_are_not_told_by_their_places() -> None:
    """The same layers, each norm behind what it is before on the other side; or keys sorted, which stand in no order of their own."""
    rows = mixer(COUNTED)
    behind = {
        key: rows[key] for at in range(3) for name in (*COUNTED[1:3], COUNTED[0], *COUNTED[4:], COUNTED[3])
        for key in (f"blocks.{at}.{name}.weight", f"blocks.{at}.{name}.bias")
    }  # fmt: skip
    assert not [key for key in certain(mixer(WITHIN), behind) if "norm" in key]
    assert not [key for key in links(mixer(WITHIN), rows) if "norm" in key]


def decoder(layer: str, parts: tuple[str, ...], *ends: tuple[str, tuple[int, ...]]) -> Shapes:
    rows: Shapes = {"embed.weight": (50, 8)}
    for at in range(3):
        rows |= {f"{layer}.{at}.{part}.weight": shape for part, shape in zip(parts, ((8,), (24, 8), (8, 24)), strict=True)}
    return rows | dict(ends)


NAMES = ("layers", ("norm", "fc1", "fc2")), ("blocks", ("ln", "mlp.0", "mlp.2"))


@pytest.mark.parametrize("name", ["final_norm", "ln_f", "post", "out_norm"])
def test_the_one_norm_outside_of_the_layers_is_the_last(name: str) -> None:
    source = decoder(*NAMES[0], ("norm.weight", (8,)), ("head.weight", (50, 8)))
    target = decoder(*NAMES[1], (f"{name}.weight", (8,)), ("unembed.weight", (50, 8)))
    assert links(source, target).get(f"{name}.weight") == "norm.weight"
    assert "extra.weight" not in links(source, target | {"extra.weight": (8,)})


@pytest.mark.parametrize("name", ["ff_out", "vocab", "final_linear", "to_words"])
def test_the_one_matrix_as_large_as_the_tokens_is_the_output_head(name: str) -> None:
    source = decoder(*NAMES[0], ("norm.weight", (8,)), (f"{name}.weight", (50, 8)))
    target = decoder(*NAMES[1], ("norm.weight", (8,)), ("lm_head.weight", (50, 8)))
    assert links(source, target).get("lm_head.weight") == f"{name}.weight"
    assert "lm_head.weight" not in links(source | {"more.weight": (50, 8)}, target)


def test_a_norm_is_in_doubt_where_its_convolution_goes_elsewhere() -> None:
    tensors = [
        meta(f"{branch}.{part}", shape) for branch in "ab" for part, shape in (("conv.weight", (4, 4, 1, 1)), *norm("bn", 4).items())
    ]
    source, target = grow(tensors), grow(tensors)
    here, there = ({unit.path: unit for unit in side.units()} for side in (source, target))
    crossed = [("a.conv", "a.conv"), ("b.conv", "b.conv"), ("a.bn", "b.bn"), ("b.bn", "b.bn")]
    units = [Laid((here[one],), (there[other],), inf, ()) for one, other in crossed]
    assert [laid.margin for laid in strayed(units, behind(source) | behind(target))] == [inf, inf, 0.0, inf]


@pytest.mark.parametrize("first", ["conv", "norm"])
def test_a_norm_in_a_row_of_layers_is_of_the_convolution_on_its_side(first: str) -> None:
    order = ("conv", "norm") if first == "conv" else ("norm", "conv")
    shapes: Shapes = {}
    for at, kind in enumerate(order * 2):
        shapes |= {f"row.{at}.weight": (4, 4, 1, 1)} if kind == "conv" else norm(f"row.{at}", 4)
    root = grow([meta(key, shape) for key, shape in shapes.items()])
    paths = {id(node): node.path for node in root.nodes}
    found = {paths[unit]: node.path for unit, node in behind(root).items()}
    assert found == ({"row.1": "row.0", "row.3": "row.2"} if first == "conv" else {"row.0": "row.1", "row.2": "row.3"})


def test_the_norm_beside_the_one_of_the_mlp_is_the_first() -> None:
    rows = linear("blocks.{}.fc1", 32, 8) | linear("blocks.{}.fc2", 8, 32)
    source = rows | {f"blocks.{{}}.norm{at}.weight": (8,) for at in (1, 2)}
    target = rows | {f"blocks.{{}}.{name}.weight": (8,) for name in ("norm", "norm_mlp")}
    found = links(*({key.format(at): shape for key, shape in some.items() for at in range(3)} for some in (source, target)))
    assert [found.get(f"blocks.1.{name}.weight") for name in ("norm", "norm_mlp")] == ["blocks.1.norm1.weight", "blocks.1.norm2.weight"]
