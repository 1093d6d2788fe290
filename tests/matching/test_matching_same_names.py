"""Keys that both sides call the same, in the same shape, go together; and what that yields to."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs_support import PAIRS, made, meta, read_pair
from profiles import examples

from ckptsurgeon.matching.matcher import match
from ckptsurgeon.planning.prefixes.find import find_change
from ckptsurgeon.tensors import TensorMeta

MODELS = {
    f"{path.stem}.{side}": getattr(read_pair(path), side)
    for path in sorted(PAIRS.glob("*.json"))
    for side in ("source", "target")
    if path.stat().st_size < 40_000
}
Side = dict[str, TensorMeta]


def side(shapes: dict[str, tuple[int, ...]]) -> Side:
    return {key: meta(key, shape) for key, shape in shapes.items()}


def sure(source: Side, target: Side) -> dict[str, tuple[str, ...]]:
    return {key: link.sources for link in match(source, target).certain for key in link.targets}


def partly_renamed(model: Side, rng: random.Random, words: list[str]) -> Side:
    """A model in which some modules, alone or in all layers, have another name."""
    heads = sorted({key.rpartition(".")[0] for key in model if "." in key})
    chosen = {head: f"{head.rpartition('.')[0]}.{rng.choice(words)}".lstrip(".") for head in rng.sample(heads, min(len(heads), 5))}
    names = {key: chosen.get(key.rpartition(".")[0], key.rpartition(".")[0]) + "." + key.rpartition(".")[2] for key in model}
    names = {key: name.lstrip(".") for key, name in names.items()}
    if len(set(names.values())) < len(names):
        return model
    return {names[key]: meta(names[key], tensor.shape) for key, tensor in model.items()}


@settings(max_examples=examples(80), deadline=None)
@given(
    model=st.sampled_from(sorted(MODELS)),
    seed=st.integers(0, 1 << 30),
    in_order=st.booleans(),
    prefix=st.sampled_from(["", "module.", "net."]),
)
def test_matching_explains_no_fewer_keys_than_names_do(model: str, seed: int, in_order: bool, prefix: str) -> None:
    rng = random.Random(seed)
    target = {key: meta(key, tensor.shape) for key, tensor in MODELS[model].items()}
    renamed = partly_renamed(target, rng, ["attn", "fc", "other", "norm2", "proj", "x"])
    source = {prefix + key: meta(prefix + key, tensor.shape) for key, tensor in renamed.items()}
    if in_order:
        source, target = dict(sorted(source.items())), dict(sorted(target.items()))
    same = find_change(source, target).applied.mapping
    found = sure(source, target)
    assert {name: (key,) for key, name in same.items()}.items() <= found.items()


@pytest.mark.parametrize("in_order", [False, True])
def test_one_expert_of_eight_is_renamed(in_order: bool) -> None:
    def moe(other: bool) -> Side:
        names = {
            f"layers.0.{'moe.expert_0' if other and e == 0 else f'mlp.experts.{e}'}.{x}_proj.weight": (3, 2)
            for e in range(8)
            for x in ("gate", "up", "down")
        }
        return side(names | {"layers.0.norm.weight": (2,)})

    source, target = moe(False), moe(True)
    if in_order:
        source, target = dict(sorted(source.items())), dict(sorted(target.items()))
    found = sure(source, target)
    assert {key: value for key, value in found.items() if key in source} == {key: (key,) for key in target if key in source}
    assert found["layers.0.moe.expert_0.up_proj.weight"] == ("layers.0.mlp.experts.0.up_proj.weight",)


def test_a_list_that_is_moved_by_several_numbers_is_not_shifted() -> None:
    """A layer of a sequence is called otherwise: its neighbours keep their names, and are not moved up to make room."""
    kept = {"model.0.weight": (8, 3, 3, 3), **{f"model.{at}.weight": (8, 8, 3, 3) for at in (3, 6)}, "model.10.weight": (3, 8, 3, 3)}
    body = {f"model.1.sub.{at}.conv.weight": (8, 8, 3, 3) for at in range(3)}
    found = sure(side(kept | body | {"model.norm2.weight": (8, 8, 3, 3)}), side(kept | body | {"model.8.weight": (8, 8, 3, 3)}))
    assert {key: (key,) for key in (*kept, *body)}.items() <= found.items()


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize("step", [2, 3])
def test_a_list_that_one_side_counts_with_gaps_is_counted_anew(step: int, in_order: bool) -> None:
    """VITS has a flip that holds nothing between its flows, and counts it; another library does not count it."""
    parts = {"pre.weight": (8, 4), "enc.weight": (16, 8), "post.weight": (4, 8), "post.bias": (4,)}
    rest = {"enc.proj.weight": (8, 6), "dec.conv.weight": (6, 8, 7), "emb.weight": (30, 8)}
    source, target = (
        rest | {f"flow.flows.{at * by}.{name}": shape for at in range(4) for name, shape in parts.items()} for by in (step, 1)
    )
    if not in_order:
        source, target = dict(sorted(source.items())), dict(sorted(target.items()))
    found = sure(side(source), side(target))
    assert {key: value[0] for key, value in found.items()} == {
        key: key if key in rest else f"flow.flows.{int(key.split('.')[2]) * step}.{key.split('.', 3)[3]}" for key in target
    }


def test_a_list_beside_its_first_and_last_is_shifted() -> None:
    """SAM's heads: three layers in a list, or one between two of other names."""
    sizes = ((8, 8), (8, 8), (3, 8))
    source = side({f"head.layers.{i}.{leaf}": size[: 2 - (leaf == "bias")] for i, size in enumerate(sizes) for leaf in ("weight", "bias")})
    names = ("proj_in", "layers.0", "proj_out")
    target = side(
        {
            f"head.{name}.{leaf}": size[: 2 - (leaf == "bias")]
            for name, size in zip(names, sizes, strict=True)
            for leaf in ("weight", "bias")
        }
    )
    links = match(source, target).certain
    assert {link.targets[0]: link.sources[0] for link in links} == {
        f"head.{name}.{leaf}": f"head.layers.{i}.{leaf}" for i, name in enumerate(names) for leaf in ("weight", "bias")
    }
    assert any("its whole list is shifted" in link.evidence for link in links)


