"""plan.json: a plan as a value that other programs read, and back. What is read is held against the files it names before it is followed.

A plan of another version, one that does not add up, or one whose source or target has changed is refused.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.errors import PlanError, StaleError
from ckptsurgeon.formats.json_text import integer, parse
from ckptsurgeon.surgery.plan import Dropped, Entry, Plan, PlanSource, PlanTarget, Step
from ckptsurgeon.tensors import Checkpoint, Coverage, TensorMeta

VERSION = 1
ACTIONS = ("copy", "rename", "adapt", "init", "keep")
OPS = {"cast": "dtype", "init": "scheme"}  # each op and the field it needs


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON's values. `from_json` gives the same plan back."""
    return {
        "version": VERSION,
        "sources": [
            {
                "path": source.path,
                "fingerprint": source.fingerprint,
                "format": source.format,
                "root": source.root,
                "prefix": dict(source.prefix),
            }
            for source in plan.sources
        ],
        "target": None
        if plan.target is None
        else {
            "spec": plan.target.spec,
            "fingerprint": plan.target.fingerprint,
            "kind": plan.target.kind,
            "root": plan.target.root,
        },
        "seed": plan.seed,
        "steps": [_step_to_json(step) for step in plan.steps],
        "dropped": [{"source": row.source, "reason": row.reason, "file": row.file} for row in plan.dropped],
        "entries": [{"target": entry.target, "source": _place(entry.source)} for entry in plan.entries],
        "module_metadata": {path: dict(local) for path, local in plan.module_metadata.items()},
        "ties": [list(group) for group in plan.ties],
        "left_behind": list(plan.left_behind),
        "allow_cast": list(plan.allow_cast),
        "coverage": {"tensors": plan.coverage.tensors, "elements": plan.coverage.elements},
    }


def _place(place: tuple[int, str] | None) -> dict[str, Any] | None:
    return None if place is None else {"file": place[0], "key": place[1]}


def _step_to_json(step: Step) -> dict[str, Any]:
    return {
        "target": step.target,
        "dtype": step.dtype,
        "shape": list(step.shape),
        "action": step.action,
        "sources": [_place(place) for place in step.sources],
        "ops": [dict(op) for op in step.ops],
        "fresh": step.fresh,
        "reason": step.reason,
    }


def from_json(raw: bytes, path: str) -> Plan:
    """A plan from the bytes of a plan.json. Raises PlanError, with the place, for anything that is none."""
    value = parse(raw, path, "plan")
    if not isinstance(value, dict) or "steps" not in value:
        raise PlanError("is not a plan", path=path, hint="make one with: ckptsurgeon plan CKPT TARGET -o plan.json")
    if value.get("version") != VERSION:
        raise PlanError(f"is a plan of version {str(value.get('version'))[:20]}; this ckptsurgeon follows version {VERSION}", path=path)
    try:
        return _plan(value)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise PlanError(f"is not a whole plan: {type(error).__name__} {str(error)[:120]}", path=path, hint="make it again") from error


def _plan(value: Mapping[str, Any]) -> Plan:
    sources = tuple(
        PlanSource(_text(row["path"]), _text(row["fingerprint"]), _text(row["format"]), _text(row["root"]), dict(row["prefix"]))
        for row in value["sources"]
    )
    target = value["target"]
    steps = tuple(_step(row, len(sources)) for row in value["steps"])
    if len({step.target for step in steps}) != len(steps):
        raise ValueError("two steps for one target key")
    covered = [step for step in steps if step.sources]
    return Plan(
        sources=sources,
        target=None
        if target is None
        else PlanTarget(_text(target["spec"]), _text(target["fingerprint"]), _text(target["kind"]), _text(target["root"])),
        seed=_whole(value["seed"]),
        steps=steps,
        dropped=tuple(Dropped(_whole(row["file"]), _text(row["source"]), _text(row["reason"])) for row in value["dropped"]),
        coverage=Coverage.of(_metas(covered), _metas(steps)),
        entries=tuple(Entry(_text(row["target"]), _source(row["source"], len(sources))) for row in value["entries"]),
        module_metadata={_text(name): dict(local) for name, local in value["module_metadata"].items()},
        ties=tuple(tuple(map(_text, group)) for group in value["ties"]),
        left_behind=tuple(map(_text, value["left_behind"])),
        allow_cast=tuple(map(_text, value["allow_cast"])),
    )


