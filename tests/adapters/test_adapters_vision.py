"""The vision adapters: what is told from shapes and what is refused; values against transformers, timm's results and each formula."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters_support import OF_FAMILY, run
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import examples
from torch.nn import functional
from transformers import BeitConfig, Dinov2Config, Dinov2WithRegistersConfig, ViTConfig
from transformers.models.beit.modeling_beit import BeitRelativePositionBias
from transformers.models.dinov2.modeling_dinov2 import Dinov2Embeddings
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import Dinov2WithRegistersEmbeddings
from transformers.models.vit.modeling_vit import ViTEmbeddings

from ckptsurgeon.adapters.op import FillContext, Shape
from ckptsurgeon.errors import RuleError

VISION = OF_FAMILY["vision"]
GOLDEN = json.loads((Path(__file__).parent / "golden" / "timm_vision.json").read_text())["cases"]


def filled(name: str, source: Shape, wanted: Shape | None = None, **fields: Any) -> dict[str, Any]:
    return dict(VISION[name].fill({"op": name, **fields}, FillContext((source,), wanted)))


def shape_after(name: str, source: Shape, wanted: Shape | None = None, **fields: Any) -> Shape:
    op = filled(name, source, wanted, **fields)
    assert json.loads(json.dumps(op)) == op  # a plan has it back as it was
    assert all(VISION[name].fields[field](value) for field, value in op.items() if field != "op")
    assert VISION[name].fill(op, FillContext((source,), wanted)) == op
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


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().view(torch.uint8).flatten().tolist()


def adapt(name: str, tensor: torch.Tensor, wanted: tuple[int, ...] | None = None, **fields: Any) -> torch.Tensor:
    return run(VISION[name].fill({"op": name, **fields}, FillContext((tuple(tensor.shape),), wanted)), tensor)[0]


@pytest.mark.parametrize("case", GOLDEN, ids=[f"{case['op']['op']}-{index}" for index, case in enumerate(GOLDEN)])
def test_as_timm_does(case: dict[str, Any]) -> None:
    shape = case["shape"]
    given = ((torch.arange(prod(shape)) * 37 % 101).float() / 101 - 0.5).reshape(shape)
    (found,) = run(case["op"], given)
    assert torch.allclose(found, torch.tensor(case["values"]).reshape(case["result_shape"]), atol=3e-6)


# Each model with its own antialiasing: ViT and DINOv2 have none, DINOv2 with registers has.
@pytest.mark.parametrize(
    ("config", "module", "antialias"),
    [
        (ViTConfig, ViTEmbeddings, False),
        (Dinov2Config, Dinov2Embeddings, False),
        (Dinov2WithRegistersConfig, Dinov2WithRegistersEmbeddings, True),
    ],
)
@pytest.mark.parametrize(("height", "width"), [(64, 64), (32, 80), (16, 16), (128, 16)])
def test_position_embeddings_as_transformers_interpolates_them(config: Any, module: Any, antialias: bool, height: int, width: int) -> None:
    torch.manual_seed(0)
    embeddings = module(config(hidden_size=8, num_attention_heads=2, image_size=48, patch_size=8))
    positions = torch.nn.init.normal_(embeddings.position_embeddings).detach()  # (1, 1 + 36, 8)
    to = [height // 8, width // 8]
    expected = embeddings.interpolate_pos_encoding(torch.zeros(1, 1 + prod(to), 8), height, width).detach()
    found = adapt("interpolate", positions, prefix=1, to=to, antialias=antialias)
    assert torch.allclose(found, expected, atol=1e-6)
    assert torch.equal(adapt("interpolate", positions[0], prefix=1, to=to, antialias=antialias), found[0])


@pytest.mark.parametrize("window", [(3, 3), (6, 6), (4, 4)])
def test_a_bias_table_as_beit_interpolates_it(window: tuple[int, int]) -> None:
    torch.manual_seed(0)

    def bias(side: int) -> Any:
        return BeitRelativePositionBias(BeitConfig(hidden_size=8, num_attention_heads=2, image_size=8 * side, patch_size=8))

    small, other = bias(4), bias(window[0])
    torch.nn.init.normal_(small.relative_position_bias_table)
    table = small.relative_position_bias_table.detach()
    wanted = tuple(other.relative_position_bias_table.shape)
    with torch.no_grad():
        other.relative_position_bias_table.copy_(adapt("relative_position_bias", table, wanted, extra=3, mode="bilinear"))
        assert torch.allclose(other(window), small(window), atol=1e-6)


def _cubic(x: float) -> float:
    """Keys' kernel with a = -1/2 (IEEE Trans. ASSP 29, 1981)."""
    x = abs(x)
    return 1.5 * x**3 - 2.5 * x**2 + 1 if x < 1 else -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0


def resize_matrix(size: int, to: int, mode: str) -> torch.Tensor:
    """(to, size): an antialiased resize of one side, its kernel as wide as a step of the coarser grid."""
    kernel, reach = (_cubic, 2.0) if mode == "bicubic" else (lambda x: max(0.0, 1 - abs(x)), 1.0)
    step = size / to
    wide = max(step, 1.0)
    rows = [
        [kernel((j + 0.5 - step * (i + 0.5)) / wide) if abs(j + 0.5 - step * (i + 0.5)) < reach * wide else 0.0 for j in range(size)]
        for i in range(to)
    ]
    found = torch.tensor(rows, dtype=torch.float64)
    return found / found.sum(1, keepdim=True)


