"""plan.json, edited anywhere: refused in words, or followed to the same tensors where what was edited is commentary. Never anything else.

Every place of real plans is deleted, and set to a value of every kind; numbers are moved by one, texts taken from elsewhere in the plan.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from writing_support import Ended, content, inside, one_error, setting

import ckptsurgeon as cs
from ckptsurgeon.errors import CheckpointError, PlanError, StaleError
from ckptsurgeon.planning import planfile

Place = tuple[str | int, ...]
KINDS: tuple[Any, ...] = (None, True, False, 0, 1, -1, 10**30, 0.5, "", "x", "\x1b[31m", [], [0], ["first"], [[]], {}, {"a": 1}, [{}])
SAYS = ("steps",)  # what the plan decides: an edit that still adds up is a decision. Any other is refused, or changes no tensor


def places(value: Any, here: Place = ()) -> Iterator[Place]:
    """Every place in a JSON value, the whole excepted."""
    rows: Any = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, one in rows:
        yield (*here, name)
        yield from places(one, (*here, name))


def at(value: Any, place: Place) -> Any:
    for name in place:
        value = value[name]
    return value


def edits(value: Any) -> Iterator[tuple[Place, Any]]:
    """Each edit as a place and the plan that it makes."""
    texts = list(dict.fromkeys(one for place in places(value) if isinstance(one := at(value, place), str)))
    for place in places(value):
        old = at(value, place)
        others: list[Any] = list(KINDS)
        others += [old + 1, old - 1] if type(old) is int else []
        others += [text for text in texts if len(text) < 30] if isinstance(old, str) else []
        others += [old[:-1], [*old, old[-1]], old[::-1]] if isinstance(old, list) and old else []
        for other in (..., *others):
            edited = copy.deepcopy(value)
            holder = at(edited, place[:-1])
            if other is ...:
                del holder[place[-1]]
            else:
                holder[place[-1]] = other
            if edited != value:
                yield place, edited


def plans(folder: Path) -> dict[str, Any]:
    """A plan of each kind: a copy with everything in it, and conversions with adapters and casts."""
    setting(folder, 6)
    a, b = folder / "a.pt", folder / "b.pt"
    decided = {
        "target": cs.plan(a, b, rename={"first": "third"}, drop="second", keep="first"),
        "adapted": cs.plan(a, b, adapt={"first": "transpose"}, rename={"second": "second"}, dtype="BF16"),
        "convert": cs.plan(a, None, dtype="F16", rename={"first": "net.first"}, drop="second"),
        "average": cs.plan([a, b], None, average=[3, 1], drop="third"),
    }
    return {name: json.loads(json.dumps(planfile.to_json(plan))) for name, plan in decided.items()}


def tensors(path: Path) -> dict[str, Any]:
    return {key: (value.dtype, value.tolist()) for key, value in torch.load(path, weights_only=True).items()}


def differences(plan: Any, found: dict[str, torch.Tensor], folder: Path) -> list[str]:
    """Where a file is not what a plan's steps say, as torch sees it: names, dtypes, shapes, and values that only move."""
    given = [torch.load(row["path"], weights_only=True) for row in plan["sources"]]
    target = torch.load(folder / "b.pt", weights_only=True)
    steps = {step["target"]: step for step in plan["steps"]}
    wrong = [] if list(found) == list(steps) else ["its keys"]
    for key, step in steps.items():
        tensor = found[key]
        if (tensor.dtype, list(tensor.shape)) != (
            {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[step["dtype"]],
            step["shape"],
        ):
            wrong.append(key)
        if step["action"] in ("copy", "rename", "keep"):
            place = step["sources"][0] if step["sources"] else None
            origin = target[key] if place is None else given[place["file"]][place["key"]]
            wrong += [] if torch.equal(origin.to(tensor.dtype), tensor) else [key]
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["target", "adapted", "convert", "average"])
def test_every_edit_of_every_field_is_refused_or_changes_nothing(kind: str, tmp_path: Path) -> None:
    value = plans(tmp_path)[kind]
    out, plan = tmp_path / "out.pt", tmp_path / "plan.json"
    plan.write_text(json.dumps(value))
    cs.apply(plan, out)
    expected, before = tensors(out), None
    out.unlink()
    refused, followed = set(), set()
    for place, edited in edits(value):
        plan.write_text(json.dumps(edited))
        before = content(tmp_path)
        try:
            cs.apply(plan, out, verify=False)
        except CheckpointError as error:
            assert error.exit_code == 2 and "\x1b" not in str(error), (place, error)
            assert content(tmp_path) == before
            refused.add(place[0])
            continue
        followed.add(place[0])
        found = torch.load(out, weights_only=True)
        if place[0] in SAYS:
            assert not differences(edited, found, tmp_path), (place, at(edited, place[:-1]))
        else:
            assert tensors(out) == expected, (place, at(edited, place[:-1]))
        out.unlink()
    assert {"version", "sources", "steps", "dropped"} <= refused
    assert {"left_behind", "seed"} <= followed


def test_an_edited_plan_is_refused_by_the_program_in_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    value = plans(tmp_path)["target"]
    next(step for step in value["steps"] if step["action"] == "rename")["sources"] = [{"file": 0, "key": "nothing"}]
    (tmp_path / "plan.json").write_text(json.dumps(value))
    before = content(tmp_path)
    capfd.readouterr()
    ended = Ended(inside(monkeypatch, tmp_path, "apply", "plan.json", "-o", "out.pt"), *capfd.readouterr())
    one_error(ended, "the plan does not add up", "plan again")
    assert content(tmp_path) == before


@pytest.mark.parametrize("version", [0, 2, 1.0, "1", None, True, 10**40])
def test_a_plan_of_another_version(version: Any, tmp_path: Path) -> None:
    value = plans(tmp_path)["target"]
    (tmp_path / "plan.json").write_text(json.dumps({**value, "version": version}))
    with pytest.raises(PlanError, match=r"is a plan of version .*; this ckptsurgeon follows version 1"):
        cs.apply(tmp_path / "plan.json", tmp_path / "out.pt")


@pytest.mark.parametrize("which", ["a.pt", "b.pt"])
@pytest.mark.parametrize("change", ["renamed", "reshaped", "longer", "gone"])
def test_a_plan_whose_source_or_target_changed_is_stale(which: str, change: str, tmp_path: Path) -> None:
    (tmp_path / "plan.json").write_text(json.dumps(plans(tmp_path)["target"]))
    path = tmp_path / which
    found = torch.load(path, weights_only=True)
    if change == "renamed":
        torch.save({f"x{key[1:]}": value for key, value in found.items()}, path)
    elif change == "reshaped":
        torch.save({key: value[:3].clone() for key, value in found.items()}, path)
    elif change == "longer":
        torch.save({**found, "more": torch.zeros(1)}, path)
    else:
        path.unlink()
    before = content(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist" if change == "gone" else "has changed since the plan was made") as caught:
        cs.apply(tmp_path / "plan.json", tmp_path / "out.pt")
    assert isinstance(caught.value, StaleError) or change == "gone"
    assert caught.value.path == str(path) and content(tmp_path) == before
