"""Layouts that shapes can't show: which links are doubted, between which layouts, and that what is chosen is what torch makes of it."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
from pairs_support import PAIRS, matched, meta, read_pair

from ckptsurgeon.adapters.chain import RuleOp, fill_chain
from ckptsurgeon.adapters.table import parse_ops, run
from ckptsurgeon.matching.layouts.choices import open_layouts
from ckptsurgeon.matching.matcher import match
from ckptsurgeon.planning.links import Layout, Link
from ckptsurgeon.rules.drafting.drafts import Known
from ckptsurgeon.rules.variables import filled

Shapes = dict[str, tuple[int, ...]]
ORDERS = (True, False)  # a library's order of keys, and the alphabet's


def links(source: Shapes, target: Shapes, in_order: bool = True) -> dict[str, Link]:
    """By target key its link."""
    sides = [
        {key: meta(key, shape) for key, shape in (side if in_order else dict(sorted(side.items()))).items()} for side in (source, target)
    ]
    return dict(match(*sides).by_target)


def made(link: Link, at: int, tensors: dict[str, torch.Tensor], goal: Shapes, **numbers: int) -> dict[str, torch.Tensor]:
    """What a link's layout makes of tensors, by target key, as a plan has it done."""
    layout = link.choices[at]
    ops = parse_ops(filled(layout.op, numbers)) if layout.op else ()
    given = [tensors[key] for key in layout.sources]
    found = {}
    for index, key in enumerate(layout.targets):
        asked = [RuleOp(op, index, layout.targets) for op in ops]
        chain, _ = fill_chain(asked, [tuple(one.shape) for one in given], goal[key], goal)
        parts = list(given)
        for op in chain:
            parts = list(run(op, parts, lambda: torch.empty(0), {}))
        found[key] = parts[0]
        assert tuple(parts[0].shape) == goal[key]
    return found


def layers(names: list[str], size: int = 32, head: str = "layers.{}.", more: Shapes | None = None, count: int = 2) -> Shapes:
    """A weight of each name in each layer."""
    return {f"{head.format(i)}{name}.weight": (size, size) for i in range(count) for name in names} | (more or {})


META = ["attention.wq", "attention.wk", "attention.wv", "attention.wo"]
HF = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]


@pytest.mark.parametrize("in_order", ORDERS)
@pytest.mark.parametrize(
    "source",
    [
        layers(META, more={"rope.freqs": (4,)}),
        layers(META),
        layers(["attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.output_proj"]),
        layers(HF, head="model.blocks.{}.", more={"model.blocks.0.rotary_emb.inv_freq": (4,)}),
        layers(["attn_q", "attn_k", "attn_v", "attn_output"], head="blk.{}."),
    ],
    ids=["rope.freqs", "wq and wk", "output_proj", "inv_freq", "GGUF"],
)
def test_rotary_queries_and_keys_between_implementations(source: Shapes, in_order: bool) -> None:
    found = links(source, layers([name.replace("self_attn", "mixer") for name in HF]), in_order)
    doubted = {key for key, link in found.items() if link.doubt}
    assert doubted == {f"layers.{i}.mixer.{name}_proj.weight" for i in range(2) for name in "qk"}
    assert all(link.clear and not link.certain for key, link in found.items() if key in doubted)
    assert all(found[f"layers.0.mixer.{name}_proj.weight"].certain for name in "vo")


def test_the_rows_of_rotary_layouts_are_metas_and_transformers() -> None:
    """As transformers' own conversion of Meta's files permutes them (`convert_llama_weights_to_hf.py:permute`)."""
    source, goal = layers(META, more={"rope.freqs": (4,)}), layers(HF)
    link = links(source, goal)["layers.0.self_attn.q_proj.weight"]
    weight = torch.randn(32, 32)
    wanted = weight.view(4, 4, 2, 32).transpose(1, 2).reshape(32, 32)  # n_heads = 32 / (2 * len(freqs))
    key = link.sources[0]
    assert torch.equal(made(link, 1, {key: weight}, goal)[link.targets[0]], wanted)
    assert torch.equal(made(link, 2, {key: wanted}, goal)[link.targets[0]], weight)
    assert link.choices[0].op == ""


def test_a_model_that_does_not_rotate_and_a_tower_with_positions_of_its_own_are_in_no_doubt() -> None:
    plain = links(layers(["attn.q", "attn.k", "attn.v", "attn.o"]), layers(HF))
    assert not any(link.doubt for link in plain.values())
    vision = {f"vision.{key}": shape for key, shape in layers(META, 16).items()} | {"vision.positional_embedding": (5, 16)}
    text = {f"text.{key}": shape for key, shape in layers(META).items()} | {"rope.freqs": (4,)}
    goal = {f"vision.{key}": shape for key, shape in layers(HF, 16).items()} | {"vision.pos_embed": (5, 16)}
    goal |= {f"text.{key}": shape for key, shape in layers(HF).items()}
    found = links({**vision, **text}, goal)
    assert {key.split(".")[0] for key, link in found.items() if link.doubt} == {"text"}
    assert not any(
        link.doubt for key, link in links(layers(["cross_attention.wq"], more={"rope.freqs": (4,)}), layers(["cross_attn.q_proj"])).items()
    )


