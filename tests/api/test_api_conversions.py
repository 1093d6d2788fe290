"""What transformers saves has the names and layouts of a model's first release: read as transformers reads it, unasked.

The oracles are the model that was saved, and `from_pretrained`.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import MODULES, program
from safetensors.torch import save_file

import ckptsurgeon as cs

transformers = pytest.importorskip("transformers", minversion="5.0")
conversion_mapping = pytest.importorskip("transformers.conversion_mapping")

import transformers_models as models  # noqa: E402

# Each with what is special about it.
KINDS = {
    "mixtral": "experts are stacked, w1 and w3 joined",
    "qwen2_moe": "experts are stacked, gate and up joined",
    "gte": "gate and up are cut from one matrix",
    "nomic_bert": "gate and up are cut from one matrix, and q, k, v",
    "molmo2_text": "q, k and v are cut unequally, an embedding is joined of two",
    "inkling_mm_model": "gate and up in turn, element by element",
    "inkling2_loop_text": "queries of two tensors in another order",
    "kimi_k25": "fused rotary q, k, v of a vision tower",
    "mistral_large4": "rotary q and k, in pairs",
    "qwen3_vl_moe": "experts are turned where their shapes say so",
    "clip_vision_model": "a prefix that once was there, and is not in what is saved today",
    "bert": "nothing is converted",
    "step3p7": "fused rotary projections, their biases too",
    "hrm_text": "projections joined of several",
}

NET = "import transformers_models as models\n\n\ndef net():\n    return models.maker(models.small('{}'))(5)\n"


def run(folder: Path, *words: str) -> tuple[int, str]:
    """The exit code of the program, and all that it says."""
    ended = program(*words, folder=folder, modules=(*MODULES, "transformers"), PYTHONPATH=str(Path(__file__).parent))
    return ended.code, ended.out + ended.err


def made(name: str) -> Callable[[int], Any]:
    if name not in models.NAMES:
        pytest.skip(f"this transformers has no {name}")
    make = models.maker(models.small(name))
    assert make is not None
    return make


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, dict[str, torch.Tensor], Callable[[int], Any]]]:
    """By name: the folder that `save_pretrained` writes of a model, its values, and what makes another one."""
    found: dict[str, Any] = {}

    def save(name: str) -> Any:
        if name not in found:
            make = made(name)
            folder = tmp_path_factory.mktemp(name)
            model = make(0)
            model.save_pretrained(folder)
            found[name] = folder, model.state_dict(), make
        return found[name]

    return save


@pytest.mark.parametrize("name", KINDS)
def test_a_saved_folder_loads_whole_into_a_fresh_model(saved: Any, name: str) -> None:
    folder, truth, make = saved(name)
    model = make(1)
    assert models.unlike(model, truth)
    report = cs.transfer(folder, model, strict=True)
    assert models.unlike(model, truth) == []
    assert report.coverage.tensors == 1 and not report.dropped
    theirs = type(model).from_pretrained(folder, config=model.config)
    assert models.unlike(theirs, truth) == []


@pytest.mark.parametrize("name", KINDS)
def test_verify_and_check_say_that_it_fits(saved: Any, name: str) -> None:
    folder, truth, make = saved(name)
    model = make(1)
    found = cs.verify(folder, model)
    assert found.ok, found
    assert found.tensors == len(truth)
    assert cs.verify(folder, model, device="meta").ok
    assert cs.check(folder, against=model).ok
    assert cs.diff(folder, model).coverage.tensors == 1
    assert models.unlike(model, truth)  # none of these touches the model


@pytest.mark.parametrize("name", ["mixtral", "gte", "mistral_large4", "kimi_k25"])
def test_a_merge_writes_what_torch_loads_strictly(saved: Any, name: str, tmp_path: Path) -> None:
    folder, truth, make = saved(name)
    model = make(1)
    report = cs.merge(folder, model, tmp_path / "out.pt")
    assert report.verification is not None and report.verification.ok
    assert any(row.code == "conversions" and "transformers" in row.message for row in report.findings)
    fresh = make(2)
    fresh.load_state_dict(torch.load(tmp_path / "out.pt", weights_only=True))
    assert models.unlike(fresh, truth) == []
    again = cs.verify(tmp_path / "out.pt", model)  # it has the model's own names: nothing is converted twice
    assert again.ok and all(row.code != "conversions" for row in again.findings)
    other = make(3)
    cs.transfer(tmp_path / "out.pt", other)
    assert models.unlike(other, truth) == []


def test_a_prefix_of_an_earlier_release(saved: Any, tmp_path: Path) -> None:
    folder, truth, make = saved("clip_vision_model")
    values = transformers.modeling_utils.load_state_dict(str(folder / "model.safetensors"))
    save_file({f"vision_model.{key}": value for key, value in values.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    theirs = type(make(1)).from_pretrained(tmp_path, config=make(1).config)
    assert models.unlike(theirs, truth) == []
    model = make(1)
    cs.transfer(tmp_path, model, strict=True)
    assert models.unlike(model, truth) == []
    assert cs.verify(tmp_path / "model.safetensors", make(2)).ok
    done = cs.merge(tmp_path, make(2), tmp_path / "out.pt")
    assert done.verification is not None and done.verification.ok


def test_a_plan_has_ordinary_steps_that_say_whose_words_they_follow(saved: Any) -> None:
    folder, _, make = saved("mixtral")
    plan = cs.plan(folder, make(1))
    steps = {step.target: step for step in plan.steps}
    joined = steps["layers.0.mlp.experts.gate_up_proj"]
    assert [op["op"] for op in joined.ops] == ["stack", "concat"]
    assert joined.reason == f"convert (MergeModulelist and Concatenate, as transformers {transformers.__version__} reads it)"
    assert [key for _, key in joined.sources[:2]] == [f"layers.0.block_sparse_moe.experts.{number}.w1.weight" for number in (0, 1)]
    renamed = steps["layers.0.mlp.gate.weight"]
    assert (renamed.action, renamed.ops) == ("rename", ())
    assert json.loads(plan.to_json())["coverage"]["tensors"] == 1


@pytest.mark.slow
def test_a_plan_that_was_written_is_followed(saved: Any, tmp_path: Path) -> None:
    folder, truth, _ = saved("mixtral")
    (tmp_path / "net.py").write_text(NET.format("mixtral"))
    assert run(tmp_path, "plan", str(folder), "net:net", "-o", "plan.json")[0] == 0
    code, text = run(tmp_path, "apply", "plan.json", "-o", "out.safetensors")
    assert code == 0 and "verified" in text
    model = models.maker(models.small("mixtral"))(6)
    cs.transfer(tmp_path / "out.safetensors", model)
    assert models.unlike(model, truth) == []


@pytest.mark.parametrize("name", ["mixtral", "gte"])
def test_no_conversions_takes_names_as_they_are(saved: Any, name: str) -> None:
    folder, _, make = saved(name)
    model = make(1)
    plain, converted = cs.diff(folder, model, conversions=False), cs.diff(folder, model)
    assert plain.missing and plain.extra and not plain.conversions.library
    assert not converted.missing and not converted.extra and converted.conversions.made
    assert not cs.verify(folder, model, conversions=False).ok
    assert not cs.check(folder, against=model, conversions=False).ok
    assert cs.plan(folder, model, conversions=False).fresh
    assert set(plain.missing) == set(cs.transfer(folder, model, conversions=False).fresh)


def test_turning_off_what_is_not_there_is_refused(tmp_path: Path) -> None:
    model = torch.nn.Linear(2, 2)
    torch.save(model.state_dict(), tmp_path / "net.pt")
    for call in (cs.diff, cs.verify, cs.plan, cs.transfer, cs.match):
        with pytest.raises(cs.CheckpointError, match="--no-conversions"):
            call(tmp_path / "net.pt", model, conversions=False)
    with pytest.raises(cs.CheckpointError, match="--no-conversions"):
        cs.check(tmp_path / "net.pt", conversions=False)


@pytest.mark.parametrize("name", ["mixtral", "kimi_k25"])
def test_a_state_dict_with_the_models_own_names_is_taken_as_it_is(saved: Any, name: str, tmp_path: Path) -> None:
    _, truth, make = saved(name)
    torch.save(truth, tmp_path / "own.pt")
    model = make(1)
    report = cs.transfer(tmp_path / "own.pt", model)
    assert models.unlike(model, truth) == []
    assert all(row.code != "conversions" for row in report.findings)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "net.", "module.net."])
def test_below_a_wrappers_or_a_persons_prefix(saved: Any, prefix: str, tmp_path: Path) -> None:
    folder, truth, make = saved("mixtral")
    state = cs.open(folder)
    values = transformers.modeling_utils.load_state_dict(str(folder / "model.safetensors"))
    assert set(values) == set(state)
    torch.save({f"{prefix}{key}": value for key, value in values.items()}, tmp_path / "wrapped.pt")
    model = make(1)
    cs.transfer(tmp_path / "wrapped.pt", model)
    assert models.unlike(model, truth) == []


def test_of_several_roots_the_one_that_the_library_reads(saved: Any, tmp_path: Path) -> None:
    folder, truth, make = saved("mixtral")
    values = transformers.modeling_utils.load_state_dict(str(folder / "model.safetensors"))
    torch.save({"state_dict": values, "other": {"w": torch.zeros(2)}, "epoch": 3}, tmp_path / "training.pt")
    model = make(1)
    report = cs.transfer(tmp_path / "training.pt", model)
    assert report.roots == ("state_dict",)
    assert models.unlike(model, truth) == []


class Wrapped(torch.nn.Module):
    """A model of a person's own, with one of transformers in it."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.encoder = inner
        self.head = torch.nn.Linear(32, 3)


