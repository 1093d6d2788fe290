"""One tower of two that are just the same is never taken silently, from either side; a name that the other side has too decides it."""

from __future__ import annotations

import pytest
from pairs_support import meta
from rules_support import checkpoint, literal_plan, proposed, read_back

from ckptsurgeon.matching.matcher import match
from ckptsurgeon.matching.towers import gathered, led
from ckptsurgeon.planning.links import Link
from ckptsurgeon.tensors import TensorMeta

HERE = {
    "conv1": (8, 3, 3, 3),
    "layer1.0.conv": (8, 8, 3, 3),
    "layer2.0.conv": (16, 8, 3, 3),
    "layer3.0.conv": (32, 16, 3, 3),
    "fc": (5, 32),
}
THERE = {"stem": (8, 3, 3, 3), "stages.0.mix": (8, 8, 3, 3), "stages.1.mix": (16, 8, 3, 3), "stages.2.mix": (32, 16, 3, 3), "head": (5, 32)}


def net(head: str, layers: dict[str, tuple[int, ...]]) -> dict[str, TensorMeta]:
    names = {
        f"{head}{layer}.{leaf}": shape if leaf == "weight" else shape[:1] for layer, shape in layers.items() for leaf in ("weight", "bias")
    }
    return {key: meta(key, shape) for key, shape in names.items()}


def test_of_two_towers_neither_is_sure_whatever_the_other_side_calls_its_one() -> None:
    two = net("net_a.", HERE) | net("net_b.", HERE)
    for one in (net("", THERE), net("backbone.", THERE)):
        for found in (match(two, one), match(one, two)):
            assert not found.certain
            assert found.uncertain and all(link.runner_up for link in found.uncertain)


def test_a_name_that_both_sides_have_decides_it() -> None:
    two = net("teacher.", HERE) | net("student.", HERE)
    found = match(two, net("student.", THERE))
    assert found.certain and all(link.sources[0].startswith("student.") for link in found.certain)


def test_towers_that_differ_are_no_twins() -> None:
    other = {layer: (*shape[:-1], shape[-1] + 4) for layer, shape in HERE.items()}
    found = match(net("net_a.", HERE) | net("net_b.", other), net("", THERE))
    assert len(found.certain) == 10


def test_a_source_that_two_links_want_is_given_to_the_surer_one() -> None:
    source = checkpoint({"k": (2, 4), "v": (2, 4), "q": (2, 4)})
    target = checkpoint({"kv": (4, 4), "qk": (4, 4), "v": (2, 4)}, "model:Net")
    links = [
        Link(("k", "v"), ("kv",), "concat(dim=0)", 9.0),
        Link(("q", "k"), ("qk",), "concat(dim=0)", 8.0),
        Link(("v",), ("v",), "", 5.0),
    ]
    found = proposed(source, target, links)
    assert found.applied == (links[0],)
    assert read_back(found, source, target) == literal_plan([links[0]], source, target)


HEADS = {"0": (24, 11), "2": (24, 24)}


def test_two_parts_of_one_form_on_both_sides_can_be_exchanged_unless_names_tell() -> None:
    here = net("policy.", HEADS) | net("value.", HEADS) | net("action.", {"net": (3, 24)})
    there = net("judge.", HEADS | {"4": (1, 24)}) | net("agent.", HEADS | {"4": (3, 24)})
    for source, target in ((here, there), (there, here)):
        found = match(source, target)
        assert {link.targets[0] for link in found.links if link.certain} <= {
            f"{name}.{leaf}" for name in ("action.net", "agent.4") for leaf in ("weight", "bias")
        }
    named = net("net.value.", HEADS | {"4": (1, 24)}) | net("net.agent.", HEADS | {"4": (3, 24)})
    found = match(net("a.value.", HEADS) | net("a.agent.", HEADS), named)
    assert {(link.sources[0], link.targets[0]) for link in found.certain} == {
        (f"a.{name}.{layer}.{leaf}", f"net.{name}.{layer}.{leaf}")
        for name in ("value", "agent")
        for layer in HEADS
        for leaf in ("weight", "bias")
    }


def test_parts_of_one_form_are_told_by_words_that_are_cut_to_their_initials() -> None:
    here = net("ar_embedder.", HEADS) | net("csize_embedder.", HEADS)
    there = net("emb.resolution_embedder.", HEADS) | net("emb.aspect_ratio_embedder.", HEADS)
    pairs = {(link.sources[0].partition("_")[0], link.targets[0].partition("_")[0]) for link in match(here, there).certain}
    assert pairs == {("ar", "emb.aspect"), ("csize", "emb.resolution")}
    other = net("emb.resolution_embedder.", HEADS) | net("emb.pixel_area_embedder.", HEADS)
    assert not match(here, other).certain


BLOCK = {**{f"attn.{part}_proj": (8, 8) for part in ("q", "k", "v", "out")}, "norm1": (8,), "norm2": (8,), "fc1": (32, 8), "fc2": (8, 32)}


