"""A library's own conversions in a plan, by a library that is made up: which names they take, and which are left alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import planning_support as support
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ckptsurgeon.errors import RuleError
from ckptsurgeon.loading import Converted, Made, Shape
from ckptsurgeon.planning.own_loading.read_by_library import read_by_library
from ckptsurgeon.planning.plan import Plan, make_plan
from ckptsurgeon.planning.roots import choose
from ckptsurgeon.report import Finding
from ckptsurgeon.tensors import Checkpoint

NAMES = {"old.w": "new.w", "old.b": "new.b"}
TARGET = {"new.w": (2, 3), "new.b": (2,), "both": (4, 3), "plain": (5,)}
SAVED = {"old.w": (2, 3), "old.b": (2,), "one": (2, 3), "two": (2, 3), "plain": (5,)}


@dataclass(frozen=True)
class Library:
    """`old.` becomes `new.`, `one` and `two` are joined, `odd` is converted in a way of its own, `ids` are left out."""

    library: str = "lib 1"

    def convert(self, shapes: Mapping[str, Shape]) -> Converted:
        """See `Naming`."""
        renamed = {name: key for name, key in NAMES.items() if name in shapes}
        made, refused = {}, {}
        if {"one", "two"} <= set(shapes):
            rows = shapes["one"][0] + shapes["two"][0]
            ops = ({"op": "concat", "dim": 0, "of": 2},)
            made["both"] = Made(("one", "two"), ops, (rows, *shapes["one"][1:]), "Join")
        if "odd" in shapes:
            refused["odd"] = "Oddly: no adapter does what Oddly does"
        return Converted(renamed, made, refused, frozenset({"ids"} & set(shapes)))

    def may_lack(self, key: str) -> bool:
        """See `Naming`."""
        return key == "plain"


def target(shapes: support.Shapes = TARGET) -> Checkpoint:
    return support.model(shapes, naming=Library())


def planned(source: support.Shapes, *rules: object) -> Plan:
    return make_plan([support.checkpoint(source)], target(), rules)  # type: ignore[arg-type]


def origins(plan: Plan) -> dict[str, tuple[str, ...]]:
    return {step.target: tuple(key for _, key in step.sources) for step in plan.steps}


def test_renamed_and_made_and_as_it_is() -> None:
    plan = planned(SAVED)
    assert origins(plan) == {"new.w": ("old.w",), "new.b": ("old.b",), "both": ("one", "two"), "plain": ("plain",)}
    assert {step.target: step.reason for step in plan.steps} == {
        "new.w": "convert (as lib 1 reads it)",
        "new.b": "convert (as lib 1 reads it)",
        "both": "convert (Join, as lib 1 reads it)",
        "plain": "same name, same shape",
    }
    (note,) = [row for row in plan.findings if row.code == "conversions"]
    assert note.message == "names as lib 1 reads them: 2 renamed, 1 made of others (--no-conversions takes them as they are)"


def test_a_source_with_the_targets_names_and_shapes_is_left_alone() -> None:
    plan = planned({key: TARGET[key] for key in ("new.w", "new.b", "both", "plain")})
    assert all(step.action == "copy" for step in plan.steps) and not plan.findings


@given(st.sets(st.sampled_from([*SAVED, *TARGET])))
def test_a_name_that_the_source_has_and_keeps_is_its_own(names: set[str]) -> None:
    source = {name: {**SAVED, **TARGET}[name] for name in sorted(names | {"plain"})}
    plan = planned(source)
    for key, given_by in origins(plan).items():
        if key in source:
            assert given_by == (key,)
    used = {key for keys in origins(plan).values() for key in keys}
    assert used | {row.source for row in plan.dropped} == set(source)


def test_what_the_library_leaves_out_is_no_loose_key() -> None:
    plan = planned({**SAVED, "ids": (1,)})
    assert [(row.source, row.reason) for row in plan.dropped] == [("ids", "drop (as lib 1 reads it)")]
    assert plan.loose == ()


def test_what_is_no_adapter_is_left_with_its_name_and_a_warning() -> None:
    plan = planned({**SAVED, "odd": (7,)})
    why = "Oddly: no adapter does what Oddly does"
    assert [(row.source, row.reason) for row in plan.dropped] == [("odd", f"not converted: {why}")]
    assert Finding("conversion", f"is left as it is; lib 1 converts by {why}", "odd", "warning") in plan.findings


def test_what_comes_out_in_another_shape_stays_fresh() -> None:
    plan = planned({**SAVED, "two": (3, 3)})
    step = next(step for step in plan.steps if step.target == "both")
    assert step.fresh and not step.sources


def test_rules_come_first_and_may_lead_to_a_name_of_the_library() -> None:
    foreign = {key.replace("old.", "theirs."): shape for key, shape in SAVED.items()}
    assert origins(planned(foreign, support.rule("rename", "theirs.{p}", "old.{p}"))) == origins(planned(SAVED)) | {
        "new.w": ("theirs.w",),
        "new.b": ("theirs.b",),
    }
    assert origins(planned(SAVED, support.rule("drop", "old.w")))["new.w"] == ()
    with pytest.raises(RuleError):  # two keys of the source on one of the target's
        planned({**SAVED, "x": (2, 3)}, support.rule("rename", "x", "new.w"), support.rule("rename", "old.w", "new.w"))


@pytest.mark.parametrize("prefix", ["module.", "net.", "module.net."])
def test_below_a_prefix(prefix: str) -> None:
    plan = planned({f"{prefix}{key}": shape for key, shape in SAVED.items()})
    assert origins(plan) == {key: tuple(f"{prefix}{name}" for name in names) for key, names in origins(planned(SAVED)).items()}


def test_of_several_roots_the_one_that_it_reads() -> None:
    found = choose(support.archive({"a": {"w": (1,)}, "b": SAVED}), target=target())
    assert found.root == "b"


def test_a_checkpoint_as_the_library_reads_it() -> None:
    read = read_by_library(support.checkpoint({**SAVED, "ids": (1,)}), target())
    assert {key: tensor.shape for key, tensor in read.checkpoint.items()} == TARGET
    assert read.names == {"new.w": "old.w", "new.b": "old.b", "plain": "plain"}
    missing = Finding("missing", "is in the target only", "plain")
    assert [row.level for row in read.forgiven([missing, Finding("missing", "is in the target only", "both")])] == ["note", "error"]
    same = support.checkpoint(TARGET)
    assert read_by_library(same, target()).checkpoint is same
