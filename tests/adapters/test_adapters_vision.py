"""The vision adapters' shapes: what is told from them, what is refused, and that no op of an edited plan does worse than RuleError."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ckptsurgeon.adapters.op import Place, Shape
from ckptsurgeon.adapters.vision import VISION
from ckptsurgeon.errors import RuleError


def filled(name: str, source: Shape, wanted: Shape | None = None, **fields: Any) -> dict[str, Any]:
    return dict(VISION[name].fill({"op": name, **fields}, Place((source,), wanted)))


def shape_after(name: str, source: Shape, wanted: Shape | None = None, **fields: Any) -> Shape:
    op = filled(name, source, wanted, **fields)
    assert json.loads(json.dumps(op)) == op  # a plan has it back as it was
    assert all(VISION[name].fields[field](value) for field, value in op.items() if field != "op")
    assert VISION[name].fill(op, Place((source,), wanted)) == op
    (found,) = VISION[name].infer(op, (source,))
    return found


# Position embeddings as models have them: ViT-B/16 224 to 384, its distilled twin, DINOv2 518 to 224, SigLIP without a class token.
@pytest.mark.parametrize(
    ("source", "target", "prefix", "grid", "to"),
    [
        ((1, 197, 768), (1, 577, 768), 1, [14, 14], [24, 24]),
        ((1, 198, 768), (1, 578, 768), 2, [14, 14], [24, 24]),
        ((1, 1370, 384), (1, 257, 384), 1, [37, 37], [16, 16]),
        ((196, 768), (256, 768), 0, [14, 14], [16, 16]),
        ((50, 768), (197, 768), 1, [7, 7], [14, 14]),
        ((1, 201, 64), (1, 261, 64), 5, [14, 14], [16, 16]),
    ],
)
def test_the_grid_of_a_position_embedding_is_told(source: Shape, target: Shape, prefix: int, grid: list[int], to: list[int]) -> None:
    op = filled("interpolate", source, target)
    assert (op["prefix"], op["grid"], op["to"]) == (prefix, grid, to)
    assert (op["mode"], op["antialias"], op["layout"]) == ("bicubic", True, "channels_last")
    assert VISION["interpolate"].infer(op, (source,)) == (target,)
    assert VISION["interpolate"].offer(source, target) == {"op": "interpolate", "prefix": prefix}


def test_a_position_embedding_that_could_be_two_grids_is_refused() -> None:
    assert filled("interpolate", (12, 4), (17, 4))["prefix"] == 8  # 4 and 9; with 3 in front 9 and 14, with 1 11 and 16
    with pytest.raises(RuleError, match="no number of prefix tokens"):
        filled("interpolate", (10, 4), (12, 4))
    with pytest.raises(RuleError, match="0 or 7 prefix tokens") as refused:
        filled("interpolate", (16, 4), (16, 4))
    assert "prefix=1, grid=" in str(refused.value)
    assert VISION["interpolate"].offer((11, 4), (16, 4)) == {"op": "interpolate", "prefix": 7}
    assert VISION["interpolate"].offer((10, 4), (12, 4)) is None


@pytest.mark.parametrize(
    ("source", "target", "fields", "prefix", "grid", "to"),
    [
        ((1, 9, 4), (1, 25, 4), {"grid": [2, 4], "to": [4, 6]}, 1, [2, 4], [4, 6]),
        ((1, 9, 4), None, {"grid": [2, 4], "to": [4, 6]}, 1, [2, 4], [4, 6]),
        ((1, 9, 4), (1, 26, 4), {"grid": [2, 4]}, 1, [2, 4], [5, 5]),
        ((1, 26, 4), (1, 13, 4), {"to": [3, 4]}, 1, [5, 5], [3, 4]),
        ((1, 26, 4), None, {"to": [3, 4], "prefix": 1}, 1, [5, 5], [3, 4]),
        ((1, 24, 4), (1, 36, 4), {"prefix": 20}, 20, [2, 2], [4, 4]),
        ((1, 8, 6, 4), (1, 4, 3, 4), {}, 0, [8, 6], [4, 3]),
        ((1, 4, 8, 6), (1, 4, 16, 9), {"layout": "channels_first"}, 0, [8, 6], [16, 9]),
        ((4, 8, 6), (4, 16, 9), {"layout": "channels_first", "mode": "nearest"}, 0, [8, 6], [16, 9]),
    ],
)
def test_a_grid_that_is_no_square_is_given(
    source: Shape, target: Shape | None, fields: dict[str, Any], prefix: int, grid: list[int], to: list[int]
) -> None:
    op = filled("interpolate", source, target, **fields)
    assert (op["prefix"], op["grid"], op["to"]) == (prefix, grid, to)
    assert target is None or shape_after("interpolate", source, target, **fields) == target


@pytest.mark.parametrize(
    ("source", "target", "fields"),
    [
        ((1, 9, 4), (1, 25, 4), {"grid": [2, 4], "to": [5, 5]}),  # one prefix token here, none there
        ((1, 9, 4), None, {}),
        ((1, 9, 4), (9, 4), {}),
        ((9,), (16,), {}),
        ((1, 9, 4), (1, 16, 4), {"layout": "channels_first", "prefix": 1}),
        ((1, 9, 4), (1, 16, 4), {"mode": "nearest", "antialias": True}),
        ((1, 9, 0), (1, 16, 0), {}),
        ((1, 9, 4), None, {"to": [1 << 61, 1 << 61]}),
    ],
)
def test_an_interpolation_that_can_not_be_is_refused(source: Shape, target: Shape | None, fields: dict[str, Any]) -> None:
    with pytest.raises(RuleError):
        shape_after("interpolate", source, target, **fields)


def test_bias_tables() -> None:
    assert shape_after("relative_position_bias", (169, 4), (529, 4)) == (529, 4)  # Swin, window 7 to 12
    assert filled("relative_position_bias", (169, 4), (529, 4))["to"] == [12, 12]
    beit = {"extra": 3}
    assert shape_after("relative_position_bias", (732, 12), (2212, 12), **beit) == (2212, 12)  # BEiT, 14 x 14 patches to 24 x 24
    assert shape_after("relative_position_bias", (13 * 13, 4), None, to=[2, 4]) == (21, 4)
    assert shape_after("relative_position_bias", (21, 4), (25, 4), grid=[2, 4]) == (25, 4)
    for source, target in (((732, 12), (2212, 12)), ((16, 4), (36, 4)), ((169, 4), (529,)), ((169, 4), None)):
        with pytest.raises(RuleError):
            filled("relative_position_bias", source, target)
    offer = VISION["relative_position_bias"].offer
    assert offer((169, 4), (529, 4)) == {"op": "relative_position_bias"}
    assert [offer(*pair) for pair in (((1, 4), (9, 4)), ((16, 4), (36, 4)), ((169, 4), (529, 8)), ((9, 4), (9, 4)))] == [None] * 4


def test_kernels() -> None:
    assert shape_after("patch_embed", (8, 3, 16, 16), (8, 3, 14, 14)) == (8, 3, 14, 14)
    assert shape_after("patch_embed", (8, 3, 16, 16), None, to=[8, 4]) == (8, 3, 8, 4)
    assert shape_after("in_channels", (8, 3, 7, 7), (8, 1, 7, 7)) == (8, 1, 7, 7)
    assert shape_after("in_channels", (8, 3, 7, 7), None, channels=12) == (8, 12, 7, 7)
    assert shape_after("in_channels", (3, 3, 8, 4), (3, 3, 8, 6), dim=-1) == (3, 3, 8, 6)
    assert shape_after("inflate", (8, 3, 7, 7), (8, 3, 5, 7, 7)) == (8, 3, 5, 7, 7)
    assert shape_after("inflate", (8, 3, 7, 7), None, dim=-1, size=2, mode="center") == (8, 3, 7, 7, 2)
    with pytest.raises(RuleError, match="how 4 channels become 3") as refused:
        shape_after("in_channels", (8, 4, 7, 7), (8, 3, 7, 7))
    assert "slice" in str(refused.value)


@pytest.mark.parametrize(
    ("name", "source", "target", "offered"),
    [
        ("patch_embed", (8, 3, 16, 16), (8, 3, 14, 14), True),
        ("patch_embed", (8, 3, 3, 3), (8, 3, 7, 7), False),
        ("patch_embed", (8, 3, 16, 16), (8, 3, 16, 8), False),
        ("in_channels", (8, 3, 7, 7), (8, 1, 7, 7), True),
        ("in_channels", (8, 1, 7, 7, 7), (8, 4, 7, 7, 7), True),
        ("in_channels", (8, 3, 7), (8, 5, 7), True),
        ("in_channels", (8, 3, 7, 7), (8, 2, 7, 7), False),
        ("in_channels", (8, 4, 7, 7), (8, 8, 7, 7), False),
        ("in_channels", (8, 3), (8, 1), False),
        ("inflate", (8, 3, 7, 7), (8, 3, 5, 7, 7), True),
        ("inflate", (8, 3, 7, 7), (8, 3, 1, 7, 7), False),
    ],
)
def test_offers(name: str, source: Shape, target: Shape, offered: bool) -> None:
    assert VISION[name].offer(source, target) == ({"op": name} if offered else None)


@settings(max_examples=300, deadline=None)
@given(name=st.sampled_from(sorted(VISION)), source=st.lists(st.integers(0, 30), max_size=5), changes=st.data())
def test_what_is_offered_makes_the_target(name: str, source: list[int], changes: st.DataObject) -> None:
    target = [changes.draw(st.just(size) | st.sampled_from([1, 3, 4, 9, 16, 17, 25])) for size in source]
    if changes.draw(st.booleans()):
        target.insert(2, changes.draw(st.integers(0, 4)))
    op = VISION[name].offer(tuple(source), tuple(target))
    if op is not None:
        assert shape_after(name, tuple(source), tuple(target), **{field: op[field] for field in op if field != "op"}) == tuple(target)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from(["mean", "bicubic", "nearest"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=5,
)
SHAPES = st.lists(st.lists(st.integers(0, 40) | st.just(1 << 61), max_size=5).map(tuple), max_size=3).map(tuple)


@settings(max_examples=600, deadline=None)
@given(name=st.sampled_from(sorted(VISION)), shapes=SHAPES, data=st.data())
def test_no_op_does_worse_than_a_rule_error(name: str, shapes: tuple[Shape, ...], data: st.DataObject) -> None:
    adapter = VISION[name]
    values = JUNK | st.integers(0, 9) | st.lists(st.integers(0, 9), min_size=2, max_size=2)
    op = {"op": name, **{field: data.draw(values) for field in adapter.fields if data.draw(st.integers(0, 9))}}
    if data.draw(st.integers(0, 9)) == 0:
        op["other"] = 1
    with suppress(RuleError):
        assert len(adapter.infer(op, shapes)) == len(shapes)
    rule = {field: value for field, value in op.items() if field in adapter.fields and adapter.fields[field](value)}
    wanted = data.draw(st.none() | st.lists(st.integers(0, 40), max_size=5).map(tuple))
    with suppress(RuleError):
        adapter.infer(adapter.fill({"op": name, **rule}, Place(shapes, wanted)), shapes)