def test_fewer_layers_take_the_first_ones() -> None:
    def layers(count: int) -> Side:
        return side({f"layers.{i}.{name}.weight": (8, 8) for i in range(count) for name in ("q", "k", "v", "o")})

    assert sure(layers(12), layers(5)) == {key: (key,) for key in layers(5)}
    assert sure(layers(5), layers(12)) == {key: (key,) for key in layers(5)}


@pytest.mark.parametrize("other", [True, False])
def test_a_square_matrix_is_turned_as_its_kind_is(other: bool) -> None:
    """GPT-2's `c_proj` is square in the attention, and not in the MLP."""

    def block(turned: bool) -> Side:
        turn = (lambda shape: shape[::-1]) if turned else (lambda shape: shape)
        shapes = {"attn.c_attn": (24, 8), "attn.c_proj": (8, 8), "mlp.c_fc": (32, 8), "mlp.c_proj": (8, 32)}
        return side({f"h.{i}.{name}.weight": turn(shape) for i in range(2) for name, shape in shapes.items()})

    found = match(block(True), block(not other))
    assert {link.op for link in found.certain} == {"transpose" if other else ""}
    assert len(found.certain) == len(block(True))
    if other:
        square = next(link for link in found.certain if link.targets == ("h.0.attn.c_proj.weight",))
        assert "turned, as those of its kind that are not square" in square.evidence


@pytest.mark.parametrize("other", [True, False])
@pytest.mark.parametrize("inner", [6, 8])  # with 8, the second matrix is square
def test_stacks_of_matrices_are_turned_as_one_matrix_is(other: bool, inner: int) -> None:
    """transformers 4 has the experts of Qwen3-VL as (experts, in, out), its successor as (experts, out, in), under equal names."""

    def block(turned: bool) -> Side:
        def turn(*shape: int) -> tuple[int, ...]:
            return (shape[0], shape[2], shape[1]) if turned else shape

        experts = {"gate_up_proj": turn(5, 2 * inner, 8), "down_proj": turn(5, 8, inner)}
        return side(
            {f"layers.{i}.mlp.experts.{name}": shape for i in range(2) for name, shape in experts.items()}
            | {f"layers.{i}.attn.out.weight": (8, 8) for i in range(2)}
        )

    found = match(block(True), block(not other))
    assert {link.op for link in found.certain if "experts" in link.targets[0]} == {"permute([0, 2, 1])" if other else ""}
    assert {key: link.sources for key, link in found.by_target.items() if link.certain} == {key: (key,) for key in block(True)}
    assert not any(link.op for link in found.certain if "attn" in link.targets[0])


