"""Models that have layers in common and are not the same: refused, whatever share fits."""

from __future__ import annotations

import pytest
from pairs_support import meta
from rows_support import norm

from ckptsurgeon.matching.matcher import match
from ckptsurgeon.matching.proposals.advise import advise
from ckptsurgeon.matching.proposals.shares import share_of, unlike
from ckptsurgeon.planning.diff import compare
from ckptsurgeon.tensors import Checkpoint, TensorMeta

Side = dict[str, TensorMeta]
Rows = list[tuple[str, tuple[int, ...]]]
WIDTH = 8
SHAPES = {"q": (8, 8), "k": (8, 8), "v": (8, 8), "o": (8, 8), "n1": (8,), "n2": (8,), "f1": (32, 8), "f2": (8, 32)}
HF = {
    "q": "attention.query", "k": "attention.key", "v": "attention.value", "o": "attention.output.dense", "n1": "layernorm_before",
    "f1": "intermediate.dense", "f2": "output.dense", "n2": "layernorm_after",
}  # fmt: skip
FAIRSEQ = {
    "k": "self_attn.k_proj", "v": "self_attn.v_proj", "q": "self_attn.q_proj", "o": "self_attn.out_proj", "n1": "self_attn_layer_norm",
    "f1": "fc1", "f2": "fc2", "n2": "final_layer_norm",
}  # fmt: skip


def layers(path: str, names: dict[str, str], many: int) -> Rows:
    return [(f"{path}.{at}.{name}.weight", SHAPES[part]) for at in range(many) for part, name in names.items()]


def found(source: Rows, target: Rows) -> tuple[float, str]:
    """The share that certain links explain, and why both are unlike."""
    one, other = ({key: meta(key, shape) for key, shape in rows} for rows in (source, target))
    links = match(one, other).links
    sure = {key for link in links if link.clear for key in link.targets}
    return share_of(sure, other), unlike(
        {key for link in links for key in link.sources}, {k for link in links for k in link.targets}, one, other
    )


IMAGE: Rows = [("embeddings.patch_embeddings.projection.weight", (8, 3, 4, 4)), *layers("encoder.layer", HF, 12)]
SOUND: Rows = [("feature_extractor.conv.weight", (8, 1, 10)), *layers("encoder.layers", FAIRSEQ, 12)]
WORDS: Rows = [("embeddings.word_embeddings.weight", (40, 8)), *layers("encoder.layer", HF, 12)]


@pytest.mark.parametrize(("source", "target"), [(IMAGE, SOUND), (SOUND, WORDS), (WORDS, SOUND)], ids=["image", "sound", "words"])
def test_layers_of_one_width_are_no_model_where_what_reads_the_input_differs(source: Rows, target: Rows) -> None:
    share, why = found(source, target)
    assert share > 0.7 and "what reads the input has no partner" in why


@pytest.mark.parametrize("rows", [(50, 8), (40, 8)], ids=["another vocabulary", "the same"])
def test_what_reads_the_input_may_be_of_another_size(rows: tuple[int, int]) -> None:
    share, why = found(WORDS, [("embed_tokens.weight", rows), *layers("encoder.layers", FAIRSEQ, 12), ("span_head.weight", (2, 8))])
    assert share > 0.7 and why == ""


def test_more_layers_under_other_names_are_another_model() -> None:
    share, why = found(WORDS, [("embed_tokens.weight", (40, 8)), *layers("encoder.layers", FAIRSEQ, 13)])
    assert share > 0.9 and "encoder.layers" in why and why.endswith("1 have no partner: the target is deeper")


def test_fewer_layers_under_other_names_are_a_mapping() -> None:
    assert found(WORDS, [("embed_tokens.weight", (40, 8)), *layers("encoder.layers", FAIRSEQ, 4)])[1] == ""