def layers(path: str, *towers: str) -> dict[str, TensorMeta]:
    """Two blocks and what is before them; each layer stands once, or once in each tower."""
    names = {f"{path}.{n}.{layer}{tower}.weight": shape for n in (0, 1) for layer, shape in BLOCK.items() for tower in towers or ("",)}
    return {key: meta(key, shape) for key, shape in {"embed.proj.weight": (8, 3, 4, 4), **names}.items()}


def test_towers_within_each_other_are_not_mixed() -> None:
    """All that is shown is of one tower, and the other is named; neither is sure."""
    one, two = layers("blocks"), layers("net.layers", ".A", ".B")
    for source, target in ((two, one), (one, two)):
        found = match(source, target)
        assert [link.targets for link in found.certain] == [("embed.proj.weight",)]
        assert len(found.uncertain) == 2 * len(BLOCK)
        for link in found.uncertain:
            here, there = (key.replace("net.layers", "blocks").replace(".A.", ".") for key in (link.sources[0], link.targets[0]))
            assert here == there and ".B." in link.runner_up


def test_a_tower_within_another_that_the_other_side_calls_the_same_is_that_one() -> None:
    target = layers("net.layers", ".A")
    found = match(layers("net.layers", ".B", ".A"), target)
    assert {link.targets[0]: link.sources[0] for link in found.certain} == {key: key for key in target}


def test_two_parts_that_the_other_side_has_room_for_are_no_towers() -> None:
    """A layer's real and its imaginary weight."""
    source = layers("layers", ".real", ".imag")
    target = layers("blocks", "_r", "_i")
    assert gathered(source, target) == {key: key for key in source}


@pytest.mark.parametrize("in_order", [True, False], ids=["library", "sorted"])
@pytest.mark.parametrize("mark", ["decoder_{}", "{}_momentum", "momentum.{}"])
def test_a_tower_whose_names_say_more_than_those_of_another_is_set_aside(mark: str, in_order: bool) -> None:
    """A masked autoencoder's decoder repeats the names of its encoder, a momentum copy those of its net."""

    def tower(pattern: str, names: tuple[str, ...], table: str) -> dict[str, TensorMeta]:
        rows: dict[str, tuple[int, ...]] = {pattern.format(table): (1, 5, 8), f"{pattern.format('norm')}.weight": (8,)}
        rows |= {f"{pattern.format('blocks')}.{i}.{name}.weight": (8 * (n + 1), 8) for i in range(3) for n, name in enumerate(names)}
        rows |= {f"{pattern.format('blocks')}.{i}.norm.weight": (8,) for i in range(3)}
        return {key: meta(key, shape) for key, shape in (rows.items() if in_order else sorted(rows.items()))}

    parts = ("fc1", "fc2", "proj")
    source = {**tower(mark, parts, "pos_embed"), **tower("{}", parts, "pos_embed")}
    other = tower("encoder.{}", ("first", "second", "last"), "position_embeddings")
    found = {key: link.sources for key, link in match(dict(source), other).by_target.items() if link.clear}
    assert all(not (set(keys) & tower(mark, parts, "pos_embed").keys()) for keys in found.values())
    assert found["encoder.position_embeddings"] == ("pos_embed",)
    assert len(found) == len(other)


def test_a_tower_is_not_set_aside_where_the_other_side_has_its_word_or_room_for_both() -> None:
    keys = [f"{mark}blocks.{i}.{name}.weight" for mark in ("", "decoder_") for i in range(2) for name in ("fc", "mid", "out", "norm")]
    side = {key: meta(key, (8, 8)) for key in keys}
    half = {f"layers.{at}.weight": meta(f"layers.{at}.weight", (8, 8)) for at in range(8)}
    assert led(side, half) == {key for key in keys if key.startswith("decoder_")}
    assert led(side, {f"dec.{key}": tensor for key, tensor in half.items()}) == set()
    assert led(side, half | {f"more.{key}": tensor for key, tensor in half.items()}) == set()
    assert led({key: tensor for key, tensor in side.items() if key.startswith("decoder_")}, half) == set()


@pytest.mark.parametrize(
    ("lead", "follower"),
    [
        ("backbone.", "target_net.module.0."),  # BYOL's, in a wrapper of its own
        ("encoder_q.", "encoder_k."),
        ("module.base_encoder.", "module.momentum_encoder."),
        ("teacher.backbone.", "student.module.backbone."),  # DINO's
    ],
)
def test_the_tower_that_follows_another_is_left_behind_and_stands_in_for_nothing(lead: str, follower: str) -> None:
    both = net(lead, HERE) | net(follower, HERE)
    for one in (net("", THERE), net("", HERE)):
        found = match(both, one).by_target
        assert {link.sources[0] for link in found.values() if link.certain} == {*net(lead, HERE)}
        lacking = {key: tensor for key, tensor in both.items() if not key.startswith(f"{lead}layer2")}
        found = match(lacking, one).by_target
        assert not [key for link in found.values() if link.certain for key in link.sources if key.startswith(follower)]