def test_files_of_one_naming_are_in_no_doubt() -> None:
    source = layers([*META, "feed_forward.w1"], more={"rope.freqs": (4,)})
    renamed = {key.replace("attention.wq", "attention.query") if ".0." in key else key: shape for key, shape in source.items()}
    assert not any(link.doubt for link in links(source, {f"model.{key}": shape for key, shape in renamed.items()}).values())


QKV: Shapes = {f"h.{i}.attn.{name}.weight": (rows, 32) for i in range(2) for name, rows in (("query_key_value", 96), ("dense", 32))}
QKV |= {f"h.{i}.attn.query_key_value.bias": (96,) for i in range(2)}
SPLIT: Shapes = {f"blocks.{i}.attn.{name}.weight": (32, 32) for i in range(2) for name in ("q_proj", "k_proj", "v_proj", "out_proj")}
SPLIT |= {f"blocks.{i}.attn.{name}.bias": (32,) for i in range(2) for name in ("q_proj", "k_proj", "v_proj")}


@pytest.mark.parametrize("in_order", ORDERS)
@pytest.mark.parametrize("heads", [1, 2, 4])
def test_fused_queries_keys_and_values_in_turn_or_by_head(in_order: bool, heads: int) -> None:
    """By head as GPT-NeoX has it: `qkv.view(heads, 3 * size).chunk(3, -1)`."""
    there, back = links(QKV, SPLIT, in_order), links(SPLIT, QKV, in_order)
    for part in ("weight", "bias"):
        whole = torch.randn(QKV[f"h.1.attn.query_key_value.{part}"])
        keys = [f"blocks.1.attn.{name}_proj.{part}" for name in "qkv"]
        by_head = dict(
            zip(keys, (one.reshape(32, *whole.shape[1:]) for one in whole.view(heads, 3, -1, *whole.shape[1:]).unbind(1)), strict=True)
        )
        cut, joined = there[keys[0]], back[f"h.1.attn.query_key_value.{part}"]
        assert cut.doubt == joined.doubt == "layout" and cut.clear and joined.clear
        for at, wanted in ((0, dict(zip(keys, whole.chunk(3), strict=True))), (1, by_head)):
            got = made(cut, at, {cut.sources[0]: whole}, SPLIT, heads=heads)
            assert all(torch.equal(got[key], wanted[key]) for key in keys)
            assert torch.equal(made(joined, at, wanted, QKV, heads=heads)[joined.targets[0]], whole)


@pytest.mark.parametrize("in_order", ORDERS)
@pytest.mark.parametrize("ones", [(1,), (1, 1)], ids=["1-D", "2-D"])
@pytest.mark.parametrize("cuts", [True, False])
def test_queries_keys_and_values_of_a_convolution_over_one_place(cuts: bool, ones: tuple[int, ...], in_order: bool) -> None:
    """OpenAI's U-Nets project by a convolution, diffusers by linear layers."""
    fused = {f"blocks.{i}.qkv.weight": (96, 32, *ones) for i in range(2)} | {
        f"blocks.{i}.proj_out.weight": (32, 32, *ones) for i in range(2)
    }
    parted = {f"attentions.{i}.to_{part}.weight": (32, 32) for i in range(2) for part in ("q", "k", "v", "out.0")}
    source, target = (fused, parted) if cuts else (parted, fused)
    found = links(source, target, in_order)
    key = "attentions.1.to_q.weight" if cuts else "blocks.1.qkv.weight"
    link = found[key]
    assert link.clear and link.doubt and [choice.words for choice in link.choices] == ["in turn", "each head's together"]
    tensors = {key: torch.randn(shape) for key, shape in source.items()}
    heads, part = 4, 32 // 4
    for at, order in enumerate(("p h d", "h p d")):
        made_of = made(link, at, tensors, target, heads=heads)
        if cuts:
            whole = tensors["blocks.1.qkv.weight"].flatten(1)
            rows = whole.view(3, 32, 32) if order == "p h d" else whole.view(heads, 3, part, 32).transpose(0, 1).reshape(3, 32, 32)
            assert all(torch.equal(made_of[f"attentions.1.to_{name}.weight"], rows[number]) for number, name in enumerate("qkv"))
        else:
            each = torch.stack([tensors[f"attentions.1.to_{name}.weight"] for name in "qkv"])
            rows = each if order == "p h d" else each.view(3, heads, part, 32).transpose(0, 1)
            assert torch.equal(made_of[key].flatten(), rows.flatten())


@pytest.mark.parametrize("in_order", ORDERS)
@pytest.mark.parametrize("turned", [True, False, None], ids=["the block is turned", "it is not", "nothing tells"])
def test_the_square_parts_of_a_matrix_lie_along_either_dim(turned: bool | None, in_order: bool) -> None:
    """GPT-2's `c_attn` is (in, out): whether its square parts are turned, the other matrices of the block tell."""
    source: Shapes = {}
    target: Shapes = {}
    for i in range(2):
        source |= {f"h.{i}.attn.c_attn.weight": (16, 48), f"h.{i}.attn.c_proj.weight": (16, 16)}
        target |= {f"layers.{i}.attn.{part}_proj.weight": (16, 16) for part in ("q", "k", "v", "out")}
        if turned is not None:
            for name, other, shape in (("c_fc", "fc1", (16, 40)), ("c_proj", "fc2", (40, 16))):
                source |= {f"h.{i}.mlp.{name}.weight": shape, f"h.{i}.mlp.{name}.bias": shape[1:]}
                target |= {f"layers.{i}.mlp.{other}.weight": shape[:: -1 if turned else 1], f"layers.{i}.mlp.{other}.bias": shape[1:]}
    found = links(source, target, in_order)
    parts, beside = found["layers.1.attn.q_proj.weight"], found["layers.1.attn.out_proj.weight"]
    if turned:
        assert parts.op == "transpose | chunk(dim=0)" and beside.op == "transpose" and not parts.doubt and not beside.doubt
    else:
        assert [choice.op for choice in parts.choices] == ["chunk(dim=1)", "transpose | chunk(dim=0)"]
        assert [choice.op for choice in beside.choices] == ["", "transpose"]
    tensors = {key: torch.randn(shape) for key, shape in source.items()}
    if parts.doubt:
        made_of = made(parts, 1, tensors, target)
        wanted = tensors["h.1.attn.c_attn.weight"].T.chunk(3)
        assert all(torch.equal(made_of[f"layers.1.attn.{name}_proj.weight"], part) for name, part in zip("qkv", wanted, strict=True))