@pytest.mark.parametrize("way", [1, -1], ids=["shallower", "deeper"])
def test_another_depth_and_another_vocabulary_under_other_names_are_another_model(way: int) -> None:
    """Any two transformers of one width have the rest in common."""
    deep: Rows = [("embeddings.word_embeddings.weight", (300, 8)), *layers("encoder.layer", HF, 8)]
    rows: Rows = [("embed_tokens.weight", (200, 8)), *layers("layers", FAIRSEQ, 6)]
    share, why = found(*[deep, rows][::way])
    assert share > 0.5 and "of 8 equal blocks such as encoder.layer.0, 2 have no partner" in why


def test_half_of_two_models_of_other_names_is_none() -> None:
    mixers: Rows = [(f"mixers.{at}.state.weight", (20 + at, 8)) for at in range(12)]
    others: Rows = [(f"states.{at}.kernel.weight", (50 + at, 8)) for at in range(12)]
    share, why = found([*WORDS, *mixers], [("embed_tokens.weight", (40, 8)), *layers("encoder.layers", FAIRSEQ, 12), *others])
    assert share > 0.5 and "even uncertain links explain only" in why


@pytest.mark.parametrize(("classes", "why"), [((2, 400), ""), ((2, 300), "even uncertain links explain only 66.6 %")])
def test_a_head_of_other_classes_is_no_reason(classes: tuple[int, int], why: str) -> None:
    def small(first: str, second: str, head: str, shape: tuple[int, int]) -> Rows:
        rows: Rows = [(first, (6, 3, 5, 5)), (second, (16, 6, 5, 5)), (head, shape)]
        return [(f"{name}.{leaf}", size[: 1 if leaf == "bias" else None]) for name, size in rows for leaf in ("weight", "bias")]

    share, said = found(small("conv1", "conv2", "fc", (10, 400)), small("stem", "body", "cls", classes))
    assert share > 0.6 and said.startswith(why) and bool(said) == bool(why)


def test_half_of_a_model_under_its_own_names_is_a_mapping() -> None:
    share, why = found([*WORDS, ("extra.weight", (300, 8))], [*WORDS, ("other.weight", (400, 8))])
    assert share < 0.8 and why == ""


def dense(widths: list[int], other: int = 0) -> Rows:
    """Blocks that begin with a norm and a matrix of the width that comes in, and go on in a width of their own."""
    rows: Rows = [("conv0.weight", (8, 3, 3, 3))]
    for at, width in enumerate(widths):
        wide = width + (other if at >= 4 else 0)
        rows += [(f"dense.layer{at}.norm1.weight", (wide,)), (f"dense.layer{at}.conv1.weight", (16, wide, 1, 1))]
        rows += [(f"dense.layer{at}.norm2.weight", (16,)), (f"dense.layer{at}.conv2.weight", (4, 16, 3, 3))]
    return rows


def test_blocks_of_which_half_is_of_another_size_are_of_another_model() -> None:
    """A net with more blocks before these, say, which all of these see."""
    share, why = found(dense([8] * 10), dense([8] * 10, other=6))
    assert share > 0.5 and "of 6 blocks such as dense.layer4 half or more is of another size" in why


@pytest.mark.parametrize("torn", [3, 0], ids=["some blocks", "none"])
def test_some_blocks_of_another_size_are_another_part_of_the_same_model(torn: int) -> None:
    assert found(dense([8] * (4 + torn)), dense([8] * (4 + torn), other=6))[1] == ""


def test_a_wider_mlp_in_each_block_is_the_same_model() -> None:
    wider = [(key, tuple(64 if size == 32 else size for size in shape)) for key, shape in WORDS]
    assert found(WORDS, wider)[1] == ""


@pytest.mark.parametrize("squeezed", [6, 4], ids=["another size", "the same"])
def test_blocks_whose_parts_of_one_name_are_of_other_sizes_are_of_other_models(squeezed: int) -> None:
    def net(head: str, squeeze: str, out: str, first: int) -> Rows:
        rows: Rows = [(f"{head}.stem.weight", (16, 3, 3, 3))]
        for at in range(5):
            wide = first if at == 0 else 4
            rows += [(f"{head}.{at}.{squeeze}.weight", (wide, 16 + at, 1, 1)), (f"{head}.{at}.{out}.weight", (17 + at, 4, 3, 3))]
        return rows

    share, why = found(net("features", "squeeze", "expand3x3", 4), net("stages", "squeeze.conv", "expand3x3.conv", squeezed))
    assert share > 0.7 and bool(why) == (squeezed != 4) and ("of other sizes" in why) == bool(why)


