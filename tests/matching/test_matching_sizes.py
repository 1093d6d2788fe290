"""What a key of another size is, and what is offered for it: by words, shape and neighbours, never because a shape would go through."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import ckptsurgeon as cs
from ckptsurgeon.matching.proposals import advise as advise_module
from ckptsurgeon.matching.proposals.advise import advise, with_sizes
from ckptsurgeon.matching.proposals.propose import propose
from ckptsurgeon.matching.proposals.sizes import resizes
from ckptsurgeon.planning.diff import compare
from ckptsurgeon.tensors import Checkpoint, TensorMeta, contiguous_stride

Shape = tuple[int, ...]


def side(path: str, shapes: dict[str, Shape], kind: str = "file", dtype: str = "F32") -> Checkpoint:
    tensors = {key: TensorMeta(key, dtype, shape, contiguous_stride(shape)) for key, shape in shapes.items()}
    return Checkpoint(path, "safetensors" if kind == "file" else kind, path, tensors, kind=kind)


def offered(key: str, old: Shape, new: Shape, beside: dict[str, Shape] | None = None, kind: str = "file") -> list[tuple[str, bool]]:
    """What is offered for a key in another size, and whether the next command carries it; `beside` are the target's other keys."""
    more = {**(beside or {}), **({} if key.startswith("last") else {"aux.weight": (3, 3)})}
    found = resizes(side("a", {key: old, **more}), side("t", {key: new, **more}, kind), {key: key})
    return [(offer.adapter, one.sure) for one in found for offer in one.offers]


# A key, from which shape to which, and the only adapter that is sure.
CARRIED = [
    ("pos_embed", (1, 197, 8), (1, 577, 8), "interpolate(prefix=1)"),
    ("visual.positional_embedding", (50, 8), (197, 8), "interpolate(prefix=1)"),
    ("encoder.pos_embedding", (1, 17, 8), (1, 26, 8), "interpolate(prefix=1)"),
    ("vit.embeddings.position_embeddings", (1, 17, 8), (1, 26, 8), "interpolate(prefix=1)"),
    ("absolute", (1, 17, 8), (1, 26, 8), "interpolate(prefix=1)"),  # a bare table of the form (1, N, C)
    ("layers.0.blocks.0.attn.relative_position_bias_table", (169, 3), (529, 3), "relative_position_bias"),
    ("beit.layers.0.relative_position_bias.relative_position_bias_table", (52, 2), (124, 2), "relative_position_bias(extra=3)"),
    ("embed_tokens.weight", (100, 4), (105, 4), 'pad(fill="init")'),
    ("transformer.wte.weight", (100, 4), (150, 4), 'pad(fill="init")'),
    ("tok_embeddings.weight", (32000, 4), (32064, 4), 'pad(fill="init")'),
    ("shared.weight", (100, 4), (105, 4), 'pad(fill="init")'),
    ("bert.embeddings.word_embeddings.weight", (100, 4), (101, 4), 'pad(fill="init")'),
    ("transformer.wte.weight", (50304, 4), (50257, 4), "slice"),  # rounded up in the source
    ("lm_head.weight", (100, 4), (105, 4), 'pad(fill="init")'),
    ("lm_head.bias", (100,), (105,), 'pad(fill="init")'),
    ("gpt_neox.embed_out.weight", (100, 4), (128, 4), 'pad(fill="init")'),
    ("conv1.weight", (8, 3, 3, 3), (8, 1, 3, 3), "in_channels"),
    ("stem.conv.weight", (8, 3, 3, 3, 3), (8, 1, 3, 3, 3), "in_channels"),
    ("features.0.weight", (8, 1, 3, 3), (8, 3, 3, 3), "in_channels"),
    ("patch_embed.proj.weight", (8, 3, 16, 16), (8, 3, 14, 14), "patch_embed"),
    ("layer1.0.conv2.weight", (8, 8, 3, 3), (8, 8, 3, 3, 3), "inflate"),
    ("fc.weight", (8, 4), (8, 4, 1, 1), "reshape"),
]
# What a person has to choose, and what is offered nothing.
CHOICES = [
    ("layers.0.self_attn.k_proj.weight", (32, 32), (16, 32), "group_mean(heads=2)"),
    ("layers.0.self_attn.v_proj.bias", (4096,), (1024,), "group_mean(heads=32)"),
    ("layers.0.attention.wk.weight", (4096, 8), (1024, 8), "group_mean(heads=32)"),
    ("embed_tokens.weight", (1024, 4), (256, 4), "slice"),
    ("wte.weight", (105, 4), (100, 4), "slice"),
    ("conv_in.weight", (8, 4, 3, 3), (8, 9, 3, 3), "pad(dim=1)"),
    ("conv1.weight", (8, 12, 3, 3), (8, 4, 3, 3), "slice(dim=1)"),
    ("fc.weight", (81, 16), (4, 16), None),
    ("cls_score.weight", (100, 16), (4, 16), ""),
    ("head.weight", (101, 8), (37, 8), ""),
    ("classifier.bias", (101,), (37,), ""),
    ("last.weight", (81, 3), (4, 3), ""),
    ("last.v_proj.weight", (8, 32), (32, 32), None),  # of an attention, at the end of the model
    ("layers.0.mlp.up_proj.weight", (64, 16), (36, 16), None),
    ("query_tokens", (1, 16, 8), (1, 25, 8), None),
    ("latents", (1, 16, 8), (1, 25, 8), None),
    ("mask_token", (1, 4, 8), (1, 9, 8), None),
    ("prompt", (16, 8), (25, 8), None),
    ("quantizer.codebook", (1, 16, 8), (1, 25, 8), None),
    ("layer2.0.conv1.weight", (64, 32, 3, 3), (64, 16, 3, 3), None),
]


