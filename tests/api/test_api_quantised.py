"""Quantised weights are codes: named, never cast, averaged, adapted or parted from their scales, and made values of on demand."""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Any

import api_support as support
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import examples
from safetensors.torch import save_file
from torch import Tensor

import ckptsurgeon as cs
from ckptsurgeon.errors import CastError, CheckpointError, PlanError, RuleError, SettingsError
from ckptsurgeon.planning.quantised_weights.find import TABLE, find
from ckptsurgeon.tensors import TensorMeta

FP8 = torch.float8_e4m3fn
MODULE = "model.layers.0.q"


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * 0.05


def codes(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.arange(prod(shape)).remainder(100).reshape(shape).to(dtype)


def by_block(weight: Tensor, rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """fp8 codes and a scale for each block, as DeepSeek's and transformers' checkpoints hold them."""
    shape = -(-weight.shape[0] // rows), -(-weight.shape[1] // cols)
    scale = torch.empty(shape)
    out = torch.empty(weight.shape, dtype=FP8)
    for i in range(shape[0]):
        for j in range(shape[1]):
            place = slice(i * rows, (i + 1) * rows), slice(j * cols, (j + 1) * cols)
            scale[i, j] = weight[place].abs().max() / 448
            out[place] = (weight[place] / scale[i, j]).to(FP8)
    return out, scale


# What each library writes for one linear layer of 8 x 16: its codes' key, and whether values can be made of them.
LIBRARIES: dict[str, tuple[str, dict[str, Tensor], bool]] = {
    "bitsandbytes nf4": (
        ".weight",
        {
            ".weight": codes(torch.uint8, 64, 1),
            ".weight.absmax": codes(torch.uint8, 2),
            ".weight.quant_map": random(16),
            ".weight.nested_absmax": random(1),
            ".weight.nested_quant_map": random(256),
            ".weight.quant_state.bitsandbytes__nf4": codes(torch.uint8, 90),
        },
        False,
    ),
    "bitsandbytes fp4, in bfloat16": (
        ".weight",
        {
            ".weight": random(32, 1).bfloat16(),
            ".weight.absmax": random(2),
            ".weight.quant_map": random(16),
            ".weight.quant_state.bitsandbytes__fp4": codes(torch.uint8, 90),
        },
        False,
    ),
    "bitsandbytes int8": (
        ".weight",
        {".weight": codes(torch.int8, 8, 16), ".SCB": random(8).abs(), ".weight_format": torch.tensor(0, dtype=torch.uint8)},
        True,
    ),
    "GPTQ": (
        ".qweight",
        {
            ".qweight": codes(torch.int32, 2, 8),
            ".qzeros": codes(torch.int32, 1, 1),
            ".scales": random(1, 8).half(),
            ".g_idx": codes(torch.int32, 16),
        },
        False,
    ),
    "AWQ": (
        ".qweight",
        {".qweight": codes(torch.int32, 16, 1), ".qzeros": codes(torch.int32, 1, 1), ".scales": random(1, 8).half()},
        False,
    ),
    "compressed-tensors, packed": (
        ".weight_packed",
        {".weight_packed": codes(torch.int32, 8, 2), ".weight_scale": random(8, 1).bfloat16(), ".weight_shape": torch.tensor([8, 16])},
        False,
    ),
    "nvfp4": (
        ".weight_packed",
        {".weight_packed": codes(torch.uint8, 8, 8), ".weight_scale": random(8, 1).abs().to(FP8), ".weight_global_scale": random(1)},
        False,
    ),
    "compressed-tensors int8": (".weight", {".weight": codes(torch.int8, 8, 16), ".weight_scale": random(8, 1).bfloat16()}, True),
    "int8 with zero points": (
        ".weight",
        {".weight": codes(torch.int8, 8, 16), ".weight_scale": random(8, 1), ".weight_zero_point": codes(torch.int8, 8, 1)},
        False,
    ),
    "MXFP4": ("_blocks", {"_blocks": codes(torch.uint8, 8, 1, 16), "_scales": codes(torch.uint8, 8, 1)}, False),
    "fp8, per tensor": (
        ".weight",
        {".weight": random(8, 16).to(FP8), ".weight_scale": torch.tensor(0.5), ".input_scale": torch.tensor(2.0)},
        True,
    ),
    "fp8, per row": (".weight", {".weight": random(8, 16).to(torch.float8_e5m2), ".weight_scale": random(8, 1).bfloat16()}, True),
    "fp8, by block": (".weight", {".weight": random(8, 16).to(FP8), ".weight_scale_inv": random(1, 1)}, True),
    "fp8 experts": ("_proj", {"_proj": random(2, 8, 16).to(FP8), "_proj_scale_inv": random(2, 1, 1)}, True),
    "mxfp8": (".weight", {".weight": random(8, 64).to(FP8), ".weight_scale": codes(torch.uint8, 8, 2) + 120}, True),
    "torchao": ("._weight_qdata", {"._weight_qdata": codes(torch.int8, 8, 16), "._weight_scale": random(8, 1)}, False),
    "quanto": (".weight._data", {".weight._data": codes(torch.int8, 8, 16), ".weight._scale": random(8, 1)}, False),
    "ComfyUI": (".weight", {".weight": random(8, 16).to(FP8), ".scale_weight": torch.tensor([0.5])}, True),
    "modelopt fp4": (
        ".weight",
        {".weight": codes(torch.uint8, 8, 8), ".weight_scale": random(8, 1).abs().to(FP8), ".weight_scale_2": random(1)},
        False,
    ),
}


def layer(library: str) -> tuple[str, dict[str, Tensor], bool]:
    ends, parts, readable = LIBRARIES[library]
    return MODULE + ends, {**{MODULE + name: value.contiguous() for name, value in parts.items()}, "norm.weight": torch.ones(4)}, readable


def save(folder: Path, name: str, state: dict[str, Tensor]) -> Path:
    (torch.save if name.endswith(".pt") else save_file)({key: value.clone() for key, value in state.items()}, folder / name)
    return folder / name


@pytest.mark.parametrize("library", LIBRARIES)
def test_codes_are_named_in_inspect_diff_and_check(library: str, tmp_path: Path) -> None:
    key, state, readable = layer(library)
    path = save(tmp_path, "a.safetensors", state)
    found = find(cs.open(path))
    assert list(found) == [key] and (found[key].op is not None) is readable
    (finding,) = [one for one in cs.check(path).files[0].findings if one.code == "CK203"]
    assert (finding.key, finding.level) == (key, "note") and cs.check(path).ok
    from ckptsurgeon.views import json as views

    assert [(row["key"], row["dequantize"]) for row in views.archive(cs.inspect(path))["quantised"]] == [(key, readable)]
    assert f"quantised: 1 weight as {found[key].scheme}, such as {key}" in cs.inspect(path).to_text()
    wanted = save(tmp_path, "t.safetensors", {key: torch.zeros(state[key].shape, dtype=torch.float32), "norm.weight": torch.ones(4)})
    diff = cs.diff(path, wanted)
    assert [one.key for one in diff.quantised] == [key] and "quantised" in str(diff)
    assert ("--dequantize" in str(diff)) is readable and ("by the library that wrote" in str(diff)) is not readable
    assert views.diff(diff)["quantised"][0]["key"] == key and views.diff(cs.diff(wanted, path))["target_quantised"][0]["key"] == key
    assert "quantised in the target" in str(cs.diff(wanted, path))
    same = cs.diff(path, path)
    assert "--dequantize" not in str(same) and same.same


@pytest.mark.parametrize("library", LIBRARIES)
def test_codes_go_whole_or_not_at_all(library: str, tmp_path: Path) -> None:
    """Converted and copied bit for bit with their scales; a cast, and the loss of any scale, is refused by key unless it is allowed."""
    key, state, readable = layer(library)
    path = save(tmp_path, "a.safetensors", state)
    cs.merge(path, None, tmp_path / "whole.pt")
    support.same(support.load(tmp_path / "whole.pt"), state)
    target = save(tmp_path, "same.pt", {name: torch.zeros_like(value) for name, value in state.items()})
    cs.merge(path, target, tmp_path / "copied.safetensors")
    support.same(support.load(tmp_path / "copied.safetensors"), state)

    wider = {**state, key: torch.zeros(state[key].shape, dtype=torch.float32)}
    refused: list[Any] = [
        lambda **more: cs.merge(
            path, save(tmp_path, "wide.pt", {key: wider[key], "norm.weight": torch.ones(4)}), tmp_path / "no.pt", **more
        ),
        lambda **more: cs.merge(path, save(tmp_path, "wide.pt", wider), tmp_path / "no.pt", **more),
        lambda **more: cs.plan(path, save(tmp_path, "bare.pt", {key: torch.zeros_like(state[key]), "norm.weight": torch.ones(4)}), **more),
        lambda **more: cs.merge(path, None, tmp_path / "no.pt", adapt={key: "transpose"}, **more),
    ]
    scales = find(cs.open(path))[key].scales
    refused += [lambda scale=scale, **more: cs.merge(path, None, tmp_path / "no.pt", drop=[scale], **more) for scale in scales]
    for call in refused:
        with pytest.raises(CastError) as caught:
            call()
        assert caught.value.exit_code == 2 and caught.value.key == key and "allow_cast=" in str(caught.value.hint)
        assert ("dequantize=True" in str(caught.value.hint)) is readable
        assert not (tmp_path / "no.pt").exists()
        call(allow_cast=[key])
        (tmp_path / "no.pt").unlink(missing_ok=True)


@pytest.mark.parametrize("library", LIBRARIES)
def test_codes_are_not_averaged(library: str, tmp_path: Path) -> None:
    key, state, _ = layer(library)
    one = save(tmp_path, "a.safetensors", state)
    other = save(tmp_path, "b.safetensors", {name: value + 1 if value.dtype == torch.float32 else value for name, value in state.items()})
    with pytest.raises(CastError) as caught:
        cs.merge([one, other], None, tmp_path / "o.pt", average=True)
    assert key in caught.value.message


@pytest.mark.parametrize("library", LIBRARIES)
def test_transfer_refuses_what_torchs_copy_would_cast(library: str, tmp_path: Path) -> None:
    key, state, readable = layer(library)
    path = save(tmp_path, "a.safetensors", state)

    class Net(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            *modules, leaf = key.split(".")
            place: torch.nn.Module = self
            for name in modules:
                place.add_module(name, torch.nn.Module())
                place = place.get_submodule(name)
            place.register_buffer(leaf, torch.zeros(state[key].shape))

    for source in (path, {name: value.clone() for name, value in state.items()}):
        model = Net()
        with pytest.raises(CastError):
            cs.transfer(source, model)
        assert not any(value.any() for value in model.state_dict().values())
        if readable:
            cs.transfer(source, model, dequantize=True)
            assert torch.equal(model.state_dict()[key], expected(state, key))
        else:
            with pytest.raises(CastError, match="is not known"):
                cs.transfer(source, model, dequantize=True)
        cs.transfer(source, model, allow_cast=[key])
        assert torch.equal(model.state_dict()[key], state[key].float())


def expected(state: dict[str, Tensor], key: str) -> Tensor:
    """Each value by the formula, by torch's broadcasting; the blocks of these are whole dims, or divide them."""
    stem = key.removesuffix(".weight")
    if f"{stem}.SCB" in state:
        return state[key] * state[f"{stem}.SCB"].view(-1, 1) * 7.874015718698502e-3  # as transformers and bitsandbytes have it
    names = (f"{key}_scale_inv", f"{key}_scale", f"{stem}.scale_weight")
    scale = next(state[name] for name in names if name in state)
    factor = torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()
    for dim in range(factor.dim() if factor.dim() == state[key].dim() else 0):
        factor = factor.repeat_interleave(state[key].shape[dim] // factor.shape[dim], dim)
    return state[key].float() * factor


READABLE = [library for library, (_, _, readable) in LIBRARIES.items() if readable]


@pytest.mark.parametrize("library", READABLE)
@pytest.mark.parametrize("out", ["o.safetensors", "o.pt"])
def test_values_are_made_of_codes_and_scales(library: str, out: str, tmp_path: Path) -> None:
    key, state, _ = layer(library)
    path, truth = save(tmp_path, "a.safetensors", state), expected(state, key)
    report = cs.merge(path, None, tmp_path / out, dequantize=True)
    support.same(support.load(tmp_path / out), {key: truth.bfloat16(), "norm.weight": torch.ones(4)})
    assert report.proven and set(dict(report.dropped)) == set(state) - {key, "norm.weight"} - set(find(cs.open(path))[key].scales)
    for dtype, kind in (("F32", torch.float32), ("F16", torch.float16), ("F64", torch.float64), ("source", torch.bfloat16)):
        cs.merge(path, None, tmp_path / out, dequantize=True, dtype=dtype, overwrite=True)
        assert torch.equal(support.load(tmp_path / out)[key], truth.to(kind))
    for kind in (torch.float32, torch.bfloat16, torch.float64):
        target = save(tmp_path, "t.pt", {key: torch.zeros(truth.shape, dtype=kind), "norm.weight": torch.zeros(4)})
        report = cs.merge(path, target, tmp_path / out, dequantize=True, overwrite=True, strict=True)
        support.same(support.load(tmp_path / out), {key: truth.to(kind), "norm.weight": torch.ones(4)})
        assert report.coverage.elements == 1 and report.findings == ()
        decided = cs.plan(path, target, dequantize=True)
        written = tmp_path / "plan.json"
        from ckptsurgeon.planning import planfile

        written.write_text(json.dumps(planfile.to_json(decided)))
        cs.apply(written, tmp_path / f"again-{out}", overwrite=True)
        support.same(support.load(tmp_path / f"again-{out}"), {key: truth.to(kind), "norm.weight": torch.ones(4)})
    (step,) = [step for step in decided.steps if step.target == key]
    assert step.ops[0]["op"] == "dequantize" and [name for _, name in step.sources] == [key, *find(cs.open(path))[key].scales]


@settings(max_examples=examples(40), deadline=None)
@given(rows=st.integers(1, 300), cols=st.integers(1, 300), seed=st.integers(0, 9), kind=st.sampled_from(["block", "row", "tensor"]))
def test_fp8_of_any_shape(tmp_path_factory: pytest.TempPathFactory, rows: int, cols: int, seed: int, kind: str) -> None:
    """Ragged blocks at the edges too; the oracle scales block by block."""
    folder = tmp_path_factory.mktemp("fp8")
    weight = random(rows, cols, seed=seed)
    size = {"block": (128, 128), "row": (1, cols), "tensor": (rows, cols)}[kind]
    made, scale = by_block(weight, *size)
    name = "w.weight_scale_inv" if kind == "block" else "w.weight_scale"
    scales = {name: scale.reshape(()) if kind == "tensor" else scale}
    path = save(folder, "a.safetensors", {"w.weight": made, **scales})
    cs.merge(path, None, folder / "o.safetensors", dequantize=True, dtype="F32")
    found = support.load(folder / "o.safetensors")["w.weight"]
    truth = torch.empty(rows, cols)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            place = slice(i * size[0], (i + 1) * size[0]), slice(j * size[1], (j + 1) * size[1])
            truth[place] = made[place].float() * scale[i, j]
    assert torch.equal(found, truth)
    assert (found - weight).abs().max() <= weight.abs().max() / 16  # what fp8 itself loses


def test_transformers_makes_the_same_values(tmp_path: Path) -> None:
    fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    weight = random(256, 384)
    made, scale = by_block(weight, 128, 128)
    path = save(tmp_path, "a.safetensors", {"w.weight": made, "w.weight_scale_inv": scale})
    cs.merge(path, None, tmp_path / "o.safetensors", dequantize=True)
    theirs = fp8.Fp8Dequantize(None)._dequantize_one(made, scale, torch.bfloat16)
    assert torch.equal(support.load(tmp_path / "o.safetensors")["w.weight"], theirs)


def test_a_large_matrix_is_made_row_by_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptsurgeon.adapters import widening

    made, scale = by_block(random(700, 300), 128, 128)
    path = save(tmp_path, "a.safetensors", {"w.weight": made, "w.weight_scale_inv": scale})
    cs.merge(path, None, tmp_path / "one.safetensors", dequantize=True, dtype="F32")
    monkeypatch.setattr(widening, "BLOCK_ELEMENTS", 1000)  # three rows, which end within a block
    cs.merge(path, None, tmp_path / "two.safetensors", dequantize=True, dtype="F32")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_ordinary_tensors_with_such_names_are_values(tmp_path: Path) -> None:
    """A float weight beside a weight_scale, fp8 without any scale, integers that are integers: cast as ever."""
    state = {
        "a.weight": random(4, 4),
        "a.weight_scale": torch.ones(4),
        "b.weight": random(4, 4).to(FP8),
        "c.weight": torch.arange(4, dtype=torch.int8),
        "c.bias": torch.ones(4),
        "logit_scale": torch.ones(1),
        "scales": torch.ones(3),
        "d.weight": random(4, 4).to(FP8),
        "d.weight_scale": torch.ones(4).to(FP8),
        "e.weight": random(4, 4).to(FP8),
        "e.layer_scale": torch.ones(4),
        "f.table": torch.ones(4, 4, dtype=torch.int8),
        "f.scale": torch.ones(4),
        "g.weight": torch.ones(4, dtype=torch.uint8),
        "g.scale": torch.ones(4),
    }
    path = save(tmp_path, "a.safetensors", state)
    assert find(cs.open(path)) == {} and cs.check(path).files[0].findings == ()
    target = save(tmp_path, "t.pt", {key: torch.zeros(value.shape) for key, value in state.items()})
    cs.merge(path, target, tmp_path / "o.pt")
    support.same(support.load(tmp_path / "o.pt"), {key: value.float() for key, value in state.items()})
    with pytest.raises(SettingsError, match="--dequantize"):
        cs.merge(path, target, tmp_path / "p.pt", dequantize=True)


@pytest.mark.parametrize("dtype", [FP8, torch.float8_e5m2, torch.int8, torch.uint8])
@pytest.mark.parametrize(
    "scale",
    [
        "weight.scale",
        "weight_scales",
        "w_scale",
        "weight_scale_inverse",
        "qscale_weight",
        "weight_descale",
        "scale",
        "scales",
        "weight.absmax",
    ],
)
def test_a_scale_of_any_name_makes_codes(scale: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """No library's names that are known here: such codes are never cast alone, and go where their scales go."""
    state = {"a.q.weight": codes(dtype, 8, 16), f"a.q.{scale}": random(8).abs(), "n": torch.ones(1)}
    path = save(tmp_path, "a.safetensors", state)
    target = save(tmp_path, "t.safetensors", {"a.q.weight": torch.zeros(8, 16, dtype=torch.bfloat16), "n": torch.ones(1)})
    with pytest.raises(CastError) as caught:
        cs.merge(path, target, tmp_path / "o.safetensors")
    assert caught.value.key == "a.q.weight" and f"a.q.{scale}" in caught.value.message
    model = torch.nn.Module()
    model.a = torch.nn.ModuleDict({"q": torch.nn.Linear(16, 8, bias=False)})
    model.register_buffer("n", torch.ones(1))
    with pytest.raises(CastError):
        cs.transfer(path, model)
    cs.merge(path, target, tmp_path / "allowed.safetensors", allow_cast=["a.q.weight"])
    cs.merge(path, None, tmp_path / "copy.pt", rename={"a.q.{**r}": "b.{r}"})
    assert torch.equal(support.load(tmp_path / "copy.pt")["b.weight"].view(torch.uint8), state["a.q.weight"].view(torch.uint8))


@pytest.mark.parametrize("dtype", [FP8, torch.int8, torch.uint8])
@pytest.mark.parametrize("scale, shape", [("weight_scaler", ()), ("w_s", (8, 1)), ("qparam", (8,)), ("step_size", (2, 4))])
def test_an_unused_tensor_beside_codes_may_be_their_scales(scale: str, shape: tuple[int, ...], dtype: torch.dtype, tmp_path: Path) -> None:
    """Whatever it is called: where it would be left out, the weight is not cast alone; where the target has it too, both are values."""
    state = {"q.weight": codes(dtype, 8, 16), f"q.{scale}": torch.rand(shape), "q.bias": torch.ones(8)}
    path = save(tmp_path, "a.safetensors", state)
    floats = {key: value.float() for key, value in state.items()}
    alone = save(tmp_path, "alone.pt", {"q.weight": floats["q.weight"]})
    with pytest.raises(CastError, match=f"q.{scale} beside it") as caught:
        cs.merge(path, alone, tmp_path / "o.pt")
    assert caught.value.key == "q.weight"
    with pytest.raises(CastError, match=f"q.{scale} beside it"):
        cs.transfer(path, torch.nn.ModuleDict({"q": torch.nn.Linear(16, 8)}))
    cs.merge(path, alone, tmp_path / "o.pt", allow_cast=["q.weight"])
    cs.merge(path, save(tmp_path, "t.pt", floats), tmp_path / "p.pt")
    support.same(support.load(tmp_path / "p.pt"), floats)


def test_a_bias_or_another_shape_is_no_scale(tmp_path: Path) -> None:
    state = {"q.weight": codes(FP8, 8, 16), "q.bias": torch.ones(8), "q.odd": torch.ones(5), "n.weight": torch.ones(8)}
    path = save(tmp_path, "a.safetensors", state)
    report = cs.merge(path, save(tmp_path, "t.pt", {"q.weight": torch.ones(8, 16)}), tmp_path / "o.pt")
    assert report.transferred == ("q.weight",) and not report.findings


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.int64, torch.bool])
def test_weights_of_whole_numbers_are_told(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {"a.weight": torch.ones(8, 16, dtype=dtype), "b.weight": torch.ones(2, 2, dtype=dtype), "c.weight": torch.ones(8, dtype=dtype)}
    path = save(tmp_path, "a.safetensors", state)
    floats = save(tmp_path, "t.pt", {key: value.float() for key, value in state.items()})
    (finding,) = [one for one in cs.merge(path, floats, tmp_path / "o.pt").findings if one.level == "warning"]
    assert (finding.code, finding.key) == ("codes", "a.weight") and "and 1 more" in finding.message
    assert not cs.merge(path, None, tmp_path / "p.pt").findings
    tables = save(tmp_path, "b.safetensors", {"table": torch.ones(8, 16, dtype=dtype)})
    others = cs.merge(tables, save(tmp_path, "u.pt", {"table": torch.ones(8, 16)}), tmp_path / "q.pt").findings
    assert not [one for one in others if one.level == "warning"]


def test_codes_and_scales_of_a_target_come_from_one_place(tmp_path: Path) -> None:
    """Plain weights do not become codes of a quantised target, and codes do not keep another file's scales."""
    made, scale = by_block(random(8, 16), 128, 128)
    target = save(tmp_path, "t.safetensors", {"w.weight": made, "w.weight_scale_inv": scale, "n": torch.ones(1)})
    for state in ({"w.weight": random(8, 16)}, {"w.weight": random(8, 16).to(FP8)}, {"w.weight_scale_inv": scale * 2, "n": torch.ones(1)}):
        source = save(tmp_path, "s.safetensors", state)
        with pytest.raises(CastError) as caught:
            cs.merge(source, target, tmp_path / "o.pt", overwrite=True)
        assert caught.value.key == "w.weight" and "in the target" in caught.value.message
        cs.merge(source, target, tmp_path / "o.pt", allow_cast="w.weight", overwrite=True)
    with pytest.raises(CastError):
        cs.merge(
            save(tmp_path, "s.safetensors", {"w.weight": made, "w.weight_scale_inv": scale}), target, tmp_path / "p.pt", dequantize=True
        )
    kept = save(tmp_path, "k.safetensors", {"n": torch.zeros(1)})
    cs.merge(kept, target, tmp_path / "kept.pt")
    assert torch.equal(support.load(tmp_path / "kept.pt")["w.weight_scale_inv"], scale)


def test_names_change_together(tmp_path: Path) -> None:
    made, scale = by_block(random(8, 16), 128, 128)
    path = save(
        tmp_path, "a.safetensors", {f"old.{n}.weight{end}": part.clone() for n in "qk" for end, part in (("", made), ("_scale_inv", scale))}
    )
    cs.merge(path, None, tmp_path / "o.pt", rename={"old.{**p}": "new.{**p}"})
    assert set(support.load(tmp_path / "o.pt")) == {f"new.{n}.weight{end}" for n in "qk" for end in ("", "_scale_inv")}
    truth = made.float() * scale
    cs.merge(path, None, tmp_path / "d.pt", rename={"old.{**p}": "new.{**p}"}, dequantize=True, dtype="F32")
    support.same(support.load(tmp_path / "d.pt"), {f"new.{n}.weight": truth for n in "qk"})
    joined = {"old.q.weight + old.k.weight -> qk": "concat(dim=0)"}
    target = save(tmp_path, "t.pt", {"qk": torch.zeros(16, 16)})
    cs.merge(path, target, tmp_path / "j.pt", adapt=joined, dequantize=True)
    support.same(support.load(tmp_path / "j.pt"), {"qk": torch.cat([truth, truth])})
    with pytest.raises(CastError):
        cs.merge(path, target, tmp_path / "k.pt", adapt=joined)
    asked = {"old.q.weight + old.q.weight_scale_inv -> one": "dequantize"}
    cs.merge(path, save(tmp_path, "u.pt", {"one": torch.zeros(8, 16)}), tmp_path / "a.pt", adapt=asked)
    support.same(support.load(tmp_path / "a.pt"), {"one": truth})


def test_codes_keep_their_scales_under_a_new_name(tmp_path: Path) -> None:
    """A rename that nobody could read any more, and scales that change places, are refused; a layer's own file is known too."""
    made, scale = by_block(random(8, 16), 128, 128)
    parts = {f"{n}.weight{end}": part.clone() for n in "qk" for end, part in (("", made), ("_scale_inv", scale))}
    path = save(tmp_path, "a.safetensors", parts)
    lone: dict[str, Any] = {"rename": {"q.weight": "new.weight"}}
    crossed: dict[str, Any] = {"rename": {"q.weight_scale_inv": "k.weight_scale_inv", "k.weight_scale_inv": "q.weight_scale_inv"}}
    for choices in (lone, crossed):
        with pytest.raises(CastError, match="new name"):
            cs.merge(path, None, tmp_path / "o.pt", **choices)
    cs.merge(path, None, tmp_path / "o.pt", allow_cast="new.weight", **lone)
    layer_alone = save(tmp_path, "l.safetensors", {"weight": codes(torch.int8, 8, 16), "SCB": random(8).abs()})
    assert list(find(cs.open(layer_alone))) == ["weight"]
    gptq = {name.removeprefix(f"{MODULE}."): value for name, value in layer("GPTQ")[1].items()}
    assert list(find(cs.open(save(tmp_path, "g.safetensors", gptq)))) == ["qweight"]


def test_one_dtype_for_all_values_leaves_scales_alone(tmp_path: Path) -> None:
    for library in ("bitsandbytes int8", "GPTQ", "nvfp4", "bitsandbytes nf4"):
        _, state, _ = layer(library)
        path = save(tmp_path, "a.safetensors", state)
        cs.merge(path, None, tmp_path / "o.pt", dtype="BF16", overwrite=True)
        support.same(support.load(tmp_path / "o.pt"), {**state, "norm.weight": torch.ones(4).bfloat16()})
        other = save(tmp_path, "s.safetensors", {"norm.weight": torch.zeros(4)})
        cs.merge(other, path, tmp_path / "o.pt", dtype="BF16", overwrite=True)
        support.same(support.load(tmp_path / "o.pt"), {**state, "norm.weight": torch.zeros(4).bfloat16()})
    made, scale = by_block(random(8, 16), 128, 128)
    target = save(tmp_path, "t.safetensors", {"w.weight": made, "w.weight_scale_inv": scale, "norm.weight": torch.ones(4)})
    with pytest.raises(CastError, match=r"in the target .*, and would be cast to BF16"):
        cs.merge(other, target, tmp_path / "p.pt", dtype="BF16")


def test_a_rule_of_ones_own_follows_the_formula(tmp_path: Path) -> None:
    """Blocks that the shapes do not tell may be given; another divisor, another weight's scale, or zero points left out are refused."""
    key, state, _ = layer("bitsandbytes int8")
    path = save(tmp_path, "a.safetensors", state)
    rule = f"{key} + {MODULE}.SCB -> {key}"
    with pytest.raises(CastError):
        cs.merge(path, None, tmp_path / "o.pt", adapt={rule: "dequantize"})
    cs.merge(path, None, tmp_path / "o.pt", adapt={rule: "dequantize(divisor=127)"}, dtype="F32")
    assert torch.equal(support.load(tmp_path / "o.pt")[key], expected(state, key))
    made, scale = by_block(random(100, 90), 48, 64)
    other = save(
        tmp_path, "b.safetensors", {f"{n}.weight{end}": part.clone() for n in "qk" for end, part in (("", made), ("_scale_inv", scale))}
    )
    with pytest.raises(CastError, match="is not known"):
        cs.merge(other, None, tmp_path / "p.pt", dequantize=True)
    told = {f"{n}.weight + {n}.weight_scale_inv -> {n}.weight": "dequantize(block=[48, 64])" for n in "qk"}
    cs.merge(other, None, tmp_path / "p.pt", adapt=told, dtype="F32")
    whole = scale.repeat_interleave(48, 0)[:100].repeat_interleave(64, 1)[:, :90]
    support.same(support.load(tmp_path / "p.pt"), dict.fromkeys(["q.weight", "k.weight"], made.float() * whole))
    crossed = {f"{n}.weight + {m}.weight_scale_inv -> {n}.weight": "dequantize(block=[48, 64])" for n, m in ("qk", "kq")}
    with pytest.raises(CastError):
        cs.merge(other, None, tmp_path / "r.pt", adapt=crossed)
    key, state, _ = layer("int8 with zero points")
    with pytest.raises(CastError):
        cs.merge(
            save(tmp_path, "z.safetensors", state), None, tmp_path / "z.pt", adapt={f"{key} + {MODULE}.weight_scale -> {key}": "dequantize"}
        )


def test_averages_of_values(tmp_path: Path) -> None:
    parts = [by_block(random(8, 16, seed=seed), 128, 128) for seed in (1, 2)]
    paths = [save(tmp_path, f"{n}.safetensors", {"w.weight": made, "w.weight_scale_inv": scale}) for n, (made, scale) in enumerate(parts)]
    cs.merge(paths, None, tmp_path / "o.pt", average=True, dequantize=True, dtype="F32")
    first, second = (made.float() * scale for made, scale in parts)
    assert torch.allclose(support.load(tmp_path / "o.pt")["w.weight"], (first + second) / 2, rtol=1e-6)
    _, state, _ = layer("bitsandbytes int8")
    path = save(tmp_path, "i.safetensors", state)
    with pytest.raises(PlanError, match="not averaged"):
        cs.merge([path, path], None, tmp_path / "p.pt", average=True, dequantize=True)


def test_int8_is_what_bitsandbytes_makes_of_it(tmp_path: Path) -> None:
    """Its own dequantisation of its own layer's state_dict, bit for bit, for every code."""
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: pip install bitsandbytes")
    every = torch.arange(-128, 128).to(torch.int8).repeat(64, 1)
    scale = random(64, seed=3).abs() * 100
    path = save(tmp_path, "a.safetensors", {"q.weight": every, "q.SCB": scale})
    cs.merge(path, None, tmp_path / "o.pt", dequantize=True, dtype="F32")
    assert torch.equal(support.load(tmp_path / "o.pt")["q.weight"], bnb.functional.int8_vectorwise_dequant(every, scale))
    layer = bnb.nn.Linear8bitLt(32, 16, bias=False, has_fp16_weights=False)
    layer.load_state_dict({"weight": random(16, 32)})
    state = layer.to("cpu").state_dict()
    if state["weight"].dtype != torch.int8:
        pytest.skip("this bitsandbytes quantises on a GPU only")
    path = save(tmp_path, "b.safetensors", {f"q.{name}": value for name, value in state.items() if isinstance(value, Tensor)})
    cs.merge(path, None, tmp_path / "o.pt", dequantize=True, dtype="F32", overwrite=True)
    assert torch.equal(support.load(tmp_path / "o.pt")["q.weight"], bnb.functional.int8_vectorwise_dequant(state["weight"], state["SCB"]))


@pytest.mark.parametrize(("form", "suffix"), [(2, "safetensors"), (3, "pt"), ("col_turing", "pt")])
def test_int8_in_the_order_of_a_gpu_is_refused(form: int | str, suffix: str, tmp_path: Path) -> None:
    """What bitsandbytes before 0.45 saves after a forward pass: its `weight_format` is the number or the name of the order."""
    key, state, _ = layer("bitsandbytes int8")
    value: Any = {**state, f"{MODULE}.weight_format": torch.tensor(form, dtype=torch.uint8) if isinstance(form, int) else form}
    path = tmp_path / f"a.{suffix}"
    (save_file if suffix == "safetensors" else torch.save)(value, path)
    for call in (
        lambda **more: cs.merge(path, None, tmp_path / "o.pt", **more),
        lambda **more: cs.plan(path, **more),
    ):
        with pytest.raises(CastError, match="the order of a GPU's kernels") as caught:
            call(dequantize=True)
        assert caught.value.key == key and not (tmp_path / "o.pt").exists()
        call()
        (tmp_path / "o.pt").unlink(missing_ok=True)
    model = torch.nn.Linear(16, 8, bias=False)
    renames = {"rename": {f"{MODULE}.{{p}}": "{p}"}, "drop": ["norm.weight"]}
    for source in (path, value):
        with pytest.raises(CastError, match="the order of a GPU's kernels"):
            cs.transfer(source, model, dequantize=True, **renames)


INDEX = "model.safetensors.index.json"
FIRST = "model-00001-of-00002.safetensors"


def one_shard(folder: Path, codes: Tensor, index: dict[str, str] | None, name: str = FIRST, key: str = "w.weight") -> Path:
    """A file of codes alone, beside what an index says of the others, if there is one."""
    if index is not None:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": {key: name, "norm.weight": name, **index}}))
    return save(folder, name, {key: codes, "norm.weight": torch.ones(4)})


SECOND = "model-00002-of-00002.safetensors"
APART: dict[str, tuple[str, Tensor, dict[str, str] | None, str]] = {
    "the index names the scale": ("w.weight", random(8, 16).to(FP8), {"w.weight_scale_inv": SECOND}, FIRST),
    "the index names the scale, and the file is called otherwise": ("w.weight", random(8, 16).to(FP8), {"w.weight_scale": "b.st"}, "a.st"),
    "int8": ("w.weight", codes(torch.int8, 8, 16), {"w.SCB": SECOND}, FIRST),
    "GPTQ": ("w.qweight", codes(torch.int32, 2, 8), {"w.scales": SECOND, "w.qzeros": SECOND}, FIRST),
    "fp8 without an index": ("w.weight", random(8, 16).to(FP8), None, FIRST),
    "int8 without an index": ("w.weight", codes(torch.int8, 8, 16), None, FIRST),
    "torch's format": ("w.weight", random(8, 16).to(FP8), None, "pytorch_model-00002-of-00003.pt"),
    "an index that can't be read": ("w.weight", random(8, 16).to(FP8), {"w": 3}, FIRST),  # type: ignore[dict-item]
}


@pytest.mark.parametrize("case", APART)
def test_codes_of_one_shard_whose_scales_stand_in_another(case: str, tmp_path: Path) -> None:
    """Copied bit for bit; a cast, an average and an adapter are refused by name, with where the whole is."""
    key, made, index, name = APART[case]
    path = one_shard(tmp_path, made, index, name, key)
    (tmp_path / "out").mkdir()
    cs.merge(path, None, tmp_path / "out" / "copied.pt")
    copied = torch.load(tmp_path / "out" / "copied.pt")[key]
    assert copied.dtype == made.dtype and torch.equal(copied.view(torch.uint8), made.view(torch.uint8))
    target = save(tmp_path / "out", "t.safetensors", {key: torch.zeros(made.shape), "norm.weight": torch.ones(4)})
    same = save(tmp_path / "out", "s.safetensors", {key: torch.zeros(made.shape).to(made.dtype), "norm.weight": torch.ones(4)})
    cs.merge(path, same, tmp_path / "out" / "same.pt")
    refused: list[Any] = [
        lambda **more: cs.merge(path, target, tmp_path / "out" / "no.pt", **more),
        lambda **more: cs.merge(path, None, tmp_path / "out" / "no.pt", adapt={key: "transpose"}, **more),
        lambda **more: cs.merge([path, path], None, tmp_path / "out" / "no.pt", average=True, **more),
        lambda **more: cs.plan(cs.open(path), target, **more),
    ]
    for call in refused:
        with pytest.raises(CastError) as caught:
            call()
        assert caught.value.key == key and "another shard" in caught.value.reason
        whole = str(tmp_path if index is None or "w" in index else tmp_path / INDEX)
        assert f"give the whole checkpoint: {whole};" in str(caught.value.hint) and not (tmp_path / "out" / "no.pt").exists()
        call(allow_cast=[key])
        (tmp_path / "out" / "no.pt").unlink(missing_ok=True)
    with pytest.raises(CastError, match="another shard"):
        cs.merge(path, None, tmp_path / "out" / "no.pt", dequantize=True)
    found = cs.diff(path, target)
    assert [one.key for one in found.quantised] == [key] and "give the whole checkpoint" in str(found)


def test_the_whole_that_the_hint_names_is_dequantized(tmp_path: Path) -> None:
    made, scale = by_block(random(8, 16), 128, 128)
    path = one_shard(tmp_path, made, {"w.weight_scale_inv": SECOND})
    save(tmp_path, SECOND, {"w.weight_scale_inv": scale})
    save(tmp_path, "t.pt", {"w.weight": torch.zeros(8, 16), "norm.weight": torch.zeros(4)})
    with pytest.raises(CastError) as caught:
        cs.merge(path, tmp_path / "t.pt", tmp_path / "o.pt")
    whole = str(caught.value.hint).removeprefix("give the whole checkpoint: ").partition(";")[0]
    cs.merge(whole, tmp_path / "t.pt", tmp_path / "o.pt", dequantize=True)
    assert torch.equal(support.load(tmp_path / "o.pt")["w.weight"], made.float() * scale)


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("model.safetensors", None),
        ("model-00001-of-00001.safetensors", None),
        (FIRST, {"v.weight": SECOND}),  # an index that lists all keys, and no scale
        ("model.safetensors", {"v.weight_scale": SECOND}),  # another weight's
        ("fp8-of-2024.safetensors", None),
    ],
)
def test_fp8_without_scales_stays_castable(name: str, index: dict[str, str] | None, tmp_path: Path) -> None:
    made = random(8, 16).to(FP8)
    path = one_shard(tmp_path, made, index, name)
    target = save(tmp_path, "t.pt", {"w.weight": torch.zeros(8, 16), "norm.weight": torch.ones(4)})
    cs.merge(path, target, tmp_path / "o.pt")
    assert torch.equal(support.load(tmp_path / "o.pt")["w.weight"], made.float())


def test_codes_that_are_all_bytes_are_averaged_by_name_only(tmp_path: Path) -> None:
    """An average takes integers from the first source, which would be half a model of one and half a mean."""
    state = {"w_blocks": codes(torch.uint8, 4, 2, 16), "w_scales": codes(torch.uint8, 4, 2), "norm.weight": random(4)}
    paths = [save(tmp_path, f"{n}.safetensors", {**state, "norm.weight": random(4, seed=n)}) for n in range(2)]
    with pytest.raises(CastError, match="no average") as caught:
        cs.merge(paths, None, tmp_path / "o.pt", average=True)
    assert caught.value.key == "w_blocks"
    cs.merge(paths, None, tmp_path / "o.pt", average=True, allow_cast="w_blocks")
    assert torch.equal(support.load(tmp_path / "o.pt")["w_blocks"], state["w_blocks"])


def test_another_name_of_codes_has_the_same_values(tmp_path: Path) -> None:
    made, scale = by_block(random(8, 16), 128, 128)
    path = tmp_path / "a.pt"
    torch.save({"w.weight": made, "w.weight_scale_inv": scale, "head.weight": made, "other.weight": made.clone()}, path)
    save(tmp_path, "t.safetensors", {name: torch.zeros(8, 16) for name in ("w.weight", "head.weight", "other.weight")})
    with pytest.raises(CastError) as caught:
        cs.merge(path, tmp_path / "t.safetensors", tmp_path / "o.pt")
    assert {problem.partition(":")[0] for problem in caught.value.problems} == {"w.weight", "head.weight"}
    cs.merge(path, tmp_path / "t.safetensors", tmp_path / "o.pt", dequantize=True)
    found = support.load(tmp_path / "o.pt")
    assert torch.equal(found["w.weight"], made.float() * scale) and torch.equal(found["head.weight"], found["w.weight"])
    assert torch.equal(found["other.weight"], made.float())  # bytes of its own and no scale: values
    cs.merge(path, None, tmp_path / "p.pt")
    copied = support.load(tmp_path / "p.pt")
    assert torch.equal(copied["head.weight"].view(torch.uint8), made.view(torch.uint8))
    assert copied["head.weight"].data_ptr() == copied["w.weight"].data_ptr()


def test_a_scale_beyond_float32_is_refused(tmp_path: Path) -> None:
    made = torch.full((8, 16), 448.0).to(FP8)
    path = save(tmp_path, "a.safetensors", {"w.weight": made, "w.weight_scale": torch.tensor(1e38), "n.weight": random(4)})
    with pytest.raises(CastError, match="float32") as caught:
        cs.merge(path, None, tmp_path / "o.pt", dequantize=True)
    assert caught.value.key == "w.weight" and "drop=[" in str(caught.value.hint)
    cs.merge(path, None, tmp_path / "o.pt", drop=["w.weight"])


def test_what_is_not_known_is_refused_by_name(tmp_path: Path) -> None:
    """Beside codes of which values are made, those that are not: named, unless they are left out or allowed."""
    key, state, _ = layer("GPTQ")
    made, scale = by_block(random(8, 16), 128, 128)
    path = save(tmp_path, "a.safetensors", {**state, "w.weight": made, "w.weight_scale_inv": scale})
    with pytest.raises(CastError) as caught:
        cs.merge(path, None, tmp_path / "o.pt", dequantize=True)
    assert caught.value.key == key and "GPTQ" in caught.value.message and "dequantize=True" not in str(caught.value.hint)
    cs.merge(path, None, tmp_path / "o.pt", dequantize=True, allow_cast=key)
    assert torch.equal(support.load(tmp_path / "o.pt")[key], state[key])
    cs.merge(path, None, tmp_path / "p.pt", dequantize=True, drop=[f"{MODULE}.**"])
    assert set(support.load(tmp_path / "p.pt")) == {"w.weight", "norm.weight"}


def test_scales_that_do_not_go_with_their_codes(tmp_path: Path) -> None:
    path = save(tmp_path, "a.safetensors", {"w.weight": random(8, 16).to(FP8), "w.weight_scale_inv": torch.ones(3, 5)})
    with pytest.raises(CheckpointError) as caught:
        cs.merge(path, None, tmp_path / "o.pt", dequantize=True)
    assert caught.value.exit_code == 2 and "w.weight" in caught.value.message
    with pytest.raises(RuleError):
        cs.merge(path, None, tmp_path / "o.pt", adapt={"w.weight + w.weight_scale_inv -> w": "dequantize(block=[128, 128])"})


def test_an_edited_plan_casts_no_codes(tmp_path: Path) -> None:
    from ckptsurgeon.planning import planfile

    _, state, _ = layer("fp8, by block")
    key = f"{MODULE}.weight"
    path = save(tmp_path, "a.safetensors", state)
    value = planfile.to_json(cs.plan(path))
    (row,) = [row for row in value["steps"] if row["target"] == key]
    row |= {"dtype": "BF16", "ops": [{"op": "cast", "dtype": "BF16"}]}
    (tmp_path / "plan.json").write_text(json.dumps(value))
    with pytest.raises(CastError):
        cs.apply(tmp_path / "plan.json", tmp_path / "o.pt")
    value["allow_cast"] = [key]
    (tmp_path / "plan.json").write_text(json.dumps(value))
    cs.apply(tmp_path / "plan.json", tmp_path / "o.pt")


def test_the_scheme_is_told_by_dtype_and_scales_together() -> None:
    """No row takes a float weight, save bitsandbytes' packed ones, nor codes that lack a scale."""
    for scheme in TABLE:
        for dtype in ("F32", "BF16", "F16", *sorted(scheme.dtypes)):
            key = f"m{scheme.ends or '.weight'}"
            stem = key.removesuffix(scheme.ends)
            tensors = {key: TensorMeta(key, dtype, (4, 4), (4, 1))}
            assert find(tensors) == {}
            for name in scheme.scales:
                tensors[stem + name] = TensorMeta(stem + name, "F64", (4,), (1,))
            assert (key in find(tensors)) is (dtype in scheme.dtypes)