def growing(path: str, many: tuple[int, ...], unit: str) -> Rows:
    """Dense blocks: each layer takes in what all before it gave."""
    rows: Rows = [(f"{path}.stem.weight", (8, 3, 7, 7))]
    for stage, layers_ in enumerate(many, start=1):
        for at in range(layers_):
            rows += [(f"{path}.stage{stage}.{unit}{at + 1}.conv1.weight", (16, 8 * stage + 4 * at, 1, 1))]
            rows += [(f"{path}.stage{stage}.{unit}{at + 1}.conv2.weight", (4, 16, 3, 3))]
    return rows


def test_more_layers_that_grow_under_other_names_are_another_model() -> None:
    """DenseNet-121 and DenseNet-169: no two of their layers are of one size."""
    assert "have no partner" in found(growing("features", (3, 6, 12), "denselayer"), growing("net", (3, 6, 22), "unit"))[1]
    assert found(growing("features", (3, 6, 12), "denselayer"), growing("net", (3, 6, 12), "unit"))[1] == ""


@pytest.mark.parametrize("learned", [True, False])
def test_learned_positions_that_the_other_side_has_not_are_of_another_model(learned: bool) -> None:
    """GPT-2 looks its positions up, GPT-NeoX rotates; what is computed is saved, if at all, as one table and no layer's weight."""
    tokens: Rows = [("embed.tokens.weight", (50, 8)), *layers("encoder.layer", HF, 4)]
    other: Rows = [("embed_tokens.weight", (50, 8)), *layers("layers", FAIRSEQ, 4)]
    places: Rows = [("embed.position_embeddings.weight", (12, 8))] if learned else []
    told = found([*tokens, *places], other)[1]
    assert ("is learned" in told) is learned
    assert found(other, [*tokens, *places])[1] == told


@pytest.mark.parametrize("window", [7, 4], ids=["another window", "the same"])
def test_a_first_convolution_of_another_window_is_of_another_model(window: int) -> None:
    """PVT's second version embeds overlapping patches; that the convolutions behind them fit says nothing."""
    rest: Rows = [(f"blocks.{at}.{name}.weight", shape) for at in range(4) for name, shape in (("mix", (8, 8, 3, 3)), ("out", (8, 9)))]
    source: Rows = [("patch_embed.proj.weight", (8, 3, 4, 4)), *rest]
    target: Rows = [
        ("embeddings.patches.weight", (8, 3, window, window)),
        *((key.replace("blocks", "layers"), shape) for key, shape in rest),
    ]
    assert ("reads the input" in found(source, target)[1]) is (window == 7)


def plain(*stages: tuple[int, int]) -> Rows:
    """VGG's layers in one list: a convolution, a norm, and a number left out for what holds nothing."""
    rows: Rows = []
    at, into = 0, 3
    for width, many in stages:
        for _ in range(many):
            rows += [(f"features.{at}.weight", (width, into, 3, 3)), (f"features.{at}.bias", (width,)), *norm(f"features.{at + 1}", width)]
            at, into = at + 3, width
        at += 1
    return rows


def test_layers_of_other_kinds_under_the_same_numbers_are_of_another_model() -> None:
    """VGG-13 and VGG-16 begin alike, and count on differently."""
    thirteen, sixteen = plain((8, 2), (16, 2), (32, 2), (64, 2), (65, 2)), plain((8, 2), (16, 2), (32, 3), (64, 3), (65, 3))
    assert "another kind has the same name" in found(thirteen, sixteen)[1]
    assert found(thirteen, thirteen)[1] == ""