@pytest.mark.parametrize("in_order", ORDERS)
@pytest.mark.parametrize("leaf", ["kernel", "weight"])
def test_heads_that_are_a_dim_of_their_own(leaf: str, in_order: bool) -> None:
    """JAX's attention projects to (width, heads, size) and back from (heads, size, width); a linear layer has heads and size as one."""
    width, heads, size, groups = 24, 4, 5, 2
    shapes = {"query": (width, heads, size), "key": (width, groups, size), "value": (width, groups, size), "out": (heads, size, width)}
    names = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
    source: Shapes = {f"blocks.{i}.attn.{part}.{leaf}": shape for i in range(2) for part, shape in shapes.items()}
    source |= {f"blocks.{i}.attn.{part}.bias": shape[1:] for i in range(2) for part, shape in shapes.items() if part != "out"}
    target: Shapes = {}
    for i in range(2):
        for part, shape in shapes.items():
            flat = (width, heads * size) if part == "out" else (shape[1] * size, width)
            target |= {f"layers.{i}.attention.{names[part]}.weight": flat}
            target |= {} if part == "out" else {f"layers.{i}.attention.{names[part]}.bias": flat[:1]}
    found = links(source, target, in_order)
    assert {key: link.sources for key, link in found.items()} == {
        f"layers.{i}.attention.{name}.{end}": (f"blocks.{i}.attn.{part}.{leaf if end == 'weight' else end}",)
        for i in range(2)
        for part, name in names.items()
        for end in ("weight", "bias")
        if (part, end) != ("out", "bias")
    }
    x, y = torch.randn(3, width), torch.randn(3, heads, size)
    for key, link in found.items():
        assert link.clear
        given = torch.randn(source[link.sources[0]])
        made_of = made(
            replace(link, choices=link.choices or (Layout("", "", link.sources, link.targets, link.op),)),
            0,
            {link.sources[0]: given},
            target,
        )[key]
        if key.endswith("bias"):
            assert torch.equal(made_of, given.flatten())
        elif "o_proj" in key:
            assert torch.allclose(y.flatten(1) @ made_of.T, torch.einsum("bhs,hsw->bw", y, given), atol=1e-5)
        else:
            assert torch.allclose(x @ made_of.T, torch.einsum("bw,whs->bhs", x, given).flatten(1), atol=1e-5)


@pytest.mark.parametrize("in_order", ORDERS)
@pytest.mark.parametrize("dims", [1, 2])
def test_windows_before_their_channels(dims: int, in_order: bool) -> None:
    """TensorFlow has (window, in, out), and (window, channels, 1) where each channel has a window of its own."""
    window = (3,) * dims
    source: Shapes = {"stem/kernel": (*window, 3, 8)} | {f"block_{i}/depthwise/kernel": (*window, 8 * i, 1) for i in (1, 2)}
    target: Shapes = {"stem.weight": (8, 3, *window)} | {f"blocks.{i}.depthwise.weight": (8 * i, 1, *window) for i in (1, 2)}
    found = links(source, target, in_order)
    assert {key: link.sources[0].partition("/")[0] for key, link in found.items() if link.clear} == {
        "stem.weight": "stem",
        **{f"blocks.{i}.depthwise.weight": f"block_{i}" for i in (1, 2)},
    }
    for key, link in found.items():
        given = torch.randn(source[link.sources[0]])
        got = made(replace(link, choices=(Layout("", "", link.sources, link.targets, link.op),)), 0, {link.sources[0]: given}, target)[key]
        assert torch.equal(got, given.movedim((-1, -2), (0, 1)) if "stem" in key else given.movedim((-2, -1), (0, 1)))


@pytest.mark.parametrize("in_order", ORDERS)
@pytest.mark.parametrize("stacked", [False, True])
def test_the_members_of_a_list_are_one_tensor_elsewhere(stacked: bool, in_order: bool) -> None:
    """An embedding for each codebook, side by side or stacked; layers between which others stand are no such list."""
    rest: Shapes = {f"body.{i}.proj.weight": (8, 9) for i in range(4)}
    source = rest | {f"decoder.embeddings.{i}.weight": (5, 8) for i in range(3)}
    target = {key.replace("body", "layers"): shape for key, shape in rest.items()} | {
        "decoder.embeddings.embed.weight": (3, 5, 8) if stacked else (15, 8)
    }
    link = links(source, target, in_order)["decoder.embeddings.embed.weight"]
    assert link.clear and link.sources == tuple(f"decoder.embeddings.{i}.weight" for i in range(3))
    assert link.op == ("stack(dim=0)" if stacked else "concat(dim=0)")
    gaps = rest | {f"decoder.embeddings.{2 * i}.weight": (5, 8) for i in range(3)}
    assert "decoder.embeddings.embed.weight" not in {key for key, one in links(gaps, target, in_order).items() if one.clear}


