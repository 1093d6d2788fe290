"""Names without separators, with others, and weights with their dims in another order."""

from __future__ import annotations

import re

import pytest
from pairs_support import PAIRS, meta, read_pair

from ckptsurgeon.matching.matcher import match
from ckptsurgeon.tensors import TensorMeta

PAIRS_READ = {path.stem: read_pair(path) for path in sorted(PAIRS.glob("*.json")) if path.stat().st_size < 40_000}
_ROLE = re.compile(r"\.(weight|bias|running_mean|running_var|num_batches_tracked)$")


def without_dots(key: str) -> str:
    return key.replace(".", "")


def underscores(key: str) -> str:
    return key.replace(".", "_")


def kohya(key: str) -> str:
    role = _ROLE.search(key)
    return "lora_unet_" + (key[: role.start()].replace(".", "_") + role[0] if role else underscores(key))


def slashes(key: str) -> str:
    return key.replace(".", "/")


@pytest.mark.parametrize("form", [without_dots, underscores, kohya, slashes])
@pytest.mark.parametrize("name", sorted(PAIRS_READ))
def test_a_model_is_known_again_without_its_separators(name: str, form: object) -> None:
    target = {key: meta(key, tensor.shape) for key, tensor in PAIRS_READ[name].target.items()}
    names = {form(key): key for key in target}  # type: ignore[operator]
    assert len(names) == len(target)
    source = {flat: meta(flat, target[key].shape) for flat, key in names.items()}
    found = match(source, target)
    assert {link.targets: tuple(names[key] for key in link.sources) for link in found.certain} == {(key,): (key,) for key in target}


@pytest.mark.parametrize("form", [underscores, kohya])
def test_another_implementation_is_matched_without_dots_too(form: object) -> None:
    pair = PAIRS_READ["timm_siglip_vit__hf_siglip_vision"]
    names = {form(key): key for key in pair.source}  # type: ignore[operator]
    found = match({flat: meta(flat, pair.source[key].shape) for flat, key in names.items()}, pair.target)
    told = {key: tuple(names[one] for one in link.sources) for link in found.links if link.clear for key in link.targets}
    assert told == {key: truth.sources for key, truth in pair.truth.items()}


def turned(shape: tuple[int, ...]) -> tuple[int, ...]:
    return {2: shape[::-1], 4: (*shape[2:], *shape[1::-1])}.get(len(shape), shape)


def test_kernels_are_turned_windows_too() -> None:
    """JAX's and TensorFlow's layers: `x @ kernel`, and windows before channels."""
    target: dict[str, TensorMeta] = {}
    source: dict[str, TensorMeta] = {}
    for name, shape in {"conv": (16, 3, 4, 4), **{f"blocks.{i}.{n}": (16, 16) for i in range(2) for n in ("q", "k", "v", "out")}}.items():
        target |= {f"{name}.weight": meta(f"{name}.weight", shape), f"{name}.bias": meta(f"{name}.bias", shape[:1])}
        path = name.replace(".", "/")
        source |= {f"{path}/kernel": meta(f"{path}/kernel", turned(shape)), f"{path}/bias": meta(f"{path}/bias", shape[:1])}
    found = {link.targets[0]: link for link in match(source, target).certain}
    assert found.keys() == target.keys()
    assert found["conv.weight"].op == "permute([3, 2, 0, 1])"
    assert {link.op for key, link in found.items() if key.endswith("weight") and key != "conv.weight"} == {"transpose"}


def test_a_square_projection_is_turned_as_the_other_one_is() -> None:
    """CLIP's: two bare parameters, one of them square."""
    source = {"visual.proj": (12, 8), "text_projection": (8, 8), "visual.fc.weight": (12, 12), "text.fc.weight": (8, 8)}
    target = {
        "visual_projection.weight": (8, 12),
        "text_projection.weight": (8, 8),
        "vision_model.fc.weight": (12, 12),
        "text_model.fc.weight": (8, 8),
    }
    found = match({key: meta(key, shape) for key, shape in source.items()}, {key: meta(key, shape) for key, shape in target.items()})
    ops = {link.targets[0]: link.op for link in found.links}
    assert ops["visual_projection.weight"] == ops["text_projection.weight"] == "transpose"


def test_an_optimizers_moments_are_no_weights() -> None:
    body = {f"layers.{i}.{name}.weight": (8, 8) for i in range(2) for name in ("q", "k")}
    source = body | {f"{key}/adam_{m}": shape for key, shape in body.items() for m in "mv"}
    found = match({key: meta(key, shape) for key, shape in source.items()}, {key: meta(key, shape) for key, shape in body.items()})
    assert {link.targets: link.sources for link in found.links} == {(key,): (key,) for key in body}
