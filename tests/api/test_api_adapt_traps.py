"""Traps in which wrong weights could be written without a word: ties, dtypes, arguments, numbers that shift. Each is told, or right."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckptsurgeon as cs
from ckptsurgeon.errors import CastError, CheckpointError, CoverageError, PlanError, RuleError, StrictError
from ckptsurgeon.planning import planfile
from ckptsurgeon.rules.patterns import compile_pattern


class Tied(nn.Module):
    def __init__(self, rows: int = 4) -> None:
        super().__init__()
        self.emb, self.head = nn.Embedding(rows, 3), nn.Linear(3, rows, bias=False)
        self.head.weight = self.emb.weight


def save(folder: Path, name: str, **tensors: torch.Tensor) -> Path:
    torch.save({key.replace("_", "."): value for key, value in tensors.items()}, folder / name)
    return folder / name


def load(path: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = torch.load(path, weights_only=True)
    return found


TURN = {"emb.weight": "rows(index=[3, 2, 1, 0])"}


@pytest.fixture
def tied(tmp_path: Path) -> Path:
    weight = torch.arange(12.0).view(4, 3)
    return save(tmp_path, "tied.pt", emb_weight=weight, head_weight=weight)


def test_a_tied_key_follows_what_adapters_make_of_the_other(tied: Path, tmp_path: Path) -> None:
    turned = torch.arange(12.0).view(4, 3).flip(0)
    model = Tied()
    cs.transfer(tied, model, adapt=TURN)
    assert torch.equal(model.emb.weight, turned)
    torch.save(Tied().state_dict(), tmp_path / "target.pt")
    for target, output in ((Tied(), "a.pt"), (tmp_path / "target.pt", "b.pt"), (tmp_path / "target.pt", "c.pt")):
        cs.merge(tied, target, tmp_path / output, adapt=TURN, verify=output != "c.pt")
        assert all(torch.equal(value, turned) for value in load(tmp_path / output).values())


def test_tied_keys_that_are_adapted_each_in_its_own_way_are_refused(tied: Path) -> None:
    with pytest.raises(RuleError, match="one tensor in the target, and each is adapted in its own way"):
        cs.plan(tied, Tied(), adapt={**TURN, "head.weight": "rows(index=[0, 1, 3, 2])"})


def test_two_sources_of_tied_keys_that_are_filled_up_are_not_taken_for_one(tmp_path: Path) -> None:
    save(tmp_path, "two.pt", emb_weight=torch.ones(2, 3), head_weight=torch.full((2, 3), 7.0))
    torch.save(Tied().state_dict(), tmp_path / "target.pt")
    report = cs.merge(
        tmp_path / "two.pt", tmp_path / "target.pt", tmp_path / "o.pt", adapt={"**.weight": "pad(fill='init', scheme='zeros')"}
    )
    made = load(tmp_path / "o.pt")
    assert made["emb.weight"][0, 0] == 1 and made["head.weight"][0, 0] == 7
    assert any(finding.code == "untied" for finding in report.findings)


# --- dtypes --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [torch.int64, torch.float16, torch.bfloat16])
def test_what_is_filled_in_need_not_fit_the_sources_dtype(tmp_path: Path, given: torch.dtype) -> None:
    save(tmp_path, "i.pt", w=torch.tensor([1, 2]).to(given))
    save(tmp_path, "t.pt", w=torch.zeros(4))
    adapt = {"w": "rows(index=[0, 1, -1, -1], fill='init', scheme='constant(70000.5)')"}
    cs.merge(tmp_path / "i.pt", tmp_path / "t.pt", tmp_path / "o.pt", adapt=adapt)
    assert load(tmp_path / "o.pt")["w"].tolist() == [1, 2, 70000.5, 70000.5]


def test_what_adapters_compute_need_not_fit_the_sources_dtype(tmp_path: Path) -> None:
    save(tmp_path, "h.pt", w=torch.full((2, 3, 1, 1), 40000.0, dtype=torch.float16))
    save(tmp_path, "wide.pt", w=torch.zeros(2, 1, 1, 1))
    save(tmp_path, "narrow.pt", w=torch.zeros(2, 1, 1, 1, dtype=torch.float16))
    cs.merge(tmp_path / "h.pt", tmp_path / "wide.pt", tmp_path / "o.pt", adapt={"w": "in_channels"})
    assert load(tmp_path / "o.pt")["w"].unique().tolist() == [120000.0]
    with pytest.raises(CastError, match="can't hold"):
        cs.merge(tmp_path / "h.pt", tmp_path / "narrow.pt", tmp_path / "n.pt", adapt={"w": "in_channels"})
    assert not (tmp_path / "n.pt").exists()


def test_a_copys_original_tells_its_cast_once(tmp_path: Path) -> None:
    save(tmp_path, "s.pt", a=torch.rand(3), b=torch.rand(3))
    torch.save({key: torch.zeros(3, dtype=torch.float16) for key in "abcd"}, tmp_path / "t.pt")
    report = cs.merge(tmp_path / "s.pt", tmp_path / "t.pt", tmp_path / "o.pt", init={"c": "from(a)", "d": "from(a)"})
    assert sorted(found.key for found in report.casts) == ["a", "b"]


def test_an_average_of_strided_and_dense_sources(tmp_path: Path) -> None:
    one, other = torch.rand(1100, 1100), torch.rand(1100, 1100)
    torch.save({"w": one}, tmp_path / "a.pt")
    torch.save({"w": other.t()}, tmp_path / "b.pt")
    for paths in (["a.pt", "b.pt"], ["b.pt", "a.pt"]):
        cs.merge([tmp_path / name for name in paths], None, tmp_path / "o.pt", average=True, overwrite=True)
        torch.testing.assert_close(load(tmp_path / "o.pt")["w"], (one + other.t()) / 2)


# --- arguments of a person's own -----------------------------------------------------------------------------------------------------

OWN = """
import ckptsurgeon as cs