@pytest.mark.parametrize("in_order", ORDERS)
@pytest.mark.parametrize("cuts", [False, True])
@pytest.mark.parametrize("name", ["in_proj_weight", "qkv.weight"])
def test_heads_in_a_list_are_one_matrix_elsewhere(name: str, cuts: bool, in_order: bool) -> None:
    """All queries, all keys, all values, as torch has it; elsewhere each head's may be together."""
    heads = [(head, part) for part in ("query", "key", "value") for head in range(4)]
    parts: Shapes = {f"blocks.{i}.sa.heads.{head}.{part}.weight": (2, 8) for i in range(2) for head, part in sorted(heads)}
    wholes: Shapes = {f"layers.{i}.self_attn.{name}": (24, 8) for i in range(2)}
    for i in range(2):
        parts[f"blocks.{i}.sa.proj.weight"] = wholes[f"layers.{i}.self_attn.out_proj.weight"] = (8, 8)
    found = links(*((wholes, parts) if cuts else (parts, wholes)), in_order)
    rows = {f"blocks.1.sa.heads.{head}.{part}.weight": torch.randn(2, 8) for head, part in heads}
    key = f"layers.1.self_attn.{name}"
    link = found[next(iter(rows)) if cuts else key]
    assert link.clear and bool(link.doubt) == (name == "qkv.weight")
    assert (link.targets if cuts else link.sources) == tuple(rows)
    for at, keys in enumerate((rows, sorted(rows, key=lambda own: own.split(".")[4])) if link.doubt else ()):
        whole = torch.cat([rows[own] for own in keys])
        got = made(link, at, {key: whole} if cuts else rows, parts if cuts else wholes)
        assert all(torch.equal(got[own], rows[own]) for own in rows) if cuts else torch.equal(got[key], whole)


@pytest.mark.parametrize("in_order", ORDERS)
@pytest.mark.parametrize("cuts", [False, True])
def test_a_norm_for_each_head_is_a_row_of_one_elsewhere(cuts: bool, in_order: bool) -> None:
    """StableLM's norms of queries and keys, which llama.cpp holds as matrices."""
    heads = {"q": 6, "k": 3}
    parts: Shapes = {f"layers.{i}.attn.{name}_proj.weight": (8 * size, 48) for i in range(2) for name, size in heads.items()}
    wholes = {key.replace("layers", "blk").replace("_proj", ""): shape for key, shape in parts.items()}
    parts |= {f"layers.{i}.attn.{name}_norm.norms.{at}.weight": (8,) for i in range(2) for name in heads for at in range(heads[name])}
    wholes |= {f"blk.{i}.attn.{name}_norm.weight": (size, 8) for i in range(2) for name, size in heads.items()}
    found = links(*((wholes, parts) if cuts else (parts, wholes)), in_order)
    norms = {key: link for key, link in found.items() if "norm" in key}
    assert len(norms) == (18 if cuts else 4) and all(link.certain for link in norms.values())
    for link in norms.values():
        (whole,), rows = (link.sources, link.targets) if cuts else (link.targets, link.sources)
        assert rows == tuple(f"{whole.replace('blk', 'layers').removesuffix('weight')}norms.{at}.weight" for at in range(wholes[whole][0]))
        assert link.op == ("unstack(dim=0)" if cuts else "stack(dim=0)")


@pytest.mark.parametrize("in_order", ORDERS)
def test_two_counted_matrices_are_the_halves_of_one_in_either_order(in_order: bool) -> None:
    """T5's `wi_0` and `wi_1` in a GEGLU: diffusers has the gate behind, others before."""
    source: Shapes = {f"layers.{i}.ffn.{name}.weight": (24, 8) for i in range(2) for name in ("wi_0", "wi_1")}
    source |= {f"layers.{i}.ffn.wo.weight": (8, 24) for i in range(2)}
    target: Shapes = {f"layers.{i}.ff.net.0.proj.weight": (48, 8) for i in range(2)} | {
        f"layers.{i}.ff.net.2.weight": (8, 24) for i in range(2)
    }
    link = links(source, target, in_order)["layers.1.ff.net.0.proj.weight"]
    assert link.doubt == "layout"
    assert {choice.sources for choice in link.choices} >= {
        tuple(f"layers.1.ffn.wi_{at}.weight" for at in order) for order in ((0, 1), (1, 0))
    }


def test_groups_of_heads_that_share_a_key() -> None:
    """As lit-gpt laid them before 0.5: `qkv.view(groups, per_group + 2, size, width)`, q…q k v."""
    source = {"h.0.attn.attn.weight": (64, 16), "h.0.attn.proj.weight": (16, 32), "h.0.rope.freqs": (4,)}
    goal = {
        "l.0.a.q_proj.weight": (32, 16),
        "l.0.a.k_proj.weight": (16, 16),
        "l.0.a.v_proj.weight": (16, 16),
        "l.0.a.o_proj.weight": (16, 32),
    }
    link = links(source, goal)["l.0.a.q_proj.weight"]
    whole = torch.randn(64, 16)
    groups = whole.view(2, 4, 8, 16)
    wanted = {key: part.reshape(goal[key]) for key, part in zip(link.targets, (groups[:, :2], groups[:, 2], groups[:, 3]), strict=True)}
    got = made(link, 1, {link.sources[0]: whole}, goal, kv_heads=2)
    assert all(torch.equal(got[key], wanted[key]) for key in wanted)
    back = links(goal, source)["h.0.attn.attn.weight"]
    assert torch.equal(made(back, 1, wanted, source, kv_heads=2)["h.0.attn.attn.weight"], whole)


