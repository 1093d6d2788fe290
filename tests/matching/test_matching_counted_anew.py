"""Sequences into which one side puts more layers: what is in them moves by whole layers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
from pairs_support import meta

from ckptsurgeon.matching.matcher import match
from ckptsurgeon.tensors import TensorMeta

NORMS = {"none": (), "layer": ("weight", "bias"), "batch": ("weight", "bias", "running_mean", "running_var")}
WIDTHS = {"grows": (3, 8, 8, 16, 16, 32, 32), "equal": (10, 64, 64, 64, 64, 5), "pairs": (3, 8, 16, 32, 32, 64, 64, 64, 64)}


def sequence(widths: Sequence[int], norm: str, more: int = 0, bias: bool = True) -> tuple[dict[str, TensorMeta], list[int]]:
    """A sequence of layers with a norm and an activation behind each, and where its layers stand; `more` hold nothing."""
    side, at, numbers = {"stem.weight": meta("stem.weight", (4, 4))}, 0, []
    for into, out in pairwise(widths):
        numbers.append(at)
        shapes = {f"net.{at}.weight": (out, into)} | ({f"net.{at}.bias": (out,)} if bias else {})
        shapes |= {f"net.{at + 1}.{name}": (out,) for name in NORMS[norm]}
        side |= {key: meta(key, shape) for key, shape in shapes.items()}
        at += 2 + bool(NORMS[norm]) + more
    return side, numbers


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize(("norm", "more"), [("layer", 0), ("batch", 0), ("batch", 1)])
@pytest.mark.parametrize("widths", WIDTHS)
def test_a_norm_behind_each_layer_moves_the_layers_and_tears_none(widths: str, norm: str, more: int, back: bool) -> None:
    sides = [sequence(WIDTHS[widths], "none"), sequence(WIDTHS[widths], norm, more)]
    (source, here), (target, there) = sides[::-1] if back else sides
    found = {key: link.sources[0] for link in match(source, target).certain for key in link.targets}
    layers = {f"net.{new}.{name}": f"net.{old}.{name}" for old, new in zip(here, there, strict=True) for name in ("weight", "bias")}
    assert found == layers | {"stem.weight": "stem.weight"}


@pytest.mark.parametrize("end", [0, -1])
def test_an_end_of_another_size_stays_behind(end: int) -> None:
    widths = list(WIDTHS["grows"])
    source, here = sequence(widths, "none")
    widths[end] = 7
    target, there = sequence(widths, "batch")
    found = {key: link.sources[0] for link in match(source, target).certain for key in link.targets if key.endswith("weight")}
    kept = [*zip(here, there, strict=True)][1 if end == 0 else 0 : None if end == 0 else -1]
    assert found == {f"net.{new}.weight": f"net.{old}.weight" for old, new in kept} | {"stem.weight": "stem.weight"}


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("widths", WIDTHS)
def test_no_bias_goes_to_a_norm_where_the_layers_have_lost_theirs(widths: str, back: bool) -> None:
    sides = [sequence(WIDTHS[widths], "none"), sequence(WIDTHS[widths], "batch", bias=False)]
    (source, _), (target, _) = sides[::-1] if back else sides
    for link in match(source, target).certain:
        assert len(source[link.sources[0]].shape) == 2, link


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("norm", ["none", "layer", "batch"])
def test_one_layer_more_of_one_width_tears_no_layer(norm: str, back: bool) -> None:
    sides = [sequence((10, 64, 64, 64, 5), "none"), sequence((10, 64, 64, 64, 64, 5), norm)]
    (source, _), (target, _) = sides[::-1] if back else sides
    found = {key: link.sources[0] for link in match(source, target).certain for key in link.targets}
    for key in found:
        head = key.rpartition(".")[0]
        assert len({found[f"{head}.{name}"].rpartition(".")[0] for name in ("weight", "bias") if f"{head}.{name}" in found}) == 1


def test_a_first_layer_of_other_channels_keeps_its_bias() -> None:
    source, target = sequence((3, 8, 8, 16), "batch")[0], sequence((4, 8, 8, 16), "batch")[0]
    kept = {key for key in target if key != "net.0.weight"}
    assert {key for link in match(source, target).certain for key in link.targets} == kept