@settings(max_examples=examples(60), deadline=None)
@given(grid=st.tuples(*[st.integers(1, 7)] * 2), to=st.tuples(*[st.integers(1, 7)] * 2), mode=st.sampled_from(["bicubic", "bilinear"]))
def test_antialiasing_is_the_formula_in_every_layout(grid: tuple[int, int], to: tuple[int, int], mode: str) -> None:
    torch.manual_seed(0)
    planes = torch.randn(1, 3, *grid, dtype=torch.float64)
    expected = resize_matrix(grid[0], to[0], mode) @ planes @ resize_matrix(grid[1], to[1], mode).T
    fields = {"grid": grid, "to": to, "mode": mode}
    first = adapt("interpolate", planes, layout="channels_first", **fields)
    assert torch.allclose(first, expected, atol=1e-9)
    assert torch.equal(adapt("interpolate", planes[0], layout="channels_first", **fields), first[0])
    last = adapt("interpolate", planes.permute(0, 2, 3, 1).contiguous(), **fields)
    assert torch.allclose(last.permute(0, 3, 1, 2), expected, atol=1e-9)
    tokens = adapt("interpolate", planes.permute(0, 2, 3, 1).reshape(1, -1, 3), **fields)
    assert torch.allclose(tokens.reshape(1, *to, 3), last, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e5m2])
def test_prefix_tokens_stay_bit_for_bit_and_the_rest_is_rounded_once(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    given = torch.randn(1, 11, 4).to(dtype)
    given[0, 0] = torch.tensor([torch.nan, -torch.inf, -0.0, 6.1e-5])
    found = adapt("interpolate", given, (1, 18, 4), prefix=2)
    assert bits(found[:, :2]) == bits(given[:, :2])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert torch.equal(found[:, 2:].to(wide), adapt("interpolate", given[:, 2:].to(wide), (1, 16, 4)).to(dtype).to(wide))


def test_nearest() -> None:
    given = torch.arange(4.0).reshape(1, 4, 1)
    assert adapt("interpolate", given, to=[4, 4], mode="nearest").flatten().tolist() == [0, 0, 1, 1] * 2 + [2, 2, 3, 3] * 2


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("mode", ["bicubic", "bilinear"])
@pytest.mark.parametrize("to", [(6, 6), (4, 9), (3, 3), (6, 2), (8, 1)])
def test_a_patch_embedding_of_another_size_answers_as_before(to: tuple[int, int], mode: str, antialias: bool) -> None:
    torch.manual_seed(0)
    kernel, patches = torch.randn(5, 2, 4, 4, dtype=torch.float64), torch.randn(7, 2, 4, 4, dtype=torch.float64)
    found = adapt("patch_embed", kernel, (5, 2, *to), mode=mode, antialias=antialias)

    def resize(images: torch.Tensor) -> torch.Tensor:
        if antialias:  # not by torch, which is wrong for one column
            return resize_matrix(4, to[0], mode) @ images @ resize_matrix(4, to[1], mode).T
        return functional.interpolate(images, size=to, mode=mode, align_corners=False)

    if min(to) >= 4:  # the defining property: <resize(x), w'> = <x, w>
        assert torch.allclose(functional.conv2d(resize(patches), found), functional.conv2d(patches, kernel), atol=1e-9)
        return
    units = resize(torch.eye(16, dtype=torch.float64).reshape(16, 1, 4, 4)).reshape(16, -1)  # Bᵀ
    best = torch.linalg.lstsq(units, kernel.reshape(10, 16).T, driver="gelsd").solution.T.reshape(5, 2, *to)
    assert torch.allclose(found, best, atol=1e-9)


@pytest.mark.parametrize(("given", "wanted"), [(3, 1), (1, 1), (1, 3), (1, 5), (3, 6), (3, 9), (4, 1)])
def test_a_grey_image_gives_the_same_output(given: int, wanted: int) -> None:
    torch.manual_seed(0)
    kernel, grey = torch.randn(5, given, 3, 3), torch.randn(2, 1, 8, 8)
    found = adapt("in_channels", kernel, (5, wanted, 3, 3))
    before, after = (functional.conv2d(grey.expand(-1, weight.shape[1], -1, -1), weight) for weight in (kernel, found))
    assert torch.allclose(after, before, atol=1e-5)


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("mode", ["mean", "center"])
def test_a_still_video_gives_a_frames_output(mode: str, size: int) -> None:
    torch.manual_seed(0)
    kernel, frame = torch.randn(4, 3, 3, 3), torch.randn(2, 3, 9, 9)
    found = adapt("inflate", kernel, (4, 3, size, 3, 3), mode=mode)
    video = frame.unsqueeze(2).expand(-1, -1, size + 2, -1, -1)
    expected = functional.conv2d(frame, kernel).unsqueeze(2).expand(-1, -1, 3, -1, -1)
    assert torch.allclose(functional.conv3d(video, found), expected, atol=1e-4)
    assert mode == "mean" or torch.equal(found[:, :, size // 2], kernel)
