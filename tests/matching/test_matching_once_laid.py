"""What is decided once both sides are laid on each other: what many targets share, lists that go on elsewhere, biases of two layers."""

from __future__ import annotations

import pytest
from rows_support import Rows, side, sure

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