@cs.adapter(shape=lambda shapes, **arguments: shapes[0])
def scale(tensors, **arguments):
    by = arguments.get("by")
    return tensors[0] * (by if isinstance(by, (int, float)) else len(by))
"""


@pytest.mark.parametrize("by", ["{1: 5.0}", "{1, 2}", "b'x'", "1e999", "2j", "...", "'\\ud800'"])
def test_arguments_that_a_plan_can_not_hold_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, by: str) -> None:
    (tmp_path / "own_scale.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    save(tmp_path, "a.pt", w=torch.ones(2))
    with pytest.raises(RuleError, match="nothing that a plan can hold"):
        cs.merge("a.pt", "a.pt", "o.pt", adapt={"w": f"own_scale.py:scale(by={by})"})


@pytest.mark.parametrize("name", ["tensors", "shapes", "self"])
def test_arguments_may_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "own_scale.py").write_text(OWN.replace("**arguments", "/, **arguments").replace('get("by")', f"get({name!r})"))
    monkeypatch.chdir(tmp_path)
    save(tmp_path, "a.pt", w=torch.ones(2))
    cs.merge("a.pt", "a.pt", "o.pt", adapt={"w": f"own_scale.py:scale({name}=3)"})
    assert load(tmp_path / "o.pt")["w"].tolist() == [3, 3]


def test_diff_imports_no_scheme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path, "a.pt", w=torch.ones(2))
    (tmp_path / "noisy.py").write_text("raise RuntimeError('imported')")
    (tmp_path / "rules.toml").write_text('[[init]]\nkey = "w"\nscheme = "noisy:f"\n')
    notes: list[str] = []
    cs.diff("a.pt", "a.pt", rules="rules.toml", note=notes.append)
    assert not notes


# --- names, parts and numbers --------------------------------------------------------------------------------------------------------


def test_safe_is_not_what_could_be_a_transpose(tmp_path: Path) -> None:
    save(tmp_path, "depthwise.pt", conv_weight=torch.rand(8, 1, 3, 3), fc_weight=torch.rand(1, 5))
    save(tmp_path, "dense.pt", conv_weight=torch.zeros(1, 8, 3, 3), fc_weight=torch.zeros(5, 1))
    with pytest.raises(CoverageError):
        cs.merge(tmp_path / "depthwise.pt", tmp_path / "dense.pt", tmp_path / "o.pt", auto="safe")


def test_parts_do_not_shift_where_the_target_counts_from_another_number(tmp_path: Path) -> None:
    save(tmp_path, "experts.pt", **{f"e_{number}": torch.full((2,), float(number)) for number in range(1, 5)})
    (tmp_path / "rules.toml").write_text('[[adapt]]\nfrom = "e.{i}"\nto = "w"\nop = "stack"\n')
    cs.merge(tmp_path / "experts.pt", None, tmp_path / "stacked.pt", rules=tmp_path / "rules.toml")
    with pytest.raises(RuleError, match=r"gives 'e\.0', which is not in the target"):
        cs.merge(tmp_path / "stacked.pt", tmp_path / "experts.pt", tmp_path / "back.pt", rules=tmp_path / "rules.toml", reverse=True)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        ({"rename": {"w": "w + tpyo"}}, "'tpyo', which is not in the target"),
        ({"adapt": {"qkv -> q + k + vv": "chunk"}}, "'vv', which is not in the target"),
    ],
)
def test_a_result_that_never_lands_is_an_error(tmp_path: Path, rules: Any, words: str) -> None:
    save(tmp_path, "a.pt", w=torch.ones(2), qkv=torch.ones(6))
    torch.save({"w": torch.zeros(2), "q": torch.zeros(2), "k": torch.zeros(2), "v": torch.zeros(2)}, tmp_path / "b.pt")
    with pytest.raises(RuleError, match=words):
        cs.plan(tmp_path / "a.pt", tmp_path / "b.pt", **rules)


def test_a_part_that_goes_nowhere_is_told_and_is_not_strict(tmp_path: Path) -> None:
    torch.save({"a.qk.w": torch.ones(4), "a.qk.b": torch.ones(4)}, tmp_path / "a.pt")
    torch.save({"a.q.w": torch.zeros(2), "a.k.w": torch.zeros(2), "a.q.b": torch.zeros(2)}, tmp_path / "b.pt")
    adapt = {"a.qk.{p} -> a.q.{p} + a.k.{p}": "chunk"}
    report = cs.merge(tmp_path / "a.pt", tmp_path / "b.pt", tmp_path / "o.pt", adapt=adapt)
    assert [finding.message for finding in report.findings] == ["a.k.b is not in the target, and what a.qk.b has for it goes nowhere"]
    with pytest.raises(StrictError):
        cs.plan(tmp_path / "a.pt", tmp_path / "b.pt", adapt=adapt, strict=True)


def test_averages_of_one_rule_go_over_equally_many_keys(tmp_path: Path) -> None:
    torch.save({f"l.{number}.w": torch.ones(2) for number in range(5)}, tmp_path / "a.pt")
    with pytest.raises(RuleError, match="some are not there"):
        cs.plan(tmp_path / "a.pt", None, adapt={"l.{i}.w -> m.{i//2}.w": "average"})


def test_a_grid_of_parts_has_no_hole(tmp_path: Path) -> None:
    torch.save({f"e.{a}.{b}": torch.ones(2) for a in range(2) for b in range(3) if (a, b) != (1, 1)}, tmp_path / "a.pt")
    with pytest.raises(RuleError, match="a full grid has 6"):
        cs.plan(tmp_path / "a.pt", None, adapt={"e.{a}.{b} -> w": "stack"})


def test_a_value_that_is_kept_is_not_tied_to_its_copy(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(2), "v": torch.zeros(2)}, tmp_path / "self.pt")
    cs.merge(tmp_path / "self.pt", tmp_path / "self.pt", tmp_path / "o.pt", rename={"w": "v"}, drop=["v"])
    made = load(tmp_path / "o.pt")
    assert made["w"].untyped_storage().data_ptr() != made["v"].untyped_storage().data_ptr()


def test_rows_that_all_are_filled_up_cover_nothing(tmp_path: Path) -> None:
    save(tmp_path, "a.pt", w=torch.ones(4))
    with pytest.raises(CoverageError):
        cs.merge(tmp_path / "a.pt", tmp_path / "a.pt", tmp_path / "o.pt", adapt={"w": "rows(index=[-1, -1, -1, -1], fill='zeros')"})


def test_partly_transferred_stays_on_record_in_the_next_merge(tmp_path: Path) -> None:
    save(tmp_path, "a.pt", w=torch.ones(2))
    save(tmp_path, "b.pt", w=torch.ones(4))
    cs.merge(tmp_path / "a.pt", tmp_path / "b.pt", tmp_path / "one.pt", adapt={"w": "pad"})
    cs.merge(tmp_path / "one.pt", tmp_path / "b.pt", tmp_path / "two.pt")
    assert (cs.open(tmp_path / "two.pt").provenance or {})["partial"] == ["w"]


# --- too much ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "op", ["pad(size=100000000000000) | slice(start=0, stop=2)", "rows(index=[0, 1], dim=9)", "reshape(shape=[1, 2, 3])"]
)
def test_what_no_machine_can_make_is_refused(tmp_path: Path, op: str) -> None:
    save(tmp_path, "a.pt", w=torch.ones(2))
    with pytest.raises(CheckpointError):
        cs.merge(tmp_path / "a.pt", tmp_path / "a.pt", tmp_path / "o.pt", adapt={"w": op})


@pytest.mark.parametrize("pattern", ["**a**a**a**a**a**b", "*a*a*a*a*a*b", "{**a}.{**b}.{**c}.{**d}.{**e}"])
def test_patterns_that_could_take_for_ever_are_refused(pattern: str) -> None:
    with pytest.raises(RuleError, match="several rules"):
        compile_pattern(pattern)


def test_an_own_adapters_shape_in_a_plan_is_bounded(tmp_path: Path) -> None:
    save(tmp_path, "a.pt", w=torch.ones(2))
    value = planfile.to_json(cs.plan(tmp_path / "a.pt", None))
    step = value["steps"][0]
    step |= {"action": "adapt", "shape": [2**61, 2**61], "ops": [{"op": "a:b", "shape": [2**61, 2**61], "arguments": {}}]}
    (tmp_path / "plan.json").write_text(json.dumps(value))
    with pytest.raises(CheckpointError):
        cs.apply(tmp_path / "plan.json", tmp_path / "o.pt")


def test_many_idle_rules_are_told_soon(tmp_path: Path) -> None:
    """Close names are looked for where they are shown: 400 rules for another model would take more than a minute otherwise."""
    torch.save({f"model.layers.{n}.part{p}.weight": torch.zeros(1) for n in range(100) for p in range(10)}, tmp_path / "a.pt")
    rules = "".join(f'[[drop]]\nkey = "encoder.block{n}.attention.weight"\n' for n in range(400))
    (tmp_path / "rules.toml").write_text(rules)
    code = "import sys, ckptsurgeon as cs\ntry: cs.plan(sys.argv[1], None, rules=sys.argv[2])\n"
    code += "except cs.CheckpointError as error: print(len(error.problems))"
    words = [sys.executable, "-c", code, str(tmp_path / "a.pt"), str(tmp_path / "rules.toml")]
    assert subprocess.run(words, capture_output=True, timeout=60, check=True).stdout == b"21\n"


def test_orthogonal_values_do_not_depend_on_the_number_of_threads() -> None:
    from ckptsurgeon.models.init.initialize import value

    before, found = torch.get_num_threads(), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(value("orthogonal", "w", (64, 64), "F32", 0, None))
    torch.set_num_threads(before)
    assert torch.equal(*found)


def test_a_plan_error_is_no_traceback_where_torch_has_no_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ckptsurgeon.streaming import adapting

    def full(*_: Any) -> Any:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(adapting, "run", full)
    torch.save({"w": torch.ones(2, 3)}, tmp_path / "a.pt")
    with pytest.raises(PlanError, match="can't allocate memory"):
        cs.merge(tmp_path / "a.pt", None, tmp_path / "o.pt", adapt={"w": "transpose"})
    assert not list(tmp_path.glob("o*"))


# --- two values for one tensor, and what is asked for and does nothing -----------------------------------------------------------------


def test_two_values_for_one_tensor_of_a_model_are_refused(tmp_path: Path) -> None:
    save(tmp_path, "two.pt", emb_weight=torch.rand(4, 3), head_weight=torch.rand(4, 3))
    model = Tied()
    before = model.emb.weight.detach().clone()
    with pytest.raises(PlanError, match=r"is one tensor with emb\.weight in the target"):
        cs.transfer(tmp_path / "two.pt", model)
    assert torch.equal(model.emb.weight, before)
    for suffix in (".pt", ".safetensors"):
        with pytest.raises(PlanError, match=r"drop=\['head\.weight'\]"):
            cs.merge(tmp_path / "two.pt", Tied(), tmp_path / f"o{suffix}", verify=False)
        assert not (tmp_path / f"o{suffix}").exists()
    cs.merge(tmp_path / "two.pt", Tied(), tmp_path / "o.pt", drop=["head.weight"])


def test_equal_values_for_one_tensor_of_a_model_are_one(tmp_path: Path) -> None:
    weight = torch.rand(4, 3)
    save(tmp_path, "two.pt", emb_weight=weight, head_weight=weight.clone())
    model = Tied()
    cs.transfer(tmp_path / "two.pt", model)
    cs.merge(tmp_path / "two.pt", Tied(), tmp_path / "o.safetensors")
    assert torch.equal(model.head.weight, weight)


def test_reverse_without_a_rules_file_is_an_error(tmp_path: Path) -> None:
    save(tmp_path, "a.pt", w=torch.ones(2))
    with pytest.raises(RuleError, match="no rules file to turn round"):
        cs.plan(tmp_path / "a.pt", None, rename={"w": "v"}, reverse=True)


def test_a_field_that_a_step_does_not_have_is_refused(tmp_path: Path) -> None:
    save(tmp_path, "a.pt", w=torch.ones(2))
    value = planfile.to_json(cs.plan(tmp_path / "a.pt", None))
    value["steps"][0]["init"] = "zeros"
    (tmp_path / "plan.json").write_text(json.dumps(value))
    with pytest.raises(PlanError, match="a step has no field 'init'"):
        cs.apply(tmp_path / "plan.json", tmp_path / "o.pt")


def test_rows_say_how_many_come_from_the_source(tmp_path: Path) -> None:
    save(tmp_path, "a.pt", w=torch.ones(4, 2))
    save(tmp_path, "b.pt", w=torch.ones(6, 2))
    found = cs.plan(tmp_path / "a.pt", tmp_path / "b.pt", adapt={"w": "rows(index=[0, 1, 3, -1, -1, -1], fill='mean')"}).findings
    assert [finding.message for finding in found] == ["3 of 6 rows come from the source, the rest is filled: mean"]


def test_a_source_key_is_told_from_a_targets(tmp_path: Path) -> None:
    save(tmp_path, "a.pt", pos_embed=torch.ones(2))
    torch.save({"position": torch.ones(2)}, tmp_path / "b.pt")
    with pytest.raises(RuleError, match=r"link it: 'pos\.embed -> position'"):
        cs.plan(tmp_path / "a.pt", tmp_path / "b.pt", adapt={"pos.embed": "slice(start=0, stop=2)"})


@pytest.mark.parametrize("link", ["q.w + k.w -> qk", "q.w+k.w->qk", "q.w  +k.w ->  qk"])
def test_a_link_needs_no_blanks(tmp_path: Path, link: str) -> None:
    torch.save({"q.w": torch.zeros(1), "k.w": torch.ones(1)}, tmp_path / "a.pt")
    plan = cs.plan(tmp_path / "a.pt", None, adapt={link: "concat"})
    assert plan.steps[0].sources == ((0, "q.w"), (0, "k.w"))


def test_two_whole_files_collide_in_one_line(tmp_path: Path) -> None:
    torch.save({f"l{number}.w": torch.zeros(1) for number in range(40)}, tmp_path / "a.pt")
    with pytest.raises(RuleError) as error:
        cs.plan([tmp_path / "a.pt", tmp_path / "a.pt"], tmp_path / "a.pt")
    assert (
        len(error.value.problems) == 1
        and "and on 39 more names" in error.value.problems[0]
        and error.value.hint is not None
        and error.value.hint.startswith("for the mean of all of them: average=True")
        and error.value.hint.endswith(f"give one of the two files only: {tmp_path / 'a.pt'} has nothing else")
    )
