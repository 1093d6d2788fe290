"""Layers that one side counts through and the other counts by stages: they go together as both count them, where sizes tell one order."""

from __future__ import annotations

import pytest
from pairs_support import PAIRS, read_pair
from rows_support import ORDERS, Rows, sides, sure

from ckptsurgeon.matching.matcher import match

WIDTHS = (8, 8, 16, 16, 24, 24, 24, 24)  # of the blocks of four stages, two each


def convs(path: str, into: int, width: int) -> Rows:
    return [(f"{path}.block{n}.{end}", shape) for n in (1, 2) for end, shape in (("weight", (width, into, 3, 3)), ("bias", (width,)))]


def truth(source: Rows, target: Rows, found: dict[str, str]) -> None:
    """Hold what is sure against rows that go together one by one."""
    assert found == {name: key for (key, _), (name, _) in zip(source, target, strict=True)}


@ORDERS
@pytest.mark.parametrize("turned", [False, True])
def test_blocks_counted_through_go_to_blocks_counted_by_stages(turned: bool, in_order: bool) -> None:
    """The adapters of T2I-Adapter, and their layout in diffusers."""
    one = [row for at, width in enumerate(WIDTHS) for row in convs(f"body.{at}", width, width)]
    other = [row for at, width in enumerate(WIDTHS) for row in convs(f"adapter.body.{at // 2}.resnets.{at % 2}", width, width)]
    source, target = (other, one) if turned else (one, other)
    truth(source, target, sure(match(*sides(source, target, in_order))))


def unet(counted_through: bool) -> Rows:
    """The upward half of a U-Net whose upsampling is a block too: two blocks and one of these in each of three stages but the last."""
    rows: Rows = []
    many = 0
    for stage, width in enumerate((24, 16, 8)):
        for at in range(3 if stage < 2 else 2):
            up = at == 2
            path = (
                f"output_blocks.{many - up}.{2 * up}"
                if counted_through
                else f"up_blocks.{stage}.{'upsamplers.0' if up else f'resnets.{at}'}"
            )
            many += not up
            into = width if up else width + 8 * (at + 1)
            names = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection")
            names = names if counted_through else ("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut")
            shapes = ((into,), (width, into, 3, 3), (2 * width, 32), (width,), (width, width, 3, 3), (width, into, 1, 1))
            rows += [(f"{path}.{name}.weight", shape) for name, shape in list(zip(names, shapes, strict=True))[: 5 if up else 6]]
    return rows


@ORDERS
@pytest.mark.parametrize("turned", [False, True])
def test_blocks_of_one_list_go_to_blocks_of_two_lists_beside_each_other(turned: bool, in_order: bool) -> None:
    """OpenAI's U-Nets count the blocks that upsample with the others, diffusers has them in a list of their own."""
    source, target = unet(not turned), unet(turned)
    truth(source, target, sure(match(*sides(source, target, in_order))))


@ORDERS
def test_blocks_of_one_list_go_to_blocks_of_two_modules_behind_each_other(in_order: bool) -> None:
    """LTX counts the middle blocks of its autoencoder with those before them."""
    widths = (8, 8, 16, 24, 24, 24, 24)
    stages = ("down_blocks.0", "down_blocks.0", "down_blocks.1", "down_blocks.2", "down_blocks.3", "mid_block", "mid_block")
    source = [row for at, width in enumerate(widths) for row in convs(f"vae.down_blocks.{at}.res_blocks.0", width, width)]
    target = [
        row for at, (stage, width) in enumerate(zip(stages, widths, strict=True)) for row in convs(f"{stage}.resnets.{at}", width, width)
    ]
    truth(source, target, sure(match(*sides(source, target, in_order))))


@ORDERS
def test_blocks_that_are_alike_all_along_tell_no_order(in_order: bool) -> None:
    """Two lists side by side may be a list of pairs, or one behind the other."""
    source = [row for at in range(6) for row in convs(f"body.{at}", 8, 8)]
    target = [row for name in ("left", "right") for at in range(3) for row in convs(f"net.{name}.{at}", 8, 8)]
    assert sure(match(*sides(source, target, in_order))) == {}


def test_the_first_norm_of_a_model_is_none_of_its_blocks() -> None:
    """A source that lacks one norm of its blocks has as many as the target's blocks only if its first one is taken for theirs."""
    pair = read_pair(PAIRS / "pytorchcv_resnet18__torchvision_resnet18.json")
    source = {key: tensor for key, tensor in pair.source.items() if not key.startswith("features.stage1.unit2.body.conv1.bn.")}
    found = sure(match(source, pair.target))
    assert not [name for name, key in found.items() if name.startswith("layer") and key.startswith("features.init")]


@ORDERS
def test_dimensions_are_no_count(in_order: bool) -> None:
    """EfficientFormer's last stage has blocks in four dimensions first, in three behind them."""
    source: Rows = []
    target: Rows = []
    for at, name in enumerate(("meta4D.blocks.0", "meta4D.blocks.1", "meta3D.blocks.0")):
        mixer: Rows = [("pool.weight", (8, 8, 3, 3))] if "4D" in name else [("qkv.weight", (24, 8))]
        for rows, path in ((source, f"network.{at}"), (target, f"stage.{name}")):
            rows += [(f"{path}.scale_1", (8,)), *((f"{path}.{part}", shape) for part, shape in mixer)]
    found = sure(match(*sides(source, target, in_order)))
    assert all(found.get(name, key) == key for (key, _), (name, _) in zip(source, target, strict=True))


@ORDERS
def test_one_list_may_count_the_other_way_and_the_one_before_it_not(in_order: bool) -> None:
    """A decoder's middle blocks count up where its stages count down; who has all blocks in one sequence counts through both."""
    names = ("norm1", "conv1", "norm2", "conv2"), ("groupnorm_1", "conv_1", "groupnorm_2", "conv_2")
    blocks = [(f"mid.block_{at}", 24, 24) for at in (1, 2)]
    blocks += [(f"up.{3 - at}.block.{n}", (24, 24, 16, 8)[max(at - (n == 0), 0)], (24, 24, 16, 8)[at]) for at in range(4) for n in range(3)]
    source, target = (
        [
            (f"{path if side == 0 else at + 2}.{name}.{leaf}", shape[: 4 if leaf == "weight" else 1])
            for at, (path, into, width) in enumerate(blocks)
            for name, shape in zip(names[side], ((into,), (width, into, 3, 3), (width,), (width, width, 3, 3)), strict=True)
            for leaf in ("weight", "bias")
        ]
        for side in (0, 1)
    )
    truth(source, target, sure(match(*sides(source, target, in_order))))