def test_two_fused_matrices_of_different_names() -> None:
    source, goal = (
        QKV,
        {key.replace("h.", "layers.").replace("query_key_value", "qkv").replace("dense", "proj"): shape for key, shape in QKV.items()},
    )
    link = links(source, goal)["layers.0.attn.qkv.weight"]
    by_head = torch.randn(96, 32)
    in_turn = by_head.view(4, 3, 8, 32).transpose(0, 1).reshape(96, 32)
    assert torch.equal(made(link, 1, {link.sources[0]: by_head}, goal, heads=4)[link.targets[0]], in_turn)
    assert torch.equal(made(link, 2, {link.sources[0]: in_turn}, goal, heads=4)[link.targets[0]], by_head)


@pytest.mark.parametrize(
    "name", ["torchvision_vit__timm_vit", "timm_vit__hf_vit", "segment_anything__hf_sam", "lucidrains_vit__timm_vit_nobias"]
)
def test_plain_vision_transformers_lie_in_turn(name: str) -> None:
    path = PAIRS / f"{name}.json"
    if path.exists():
        pair = read_pair(path)
        assert not any(link.doubt for link in match(pair.source, pair.target).links)


def test_torchs_own_in_proj_lies_in_turn() -> None:
    with torch.device("meta"):
        net = torch.nn.TransformerEncoder(torch.nn.TransformerEncoderLayer(8, 2, 16), 2)
    source = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    parts = {
        f"block.{i}.{name}.{part}": ((8, 8) if part == "weight" else (8,))
        for i in range(2)
        for name in ("query", "key", "value")
        for part in ("weight", "bias")
    }
    found = links(source, parts)
    assert found["block.0.query.weight"].op == "chunk(dim=0)" and not any(link.doubt for link in found.values())


@pytest.mark.parametrize("in_order", ORDERS)
def test_gate_and_up_in_one_matrix(in_order: bool) -> None:
    fused = {f"h.{i}.mlp.gate_up_proj.weight": (24, 8) for i in range(2)} | {f"h.{i}.mlp.down_proj.weight": (8, 12) for i in range(2)}
    split = {f"m.{i}.ff.{name}.weight": (12, 8) for i in range(2) for name in ("gate", "up")} | {
        f"m.{i}.ff.down.weight": (8, 12) for i in range(2)
    }
    whole = torch.randn(24, 8)
    first, second, keys = whole[:12], whole[12:], ("m.0.ff.gate.weight", "m.0.ff.up.weight")
    ways = [(first, second), (second, first), (whole[::2], whole[1::2])]
    cut, joined = links(fused, split, in_order)[keys[0]], links(split, fused, in_order)["h.0.mlp.gate_up_proj.weight"]
    assert cut.doubt == joined.doubt == "layout"
    for at, parts in enumerate(ways):
        wanted = dict(zip(keys, parts, strict=True))
        got = made(cut, at, {"h.0.mlp.gate_up_proj.weight": whole}, split)
        assert all(torch.equal(got[key], wanted[key]) for key in keys)
        assert torch.equal(made(joined, at, wanted, fused)["h.0.mlp.gate_up_proj.weight"], whole)


def test_stacked_experts_with_their_gate_and_up_in_one() -> None:
    source = {f"moe.experts.{e}.{name}.weight": (6, 4) for e, name in product(range(3), ("w1", "w3"))}
    source |= {f"moe.experts.{e}.w2.weight": (4, 6) for e in range(3)}
    found = links(source, {"mlp.experts.gate_up_proj": (3, 12, 4), "mlp.experts.down_proj": (3, 4, 6)})
    link = found["mlp.experts.gate_up_proj"]
    assert link.doubt == "layout" and found["mlp.experts.down_proj"].certain
    tensors = {key: torch.randn(6, 4) for key in link.sources}
    one = [
        torch.stack([torch.cat([tensors[f"moe.experts.{e}.{name}.weight"] for name in names]) for e in range(3)])
        for names in (("w1", "w3"), ("w3", "w1"))
    ]
    mixed = torch.stack(
        [torch.stack([tensors[f"moe.experts.{e}.{name}.weight"] for name in ("w1", "w3")], 1).reshape(12, 4) for e in range(3)]
    )
    for at, wanted in enumerate((*one, mixed)):
        assert torch.equal(made(link, at, tensors, {"mlp.experts.gate_up_proj": (3, 12, 4)})["mlp.experts.gate_up_proj"], wanted)