@pytest.mark.parametrize(("key", "old", "new", "adapter"), CARRIED)
def test_what_a_key_is_says_what_makes_it_fit(key: str, old: Shape, new: Shape, adapter: str) -> None:
    beside = {"patch.weight": (8, 3, 4, 4)} if "pos" in key else {}
    assert offered(key, old, new, beside) == [(adapter, True)]


@pytest.mark.parametrize(("key", "old", "new", "adapter"), CHOICES)
def test_what_is_not_sure_is_a_choice_or_nothing(key: str, old: Shape, new: Shape, adapter: str | None) -> None:
    found = offered(key, old, new)
    assert found == ([] if adapter is None else [(adapter, False)])
    advice = advise(compare(*(pair := (side("a", {key: old, "z": (1,)}), side("t", {key: new, "z": (1,)})))), *pair)
    assert advice.rules == () and advice.reaches is None


@pytest.mark.parametrize(
    ("old", "new", "beside", "found"),
    [
        ((6, 6, 3, 3), (6, 1, 3, 3), {}, []),  # each channel by itself on one side
        ((6, 1, 3, 3), (6, 6, 3, 3), {}, []),
        ((3, 3, 3, 3), (3, 1, 3, 3), {}, []),
        ((64, 32, 3, 3), (64, 1, 3, 3), {}, []),
        ((8, 8, 7, 7), (8, 1, 7, 7), {"stem.weight": (8, 3, 7, 7)}, []),
        ((16, 3, 3, 3), (16, 1, 3, 3), {"stem.weight": (8, 3, 7, 7)}, [("in_channels", False)]),
        ((16, 8, 3, 3), (16, 4, 3, 3), {"stem.weight": (8, 3, 7, 7)}, [("slice(dim=1)", False)]),
        ((3, 8, 3, 3), (3, 4, 3, 3), {}, [("slice(dim=1)", False)]),
    ],
)
def test_a_first_convolution_reads_the_image_before_any_other(
    old: Shape, new: Shape, beside: dict[str, Shape], found: list[tuple[str, bool]]
) -> None:
    assert offered("conv.weight", old, new, beside) == found
    pair = side("a", {"conv.weight": old, **beside}), side("t", {"conv.weight": new, **beside})
    assert not any("first conv" in one.role for one in resizes(*pair, {"conv.weight": "conv.weight"}))


@pytest.mark.parametrize(
    ("biases", "others", "found"),
    [
        (((32,), (64,)), (), []),  # another layer, whose two sizes are exchanged by chance
        (((64,), (64,)), (), [("transpose", True)]),
        (None, (), [("transpose", False)]),
        (None, ("up.weight",), [("transpose", True)]),
    ],
)
def test_exchanged_sizes_are_a_turned_layer_of_as_many_outputs(
    biases: tuple[Shape, Shape] | None, others: tuple[str, ...], found: list[tuple[str, bool]]
) -> None:
    old, new = (dict.fromkeys(("proj.weight", *others), shape) for shape in ((32, 64), (64, 32)))
    keys = {key: key for key in old}
    for shapes, bias in zip((old, new), biases or (), strict=False):
        shapes["proj.bias"] = bias
    answers = resizes(side("a", old), side("t", new), keys)
    assert [(offer.adapter, one.sure) for one in answers for offer in one.offers][:1] == found