def test_the_same_name_in_another_size_outranks_a_stranger_of_the_same_shape() -> None:
    source = side({"body.weight": (4, 6), "body.bias": (4,), "embed.weight": (100, 8), "other.table": (120, 8)})
    target = side({"body.weight": (4, 6), "body.bias": (4,), "embed.weight": (120, 8)})
    found = match(source, target)
    assert "embed.weight" not in {key for link in found.certain for key in link.targets}
    told = [words for link in found.links if link.targets == ("embed.weight",) for words in link.evidence]
    assert not told or "embed.weight has that name, in another size" in told


@pytest.mark.parametrize("in_order", [False, True])
def test_what_is_left_over_is_fresh_where_all_else_goes_by_its_name(in_order: bool) -> None:
    body = {f"encoder.{i}.{name}.weight": (16, 16) for i in range(3) for name in ("q", "k", "v", "out")} | {"embed.weight": (50, 16)}
    source = side(
        {f"bert.{key}": shape for key, shape in body.items()} | {"cls.transform.dense.weight": (16, 16), "cls.transform.dense.bias": (16,)}
    )
    target = side(body | {"pooler.dense.weight": (16, 16), "pooler.dense.bias": (16,)})
    if in_order:
        source, target = dict(sorted(source.items())), dict(sorted(target.items()))
    found = sure(source, target)
    assert {key: value for key, value in found.items() if "pooler" not in key} == {key: (f"bert.{key}",) for key in body}
    assert not [key for key in found if "pooler" in key]


@pytest.mark.parametrize("prefix", ["", "model."])
@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("value_head", "reward_head"),
        ("cls_head.fc", "proj_head.fc"),
        ("decode_head.conv", "aux_head.proj"),
        ("roi.box_head", "roi.mask_head"),
    ],
)
def test_a_head_is_no_other_head(one: str, other: str, prefix: str) -> None:
    """Both are heads, and each says which: the target's is fresh, though all else goes by its name."""
    body = {f"encoder.{i}.fc.{leaf}": shape for i in range(4) for leaf, shape in (("weight", (8, 8)), ("bias", (8,)))}
    heads = [{f"{name}.weight": (8, 8), f"{name}.bias": (8,)} for name in (one, other)]
    source = side({f"{prefix}{key}": shape for key, shape in {**body, **heads[0]}.items()})
    assert sure(source, side(body | heads[1])) == {key: (f"{prefix}{key}",) for key in body}


@pytest.mark.parametrize("in_order", [False, True])
def test_a_prefix_that_is_exchanged_is_one_naming_too(in_order: bool) -> None:
    """`bert.` for `encoder.`: a head of the source is no pooler of the target, and a table of another size stays what it is."""
    body = {f"layer.{i}.{name}.weight": (16, 16) for i in range(4) for name in ("q", "k", "v", "out")}
    source = side(
        {f"bert.{key}": shape for key, shape in body.items()}
        | {"bert.embed.weight": (50, 16), "cls.transform.dense.weight": (16, 16), "cls.transform.dense.bias": (16,)}
    )
    target = side(
        {f"encoder.{key}": shape for key, shape in body.items()}
        | {"encoder.embed.weight": (60, 16), "encoder.pooler.dense.weight": (16, 16), "encoder.pooler.dense.bias": (16,)}
    )
    if in_order:
        source, target = dict(sorted(source.items())), dict(sorted(target.items()))
    assert sure(source, target) == {f"encoder.{key}": (f"bert.{key}",) for key in body}