def test_a_model_of_the_library_within_a_persons_own(saved: Any, tmp_path: Path) -> None:
    folder, truth, make = saved("mixtral")
    model = Wrapped(make(1))
    report = cs.transfer(folder, model)
    assert models.unlike(model.encoder, truth) == []
    assert set(report.fresh) == {"head.weight", "head.bias"}
    compiled = torch.nn.Sequential(make(2))
    cs.transfer(folder, compiled)
    assert models.unlike(compiled[0], truth) == []
    # A training checkpoint of the whole, with the names that an earlier release had.
    values = transformers.modeling_utils.load_state_dict(str(folder / "model.safetensors"))
    head = {"head.weight": torch.ones(3, 32), "head.bias": torch.ones(3)}
    torch.save({**{f"encoder.{key}": value for key, value in values.items()}, **head}, tmp_path / "whole.pt")
    other = Wrapped(make(3))
    assert cs.transfer(tmp_path / "whole.pt", other).coverage.tensors == 1
    assert models.unlike(other, {f"encoder.{key}": value for key, value in truth.items()} | head) == []
    assert cs.verify(tmp_path / "whole.pt", Wrapped(make(4))).ok


def test_a_persons_rules_come_first(saved: Any) -> None:
    folder, truth, make = saved("mixtral")
    model = make(1)
    own = model.state_dict()["layers.1.mlp.gate.weight"].clone()
    report = cs.transfer(folder, model, drop=["layers.1.block_sparse_moe.gate.weight"])
    assert report.fresh == ("layers.1.mlp.gate.weight",)
    assert torch.equal(model.state_dict()["layers.1.mlp.gate.weight"], own)
    gate = "layers.{i}.block_sparse_moe.gate.weight"
    swapped = make(2)
    cs.transfer(folder, swapped, rename={gate: "layers.{1-i}.mlp.gate.weight"})
    assert torch.equal(swapped.state_dict()["layers.0.mlp.gate.weight"], truth["layers.1.mlp.gate.weight"])
    # A rule that leads to a name of the library's files is followed by the library's conversion.
    values = transformers.modeling_utils.load_state_dict(str(folder / "model.safetensors"))
    renamed = {key.replace("block_sparse_moe", "moe"): value for key, value in values.items()}
    by_rule = make(3)
    cs.transfer(renamed, by_rule, rename={"layers.{i}.moe.{**p}": "layers.{i}.block_sparse_moe.{p}"})
    assert models.unlike(by_rule, truth) == []