@pytest.mark.parametrize("turned", [False, True])
def test_a_gate_and_up_in_one_on_both_sides_under_two_names(turned: bool) -> None:
    """`w13` and `gate_up_proj`: with either half first, or row by row. Where both call it the same, it is taken as it stands."""
    shapes: Shapes = {"gate_up_proj": (3, 4, 12) if turned else (3, 12, 4), "down_proj": (3, 6, 4) if turned else (3, 4, 6)}
    goal = {f"layers.{at}.mlp.experts.{name}": shape for at in range(2) for name, shape in shapes.items()}
    source = {
        f"h.{at}.moe.experts.{name}": shapes[there] for at in range(2) for name, there in (("w13", "gate_up_proj"), ("w2", "down_proj"))
    }
    found = links(source, goal)
    link = found["layers.0.mlp.experts.gate_up_proj"]
    assert link.doubt == "layout" and link.clear and found["layers.0.mlp.experts.down_proj"].certain
    whole, dim = torch.randn(shapes["gate_up_proj"]), 2 if turned else 1
    gate, up = whole.chunk(2, dim)
    ways = [whole, torch.cat([up, gate], dim), torch.cat([whole.index_select(dim, torch.arange(at, 12, 2)) for at in (0, 1)], dim)]
    ways.append(torch.stack([gate, up], dim + 1).reshape(whole.shape))
    for at, wanted in enumerate(ways):
        assert torch.equal(made(link, at, {link.sources[0]: whole}, goal)[link.targets[0]], wanted), at
    same = links({key.replace("w13", "gate_up_proj").replace("w2", "down_proj"): shape for key, shape in source.items()}, goal)
    assert same["layers.0.mlp.experts.gate_up_proj"].certain


def test_a_gate_and_up_in_one_is_in_doubt_after_it_is_turned() -> None:
    """JAX's kernel is (in, out), and its bias is as it is elsewhere."""
    source = {f"h.{at}.up_gate.{name}": shape for at in range(2) for name, shape in (("kernel", (8, 24)), ("bias", (24,)))}
    source |= {f"h.{at}.wo.kernel": (12, 8) for at in range(2)}
    goal = {f"layers.{at}.gate_up.{name}": shape for at in range(2) for name, shape in (("weight", (24, 8)), ("bias", (24,)))}
    goal |= {f"layers.{at}.down.weight": (8, 12) for at in range(2)}
    found = links(source, goal)
    whole, bias = torch.randn(8, 24), torch.randn(24)
    for part, given, wanted in (("weight", whole, whole.T.roll(12, 0)), ("bias", bias, bias.roll(12, 0))):
        link = found[f"layers.1.gate_up.{part}"]
        assert torch.equal(made(link, 1, {link.sources[0]: given}, goal)[link.targets[0]], wanted)


@pytest.mark.parametrize("gated", [True, False])
def test_a_layer_of_which_the_next_takes_half_is_a_gate_and_up_in_one(gated: bool) -> None:
    """Whatever it is called: half of it is multiplied with the other half."""
    wide = 24 if gated else 12
    source = {f"h.{at}.mlp.{name}.weight": shape for at in range(2) for name, shape in (("w1", (wide, 8)), ("w2", (8, 12)))}
    goal = {f"layers.{at}.ff.net.{name}.weight": shape for at in range(2) for name, shape in (("0.proj", (wide, 8)), ("2", (8, 12)))}
    found = links(source, goal)
    assert found["layers.1.ff.net.2.weight"].certain and (found["layers.1.ff.net.0.proj.weight"].doubt == "layout") == gated


@pytest.mark.parametrize("around", ["blocks.{}.", "{}."], ids=["in a list", "at the top"])
@pytest.mark.parametrize("names", [("up_gate", "gate_up"), ("w12", "weights_in")], ids=["said", "by shape"])
def test_a_gate_and_up_in_one_and_its_bias_are_one_doubt(names: tuple[str, str], around: str) -> None:
    """Either both change places or neither, by one rule."""
    shapes = {"{}.weight": (24, 8), "{}.bias": (24,)}
    rest = (("norm", "w3"), ("ln", "down"))
    source, goal = (
        {around.format(at) + key.format(own): shape for at in range(2) for key, shape in shapes.items()}
        | {f"{around.format(at)}{norm}.{part}": (8,) for at in range(2) for part in ("weight", "bias")}
        | {around.format(at) + key.format(back): shape for at in range(2) for key, shape in (("{}.weight", (8, 12)), ("{}.bias", (8,)))}
        for own, (norm, back) in zip(names, rest, strict=True)
    )
    found = links(source, goal)
    doubted = [f"{around.format(at)}{names[1]}.{part}" for at in range(2) for part in ("weight", "bias")]
    assert sorted(key for key, link in found.items() if link.doubt) == sorted(doubted) and all(link.clear for link in found.values())
    tensors = {key: torch.randn(shape) for key, shape in source.items()}
    for key in doubted:
        whole = tensors[found[key].sources[0]]
        ways = [whole, whole.roll(12, 0), torch.cat([whole[::2], whole[1::2]]), torch.stack(whole.chunk(2), 1).reshape(whole.shape)]
        assert all(torch.equal(made(found[key], at, tensors, goal)[key], way) for at, way in enumerate(ways))
    (opened,) = open_layouts(found.values(), {key: key for key in source}, Known(source))
    head = around.format("{i}")
    assert [str(rule) for rule in opened.ways[1].rules] == [
        f"--adapt '{head}{names[0]}.{{p}} -> {head}{names[1]}.{{p}}' 'roll(dim=0, by=12)'"
    ]


