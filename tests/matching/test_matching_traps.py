"""Where a mapping can't be told, it is not told as sure; and nothing crashes or takes for ever."""

from __future__ import annotations

import resource
import time

import pytest
from pairs_support import meta

from ckptsurgeon.matching.evidence.lists import across
from ckptsurgeon.matching.matcher import match
from ckptsurgeon.matching.proposals.shares import unlike
from ckptsurgeon.planning.links import Link
from ckptsurgeon.tensors import TensorMeta

Side = dict[str, TensorMeta]


def side(*rows: tuple[str, tuple[int, ...]]) -> Side:
    return {key: meta(key, shape) for key, shape in rows}


def block(path: str, names: dict[str, str], width: int = 8) -> list[tuple[str, tuple[int, ...]]]:
    """A transformer's block under names for its parts."""
    shapes = {"q": (width, width), "k": (width, width), "v": (width, width), "o": (width, width), "n1": (width,), "n2": (width,)}
    shapes |= {"f1": (4 * width, width), "f2": (width, 4 * width)}
    rows = []
    for part, name in names.items():
        rows += [(f"{path}.{name}.weight", shapes[part]), (f"{path}.{name}.bias", shapes[part][:1])]
    return rows


TIMM = {"n1": "norm1", "q": "attn.q", "k": "attn.k", "v": "attn.v", "o": "attn.proj", "n2": "norm2", "f1": "mlp.fc1", "f2": "mlp.fc2"}
HF = {
    "q": "attention.query",
    "k": "attention.key",
    "v": "attention.value",
    "o": "output.dense",
    "n1": "layernorm_before",
    "f1": "intermediate.dense",
    "f2": "outer.dense",
    "n2": "layernorm_after",
}
OPAQUE = {part: f"part.{letter}" for part, letter in zip(TIMM, "hgfedcba", strict=True)}


def sure(found: object) -> dict[str, str]:
    return {key: link.sources[0] for link in found.certain for key in link.targets}  # type: ignore[attr-defined]


def test_two_towers_go_by_their_names() -> None:
    source = side(*block("visual.blocks.0", TIMM), *block("text.blocks.0", TIMM))
    target = side(*block("text_model.layers.0", HF), *block("vision_model.layers.0", HF))
    found = sure(match(source, target))
    assert len(found) == len(target)
    assert all(("visual" in one) == ("vision" in other) for other, one in found.items())


def test_two_towers_without_telling_names_are_uncertain() -> None:
    source = side(*block("tower_x.blocks.0", TIMM), *block("tower_y.blocks.0", TIMM))
    target = side(*block("alpha.layers.0", HF), *block("beta.layers.0", HF))
    found = match(source, target)
    assert not found.certain
    assert len(found.uncertain) == len(target)
    assert all(link.runner_up for link in found.uncertain)


def test_of_two_towers_for_one_neither_is_sure() -> None:
    source = side(*block("module.net_a.blocks.0", TIMM), *block("module.net_b.blocks.0", TIMM))
    found = match(source, side(*block("blocks.0", TIMM)))
    assert not found.certain and found.uncertain


def test_q_k_and_v_without_names_are_uncertain() -> None:
    source = side(*block("blocks.0", {"q": "a.0", "k": "a.1", "v": "a.2", "o": "a.3"}))
    target = side(*block("blocks.0", {"q": "b.query", "k": "b.key", "v": "b.value", "o": "b.out"}))
    assert not {key for key in sure(match(source, target)) if "out" not in key}


def test_square_matrices_that_are_turned_go_with_their_siblings() -> None:
    source = side(("h.0.qkv.weight", (8, 24)), ("h.0.proj.weight", (8, 8)), ("h.0.fc.weight", (8, 32)), ("h.0.out.weight", (32, 8)))
    target = side(("h.0.qkv.weight", (24, 8)), ("h.0.proj.weight", (8, 8)), ("h.0.fc.weight", (32, 8)), ("h.0.out.weight", (8, 32)))
    found = match(source, target)
    assert {link.targets[0]: link.op for link in found.certain} == dict.fromkeys(target, "transpose")