def test_match_leaves_alone_what_the_library_settles(saved: Any, tmp_path: Path) -> None:
    folder, truth, make = saved("gte")
    values = transformers.modeling_utils.load_state_dict(str(folder / "model.safetensors"))
    first = next(key for key in values if "word_embeddings" in key)
    torch.save({("tokens.weight" if key == first else key): value for key, value in values.items()}, tmp_path / "renamed.pt")
    model = make(1)
    cs.transfer(tmp_path / "renamed.pt", model, match=True, accept_uncertain=True)
    assert models.unlike(model, truth) == []


def test_what_is_not_there_stays_fresh_and_nothing_lands_elsewhere(saved: Any) -> None:
    folder, truth, make = saved("mixtral")
    values = transformers.modeling_utils.load_state_dict(str(folder / "model.safetensors"))
    less = {key: value for key, value in values.items() if key != "layers.0.block_sparse_moe.experts.3.w1.weight"}
    model = make(1)
    own = {key: value.clone() for key, value in model.state_dict().items()}
    report = cs.transfer(less, model)
    assert report.fresh == ("layers.0.mlp.experts.gate_up_proj",)
    gone = "layers.0.mlp.experts.gate_up_proj"
    assert torch.equal(model.state_dict()[gone], own[gone])
    assert models.unlike(model, {key: value for key, value in truth.items() if key != gone}) == []