def trunk(layers: int = 16) -> dict[str, tuple[int, ...]]:
    return {f"backbone.{at}.{name}": shape for at in range(layers) for name, shape in (("conv.weight", (8, 8, 3, 3)), ("bn.weight", (8,)))}


def convolution(name: str, norm: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (out, into, 3, 3), **{f"{norm}.{leaf}": (out,) for leaf in ("weight", "bias", "running_mean", "running_var")}}


@pytest.mark.parametrize("in_order", [True, False])
def test_numbers_of_different_lists_say_nothing_about_a_leftover_head(in_order: bool) -> None:
    """A fully convolutional head as mmseg and as torchvision name it: the norm is 0 in one list and 1 in the other."""
    source = (
        trunk() | convolution("decode_head.convs.0.conv", "decode_head.convs.0.bn", 16, 8) | {"decode_head.conv_seg.weight": (5, 16, 1, 1)}
    )
    target = trunk() | convolution("classifier.0", "classifier.1", 16, 8) | {"classifier.4.weight": (5, 16, 1, 1)}
    if not in_order:
        source, target = dict(sorted(source.items())), dict(sorted(target.items()))
    found = sure(side(source), side(target))
    assert {key for key in target if key.startswith("classifier.1.")} <= found.keys()
    assert all(found[f"classifier.1.{leaf}"] == (f"decode_head.convs.0.bn.{leaf}",) for leaf in ("weight", "bias", "running_mean"))


@pytest.mark.parametrize("in_order", [True, False])
def test_a_module_of_many_parts_moves_as_a_whole(in_order: bool) -> None:
    """Dilated convolutions side by side, within a `classifier` and within a decoder. A part of another size, or one that is missing, and
    nothing is sure."""

    def pyramid(head: str, parts: int = 4) -> dict[str, tuple[int, ...]]:
        sizes = enumerate(range(12, 12 + parts))
        return {
            key: shape for at, size in sizes for key, shape in convolution(f"{head}.convs.{at}.0", f"{head}.convs.{at}.1", size, 8).items()
        }

    for parts, moved in ((4, True), (3, False)):
        source, target = trunk() | pyramid("classifier.0"), trunk() | pyramid("decoder.aspp", parts)
        if not in_order:
            source, target = dict(sorted(source.items())), dict(sorted(target.items()))
        found = sure(side(source), side(target))
        expected = {key: (key.replace("decoder.aspp", "classifier.0"),) for key in target if key.startswith("decoder")}
        assert {key: found[key] for key in found if key.startswith("decoder")} == (expected if moved else {})


def test_heads_with_a_word_in_common_are_no_two_heads() -> None:
    source = trunk() | {"bbox_head.retina_cls.weight": (9, 8, 3, 3), "bbox_head.retina_reg.weight": (4, 8, 3, 3)}
    target = trunk() | {"head.classification_head.cls_logits.weight": (9, 8, 3, 3), "head.regression_head.bbox_reg.weight": (4, 8, 3, 3)}
    found = sure(side(source), side(target))
    assert found["head.classification_head.cls_logits.weight"] == ("bbox_head.retina_cls.weight",)
    assert found["head.regression_head.bbox_reg.weight"] == ("bbox_head.retina_reg.weight",)


def test_an_output_layer_is_presumed_fresh_where_all_else_has_its_name() -> None:
    """Whether it is the embedding, the model says (`ties`), and no file."""
    rest = {"model.embed_tokens.weight": (30, 8), **{f"model.layers.{i}.mlp.weight": (16, 8) for i in range(3)}, "model.norm.weight": (8,)}
    assert sure(side(rest), side(rest | {"lm_head.weight": (30, 8)})) == {key: (key,) for key in rest}


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("squares", [("fc1", "fc2", "fc3"), ("blocks.0.fc", "blocks.1.fc")])
def test_a_layer_that_changed_its_size_turns_no_other(squares: tuple[str, ...], biased: bool) -> None:
    """64 → 32 where the target has 32 → 64: that the sizes are exchanged is chance, which biases show."""

    def net(outputs: int, inputs: int) -> Side:
        shapes: dict[str, tuple[int, ...]] = dict.fromkeys((f"{name}.weight" for name in squares), (64, 64)) | {
            "proj.weight": (outputs, inputs)
        }
        return side(shapes | {f"{key.removesuffix('weight')}bias": shape[:1] for key, shape in shapes.items() if biased})

    found = match(net(32, 64), net(64, 32)).by_target
    assert all(found[f"{name}.weight"].op == "" and found[f"{name}.weight"].certain for name in squares)
    assert "proj.weight" not in found or not found["proj.weight"].certain