def test_several_first_convolutions_change_together() -> None:
    assert offered("rgb.conv.weight", (8, 3, 3, 3), (8, 1, 3, 3), {"out.weight": (3, 8, 3, 3)}) == [("in_channels", True)]
    narrow: dict[str, Shape] = {"layers.0.conv.weight": (8, 4, 3, 3), "layers.0.conv2.weight": (4, 4, 3, 3)}
    assert offered("stem.conv.weight", (8, 3, 3, 3), (8, 1, 3, 3), narrow) == [("in_channels", True)]
    keys = {key: key for key in ("left.conv.weight", "right.conv.weight")}
    found = resizes(side("a", dict.fromkeys(keys, (8, 3, 3, 3))), side("t", dict.fromkeys(keys, (8, 1, 3, 3))), keys)
    assert [(one.sure, len(one.offers)) for one in found] == [(True, 2)]


def test_a_text_s_positions_are_counted_and_an_image_s_are_a_grid() -> None:
    text = {"text.embeddings.token_embedding.weight": (60, 8)}
    image = {"vision.embeddings.patch_embedding.weight": (8, 3, 4, 4)}
    for key, beside, adapter in (
        ("text.embeddings.position_embedding.weight", text, 'pad(fill="init")'),
        ("vision.embeddings.position_embedding.weight", image, "interpolate(prefix=1)"),
    ):
        assert offered(key, (17, 8), (26, 8), beside) == [(adapter, True)]
    assert offered("wpe.weight", (1024, 8), (512, 8), {"wte.weight": (60, 8)}) == [("slice", True)]


@pytest.mark.parametrize(
    ("old", "new", "adapter", "words"),
    [
        (197, 196, "slice(dim=1, start=1)", "1 fewer"),
        (201, 196, "slice(dim=1, start=5)", "5 fewer"),
        (198, 197, "", "1 fewer"),  # which of the two goes can't be told
        (196, 197, "", "1 more"),
        (197, 201, "", "4 more"),
        (220, 197, "", ""),
    ],
)
def test_a_table_of_the_same_grid_is_never_resized(old: int, new: int, adapter: str, words: str) -> None:
    (found,) = resizes(side("a", {"pos_embed": (1, old, 8)}), side("t", {"pos_embed": (1, new, 8)}), {"pos_embed": "pos_embed"})
    (offer,) = found.offers
    assert (offer.adapter, found.sure) == (adapter, False)
    assert offer.role == ("table of positions, of " + (f"one grid, with {words} in front of it in the target" if words else "another grid"))


def test_a_table_of_positions_is_a_square_grid_only_where_something_says_so() -> None:
    """16 → 32 rows fit a grid of 3 x 3 with seven more tokens, and 100 → 64 a grid: of a text, a sound or a video that is chance."""
    assert offered("wpe.weight", (16, 8), (32, 8)) == [('pad(fill="init")', True)]
    for beside in ({}, {"encoder.conv1.weight": (8, 4, 3)}, {"encoder.patch.weight": (8, 3, 2, 4, 4)}):
        assert [sure for _, sure in offered("encoder.embed_positions.weight", (100, 8), (64, 8), beside)] == [False]
    assert [sure for _, sure in offered("encoder.pos_embed", (1, 16, 8), (1, 25, 8), {"encoder.patch.weight": (8, 3, 2, 4, 4)})] == [False]
    clip = {"token_embedding.weight": (60, 8), "visual.conv1.weight": (8, 3, 4, 4)}  # the text's table stands nearer to its tokens
    assert offered("positional_embedding", (65, 8), (82, 8), clip) == [('pad(fill="init")', True)]


def test_positions_beside_a_plain_embedding_are_a_text_s() -> None:
    """A table of 32 x 32 positions of a text is no picture, wherever its module stands; nor is a linear layer called so a table."""
    text = {"embedding.weight": (30, 8), "layers.0.linear1.weight": (16, 8)}
    assert offered("pos_encoder.pe", (1, 1024, 8), (1, 4096, 8), text) == [('pad(dim=1, fill="init")', True)]
    assert offered("pos_encoder.pe", (1024, 1, 8), (4096, 1, 8), text) == [('pad(fill="init")', True)]
    assert offered("pos_encoder.pe", (1, 4096, 8), (1, 1024, 8), text) == [("slice(dim=1)", True)]
    for beside in ({**text, "embedding.bias": (30,)}, {**text, "conv.weight": (8, 3, 4, 4)}):
        assert offered("pos_encoder.pe", (1, 1024, 8), (1, 4096, 8), beside) == [("interpolate(prefix=0)", True)]


