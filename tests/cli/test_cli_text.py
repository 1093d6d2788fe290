"""Texts where a person would be lost in them: many keys, many findings, narrow terminals."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace

import pytest
import tabulate
from hypothesis import given
from hypothesis import strategies as st

from ckptsurgeon.command import Command
from ckptsurgeon.planning.diff import Diff, Mismatch, compare
from ckptsurgeon.planning.plan import make_plan
from ckptsurgeon.report import Cast, CheckReport, Coverage, FileCheck, Finding, Report, Verification
from ckptsurgeon.rules.rules import Rule, rule_options
from ckptsurgeon.tensors import Checkpoint, TensorMeta, contiguous_stride
from ckptsurgeon.views.text.merge import groups
from ckptsurgeon.views.text.words import aligned, broken, findings, fitted, pasted, table


def checkpoint(shapes: dict[str, tuple[int, ...]], form: str = "torch-zip", path: str = "net.pt") -> Checkpoint:
    tensors = {key: TensorMeta(key, "F32", dims, contiguous_stride(dims)) for key, dims in shapes.items()}
    return Checkpoint(path, form, "0" * 64, tensors)


def transformer(layers: int, width: int = 64) -> dict[str, tuple[int, ...]]:
    parts = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj", "input_norm")
    keys = {f"model.layers.{n}.{part}.weight": (width, width) for n in range(layers) for part in parts}
    return {"model.embed_tokens.weight": (1000, width), **keys, "lm_head.weight": (1000, width)}


def test_a_transformer_is_told_on_one_screen_of_eighty_columns():
    source = checkpoint(transformer(80))
    target = checkpoint(transformer(96) | {"lm_head.weight": (1200, 64)}, "model", "model:Net")
    for words in (compare(source, target).to_text(width=80), make_plan([source], target).to_text(width=80)):
        lines = words.splitlines()
        assert len(lines) <= 32 and max(map(len, lines)) <= 80, words
        assert "model.layers.{80..95}.self_attn.{q_proj,k_proj,v_proj,o_proj}.weight" in words
    long = make_plan([source], target).to_text(verbose=True)
    assert all(f"model.layers.{n}.mlp.up_proj.weight" in long for n in range(96))


def test_every_count_in_a_diff_reconciles_with_its_keys():
    source, target = checkpoint(transformer(4)), checkpoint(transformer(6) | {"lm_head.weight": (9, 64)}, path="other.pt")
    found = compare(source, target)
    words = found.to_text(verbose=True)
    assert len(found.matched) + len(found.missing) + len(found.mismatched) == len(target)
    for name, keys in (("matched", found.matched), ("missing", found.missing), ("extra", found.extra)):
        assert f"  {name:<11} {len(keys):>5}" in words and all(re.search(rf"^    {re.escape(key)}( |$)", words, re.M) for key in keys)


def test_many_of_a_kind_are_counted():
    rows = [(f"key{chr(97 + n)}",) for n in range(20)]
    lines = table(rows, None, 12)
    assert len(lines) == 13 and lines[9] == "    … 8 more (-v shows all)"
    assert [line.strip() for line in (*lines[:9], *lines[10:])] == [f"key{letter}" for letter in "abcdefghirst"]
    assert len(table(rows[:13], None, 12)) == 13  # never a line that says that one line more is hidden
    assert len(table(rows, None, None)) == 20


def test_the_last_cell_of_a_wide_row_stands_below():
    rows = [("a" * 30, "F32", "because of this and that"), ("b", "F32", "why")]
    assert table(rows, 50) == ["    " + "a" * 30 + "  F32", "        because of this and that", "    b  F32  why"]
    assert len(table(rows, None)) == 2


def test_lines_go_on_below_further_in():
    assert fitted(["  note: one two three four", "short"], 16) == "  note: one\n      two three\n      four\nshort"
    assert broken("x" * 50, 10) == ["x" * 50]


@pytest.mark.parametrize("width", [None, 200, 80, 40, 10])
def test_a_pasted_command_is_the_command_at_any_width(width):
    options = (("rename", "fc2.{p}", "dense2.{p}"), ("drop", "a b"))
    shown = pasted("Next:", Command("merge", "my net.pt", "model:Net", "merged.pt", options), width)
    words = ["ckptsurgeon", "merge", "my net.pt", "model:Net", "-o", "merged.pt", "--rename", "fc2.{p}", "dense2.{p}", "--drop", "a b"]
    assert shlex.split(shown.removeprefix("Next:").replace("\\\n", " ")) == words
    assert width is None or width < 40 or max(map(len, shown.splitlines())) <= max(width, 47)


def test_findings_that_say_the_same_stand_together_and_many_are_counted():
    same = [Finding("missing", "is in the target only", f"layers.{n}.weight") for n in range(50)]
    assert findings(same, False, None) == ["  error: 50 tensors are in the target only", "    layers.{0..49}.weight"]
    apart = [Finding("cast", f"is {n}", f"key{n}", "warning") for n in range(50)]
    assert len(findings(apart, False, None)) == 13 and findings(apart, False, None)[-1] == "  … and 38 findings more (-v shows all)"
    assert len(findings(apart, True, None)) == 50
    notes = [Finding("dtype", "loaded as F32 from F16", f"key{n}", "note") for n in range(3)]
    assert findings(notes, False, None) == ["  note: 3 tensors: loaded as F32 from F16"]
    assert len(findings([Finding("load", "x" * 5000)], False, None)[0]) < 250


def test_many_casts_are_summed_up_and_few_are_named():
    def report(count: int) -> str:
        casts = tuple(Cast(f"layer{n}", "F32", "F16", largest_error=n / 1000, changed=10) for n in range(count))
        return str(Report(("a.pt",), "model:Net", (), (), (), (), Coverage(1, 1), casts=casts, output="out.pt"))

    assert "    layer2  F32 → F16  10 values changed, by at most 0.002" in report(3)
    assert "lossy casts   400\n    F32 → F16  400 tensors  4,000 values changed, by at most 0.399" in report(400)


def test_a_failed_verification_never_says_that_it_is_verified():
    found = Verification("cpu", 3, (Finding("shape", "differs", "w"),), source="out.pt", target="model:Net")
    words = str(found)
    assert words.splitlines()[:2] == ["out.pt → model:Net: NOT ok", "  NOT verified on cpu: 1 error; 3 tensors compared"]
    warned = Verification(
        "cpu", 3, (Finding("non-finite", "has 2 values that are NaN", "w", "warning"),), source="out.pt", target="model:Net"
    )
    assert "out.pt → model:Net: ok\n  verified: 3 tensors" in str(warned)


def test_check_tells_a_warning_from_an_error_and_a_good_file_from_a_bad_one():
    warned = FileCheck("a.pt", (Finding("CK304", "is F16, in the target F32", "w", "warning"),))
    bad = FileCheck("b.pt", tuple(Finding("CK301", "is in the target only", f"layers.{n}.w") for n in range(9)))
    assert str(CheckReport((warned, bad))).splitlines() == [
        "a.pt: CK304 (warning) w: is F16, in the target F32",
        "b.pt: CK301 layers.{0..8}.w: are in the target only",
        "2 files checked, 1 not good (what a code means: ckptsurgeon check --explain CK301)",
    ]
    assert CheckReport((warned, bad)).to_text(verbose=True).count("b.pt: CK301 layers.") == 9
    many = FileCheck("c.pt", tuple(Finding("CK201", f"asks for os.f{n}") for n in range(100)))
    assert str(CheckReport((many,))).splitlines()[-2] == "c.pt: and 88 more (-v shows all)"


def test_the_next_command_takes_in_root_and_rules():
    found = compare(checkpoint({"a.w": (2,), "b.w": (3,)}), checkpoint({"x.w": (2,)}, path="other.pt"), [Rule("rename", "a.{p}", "x.{p}")])
    found = replace(found, options=rule_options([Rule("rename", "a.{p}", "x.{p}"), Rule("drop", "b.**")]))
    words = ("ckptsurgeon", "merge", "net.pt", "other.pt", "-o", "merged.pt", "--rename", "a.{p}", "x.{p}", "--drop", "b.**")
    following = found.next_command
    assert following is not None and following.words == words


def test_shapes_in_a_mismatch_read_from_source_to_target():
    source, target = checkpoint({"w": (3, 4), "v": (1,)}), checkpoint({"w": (5, 4), "v": (1,)}, path="other.pt")
    found: Diff = compare(source, target)
    assert found.mismatched == (Mismatch("w", (3, 4), (5, 4), "w"),)
    assert "    w  (3, 4)  →  (5, 4)" in str(found)


CELLS = st.text(st.sampled_from("ab層é\u0301|-"), max_size=6)


@given(st.lists(st.lists(CELLS, min_size=1, max_size=3), min_size=1, max_size=4))
def test_columns_are_as_wide_as_tabulate_makes_them(rows: list[list[str]]) -> None:
    found = aligned(rows)
    assert len(found) == len(rows)
    told = tabulate.tabulate(rows, tablefmt="plain", disable_numparse=True)
    if tabulate.wcwidth is not None and any(map(any, rows)):
        assert found == [line.rstrip() for line in told.split("\n")]


@pytest.mark.parametrize("width", [None, 80])
def test_groups_are_written_as_tabulate_writes_a_simple_table(width: int | None) -> None:
    names = ["first_stem.conv.weight", "norm.bias", "attention_pool.scale", "wte"]
    rows = [
        {"name": "transferred", "lr": 1e-3, "weight_decay": None, "params": names},
        {"name": "fresh", "lr": 1e-2, "weight_decay": 0.1, "params": ["head.weight"]},
    ]
    found = groups(rows, width=width)
    assert width is None or max(map(len, found.splitlines())) <= width
    joined = ", ".join(names)
    cells = [["transferred", "0.001", "", "4", joined], ["fresh", "0.01", "0.1", "1", "head.weight"]]
    headers = ["group", "lr", "weight decay", "tensors", "parameters"]
    told = tabulate.tabulate(cells, headers=headers, tablefmt="simple", disable_numparse=True)
    assert found == told if width is None else found.splitlines()[0] == told.splitlines()[0] and all(name in found for name in names)