def test_halves_of_a_modulation() -> None:
    body = {f"blocks.{i}.mlp.fc1.weight": (32, 8) for i in range(3)} | {f"blocks.{i}.attn.proj.weight": (8, 8) for i in range(3)}
    source = body | {"final_layer.adaLN_modulation.1.weight": (16, 8), "final_layer.adaLN_modulation.1.bias": (16,)}
    source |= {f"blocks.{i}.adaLN_modulation.1.weight": (48, 8) for i in range(3)}
    goal = {key.replace("blocks", "transformer_blocks").replace("fc1", "ff"): shape for key, shape in body.items()}
    goal |= {"norm_out.linear.weight": (16, 8), "norm_out.linear.bias": (16,)} | {
        f"transformer_blocks.{i}.norm1.linear.weight": (48, 8) for i in range(3)
    }
    found = links(source, goal)
    doubted = {key for key, link in found.items() if link.doubt}
    assert doubted == {"norm_out.linear.weight", "norm_out.linear.bias"}
    weight = torch.randn(16, 8)
    link = found["norm_out.linear.weight"]
    got = made(link, 1, {link.sources[0]: weight}, goal)["norm_out.linear.weight"]
    assert torch.equal(got, torch.cat(weight.chunk(2)[::-1]))  # as diffusers' own converter: swap_scale_shift


def test_channels_of_patch_merging() -> None:
    """Against mmdetection's own `correct_unfold_reduction_order` and its norm's (mmdet/models/backbones/swin.py)."""
    source = {"stages.0.norm.weight": (8,), "stages.0.downsample.reduction.weight": (16, 32), "stages.0.downsample.norm.weight": (32,)}
    goal = {"layers.0.ln.weight": (8,), "layers.0.merging.reduction.weight": (16, 32), "layers.0.merging.norm.weight": (32,)}
    found = links(source, goal)
    assert {key for key, link in found.items() if link.doubt} == {"layers.0.merging.reduction.weight", "layers.0.merging.norm.weight"}
    x, norm = torch.randn(16, 32), torch.randn(32)
    unfolded = x.reshape(16, 4, 8)[:, [0, 2, 1, 3], :].transpose(1, 2).reshape(16, 32)
    link = found["layers.0.merging.reduction.weight"]
    assert torch.equal(made(link, 2, {link.sources[0]: x}, goal)[link.targets[0]], unfolded)
    assert torch.equal(made(link, 3, {link.sources[0]: unfolded}, goal)[link.targets[0]], x)
    assert torch.equal(made(link, 1, {link.sources[0]: x}, goal)[link.targets[0]], x.reshape(16, 4, 8)[:, [0, 2, 1, 3]].reshape(16, 32))
    link = found["layers.0.merging.norm.weight"]
    assert torch.equal(made(link, 2, {link.sources[0]: norm}, goal)[link.targets[0]], norm.reshape(4, 8)[[0, 2, 1, 3]].t().reshape(32))


@pytest.mark.parametrize("in_order", ORDERS)
@pytest.mark.parametrize("path", sorted(PAIRS.glob("*.json")), ids=lambda path: path.stem)
def test_published_pairs_are_never_sure_of_a_wrong_layout(path: Path, in_order: bool) -> None:
    pair = read_pair(path)
    for key, link in matched(path, in_order).by_target.items():
        truth = pair.truth.get(key)
        if truth is not None and truth.op.startswith("permute_rows"):
            assert not link.certain
        if link.doubt and truth is not None:
            assert truth.sources in [choice.sources for choice in link.choices]


@pytest.mark.parametrize("in_order", ORDERS)
@pytest.mark.parametrize("named_source", [False, True])
@pytest.mark.parametrize("two", [("w1", "w2"), ("fc11", "fc12"), ("wi_0", "wi_1")])
def test_two_counted_matrices_are_gate_and_up_or_up_and_gate(two: tuple[str, str], named_source: bool, in_order: bool) -> None:
    def rows(head: str, norm: str, one: str, two: str, down: str) -> Shapes:
        shapes: Shapes = {"embed.weight": (40, 8)}
        for at in range(2):
            shapes |= {
                f"{head}.{at}.{norm}.weight": (8,),
                f"{head}.{at}.mlp.{one}.weight": (24, 8),
                f"{head}.{at}.mlp.{two}.weight": (24, 8),
            }
            shapes |= {f"{head}.{at}.mlp.{down}.weight": (8, 24)}
        return shapes

    counted, named = rows("h", "ln", *two, "c_proj"), rows("layers", "norm", "gate_proj", "up_proj", "down_proj")
    found = links(named, counted, in_order) if named_source else links(counted, named, in_order)
    for at in range(2):
        kinds = [
            found[f"h.{at}.mlp.{one}.weight" if named_source else f"layers.{at}.mlp.{name}_proj.weight"]
            for one, name in zip(two, ("gate", "up"), strict=True)
        ]
        assert [link.doubt for link in kinds] == ["layout"] * 2 and all(link.clear for link in kinds)
        assert [choice.sources for choice in kinds[0].choices] == [choice.sources for choice in kinds[1].choices][::-1]
    if two != ("w1", "w2"):
        return
    third = {key.replace("h.", "h.", 1): shape for key, shape in counted.items()} | {f"h.{at}.mlp.w3.weight": (24, 8) for at in range(2)}
    assert not any(link.doubt == "layout" and link.choices[0].kind == "gate or up" for link in links(third, named, in_order).values())