def test_a_table_of_positions_is_of_as_many_dimensions_as_the_kernel_beside_it(tmp_path: Path) -> None:
    """4 x 4 x 4 is 8 x 8 too, and 9 x 9 x 9 is 27 x 27."""
    cube = (
        "interpolate(grid=[4, 16], to=[9, 16]) | reshape(shape=[9, 16, 8]) | "
        "interpolate(grid=[4, 4], to=[9, 9]) | reshape(shape=[1, 729, 8])"
    )
    patches = {"patches.weight": (8, 1, 4, 4, 4)}
    assert offered("pos_embed", (1, 64, 8), (1, 729, 8), patches) == [(cube, False)]
    assert offered("pos_embed", (1, 64, 8), (1, 81, 8), patches) == [("", False)]
    assert offered("pos_embed", (1, 64, 8), (1, 81, 8), {"conv_in.weight": (8, 1, 5)}) == [("interpolate(grid=[1, 64], to=[1, 81])", False)]
    old, goal = torch.randn(1, 64, 8), torch.zeros(1, 729, 8)
    for name, table in (("a", old), ("t", goal)):
        torch.save({"pos_embed": table}, tmp_path / name)
    cs.merge(tmp_path / "a", tmp_path / "t", output=tmp_path / "o.pt", adapt={"pos_embed": cube})
    side_of = torch.nn.functional.interpolate(torch.eye(4)[None, None], (9, 4), mode="bicubic", antialias=True)[0, 0]
    whole = torch.einsum("ai,bj,ck,ijkd->abcd", side_of, side_of, side_of, old.reshape(4, 4, 4, 8))
    torch.testing.assert_close(torch.load(tmp_path / "o.pt")["pos_embed"], whole.reshape(1, 729, 8))


def test_whatever_grows_with_the_vocabulary_is_its_output() -> None:
    old = {"tok.weight": (60, 8), "output.weight": (60, 8), "cls.predictions.bias": (60,), "score.weight": (60, 8), "last.weight": (3, 3)}
    new = {key: (67, *shape[1:]) for key, shape in old.items()} | {"score.weight": (5, 8), "last.weight": (3, 3)}
    found = resizes(side("a", old), side("t", new), {key: key for key in old if old[key] != new[key]})
    grown = {offer.key for one in found for offer in one.offers if offer.adapter.startswith("pad") and one.sure}
    assert grown == {"tok.weight", "output.weight", "cls.predictions.bias"}
    assert [one.role for one in found if not one.rules] == ["a head of other classes, 60 → 5: stays as the target has it"]


def test_what_is_behind_the_target_fills_a_table_up() -> None:
    for kind, fill in (("file", "init"), ("skeleton", "mean")):
        assert offered("wte.weight", (100, 4), (105, 4), kind=kind) == [(f'pad(fill="{fill}")', True)]


def test_codes_and_counters_are_offered_nothing() -> None:
    for dtype in ("I64", "I8", "BOOL"):
        pair = side("a", {"wte.weight": (100, 4)}, dtype=dtype), side("t", {"wte.weight": (105, 4)})
        assert resizes(*pair, {"wte.weight": "wte.weight"}) == ()


@pytest.mark.parametrize(("limit", "most"), [("LARGEST", 1), ("MANY", 3)])
def test_too_many_names_are_left_to_match(monkeypatch: pytest.MonkeyPatch, limit: str, most: int) -> None:
    pair = side("a", {"fc1.weight": (2, 3), "fc2.weight": (3, 2)}), side("t", {"fc1.weight": (2, 3), "dense2.weight": (3, 2)})
    assert advise(compare(*pair), *pair).rules
    monkeypatch.setattr(advise_module, limit, most)
    found = replace(compare(*pair), advice=advise(compare(*pair), *pair))
    assert found.advice.skipped and not found.advice.rules
    assert "There are too many names to match them here.\nTry: ckptsurgeon match a t -o rules.toml\n" in str(found)