def test_a_square_parameter_beside_a_linear_layer_is_uncertain() -> None:
    source = side(("body.weight", (8, 4)), ("proj", (8, 8)))
    target = side(("body.weight", (8, 4)), ("projection.weight", (8, 8)))
    found = match(source, target)
    assert [link.targets for link in found.uncertain] == [("projection.weight",)]


def test_fused_tensors_both_ways() -> None:
    fused = side(("a.qkv.weight", (24, 8)), ("a.qkv.bias", (24,)), ("a.proj.weight", (8, 8)))
    split = side(
        *[(f"b.{name}.{part}", shape) for name in ("key", "value", "query") for part, shape in (("weight", (8, 8)), ("bias", (8,)))]
    )
    split |= side(("b.out.weight", (8, 8)))
    there = {link.sources: (link.targets, link.op) for link in match(fused, split).links if link.clear}
    assert there["a.qkv.weight",] == (("b.query.weight", "b.key.weight", "b.value.weight"), "chunk(dim=0)")
    back = {link.targets: (link.sources, link.op) for link in match(split, fused).links if link.clear}
    assert back["a.qkv.bias",] == (("b.query.bias", "b.key.bias", "b.value.bias"), "concat(dim=0)")


def test_parts_without_names_are_uncertain() -> None:
    source = side(*[(f"m.{name}.weight", (8, 6)) for name in ("x", "y", "z")])
    found = match(source, side(("n.all.weight", (24, 6))))
    assert [(link.certain, link.op) for link in found.links] == [(False, "concat(dim=0)")]


def test_experts_are_stacked() -> None:
    source = side(*[(f"experts.{e}.{name}.weight", (6, 4)) for e in range(11) for name in ("w1", "w3")])
    source |= side(*[(f"experts.{e}.w2.weight", (4, 6)) for e in range(11)])
    target = side(("e.gate_up", (11, 12, 4)), ("e.down", (11, 4, 6)))
    found = {link.targets[0]: link for link in match(source, target).links if link.clear}
    assert found["e.down"].sources == tuple(f"experts.{e}.w2.weight" for e in range(11))
    assert found["e.gate_up"].sources[:4] == tuple(f"experts.{e}.{name}.weight" for e in (0, 1) for name in ("w1", "w3"))
    assert found["e.gate_up"].op == "concat(dim=0, of=2) | stack(dim=0)"
    assert found["e.gate_up"].doubt == "layout" and found["e.down"].certain


def test_a_layer_that_the_source_has_in_another_size_is_not_tied() -> None:
    """One layer more before the head: `4` is the head's name in the source."""
    layers = [("0", 8, 20), ("2", 8, 8), ("4", 3, 8)]
    source, target = (
        side(*(row for name, rows, columns in net for row in ((f"{name}.weight", (rows, columns)), (f"{name}.bias", (rows,)))))
        for net in (layers, [*layers[:2], ("4", 8, 8), ("6", 3, 8)])
    )
    links = {link.targets: link.sources for link in match(source, target).links}
    assert ("4.weight",) not in links and links["6.weight",] == ("4.weight",)


def test_a_tied_output_layer_takes_the_embedding() -> None:
    source = side(("wte.weight", (50, 8)), *block("h.0", TIMM))
    target = side(("embed_tokens.weight", (50, 8)), *block("layers.0", HF), ("lm_head.weight", (50, 8)))
    assert sure(match(source, target))["lm_head.weight"] == "wte.weight"


def test_another_head_of_the_same_shape_is_uncertain() -> None:
    source = side(*block("blocks.0", TIMM), ("head.weight", (10, 8)))
    target = side(*block("blocks.0", TIMM), ("head.weight", (10, 8)), ("head_aux.weight", (10, 8)))
    assert "head_aux.weight" not in sure(match(source, target))