@pytest.mark.parametrize("in_order", ORDERS)
@pytest.mark.parametrize("same_names", [True, False])
def test_a_bare_square_parameter_is_multiplied_as_a_layers_weight_or_turned(same_names: bool, in_order: bool) -> None:
    """Between files of one naming too; with a matrix beside it that is not square, the shapes tell."""
    bare, layer = {"text_projection": (32, 32)}, {"text_projection.weight": (32, 32)}
    head = "h.{}.attn." if same_names else "layers.{}."
    here, there = layers(["q", "k", "v", "out"], head=head, more=bare), layers(["q", "k", "v", "out"], head="h.{}.attn.", more=layer)
    link = links(here, there, in_order)["text_projection.weight"]
    assert (link.clear, link.doubt, link.choices[0].op) == (True, "layout", "")
    p, x = torch.randn(32, 32), torch.randn(5, 32)
    weight = made(link, 1, {"text_projection": p}, there)["text_projection.weight"]
    assert torch.allclose(torch.nn.functional.linear(x, weight), x @ p, atol=1e-5)
    wide = links(here | {"image_projection": (48, 32)}, there | {"image_projection.weight": (32, 48)}, in_order)
    assert [(wide[key].certain, wide[key].op) for key in ("text_projection.weight", "image_projection.weight")] == [(True, "transpose")] * 2


@pytest.mark.parametrize("in_order", ORDERS)
def test_a_square_weight_whose_bias_stands_around_its_layer_is_as_it_is_or_turned(in_order: bool) -> None:
    """Layers on a graph, that are written by hand: in one library `lin.weight` and a bias, in another two bare parameters."""
    here = {f"convs.{at}.{name}": shape for at in range(3) for name, shape in (("bias", (48,)), ("lin.weight", (48, 48)))}
    there = {f"layers.{at}.{name}": shape for at in range(3) for name, shape in (("weight", (48, 48)), ("bias", (48,)))}
    found = links(here, there, in_order)
    assert all(found[f"layers.{at}.bias"].certain for at in range(3))
    weights = [found[f"layers.{at}.weight"] for at in range(3)]
    assert [(link.clear, link.doubt, *(choice.op for choice in link.choices)) for link in weights] == [
        (True, "layout", "", "transpose")
    ] * 3
    as_it_is = links(
        here | {"convs.3.bias": (7,), "convs.3.lin.weight": (7, 48)}, there | {"layers.3.weight": (7, 48), "layers.3.bias": (7,)}
    )
    assert all(as_it_is[f"layers.{at}.weight"].certain and not as_it_is[f"layers.{at}.weight"].op for at in range(4))


@pytest.mark.parametrize("in_order", ORDERS)
def test_two_parts_of_a_fused_bias_are_in_doubt_as_its_matrix_is(in_order: bool) -> None:
    """The key has no bias in the target, and whether the rows lie in turn or by head is not told: torch's results of both."""
    heads, size = 4, 32
    source: Shapes = {}
    target: Shapes = {}
    for at in range(2):
        source |= {
            f"h.{at}.attn.qkv.weight": (3 * size, size),
            f"h.{at}.attn.qkv.bias": (3 * size,),
            f"h.{at}.attn.proj.weight": (size, size),
        }
        target |= {f"layers.{at}.self.{name}.weight": (size, size) for name in ("query", "key", "value")}
        target |= {f"layers.{at}.self.{name}.bias": (size,) for name in ("query", "value")} | {f"layers.{at}.self.out.weight": (size, size)}
    link = links(source, target, in_order)["layers.1.self.value.bias"]
    assert link.doubt == "layout" and link.clear and link.targets == ("layers.1.self.query.bias", "layers.1.self.value.bias")
    bias = torch.arange(3.0 * size)
    goal = {key: target[key] for key in link.targets}
    in_turn, by_head = (made(link, at, {"h.1.attn.qkv.bias": bias}, goal, heads=heads) for at in range(2))
    assert torch.equal(in_turn["layers.1.self.query.bias"], bias[:size]) and torch.equal(
        in_turn["layers.1.self.value.bias"], bias[2 * size :]
    )
    parts = bias.reshape(heads, 3, size // heads)
    assert torch.equal(by_head["layers.1.self.query.bias"], parts[:, 0].flatten())
    assert torch.equal(by_head["layers.1.self.value.bias"], parts[:, 2].flatten())


def test_a_bias_of_heads_that_both_sides_have_is_taken_as_it_is() -> None:
    """As XLNet's `r_w_bias` is: only the kernels beside it are turned."""
    source = {
        f"layer.{at}.attention.{name}": shape
        for at in range(2)
        for name, shape in (("kernel", (8, 12)), ("bias", (12,)), ("r_w_bias", (4, 3)))
    }
    target = {
        f"layers.{at}.rel.{name}": shape for at in range(2) for name, shape in (("weight", (12, 8)), ("bias", (12,)), ("r_w_bias", (4, 3)))
    }
    found = links(source, target)
    assert found["layers.1.rel.r_w_bias"].op == "" and found["layers.1.rel.weight"].op == "transpose"


def test_kernels_of_a_model_that_is_called_after_tokens_are_turned_too() -> None:
    head = "tf_model_for_token_classification.encoder"
    source = {f"{head}.layer.{at}.{name}.kernel": shape for at in range(2) for name, shape in (("up", (8, 32)), ("down", (32, 8)))}
    target = {
        f"model.layers.{at}.{name}.weight": shape for at in range(2) for name, shape in (("up_proj", (32, 8)), ("down_proj", (8, 32)))
    }
    assert {link.op for link in links(source, target).values()} == {"transpose"}
