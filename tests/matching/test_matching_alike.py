"""Look-alikes: what tells one from another, and what only seems to."""

from __future__ import annotations

import pytest
from rows_support import Rows, norm, side, sure

from ckptsurgeon.matching.evidence.vocabulary import concepts
from ckptsurgeon.matching.matcher import match


def inverted(path: str, names: dict[str, str], width: int, first: bool) -> Rows:
    """A block of an inverted residual; the first has no expansion."""
    wide = width if first else 4 * width
    rows: Rows = [] if first else [(f"{path}.{names['expand']}.weight", (wide, width, 1, 1)), *norm(f"{path}.{names['n1']}", wide)]
    rows += [(f"{path}.{names['deep']}.weight", (wide, 1, 3, 3)), *norm(f"{path}.{names['n1' if first else 'n2']}", wide)]
    last = names.get("first_out", "") if first else names["project"]
    return [*rows, (f"{path}.{last}.weight", (width + 2, wide, 1, 1)), *norm(f"{path}.{names['n2' if first else 'n3']}", width + 2)]


@pytest.mark.parametrize("in_order", [True, False], ids=["library", "sorted"])
def test_the_first_of_two_norms_is_not_the_first_of_three(in_order: bool) -> None:
    timm = {"expand": "conv_pw", "deep": "conv_dw", "project": "conv_pwl", "first_out": "conv_pw", "n1": "bn1", "n2": "bn2", "n3": "bn3"}
    named = {"expand": "expansion.conv", "deep": "deep.conv", "project": "projection.conv", "first_out": "projection.conv"}
    others = ({"n1": "deep.bn", "n2": "projection.bn"}, {"n1": "expansion.bn", "n2": "deep.bn", "n3": "projection.bn"})
    source = [row for at in range(4) for row in inverted(f"blocks.{at}", timm, 8 + 2 * at, at == 0)]
    target = [row for at in range(4) for row in inverted(f"encoder.{at}", named | others[at > 0], 8 + 2 * at, at == 0)]
    sides = [side(rows if in_order else sorted(rows)) for rows in (source, target)]
    truth = {other: one for (one, _), (other, _) in zip(source, target, strict=True)}
    found = sure(match(*sides))
    assert {key: one for key, one in found.items() if truth[key] != one} == {}


def test_of_four_numbered_matrices_none_is_the_one_beside_their_fusion() -> None:
    source = side([(f"layers.{at}.attn.linears.{n}.weight", (8, 8)) for at in range(3) for n in range(4)])
    target = side([row for at in range(3) for row in ((f"h.{at}.attn.in_proj_weight", (24, 8)), (f"h.{at}.attn.out_proj.weight", (8, 8)))])
    found = match(source, target)
    assert not [link for link in found.certain if "linears.0" in link.sources[0] and "out_proj" in link.targets[0]]


def test_an_encoders_embedding_may_not_be_its_decoders() -> None:
    layers: Rows = [
        (f"{part}.layers.0.fc{n}.weight", shape) for part in ("encoder", "decoder") for n, shape in ((1, (32, 8)), (2, (8, 32)))
    ]
    tables: Rows = [(f"{part}.embed_tokens.weight", (40, 8)) for part in ("encoder", "decoder")]
    target = [(f"model.{key}", shape) for key, shape in [("shared.weight", (40, 8)), *tables, *layers]]
    target = [(key.replace("fc", "linear"), shape) for key, shape in target]
    found = match(side([*tables, *layers]), side(target)).by_target
    assert not found["model.shared.weight"].certain and found["model.shared.weight"].sources == ("encoder.embed_tokens.weight",)
    assert found["model.decoder.embed_tokens.weight"].certain


def pyramid(lateral: str, output: str, first: int, both: bool) -> Rows:
    widths = (16, 32, 64)
    rows: Rows = [(f"{lateral.format(first + at)}.weight", (8, width, 1, 1)) for at, width in enumerate(widths)] if both else []
    return [*rows, *((f"{output.format(first + at)}.weight", (8, 8, 3, 3)) for at in range(3)), ("stem.weight", (16, 3, 7, 7))]


@pytest.mark.parametrize("both", [True, False], ids=["beside one", "alone"])
def test_a_list_beside_it_tells_in_which_direction_a_list_is_counted(both: bool) -> None:
    source = side(pyramid("fpn.inner_blocks.{}", "fpn.layer_blocks.{}", 0, both))
    target = side(pyramid("neck.fpn_lateral{}", "neck.fpn_output{}", 2, both))
    outputs = [link.certain for link in match(source, target).links if "output" in link.targets[0]]
    assert outputs == ([True] * 3 if both else [False, True, False])  # the middle one stays, whichever way they are counted


@pytest.mark.parametrize("name", ["convolution_", "up_"])
@pytest.mark.parametrize("step", [1, 2])
def test_a_list_of_layers_that_skips_numbers_is_counted_as_they_run(step: int, name: str) -> None:
    """Something without tensors stands between its layers; it tells nothing of a list on the other side that may be counted down."""
    source = side([*((f"upsample.{step * at}.weight", (16, 4, 3, 3)) for at in range(2)), ("last.weight", (3, 4, 3, 3))])
    target = side([*((f"upsample.upsample.{name}{at}.weight", (16, 4, 3, 3)) for at in range(2)), ("last.weight", (3, 4, 3, 3))])
    certain = [link.certain for link in match(source, target).links if "up" in link.targets[0]]
    assert certain == [step == 2 and name != "up_"] * 2