def swin(head: str, table: bool) -> Rows:
    """Blocks with a table of relative positions, or with a scale and an MLP in its stead."""
    rows: Rows = [(f"{head}patch_embed.weight", (8, 3, 4, 4))]
    for at in range(4):
        block = f"{head}blocks.{at}"
        shapes = {"attn.proj": (8, 8), "attn.qkv": (24, 8), "fc1": (32, 8), "fc2": (8, 32)}
        rows += [row for name, shape in shapes.items() for row in ((f"{block}.{name}.weight", shape), (f"{block}.{name}.bias", shape[:1]))]
        rows.append((f"{block}.attn.table", (49, 2)) if table else (f"{block}.attn.logit_scale", (2, 1, 1)))
    return rows


def renamed(rows: Rows) -> Rows:
    names = {"patch_embed": "stem.projection", "blocks": "encoder.layer", "attn": "attention", "fc1": "intermediate", "fc2": "output"}
    for old, new in names.items():
        rows = [(key.replace(old, new), shape) for key, shape in rows]
    return rows


def test_parts_that_each_block_of_one_side_alone_has_are_another_models() -> None:
    assert found(swin("", table=False), renamed(swin("", table=True)))[1].endswith(
        "are parts that each block of one side has, and none of the other"
    )
    assert not found(swin("", table=True), renamed(swin("", table=True)))[1]
    lacking = [row for row in swin("", table=True) if "table" not in row[0]]
    assert not found(lacking, renamed(swin("", table=True)))[1]  # one side alone has more


def test_a_model_that_norms_its_input_is_none_that_norms_its_output() -> None:
    """BERT and GPT-2: tables of other sizes could be resized."""
    first: Rows = [("embeddings.word_embeddings.weight", (40, 8)), *norm("embeddings.LayerNorm", 8), *layers("encoder.layer", HF, 4)]
    last: Rows = [("wte.weight", (50, 8)), *layers("h", FAIRSEQ, 4), *norm("ln_f", 8)]
    plain: Rows = [*last[:-4], *norm("norm", 8)]
    for source, target, unlike_ends in (
        (first, last, True),
        (last, first, True),
        (first, plain, False),
        (first, [*last, *first[1:3]], False),
    ):
        assert ("are norms at other ends" in found(source, target)[1]) is unlike_ends


TEXT: Rows = [("text_model.token_embedding.weight", (40, 8)), *layers("text_model.encoder", HF, 4)]
VISION: Rows = [("vision_model.patch.weight", (8, 3, 4, 4)), *layers("vision_model.encoder", HF, 4)]


def test_a_prefix_that_is_exchanged_makes_no_text_of_pictures() -> None:
    assert "what reads the input has no partner" in found(TEXT, VISION)[1]
    assert not found(TEXT, [(key.replace("text_model", "text_tower"), shape) for key, shape in TEXT])[1]
    assert not found(TEXT[1:], VISION[1:])[1]  # layers alone


def test_a_diff_carries_no_mapping_between_two_models() -> None:
    one, other = (
        Checkpoint(path, "safetensors", "0", {key: meta(key, shape) for key, shape in rows}) for path, rows in (("a", TEXT), ("b", VISION))
    )
    advice = advise(compare(one, other), one, other)
    assert not advice.rules and not advice.match


def test_a_new_stem_and_blocks_that_lose_a_part_are_another_model_under_equal_names() -> None:
    """SE-ResNet and ResNet with a deep stem; a new stem alone may be a person's own."""
    parts: Rows = [(f"layer{at}.se.weight", (2, 8)) for at in range(4)]
    body: Rows = [(f"layer{at}.conv{n}.weight", (8, 8, 3, 3)) for at in range(4) for n in (1, 2)]
    plain_stem: Rows = [("conv1.weight", (8, 3, 7, 7)), *body]
    deep: Rows = [("stem.0.weight", (4, 3, 3, 3)), ("stem.1.weight", (8, 4, 3, 3)), *body]
    assert "what reads the input has no partner" in found([*plain_stem, *parts], deep)[1]
    assert not found(plain_stem, [*deep, *parts])[1] and not found([*plain_stem, *parts], plain_stem)[1]
