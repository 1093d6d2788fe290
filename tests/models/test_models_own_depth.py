"""Depth by a model's own word: timm's `group_matcher` in each of its forms, held against timm itself where it is installed; elsewhere the
stack that holds nearly all is the layers."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from ckptsurgeon.errors import ModelError
from ckptsurgeon.models.training.depth import depths
from ckptsurgeon.models.training.groups import param_groups


def block(width: int = 4) -> nn.Module:
    return nn.Sequential(nn.Linear(width, width), nn.LayerNorm(width))


class Net(nn.Module):
    """A stem of numbered convolutions, stages of two blocks, a norm and a head, and whatever `group_matcher` it is given."""

    def __init__(self, matcher: object = None) -> None:
        super().__init__()
        self.stem = nn.ModuleDict({f"conv{i}": nn.Sequential(nn.Linear(2, 2)) for i in (1, 2)})
        self.stages = nn.ModuleList(nn.ModuleDict({"blocks": nn.Sequential(block(), block())}) for _ in range(3))
        self.norm, self.fc = nn.LayerNorm(4), nn.Linear(4, 3)
        if matcher is not None:
            self.group_matcher = matcher if callable(matcher) else lambda coarse=False: matcher


STEM, NORM = r"^stem", (r"^norm", (99999,))
FINE = r"^stages\.(\d+)\.blocks\.(\d+)"
NAMES = [name for name, _ in Net().named_parameters()]


def expected(name: str) -> int:
    """Stem 0, six blocks 1 to 6, the norm with the last block, the head 7."""
    found = re.match(FINE, name)
    return 0 if name.startswith("stem") else 1 + int(found[1]) * 2 + int(found[2]) if found else 6 if name.startswith("norm") else 7


def by_name(name: str) -> object:
    found = re.match(FINE, name)
    return (
        -1
        if name.startswith("stem")
        else (int(found[1]), int(found[2]))
        if found
        else (2, 5, 99999)
        if name.startswith("norm")
        else float("inf")
    )


def by_name_in_tuples(name: str) -> object:
    said = by_name(name)
    return said if isinstance(said, tuple) else (said,)


@pytest.mark.parametrize(
    "matcher",
    [
        {"stem": STEM, "blocks": [(FINE, None), NORM]},
        {"stem": [(STEM, None)], "gone": None, "blocks": ((FINE, ()), NORM)},
        lambda coarse=False: {"stem": STEM, "blocks": r"^stages\.(\d+)" if coarse else [(FINE, None), NORM]},
        lambda: {"stem": STEM, "blocks": [(FINE, None), NORM]},
        lambda coarse=False: by_name,
        lambda coarse=False: by_name_in_tuples,
    ],
)
def test_every_form_of_a_group_matcher(matcher: object) -> None:
    for wrap in (lambda net: net, nn.DataParallel):
        found = depths(wrap(Net(matcher)))
        assert {name.removeprefix("module."): depth for name, depth in found.of.items()} == {name: expected(name) for name in NAMES}
        assert found.top == 7 and [found.label(depth) for depth in (0, 1, 7)] == ["stem", "layer 0", "head"]


def test_groups_learn_by_it() -> None:
    model = Net({"stem": STEM, "blocks": [(FINE, None), NORM]})
    groups = param_groups(model, [], lr=1.0, fresh_lr=None, layer_decay=0.5)
    rates = {name: group["lr"] for group in groups for name in group["param_names"]}
    assert rates == {name: 0.5 ** (7 - expected(name)) for name in NAMES}


def test_layers_that_are_named_go_before_it() -> None:
    model = Net({"stem": STEM})
    assert depths(model, "stages.{i}.**").top == 4


def test_a_backbone_that_holds_nearly_all_speaks_for_the_whole() -> None:
    model = nn.ModuleDict(
        {"embed": nn.Linear(1, 1), "backbone": Net({"stem": STEM, "blocks": [(FINE, None), NORM]}), "head": nn.Linear(2, 2)}
    )
    of, top = depths(model).of, depths(model).top
    assert of["embed.weight"] == 0 and of["head.weight"] == top == 9
    assert all(of[f"backbone.{name}"] == expected(name) + 1 for name in NAMES)


@pytest.mark.parametrize(
    "matcher",
    [
        "text",
        lambda coarse=False: None,
        lambda coarse=False: {},
        lambda coarse=False: {"stem": "("},
        lambda coarse=False: {"stem": r"^(\w+)"},
        lambda coarse=False: 1 / 0,
        lambda coarse=False: lambda name: None,
        lambda first, second: {},
    ],
)
def test_what_is_no_group_matcher_is_passed_over(matcher: object) -> None:
    model = Net()
    model.group_matcher = matcher
    assert depths(model).of == depths(Net()).of


def test_the_stack_that_holds_nearly_all_is_the_layers() -> None:
    found = depths(Net())
    assert found.patterns == ("stages.{i}.**",) and found.top == 4
    assert found.of["stem.conv1.0.weight"] == found.of["stem.conv2.0.weight"] == 0 and found.of["fc.weight"] == 4


def test_two_real_stacks_are_asked_for() -> None:
    towers = nn.ModuleDict({side: nn.ModuleList(block() for _ in range(count)) for side, count in (("a", 3), ("b", 4))})
    with pytest.raises(ModelError, match="2 stacks of blocks could be the layers"):
        depths(towers)
    with pytest.raises(ModelError, match="2 stacks"):  # 0.75 of what stands in stacks
        depths(nn.ModuleDict({"a": nn.ModuleList(block() for _ in range(2)), "b": nn.ModuleList(block() for _ in range(6))}))
    largest = nn.ModuleDict({"a": nn.ModuleList(block() for _ in range(2)), "b": nn.ModuleList(block() for _ in range(8))})
    assert depths(largest).patterns == ("b.{i}.**",)


def test_nothing_of_timm_is_imported() -> None:
    code = (
        "import sys, torch; from torch import nn; from ckptsurgeon.models.training.depth import depths\n"
        "depths(nn.ModuleList(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)) for _ in range(2)))\n"
        "assert not [name for name in sys.modules if name.startswith('timm')]"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "name", ["resnet18", "convnext_atto", "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "efficientnet_b0", "levit_128"]
)
def test_as_timm_itself(name: str) -> None:
    timm = pytest.importorskip("timm")
    from timm.optim import param_groups_layer_decay

    with torch.device("meta"):
        model = timm.create_model(name)
    wanted = {id(one): group["lr_scale"] for group in param_groups_layer_decay(model, layer_decay=0.75) for one in group["params"]}
    found = depths(model)
    for key, one in model.named_parameters():
        assert 0.75 ** (found.top - found.of[key]) == pytest.approx(wanted[id(one)], rel=1e-12), key