def test_a_base_model_and_one_with_a_head_take_each_others_files(tmp_path: Path) -> None:
    config = models.small("mixtral")
    with_head = models.maker(config, transformers.AutoModelForCausalLM)
    base = models.maker(config)
    assert with_head is not None and base is not None
    one = with_head(0)
    one.save_pretrained(tmp_path / "head")
    inner = base(1)
    cs.transfer(tmp_path / "head", inner)
    assert models.unlike(inner, one.model.state_dict()) == []
    inner = base(2)
    inner.save_pretrained(tmp_path / "base")
    model = with_head(3)
    report = cs.transfer(tmp_path / "base", model)
    assert report.fresh == ("lm_head.weight",)
    assert models.unlike(model.model, inner.state_dict()) == []


def test_names_of_a_release_before_and_what_it_also_saved(tmp_path: Path) -> None:
    make = made("bert")
    truth = make(0).state_dict()
    old = {
        f"bert.{key}".replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): truth[key]
        for key in truth
    }
    old["bert.embeddings.position_ids"] = torch.arange(64)[None]
    save_file({key: value.clone() for key, value in old.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    theirs = type(make(1)).from_pretrained(tmp_path, config=make(1).config)
    assert models.unlike(theirs, truth) == []
    model = make(1)
    report = cs.transfer(tmp_path, model, strict=True)
    assert models.unlike(model, truth) == []
    assert [key for key, reason in report.dropped if "transformers" in reason] == ["bert.embeddings.position_ids"]
    assert cs.verify(tmp_path / "model.safetensors", make(2)).ok
    assert cs.check(tmp_path / "model.safetensors", against=make(2)).ok


def test_names_that_are_no_names_of_the_library_cost_nothing(saved: Any) -> None:
    folder, truth, make = saved("mixtral")
    values = transformers.modeling_utils.load_state_dict(str(folder / "model.safetensors"))
    strange = {"layers.\u00b2.mlp.w": torch.zeros(1), "layers." * 200_000 + "w": torch.zeros(1), "layers." + "9" * 6000: torch.zeros(1)}
    model = make(1)
    report = cs.transfer({**values, **strange}, model)
    assert models.unlike(model, truth) == []
    assert {key for key, _ in report.dropped} == set(strange)


def test_code_of_the_library_that_fails_is_told_with_the_way_round_it(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _, make = saved("mixtral")

    def fails(*_: Any) -> Any:
        raise KeyError("something")

    monkeypatch.setattr(transformers.core_model_loading, "rename_source_key", fails)
    with pytest.raises(cs.CheckpointError, match="--no-conversions"):
        cs.transfer(folder, make(1))
    assert cs.transfer(folder, make(1), conversions=False).transferred


def test_nothing_of_transformers_is_imported_for_another_target(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "net.pt")
    code = (
        "import sys, torch, ckptsurgeon as cs; cs.transfer('net.pt', torch.nn.Linear(2, 2)); cs.verify('net.pt', torch.nn.Linear(2, 2)); "
        "assert not any(name.partition('.')[0] == 'transformers' for name in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


def test_an_operation_that_is_no_adapter_leaves_its_keys_and_says_its_name(saved: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _, make = saved("mixtral")

    class Scramble(transformers.core_model_loading.ConversionOps):  # type: ignore[name-defined,misc]
        def convert(self, input_dict: Any, **_: Any) -> Any:
            return {"mlp.experts.down_proj": next(iter(input_dict.values()))[0].flip(0)}

    mapping = conversion_mapping.get_checkpoint_conversion_mapping("mixtral")
    down = next(one for one in mapping if getattr(one, "target_patterns", [""])[0].endswith("down_proj"))
    down.operations = [Scramble()]
    monkeypatch.setitem(conversion_mapping._checkpoint_conversion_mapping_cache, "mixtral", mapping)
    model = make(1)
    own = {key: value.clone() for key, value in model.state_dict().items()}
    found = cs.diff(folder, model)
    assert set(found.missing) == {f"layers.{layer}.mlp.experts.down_proj" for layer in (0, 1)}
    assert set(found.conversions.refused.values()) == {"Scramble: no adapter does what Scramble does"}
    assert "Scramble" in str(found) and "Scramble" in found.to_json()
    report = cs.transfer(folder, model)
    assert set(report.fresh) == set(found.missing)
    assert any(row.code == "conversion" and "Scramble" in row.message and row.level == "warning" for row in report.findings)
    assert any("Scramble" in reason for _, reason in report.dropped)
    down_keys = [key for key in own if key.endswith("down_proj")]
    assert models.unlike(model, {key: own[key] for key in down_keys}) == []
    checked = cs.verify(folder, make(2))
    assert not checked.ok and any("Scramble" in row.message for row in checked.findings)


@pytest.mark.slow
def test_the_command_line_says_it_and_turns_it_off(saved: Any, tmp_path: Path) -> None:
    folder, _, _ = saved("gte")
    (tmp_path / "net.py").write_text(NET.format("gte"))

    code, text = run(tmp_path, "diff", str(folder), "net:net", "--strict")
    assert code == 0 and f"names as transformers {transformers.__version__} reads them" in text
    assert run(tmp_path, "diff", str(folder), "net:net", "--strict", "--no-conversions")[0] == 1
    assert run(tmp_path, "verify", str(folder), "net:net")[0] == 0
    assert run(tmp_path, "verify", str(folder), "net:net", "--no-conversions")[0] == 1
    assert run(tmp_path, "check", str(folder), "--against", "net:net", "--no-config")[0] == 0
    assert run(tmp_path, "check", str(folder), "--against", "net:net", "--no-config", "--no-conversions")[0] == 1
    code, text = run(tmp_path, "merge", str(folder), "net:net", "-o", "out.safetensors")
    assert code == 0 and "names as transformers" in text, text