def test_what_keeps_running_statistics_is_a_norm_whatever_it_is_called() -> None:
    """`patch_embed.1` is none of the patches' own tensors, so that nothing speaks against `stem.norm`."""
    source = side([("patch_embed.0.weight", (8, 3, 3, 3)), *norm("patch_embed.1", 8), ("blocks.0.fc.weight", (9, 8))])
    target = side([("stem.conv.weight", (8, 3, 3, 3)), *norm("stem.norm", 8), ("blocks.0.fc.weight", (9, 8))])
    assert sure(match(source, target))["stem.norm.running_mean"] == "patch_embed.1.running_mean"


def test_fewer_layers_are_the_first_ones_whatever_numbers_their_parts_have() -> None:
    def layers(path: str, one: str, other: str, many: int) -> Rows:
        return [row for at in range(many) for row in ((f"{path}.{at}.{one}.weight", (32, 8)), (f"{path}.{at}.{other}.weight", (8, 32)))]

    source, target = layers("encoder.layer", "intermediate.dense", "output.dense", 6), layers("blocks", "mlp.ff1", "mlp.ff2", 4)
    found = sure(match(side(source), side(target)))
    assert found == {other: one for (one, _), (other, _) in zip(source, target, strict=False)}


def test_a_head_of_two_outputs_is_no_table_of_two_segments() -> None:
    layer: Rows = [("layer.0.query.weight", (8, 8)), ("layer.0.intermediate.weight", (32, 8)), ("layer.0.output.weight", (8, 32))]
    source = side([("embeddings.word.weight", (40, 8)), ("embeddings.token_type.weight", (2, 8)), *layer])
    target = side([("embed.tok.weight", (40, 8)), ("embed.seg.weight", (2, 8)), ("span_head.weight", (2, 8)), *layer[:1]])
    target |= side([("layer.0.ff1.weight", (32, 8)), ("layer.0.ff2.weight", (8, 32))])
    found = sure(match(source, target))
    assert found["embed.seg.weight"] == "embeddings.token_type.weight"
    assert "span_head.weight" not in found


def test_whole_ends_of_names_speak_for_what_moved_to_another_module() -> None:
    layers: Rows = [(f"layers.{at}.{name}.weight", (8, 8)) for at in range(3) for name in ("q_proj", "k_proj", "v_proj")]
    moved: Rows = [("feature_projection.layer_norm.weight", (6,)), ("feature_projection.projection.weight", (8, 6))]
    source = [*((f"encoder.{key}", shape) for key, shape in moved), *((f"encoder.transformer.{key}", shape) for key, shape in layers)]
    target = [*((f"model.{key}", shape) for key, shape in moved), *((f"model.encoder.{key}", shape) for key, shape in layers)]
    found = sure(match(side(sorted(source)), side(sorted(target))))
    assert found == {other: one for (one, _), (other, _) in zip(source, target, strict=True)}


def test_words_are_told_where_nothing_stands_between_them() -> None:
    assert concepts("HRconv") == ("hr", "conv")
    assert set(concepts("upconv1")) == set(concepts("conv_up1"))
    assert concepts("CLSToken") == concepts("cls_token")


@pytest.mark.parametrize("in_order", [True, False], ids=["library", "sorted"])
def test_a_tower_called_v_is_no_value(in_order: bool) -> None:
    parts = {"weight": (8, 8), "bias": (8,)}
    source: Rows = [("v.patch_embed.proj.weight", (8, 1, 4, 4)), ("mlp_head.weight", (5, 8))]
    target: Rows = [("net.patch_embeddings.projection.weight", (8, 1, 4, 4)), ("classifier.weight", (5, 8))]
    for at in range(3):
        source += [(f"v.blocks.{at}.attn.qkv.{part}", (24, *shape[1:])) for part, shape in parts.items()]
        source += [(f"v.blocks.{at}.attn.proj.{part}", shape) for part, shape in parts.items()]
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            target += [(f"net.layers.{at}.attention.{name}.{part}", shape) for part, shape in parts.items()]
    found = match(*(side(rows if in_order else sorted(rows)) for rows in (source, target))).by_target
    for at in range(3):
        assert found[f"net.layers.{at}.attention.v_proj.weight"].sources == (f"v.blocks.{at}.attn.qkv.weight",)
        assert found[f"net.layers.{at}.attention.o_proj.weight"].sources == (f"v.blocks.{at}.attn.proj.weight",)
    assert "v" in concepts("blocks.0.attn.v.weight") and "v" in concepts("v.0.conv.weight")


def test_what_expands_comes_before_what_goes_in_depth_also_where_keys_are_sorted() -> None:
    timm = {"expand": "conv_pw", "deep": "conv_dw", "project": "conv_pwl", "n1": "bn1", "n2": "bn2", "n3": "bn3"}
    named = {"expand": "expansion.conv", "deep": "depthwise.conv", "project": "projection.conv"}
    named |= {"n1": "expansion.bn", "n2": "depthwise.bn", "n3": "projection.bn"}
    source = [row for at in range(3) for row in inverted(f"blocks.{at}", timm, 8 + 2 * at, first=False)]
    target = [row for at in range(3) for row in inverted(f"encoder.{at}", named, 8 + 2 * at, first=False)]
    found = sure(match(side(sorted(source)), side(sorted(target))))
    assert found == {other: one for (one, _), (other, _) in zip(source, target, strict=True)}