def test_keys_of_one_tensor_get_the_same() -> None:
    source = side(("wte.weight", (50, 8)), ("lm_head.weight", (50, 8)))
    found = match(source, side(("tok.weight", (50, 8)), ("lm_head.weight", (50, 8))), ties=[("tok.weight", "lm_head.weight")])
    assert len({link.sources for link in found.links}) == 1 and set(found.by_target) == {"tok.weight", "lm_head.weight"}


def test_cyclic_names_are_not_followed_blindly() -> None:
    """Names that went round: each has a namesake in another size, so a stranger of its shape is shown, and not taken as sure."""
    source = side(("a.weight", (3, 4)), ("b.weight", (5, 6)), ("c.weight", (7, 8)))
    target = side(("b.weight", (3, 4)), ("c.weight", (5, 6)), ("a.weight", (7, 8)))
    found = match(source, target)
    assert not found.certain
    assert {link.targets[0]: link.sources[0] for link in found.links} == {
        "b.weight": "a.weight",
        "c.weight": "b.weight",
        "a.weight": "c.weight",
    }


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ({}, {}),
        ({}, side(("a.weight", (2, 3)))),
        (side(("a.weight", (2, 3))), {}),
        (side(("a.weight", (2, 3))), side(("b.bias", (5,)))),
        (side(("", ())), side(("", ()))),
        (side(("a..b", (0,)), (".", (1, 1)), ("weight", (2,))), side(("a..b", (0,)), ("a", (0, 4)), ("bias", (2,)))),
        ({"n": meta("n", (3,), "int64")}, {"n": meta("n", (3,))}),
    ],
    ids=["empty", "no source", "no target", "nothing fits", "a nameless scalar", "odd names", "integers"],
)
def test_sides_that_are_hardly_any(source: Side, target: Side) -> None:
    found = match(source, target)
    assert {*found.unmatched, *found.by_target} == set(target)
    assert 0.0 <= found.share <= 1.0


def test_architectures_that_differ_share_little() -> None:
    source = side(*[(f"features.{i}.weight", (8 * (i + 1), 8 * i + 3, 3, 3)) for i in range(6)])
    assert match(source, side(*block("blocks.0", TIMM, 64))).share == 0.0


def test_all_of_one_shape_without_names_is_uncertain() -> None:
    source = side(*[(f"{'abcdefgh'[i]}x.weight", (8, 8)) for i in range(8)])
    target = side(*[(f"{'stuvwxyz'[i]}y.weight", (8, 8)) for i in range(8)])
    assert not match(source, target).certain


def test_opaque_names_in_a_turned_order_are_not_crossed() -> None:
    source = side(*[row for i in range(4) for row in block(f"blocks.{i}", TIMM)])
    target = side(*[row for i in range(4) for row in block(f"x.{i}", OPAQUE)])
    found = sure(match(source, target))
    truth = {f"x.{i}.{OPAQUE[part]}": f"blocks.{i}.{name}" for i in range(4) for part, name in TIMM.items()}
    assert not {key for key, one in found.items() if truth[key.rpartition(".")[0]] != one.rpartition(".")[0]}


def test_a_deeper_source_gives_its_first_layers() -> None:
    source = side(*[row for i in range(6) for row in block(f"blocks.{i}", TIMM)])
    target = side(*[row for i in range(4) for row in block(f"layer.{i}", HF)])
    found = match(source, target)
    assert all(link.sources[0].split(".")[1] == link.targets[0].split(".")[1] for link in found.certain)


@pytest.mark.slow
def test_ten_thousand_tensors() -> None:
    source = side(*[row for i in range(625) for row in block(f"blocks.{i}", TIMM)])
    target = side(*[row for i in range(625) for row in block(f"model.layer.{i}", HF)])
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = match(source, target)
    assert found.share == 1.0 and len(found.certain) == 10_000
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB
    assert time.process_time() - began < 120  # a guard against a square of it, not a measure


