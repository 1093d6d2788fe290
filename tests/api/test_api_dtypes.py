"""A dtype by any of its names, in every option and argument that takes one; torch's own attributes say what a name means."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import _TYPES, load_file, save_file

import ckptsurgeon as cs
from ckptsurgeon import dtypes
from ckptsurgeon.models.verify.forward import parse_input

TORCHS = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
OURS = {name: value for name, value in TORCHS.items() if str(value).removeprefix("torch.") in {row.torch for row in dtypes.TABLE}}
SHORT = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64, "f16": torch.float16}


def spellings(name: str) -> list[str]:
    mixed = "".join(random.Random(name).choice((letter.upper(), letter.lower())) for letter in name)
    return [name, name.upper(), name.lower(), mixed, f"torch.{name}", f" {name} "]


@pytest.mark.parametrize(
    ("name", "value"), [*OURS.items(), *SHORT.items(), *((code, kind) for code, kind in _TYPES.items() if code in dtypes.BY_CODE)]
)
def test_every_name_of_a_dtype_is_known(name: str, value: torch.dtype) -> None:
    for word in (*spellings(name), value):
        found = dtypes.named(word)
        assert found is not None and getattr(torch, found.torch) == value, word


def test_what_is_no_dtype_is_none() -> None:
    assert [dtypes.named(word) for word in ("", "torch", "float15", "source", None, 16)] == [None] * 6
    assert {dtypes.named(name) for name in dtypes.all_names()} == set(dtypes.TABLE)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    save_file({"w": torch.randn(3, 2), "n": torch.arange(3)}, "a.safetensors")
    return tmp_path


@pytest.mark.parametrize("word", ["bf16", "BF16", "bfloat16", "BFloat16", "torch.bfloat16", torch.bfloat16])
def test_a_merge_a_plan_and_a_check_take_any_of_them(place: Path, word: str | torch.dtype) -> None:
    cs.merge("a.safetensors", None, "out.safetensors", dtype=word)
    given, made = load_file("a.safetensors"), load_file("out.safetensors")
    assert torch.equal(made["w"], given["w"].to(torch.bfloat16)) and torch.equal(made["n"], given["n"])
    assert [step.cast for step in cs.plan("a.safetensors", dtype=word).steps if step.target == "w"] == ["BF16"]
    assert cs.check("out.safetensors", dtypes=word).ok and cs.check("out.safetensors", dtypes=[word, "I64"]).ok
    assert not cs.check("a.safetensors", dtypes=word).ok


@pytest.mark.parametrize("word", ["int64", "I64", torch.int64, "flaot16"])
def test_what_can_not_be_chosen_is_refused(place: Path, word: str | torch.dtype) -> None:
    with pytest.raises(cs.CheckpointError, match="dtype") as caught:
        cs.plan("a.safetensors", dtype=word)
    assert caught.value.hint == "one of source, target, F16, BF16, F32, F64"


@pytest.mark.parametrize("word", ["I64", "int64", "long", "torch.int64", "LONG"])
def test_an_input_of_a_forward_pass(word: str) -> None:
    assert parse_input(f"1x16:{word}")[1].code == "I64"