def test_equal_offers_are_one_pattern_that_names_no_other_key() -> None:
    keys = [f"layers.{i}.self_attn.{n}_proj.weight" for i in range(12) for n in "kv"]
    old = {**dict.fromkeys(keys, (32, 32)), "layers.0.self_attn.q_proj.weight": (32, 32)}
    new = {**dict.fromkeys(keys, (8, 32)), "layers.0.self_attn.q_proj.weight": (32, 32)}
    (one,) = resizes(side("a", old), side("t", new), {key: key for key in keys})
    assert [(rule.pattern, rule.result) for rule in one.rules] == [("layers.*.self_attn.{k_proj,v_proj}.weight", "group_mean(heads=4)")]


def test_a_list_is_shifted_though_each_of_its_names_is_on_both_sides() -> None:
    def convolutions(*channels: int) -> dict[str, Shape]:
        pairs = enumerate(zip(channels[1:], channels[:-1], strict=True))
        return {f"features.{2 * i}.{leaf}": shape for i, (o, n) in pairs for leaf, shape in (("weight", (o, n, 3, 3)), ("bias", (o,)))}

    short, long = side("a", convolutions(3, 8, 8, 8)), side("t", convolutions(3, 3, 8, 8, 8))
    for pair, step in (((short, long), "+2"), ((long, short), "-2")):
        rules = [rule for rule in advise(compare(*pair), *pair).rules if rule.kind == "rename"]
        assert [(rule.pattern, rule.result) for rule in rules] == [("features.{i}.{p}", f"features.{{i{step}}}.{{p}}")]


def test_fewer_layers_under_another_name_are_said_too() -> None:
    def layers(name: str, many: int) -> dict[str, Shape]:
        block = {"qkv.weight": (24, 8), "proj.weight": (8, 8), "fc1.weight": (32, 8), "fc2.weight": (8, 32), "norm.weight": (8,)}
        return {"tok.weight": (20, 8), **{f"{name}.{i}.{key}": shape for i in range(many) for key, shape in block.items()}}

    pair = side("a", layers("blocks", 6)), side("t", layers("layers", 3))
    found = replace(compare(*pair), advice=advise(compare(*pair), *pair))
    assert "blocks: the first 3 of 6 are kept.\n" in str(found)


@pytest.mark.parametrize("rows", [(64, 72), (64, 32)])
def test_what_has_another_name_and_another_size_is_offered_and_not_carried(rows: tuple[int, int], tmp_path: Path) -> None:
    def model(names: tuple[str, ...], words: int) -> dict[str, Shape]:
        table, layer, norm, head = names
        middle = {f"{layer}.{i}.mlp.weight": (8, 8) for i in range(2)}
        return {f"{table}.weight": (words, 8), **middle, f"{norm}.weight": (8,), f"{head}.weight": (words, 8)}

    old = model(("model.embed_tokens", "model.layers", "model.norm", "lm_head"), rows[0])
    new = model(("tok_embeddings", "blocks", "final_norm", "output"), rows[1])
    pair = side("a", old), side("t", new)
    advice = advise(compare(*pair), *pair)
    assert advice.carried and all(rule.kind == "rename" for rule in advice.rules) and not any(one.sure for one in advice.sizes)
    rules = [rule for one in advice.sizes for rule in one.rules]
    assert [rule.pattern for rule in rules] == ["model.embed_tokens.weight -> tok_embeddings.weight", "lm_head.weight -> output.weight"]
    for name, shapes in (("a.pt", old), ("t.pt", new)):
        torch.save({key: torch.randn(shape) for key, shape in shapes.items()}, tmp_path / name)
    report = cs.merge(tmp_path / "a.pt", tmp_path / "t.pt", output=tmp_path / "o.pt", rules=[*advice.rules, *rules])
    assert report.coverage.tensors == 1.0
    got, given = (torch.load(tmp_path / name) for name in ("o.pt", "a.pt"))
    least = min(rows)
    assert torch.equal(got["tok_embeddings.weight"][:least], given["model.embed_tokens.weight"][:least])


def test_what_adapters_make_fit_counts_for_matching_as_it_does_for_diff() -> None:
    flat = {f"layer{i}.{j}.conv.weight": (8, 8, 3, 3) for i in range(3) for j in range(2)} | {"bn.weight": (8,), "fc.weight": (10, 8)}
    deep = {key: (*shape, 3) if len(shape) == 4 else shape for key, shape in flat.items()} | {"fc.weight": (4, 8)}
    pair = side("a", {**flat, "more": (3,)}), side("t", {**deep, "other.weight": (5,)})
    found = with_sizes(propose(*pair), *pair)
    assert found.beside and found.refusal() is None
    assert propose(*pair).refusal() is not None