LAYERS = {
    "compress_conv1": "branch2.0",
    "dw_conv2": "branch2.3",
    "expand_conv3": "branch2.5",
    "dw_conv4": "branch1.0",
    "expand_conv5": "branch1.2",
}
NORMS = {"branch2.0": "branch2.1", "branch2.3": "branch2.4", "branch2.5": "branch2.6", "branch1.0": "branch1.1", "branch1.2": "branch1.3"}


def shuffled(width: int, other: bool, units: int = 3) -> Side:
    """Units of counted convolutions before their norms, the first one with a second branch; under numbers alone on the other side."""
    rows: list[tuple[str, tuple[int, ...]]] = []
    for number in range(units):
        for name, there in [*LAYERS.items()][: 5 if number == 0 else 3]:
            shape = (width, 1, 3, 3) if name.startswith("dw") else (width, width, 1, 1)
            layer, norm = (there, NORMS[there]) if other else (name, name.replace("conv", "bn"))
            head = f"stage.{number}" if other else f"stage.unit{number + 1}"
            rows.append((f"{head}.{layer}.weight", shape))
            rows += [(f"{head}.{norm}.{part}", (width,)) for part in ("weight", "bias", "running_mean", "running_var")]
    return side(*(sorted(rows) if other else rows))


@pytest.mark.parametrize("in_order", [True, False])
def test_layers_that_all_are_counted_keep_their_order(in_order: bool) -> None:
    """`compress_conv1` stands before `expand_conv3`, though what expands stands first elsewhere. In the unit whose branches are counted in
    another order than its layers, nothing is sure of what could be exchanged."""
    source, target = shuffled(12, other=False), shuffled(12, other=True)
    links = match(source if in_order else side(*sorted((key, value.shape) for key, value in source.items())), target).links
    truth = {
        f"stage.unit{number + 1}.{name}.weight": f"stage.{number}.{there}.weight" for number in range(3) for name, there in LAYERS.items()
    }
    found = {link.sources[0]: link.targets[0] for link in links if link.certain}
    assert {key: name for key, name in found.items() if key in truth and truth[key] != name} == {}
    assert {truth[key] for key in found if key in truth} >= {f"stage.{number}.branch2.{at}.weight" for number in (1, 2) for at in (0, 3, 5)}


def test_where_two_layers_cross_no_layer_of_their_module_is_sure() -> None:
    """However many it has, and wherever the two stand."""
    many = [1, 0, *range(2, 40)]
    source, target = ({f"net.{name}{at}.weight": meta(f"net.{name}{at}.weight", (4, 4)) for at in many} for name in ("part", "piece"))
    links = [Link((f"net.part{at}.weight",), (f"net.piece{to}.weight",), "", 5.0, ("same shape",)) for at, to in enumerate(many)]
    crossed = {link.targets[0] for link, _ in across(links, source, target)}
    assert crossed == target.keys()
    straight = [Link((f"net.part{at}.weight",), (f"net.piece{at}.weight",), "", 5.0, ("same shape",)) for at in many]
    assert not list(across(straight, source, target))


def test_sides_of_empty_tensors_are_weighed_without_a_fault() -> None:
    source, target = (
        side(*(row for at in range(5) for row in block(f"{path}.{at}", names, 0))) for path, names in (("m", TIMM), ("enc.a", HF))
    )
    assert isinstance(unlike(set(source), set(target) - {"enc.a.4.layernorm_before.weight"}, source, target), str)


def test_a_bias_without_dims_is_matched_without_a_fault() -> None:
    source, target = side(("fc.weight", (4, 8)), ("fc.bias", ())), side(("head.weight", (8, 4)), ("head.bias", ()))
    assert {key for link in match(source, target).certain for key in link.targets} <= set(target)
