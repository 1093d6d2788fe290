"""Two models of one naming but for a part: what is a part that was moved or renamed, and what may be a fresh head of the same shape."""

from __future__ import annotations

import pytest
from pairs_support import meta

from ckptsurgeon.matching.matcher import match

Shapes = dict[str, tuple[int, ...]]


def found(source: Shapes, target: Shapes) -> dict[str, str]:
    """By target key the source key of each certain link of keys that are not called the same; keys sorted."""
    sides = [{key: meta(key, some[key]) for key in sorted(some)} for some in (source, target)]
    return {link.targets[0]: link.sources[0] for link in match(*sides).links if link.certain and link.sources != link.targets}


def renamed(shapes: Shapes, old: str, new: str) -> Shapes:
    return {new + key[len(old) :]: shape for key, shape in shapes.items() if key.startswith(old)}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.{part}": (width,) for part in ("weight", "bias", "running_mean", "running_var")}


BODY: Shapes = {f"backbone.layers.{at}.{part}.weight": (16 + at, 16) for at in range(12) for part in ("fc1", "fc2", "fc3")}
PYRAMID: Shapes = {f"classifier.0.convs.{at}.0.weight": (8, 16, 1 + 2 * at, 1 + 2 * at) for at in range(3)}
PYRAMID |= {f"classifier.0.convs.{at}.1.weight": (8,) for at in range(3)}
PYRAMID |= {"classifier.0.project.0.weight": (8, 24, 1, 1), "classifier.0.project.1.weight": (8, 8, 3, 3)}
BESIDE: Shapes = {"classifier.1.weight": (8, 8, 5, 5), **norm("classifier.2", 8)}


def test_a_module_of_many_layers_that_holds_the_same_was_moved() -> None:
    source = BODY | PYRAMID | {"aux.weight": (5, 9)}
    target = BODY | renamed(PYRAMID, "classifier.0", "decoder.aspp") | {"top.weight": (7, 9)}
    assert found(source, target) == {new: old for old, new in zip(PYRAMID, renamed(PYRAMID, "classifier.0", "decoder.aspp"), strict=True)}


def test_what_stands_beside_a_moved_module_moved_with_it() -> None:
    beside: Shapes = {"decoder.conv.weight": (8, 8, 5, 5), **norm("decoder.bn", 8)}
    target = BODY | renamed(PYRAMID, "classifier.0", "decoder.aspp") | beside
    links = found(BODY | PYRAMID | BESIDE | {"aux.weight": (5, 9)}, target | {"top.weight": (7, 9)})
    assert [links.get(key) for key in beside] == list(BESIDE)


@pytest.mark.parametrize("heads", [("classifier.mlp", "projection.mlp"), ("value_head.mlp", "reward_head.mlp")])
def test_a_head_of_few_layers_may_be_fresh_and_so_may_one_of_another_name(heads: tuple[str, str]) -> None:
    few: Shapes = {f"{heads[0]}.{at}.weight": shape for at, shape in enumerate(((16, 16), (4, 16)))}
    more: Shapes = few | {f"{heads[0]}.{at}.weight": (4 + at, 4) for at in range(2, 6)}
    assert not found(BODY | few, BODY | renamed(few, heads[0], heads[1]))
    if "head" in heads[0]:
        assert not found(BODY | more | {"a.weight": (3, 3)}, BODY | renamed(more, heads[0], heads[1]) | {"b.weight": (5, 3)})


def test_all_that_is_left_on_both_sides_is_the_same_part_where_it_is_many_layers() -> None:
    old: Shapes = {f"neck.lateral_convs.{at}.conv.weight": (8, 16 * (at + 1), 1, 1) for at in range(4)}
    old |= {"bbox_head.out.weight": (6, 8, 3, 3), "bbox_head.box.weight": (4, 8, 3, 3)}
    new: Shapes = {f"fpn.inner.{at}.0.weight": (8, 16 * (at + 1), 1, 1) for at in range(4)}
    new |= {"head.cls.weight": (6, 8, 3, 3), "head.reg.weight": (4, 8, 3, 3)}
    assert found(BODY | old, BODY | new) == dict(zip(new, old, strict=True))
    assert len(found(BODY | old, BODY | new | {"more.weight": (9, 9)})) < len(new)


def test_a_norm_goes_with_its_convolution() -> None:
    old: Shapes = {"decode_head.convs.0.conv.weight": (8, 16, 3, 3), **norm("decode_head.convs.0.bn", 8)}
    new: Shapes = {"classifier.0.weight": (8, 16, 3, 3), **norm("classifier.1", 8)}
    assert found(BODY | old, BODY | new) == dict(zip(new, old, strict=True))


def test_the_one_layer_at_the_top_is_the_output_head() -> None:
    old: Shapes = {"aux.weight": (5, 16), "aux.bias": (5,)}
    new: Shapes = {"lm_head.weight": (5, 16), "lm_head.bias": (5,)}
    assert found(BODY | old, BODY | new) == dict(zip(new, old, strict=True))
    assert not found(BODY | old | {"more.weight": (5, 16)}, BODY | new)


@pytest.mark.parametrize("shape", [(5, 16), (5, 16, 1)])
def test_a_decoder_of_one_layer_is_the_output_head(shape: tuple[int, ...]) -> None:
    old: Shapes = {"decoder.layers.0.weight": shape, "decoder.layers.0.bias": (5,)}
    new: Shapes = {"ctc_head.weight": shape, "ctc_head.bias": (5,)}
    assert found(BODY | old, BODY | new) == dict(zip(new, old, strict=True))
    assert not found(BODY | {key.replace("decoder", "projector"): old[key] for key in old}, BODY | new)
    assert not found(BODY | old | {"decoder.layers.2.weight": (7, 5)}, BODY | new)
    assert not found(BODY | old, BODY | new | {"other_head.weight": (9, 9)})


def test_an_auxiliary_head_is_not_the_head() -> None:
    old: Shapes = {f"{name}.4.weight": (5, 16, 1, 1) for name in ("classifier", "aux_classifier")}
    assert found(BODY | old, BODY | {"segmentation_head.0.weight": (5, 16, 1, 1)}) == {"segmentation_head.0.weight": "classifier.4.weight"}