def _metas(steps: Sequence[Step]) -> dict[str, TensorMeta]:
    return {step.target: TensorMeta(step.target, step.dtype, step.shape, ()) for step in steps}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{str(value)[:40]!r} is not text")
    return value


def _whole(value: Any) -> int:
    if not integer(value):
        raise TypeError(f"{str(value)[:40]!r} is not a non-negative integer")
    return int(value)


def _source(value: Any, count: int) -> tuple[int, str] | None:
    if value is None:
        return None
    number = _whole(value["file"])
    if number >= count:
        raise ValueError(f"source {number} of {count}")
    return number, _text(value["key"])


def _step(row: Mapping[str, Any], count: int) -> Step:
    name, dtype, action, fresh = _text(row["target"]), _text(row["dtype"]), row["action"], row["fresh"]
    ops = tuple(dict(op) for op in row["ops"])
    if dtype not in BY_CODE or action not in ACTIONS or not isinstance(fresh, bool):
        raise ValueError(f"{name}: its dtype, action or fresh is unknown")
    for op in ops:
        if op.get("op") not in OPS or not isinstance(op.get(OPS[op["op"]]), str):
            raise ValueError(f"{name}: unknown op {str(op)[:60]}")
        if op["op"] == "cast" and op["dtype"] not in BY_CODE:
            raise ValueError(f"{name}: unknown dtype {op['dtype']!r}")
    sources = tuple(_source(place, count) for place in row["sources"])
    places = tuple(place for place in sources if place is not None)
    made = {"init": 0, "keep": 0}.get(action, 1)
    if (
        len(places) != made
        or len(sources) != made
        or fresh != (action == "init")
        or (action == "init") != any(op["op"] == "init" for op in ops)
    ):
        raise ValueError(f"{name}: its action {action!r} does not go with its sources and ops")
    return Step(name, dtype, tuple(map(_whole, row["shape"])), action, places, ops, fresh, _text(row["reason"]))


def check_followable(plan: Plan, sources: Sequence[Checkpoint], target: Checkpoint | None) -> None:
    """Raises StaleError when a file or target is not the one that was planned for, PlanError when the plan does not add up with them."""
    for planned, found in zip(plan.sources, sources, strict=True):
        if planned.fingerprint != found.fingerprint:
            raise StaleError("has changed since the plan was made", path=found.path, hint="plan again: ckptsurgeon plan … -o plan.json")
    if plan.target is not None and target is not None and plan.target.fingerprint != target.fingerprint:
        raise StaleError("has changed since the plan was made", path=target.path, hint="plan again: ckptsurgeon plan … -o plan.json")
    problems = [problem for step in plan.steps for problem in _step_problems(step, sources, target)]
    if target is not None:
        planned_keys = {step.target for step in plan.steps}
        problems += [f"{key}: has no step" for key in target if key not in planned_keys]
    problems += [f"{row.source}: is dropped, and is not in the source" for row in plan.dropped if row.source not in sources[row.file]]
    used = {place for step in plan.steps for place in step.sources} | {(row.file, row.source) for row in plan.dropped}
    problems += [f"{key}: has no fate" for number, source in enumerate(sources) for key in source if (number, key) not in used]
    if problems:
        raise PlanError("the plan does not add up", problems=tuple(problems[:20]), hint="it was edited, or damaged: plan again")


def _step_problems(step: Step, sources: Sequence[Checkpoint], target: Checkpoint | None) -> list[str]:
    problems = []
    wanted = None if target is None else target.get(step.target)
    if target is not None and wanted is None:
        return [f"{step.target}: is not in the target"]
    if wanted is not None and wanted.shape != step.shape:
        problems.append(f"{step.target}: has shape {wanted.shape} in the target, {step.shape} in the plan")
    origin = wanted
    for number, key in step.sources:
        origin = sources[number].get(key)
        if origin is None:
            problems.append(f"{step.target}: its source {key} is not there")
        elif origin.shape != step.shape:
            problems.append(f"{step.target}: its source {key} has shape {origin.shape}, not {step.shape}")
    result = step.cast or (origin.dtype if origin is not None else step.dtype)
    if result != step.dtype:
        problems.append(f"{step.target}: its ops give {result}, and its dtype says {step.dtype}")
    return problems