@pytest.mark.parametrize("to_last", [True, False])
def test_kernels_with_their_channels_last_keep_their_names(to_last: bool) -> None:
    """MLX has (out, window, in). A kernel whose window is as wide as its channels fits as it is too, and is turned as the others are."""
    shapes = {"stem": (8, 3, 3, 3), "body": (16, 8, 3, 3), "line": (16, 20, 3), "square": (16, 16, 3), "volume": (8, 3, 2, 5, 5)}
    first = side(
        {f"{name}.weight": shape for name, shape in shapes.items()} | {f"{name}.bias": shape[:1] for name, shape in shapes.items()}
    )
    last = side({key: (tensor.shape[0], *tensor.shape[2:], *tensor.shape[1:2]) for key, tensor in first.items()})
    found = match(*((first, last) if to_last else (last, first)))
    assert {link.sources for link in found.certain} == {(key,) for key in first}
    for link in found.certain:
        if link.targets[0].endswith("weight"):
            many = len(first[link.targets[0]].shape)
            order = [0, *range(2, many), 1] if to_last else [0, many - 1, *range(1, many - 1)]
            assert link.op == f"permute({order})"


def test_a_window_over_whole_words_is_a_convolution_over_their_width() -> None:
    """Kim's convolutions (2014), as a picture's with the width of a word, and as a line's with its channels."""
    kernels = {f"convs.{at}.weight": (6, 1, size, 10) for at, size in enumerate((3, 4, 5))}
    picture = side({**kernels, **{f"convs.{at}.bias": (6,) for at in range(3)}})
    line = side({key: (6, 10, tensor.shape[2]) if len(tensor.shape) > 1 else tensor.shape for key, tensor in picture.items()})
    found = match(picture, line)
    assert {link.sources for link in found.certain} == {(key,) for key in picture}
    (link,) = (link for link in found.certain if link.targets == ("convs.0.weight",))
    value = torch.randn(6, 1, 3, 10)
    values = made(link, link.op, 0, [value], {key: tensor.shape for key, tensor in line.items()})
    assert torch.equal(values, value[:, 0].transpose(1, 2))


@pytest.mark.parametrize("in_order", [True, False])
@pytest.mark.parametrize(("first", "second"), [("norm2", "norm2"), ("ln2", "pre_mlp_ln")])
def test_a_list_that_is_counted_from_one_has_its_names_there(first: str, second: str, in_order: bool) -> None:
    """Nearly all of a block has other names: what has its name goes one number on with the rest, and its norms keep their order."""
    early = {"norm2": ("attn_norm", "norm1"), "ln2": ("pre_attn_ln", "ln1")}[first]
    names = {"k": ("k_lin", "k_lin"), "q": ("q_proj", "q_lin"), "v": ("v_proj", "v_lin"), "o": ("out_proj", "dense")}
    names |= {"early": early, "late": (first, second), "up": ("c_fc", "fc1"), "down": ("c_proj", "fc2")}
    shapes = {"up": (32, 8), "down": (8, 32), "late": (8,), "early": (8,)}
    truth = {
        f"layers.{i + 1}.{new}.{leaf}": (f"layers.{i}.{old}.{leaf}", shapes.get(part, (8, 8))[: 1 if leaf == "bias" else 2])
        for i in range(3)
        for part, (old, new) in names.items()
        for leaf in ("weight", "bias")
    }
    source, target = dict(truth.values()), {key: shape for key, (_, shape) in truth.items()}
    if not in_order:
        target = dict(sorted(target.items()))
    found = sure(side(source), side(target))
    assert found.items() <= {key: (name,) for key, (name, _) in truth.items()}.items()
    assert len(found) >= len(truth) - 6
