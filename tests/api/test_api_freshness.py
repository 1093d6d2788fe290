"""What was fresh in one merge and not trained since is fresh in the next: in the report, the record, the plan, and the groups made of them.

The oracle is the way each file is made: its trained tensors are those that the test itself wrote.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from profiles import examples
from torch import nn

import ckptsurgeon as cs
from ckptsurgeon.errors import PlanError
from ckptsurgeon.planning import planfile
from ckptsurgeon.planning.plan import make_plan
from ckptsurgeon.tensors import Checkpoint, TensorMeta

NETS = """
from torch import nn
class A(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.fc = nn.Linear(3, 3), nn.Linear(3, 2)
class B(nn.Module):
    def __init__(self, rows=2):
        super().__init__()
        self.a, self.out, self.z = nn.Linear(3, 3), nn.Linear(3, rows), nn.Linear(2, 2)
"""
FC = ("fc.weight", "fc.bias")
OUT = ("out.weight", "out.bias")
Z = ("z.weight", "z.bias")
RENAME = {"fc.{p}": "out.{p}"}


def nets(folder: Path) -> str:
    (folder / "nets.py").write_text(NETS)
    return f"{folder / 'nets.py'}:"


def merged(folder: Path) -> tuple[str, Path]:
    """A file whose `fc` is fresh on record: only `a` was ever trained."""
    spec = nets(folder)
    torch.save({"a.weight": torch.ones(3, 3), "a.bias": torch.ones(3)}, folder / "0.pt")
    assert cs.merge(folder / "0.pt", f"{spec}A", folder / "1.pt").fresh == FC
    return spec, folder / "1.pt"


class B(nn.Module):
    def __init__(self, rows: int = 2) -> None:
        super().__init__()
        self.a, self.out, self.z = nn.Linear(3, 3), nn.Linear(3, rows), nn.Linear(2, 2)


def groups(source: Any, rows: int = 2, **choices: Any) -> dict[str, list[str]]:
    return {group["name"]: group["param_names"] for group in cs.param_groups(B(rows), source, lr=1e-3, fresh_lr=1e-2, **choices)}


@pytest.mark.parametrize("suffix", ["pt", "safetensors"])
@pytest.mark.parametrize("dtype", [None, "BF16"])
def test_report_record_plan_and_transfer_agree(tmp_path: Path, suffix: str, dtype: str | None) -> None:
    spec, first = merged(tmp_path)
    between = tmp_path / f"between.{suffix}"
    cs.merge(first, None, between)
    second = tmp_path / f"2.{suffix}"
    report = cs.merge(between, f"{spec}B", second, rename=RENAME, dtype=dtype)
    assert (report.fresh, report.still_fresh, report.transferred) == ((*OUT, *Z), OUT, ("a.weight", "a.bias"))
    assert report.coverage.counts == (4, 6)  # the values did come from the file
    assert "4   initialised, 2 of them by an earlier merge and not trained since" in str(report)
    plan = cs.plan(between, f"{spec}B", rename=RENAME, dtype=dtype)
    assert next(step.reason for step in plan.steps if step.target == OUT[0]).endswith("fresh since an earlier merge")
    model = B()
    moved = cs.transfer(between, model, rename=RENAME)
    expected = {"transferred": ["a.weight", "a.bias"], "fresh": [*OUT, *Z]}
    for source in (report, second, plan, moved, cs.open(second)):
        assert groups(source) == expected
    # The values are the first merge's, and not drawn anew.
    assert torch.equal(model.out.weight, torch.load(first, weights_only=True)["fc.weight"])


def test_a_plan_on_disk_keeps_it(tmp_path: Path) -> None:
    spec, first = merged(tmp_path)
    (tmp_path / "plan.json").write_text(json.dumps(planfile.to_json(cs.plan(first, f"{spec}B", rename=RENAME))))
    report = cs.apply(cs.load_plan(tmp_path / "plan.json"), tmp_path / "2.pt")
    assert report.fresh == (*OUT, *Z) and groups(tmp_path / "2.pt") == groups(report)


def test_rows_that_are_grown_onto_a_fresh_head_are_fresh_with_it(tmp_path: Path) -> None:
    spec, first = merged(tmp_path)
    grow = {"out.weight": "pad(fill='init')", "out.bias": "pad(fill='init')"}
    report = cs.merge(first, f"{spec}B(rows=4)", tmp_path / "2.pt", rename=RENAME, adapt=grow)
    assert report.fresh == (*OUT, *Z) and report.partial == ()
    trained = {"a.weight": torch.ones(3, 3), "a.bias": torch.ones(3), "fc.weight": torch.ones(2, 3), "fc.bias": torch.ones(2)}
    torch.save(trained, tmp_path / "t.pt")
    report = cs.merge(tmp_path / "t.pt", f"{spec}B(rows=4)", tmp_path / "3.pt", rename=RENAME, adapt=grow)
    assert report.partial == OUT and report.fresh == Z
    again = cs.merge(tmp_path / "3.pt", f"{spec}B(rows=4)", tmp_path / "4.pt")
    assert again.partial == OUT and groups(again, 4, partial="fresh") == groups(tmp_path / "4.pt", 4, partial="fresh") == {
        "transferred": ["a.weight", "a.bias"],
        "fresh": [*OUT, *Z],
    }


def test_a_target_file_s_own_fresh_values_are_fresh_where_they_stay(tmp_path: Path) -> None:
    _, first = merged(tmp_path)
    report = cs.merge(tmp_path / "0.pt", first, tmp_path / "2.pt")
    assert (report.fresh, report.still_fresh, report.kept) == (FC, FC, FC)
    record = cs.open(tmp_path / "2.pt").provenance
    assert record is not None and tuple(record["fresh"]) == FC and tuple(record["kept"]) == FC


@pytest.mark.parametrize("other_is_fresh", [False, True])
def test_an_average_is_fresh_only_where_all_are(tmp_path: Path, other_is_fresh: bool) -> None:
    spec, first = merged(tmp_path)
    other = tmp_path / "other.pt"
    if other_is_fresh:
        cs.merge(tmp_path / "0.pt", f"{spec}A", other, seed=1)
    else:
        torch.save(torch.load(first, weights_only=True), other)  # saved by torch: trained, for all that is known
    report = cs.merge([first, other], None, tmp_path / "mean.pt", average=True)
    record = cs.open(tmp_path / "mean.pt").provenance
    assert record is not None and (tuple(record["fresh"]), tuple(record["partial"])) == (report.fresh, report.partial)
    assert (report.fresh, report.partial) == ((FC, ()) if other_is_fresh else ((), FC))


PLACES = ("w", "v", "u")


@given(
    st.lists(st.tuples(st.sets(st.sampled_from(PLACES)), st.sets(st.sampled_from(PLACES))), min_size=1, max_size=3),
)
@settings(max_examples=examples(60))
def test_a_join_is_fresh_where_all_is_partial_where_some_is(records: list[tuple[set[str], set[str]]]) -> None:
    sources = [
        Checkpoint(
            f"{number}.pt",
            "torch-zip",
            "0",
            {key: TensorMeta(key, "F32", (2,), (1,)) for key in PLACES},
            provenance={"fresh": sorted(fresh), "partial": sorted(partial - fresh)},
        )
        for number, (fresh, partial) in enumerate(records)
    ]
    plan = make_plan(sources, None, average=True) if len(sources) > 1 else make_plan(sources, None)
    for step in plan.steps:
        fresh = [step.target in one for one, _ in records]
        partial = [step.target in two for (_, two) in records]
        assert (step.target in plan.fresh) is all(fresh)
        assert (step.target in plan.partial) is (not all(fresh) and (any(fresh) or any(partial)))
        assert sum(step.target in names for names in (plan.fresh, plan.transferred, plan.kept)) == 1


def test_one_of_several_sources_of_which_nothing_is_used_is_an_error(tmp_path: Path) -> None:
    spec = nets(tmp_path)
    torch.save({"a.weight": torch.ones(3, 3), "a.bias": torch.ones(3)}, tmp_path / "0.pt")
    torch.save({"b.weight": torch.ones(3, 3)}, tmp_path / "other.pt")
    for order in (("0.pt", "other.pt"), ("other.pt", "0.pt")):
        for verb in (cs.plan, lambda sources, target: cs.merge(sources, target, tmp_path / "out.pt")):
            with pytest.raises(PlanError, match=r"nothing of it is used, and it is one of 2 sources") as error:
                verb([tmp_path / name for name in order], f"{spec}A")
            assert str(error.value.path) == str(tmp_path / "other.pt") and error.value.exit_code == 2
            assert "ckptsurgeon diff" in (error.value.hint or "")
    assert not (tmp_path / "out.pt").exists()
    # A single one is zero coverage, a true no; one whose only use is by a rule is used.
    with pytest.raises(cs.errors.CoverageError) as no:
        cs.plan(tmp_path / "other.pt", f"{spec}A")
    assert no.value.exit_code == 1
    plan = cs.plan([tmp_path / "0.pt", tmp_path / "other.pt"], f"{spec}B", drop="0:a.weight", rename={"1:b.weight": "a.weight"})
    assert plan.coverage.counts == (2, 6)
