"""The vision kernels, judged by transformers' models, by timm's stored results, and by what each formula promises."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import pytest
import torch
from ckptsurgeon.adapters.kernels.vision import KERNELS
from hypothesis import event, given, settings
from hypothesis import strategies as st
from torch.nn import functional
from transformers import BeitConfig, Dinov2Config, Dinov2WithRegistersConfig, ViTConfig
from transformers.models.beit.modeling_beit import BeitRelativePositionBias
from transformers.models.dinov2.modeling_dinov2 import Dinov2Embeddings
from transformers.models.dinov2_with_registers.modeling_dinov2_with_registers import Dinov2WithRegistersEmbeddings
from transformers.models.vit.modeling_vit import ViTEmbeddings

from ckptsurgeon.adapters.op import Place
from ckptsurgeon.adapters.vision import VISION
from ckptsurgeon.errors import RuleError

GOLDEN = json.loads((Path(__file__).parent / "golden" / "timm_vision.json").read_text())["cases"]


def no_initial() -> torch.Tensor:
    raise AssertionError("no vision kernel asks for the target's initial value")


def bits(tensor: torch.Tensor) -> list[int]:
    return tensor.contiguous().view(torch.uint8).flatten().tolist()


def run(op: dict[str, Any], tensor: torch.Tensor) -> torch.Tensor:
    """The kernel's result for a filled op, of the shape that the adapter says; the input stays as it is."""
    before = tensor.clone()
    (found,) = KERNELS[op["op"]]([tensor], op, no_initial)
    assert VISION[op["op"]].infer(op, (tuple(tensor.shape),)) == (tuple(found.shape),)
    assert found.dtype == tensor.dtype and found.data_ptr() != tensor.data_ptr()
    assert bits(tensor) == bits(before)
    return found


def adapt(name: str, tensor: torch.Tensor, wanted: tuple[int, ...] | None = None, **fields: Any) -> torch.Tensor:
    return run(dict(VISION[name].fill({"op": name, **fields}, Place((tuple(tensor.shape),), wanted))), tensor)


@pytest.mark.parametrize("case", GOLDEN, ids=[f"{case['op']['op']}-{index}" for index, case in enumerate(GOLDEN)])
def test_as_timm_does(case: dict[str, Any]) -> None:
    shape = case["shape"]
    given = ((torch.arange(prod(shape)) * 37 % 101).float() / 101 - 0.5).reshape(shape)
    found = run(case["op"], given)
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


@settings(max_examples=60, deadline=None)
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


FIELDS = {
    "prefix": st.integers(0, 3),
    "extra": st.integers(0, 3),
    "grid": st.lists(st.integers(1, 4), min_size=2, max_size=2),
    "to": st.lists(st.integers(1, 5), min_size=2, max_size=2),
    "mode": st.sampled_from(["bicubic", "bilinear", "nearest", "mean", "center"]),
    "antialias": st.booleans(),
    "layout": st.sampled_from(["channels_last", "channels_first"]),
    "dim": st.integers(-1, 4),
    "channels": st.integers(0, 5),
    "size": st.integers(0, 3),
}


def _shape(op: dict[str, Any], data: st.DataObject) -> tuple[int, ...]:
    """A shape that often goes with the op."""
    size, batch = st.integers(1, 4), st.integers(1, 2)
    if op["op"] == "interpolate":
        grid, tokens = map(st.just, op["grid"]), st.just(op["prefix"] + prod(op["grid"]))
        h, w = grid
        close = st.tuples(batch, h, w, size) | st.tuples(batch, size, h, w) | st.tuples(batch, tokens, size) | st.tuples(tokens, size)
    elif op["op"] == "relative_position_bias":
        close = st.tuples(st.just(op["extra"] + prod(2 * n - 1 for n in op["grid"])), size)
    else:
        close = st.lists(size, min_size=3, max_size=4).map(tuple)
    return data.draw(close | close | st.lists(st.integers(0, 4), max_size=5).map(tuple))


@settings(max_examples=500, deadline=None)
@given(name=st.sampled_from(sorted(VISION)), data=st.data())
def test_the_kernel_makes_the_shapes_that_the_adapter_says(name: str, data: st.DataObject) -> None:
    op = {"op": name, **{field: data.draw(FIELDS[field].filter(check)) for field, check in VISION[name].fields.items()}}
    shapes = [_shape(op, data) for _ in range(data.draw(st.integers(1, 2)))]
    try:
        expected = VISION[name].infer(op, tuple(shapes))
    except RuleError:
        event("refused")
        return
    event("computed")
    tensors = [torch.randn(shape).to(data.draw(st.sampled_from([torch.float32, torch.bfloat16]))) for shape in shapes]
    found = KERNELS[name](tensors, op, no_initial)
    assert tuple(tuple(tensor.shape) for tensor in found) == expected
    assert [tensor.dtype for tensor in found] == [tensor.dtype for tensor in tensors]
    assert all(torch.isfinite(tensor).all() for tensor in found)
