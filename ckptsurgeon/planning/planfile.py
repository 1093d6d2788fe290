"""Writes a plan as JSON (plan.json) and reads it back. Before a plan is applied, it is compared with the files that it names.

A plan of another version, one that contradicts itself, or one whose source or target has changed is refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ckptsurgeon.adapters.chain import can_compute, check_fields, infer_chain, made_dtype
from ckptsurgeon.adapters.table import is_user_adapter
from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.errors import CheckpointError, PlanError, RuleError, StaleError
from ckptsurgeon.formats.json_text import integer, parse, short
from ckptsurgeon.hints import shortened
from ckptsurgeon.planning.keys import SourceKey
from ckptsurgeon.planning.own_loading import computed
from ckptsurgeon.planning.plan_types import FROM_MODEL, Dropped, Entry, Plan, PlanSource, PlanTarget, Step, copied_key
from ckptsurgeon.planning.quantised_weights.refuse import refuse_broken
from ckptsurgeon.report import Coverage, Finding
from ckptsurgeon.rules.copied_value import follow
from ckptsurgeon.rules.patterns import compile_pattern
from ckptsurgeon.tensors import Checkpoint, Refused, TensorMeta

VERSION = 1
OPS = {"cast": "dtype", "init": "scheme", "load": "by"}  # each op that is no adapter, and the field it needs
# By action: whether a step reads sources, and which ops it may have, where None stands for one adapter or more.
ACTIONS: Mapping[str, tuple[bool, tuple[tuple[str | None, ...], ...]]] = {
    "copy": (True, ((), ("cast",))),
    "rename": (True, ((), ("cast",))),
    "adapt": (True, ((None,), (None, "cast"))),
    "load": (True, (("load",), ("load", "cast"))),
    "init": (False, (("init",), ("init", "cast"))),
    "keep": (False, ((), ("cast",))),
}
STEP = ("target", "dtype", "shape", "action", "sources", "ops", "fresh", "reason")
LEVELS = ("error", "warning", "note")
DATA = ("sample", "sha256")  # optional digests of a file's data
_SHA256 = re.compile("[0-9a-f]{64}")


def _data(planned: PlanSource | PlanTarget) -> dict[str, str]:
    return {name: getattr(planned, name) for name in DATA if getattr(planned, name)}


def to_json(plan: Plan) -> dict[str, Any]:
    """The plan as JSON values, from which `from_json` makes the same plan."""
    target = plan.target
    return {
        "version": VERSION,
        "sources": [
            {
                "path": source.path,
                "fingerprint": source.fingerprint,
                "format": source.format,
                "root": source.root,
                "prefix": dict(source.prefix),
                **_data(source),
            }
            for source in plan.sources
        ],
        "target": target
        and {"spec": target.spec, "fingerprint": target.fingerprint, "kind": target.kind, "root": target.root, **_data(target)},
        "seed": plan.seed,
        "steps": [
            {
                "target": step.target,
                "dtype": step.dtype,
                "shape": list(step.shape),
                "action": step.action,
                "sources": [_source_key(source_key) for source_key in step.sources],
                "ops": [dict(op) for op in step.ops],
                "fresh": step.fresh,
                "reason": step.reason,
                **({"partial": True} if step.partial else {}),
            }
            for step in plan.steps
        ],
        "dropped": [{"source": row.source, "reason": row.reason, "file": row.file} for row in plan.dropped],
        "entries": [{"target": entry.target, "source": _source_key(entry.source)} for entry in plan.entries],
        "module_metadata": {path: dict(local) for path, local in plan.module_metadata.items()},
        "versions": {path: dict(local) for path, local in plan.versions.items()},
        "loaded": list(plan.loaded),
        **({"handed": {name: _source_key(source_key) for name, source_key in plan.handed.items()}} if plan.handed else {}),
        "ties": [list(group) for group in plan.ties],
        "left_behind": list(plan.left_behind),
        "allow_cast": list(plan.allow_cast),
        "coverage": {"tensors": plan.coverage.tensors, "elements": plan.coverage.elements},
        "findings": [{"code": row.code, "key": row.key, "message": row.message, "level": row.level} for row in plan.findings],
        "loose": list(plan.loose),
        **({"max_shard_size": plan.max_shard_size} if plan.max_shard_size else {}),
    }


def _source_key(source_key: SourceKey | None) -> dict[str, Any] | None:
    return None if source_key is None else {"file": source_key[0], "key": source_key[1]}


def from_json(raw: bytes, path: str) -> Plan:
    """The plan in the bytes of a plan.json. PlanError, which names the step or field, for anything that is not a plan."""
    try:
        value = parse(raw, path, "plan")
    except CheckpointError as error:
        raise PlanError(error.reason, path=path, hint=error.hint) from error
    if not isinstance(value, dict) or "steps" not in value:
        raise PlanError("is not a plan", path=path, hint="make one, as this shows: ckptsurgeon help plan")
    version = value.get("version")
    if type(version) is not int or version != VERSION:
        words = f"is a plan of version {_version(version)}; this ckptsurgeon follows version {VERSION}"
        raise PlanError(words, path=path, hint="make it again, as this shows: ckptsurgeon help plan")
    try:
        return _plan(value)
    except (KeyError, TypeError, ValueError, OverflowError, CheckpointError) as error:
        missing = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise PlanError(
            f"is not a whole plan: {missing[:200]}", path=path, hint="make it again, as this shows: ckptsurgeon help plan"
        ) from error


def _version(value: Any) -> str:
    """A version, for an error message."""
    return str(value) if integer(value) else short(value)


def _plan(value: Mapping[str, Any]) -> Plan:
    sources = tuple(_plan_source(row) for row in _rows(value["sources"]))
    target = None if value["target"] is None else _plan_target(_row(value["target"]))
    steps = tuple(_step(row, len(sources), target) for row in _rows(value["steps"]))
    entries = tuple(
        Entry(_text(row["target"]), None if row["source"] is None else _source(_row(row["source"]), len(sources)))
        for row in _rows(value["entries"])
    )
    keys = [*(step.target for step in steps), *(entry.target for entry in entries)]
    if not sources or len(set(keys)) != len(keys):
        raise ValueError("two steps for one target key" if sources else "no source")
    if target is None and any(entry.source is None for entry in entries):
        raise ValueError("a value of a target, and no target")
    ties = tuple(tuple(_texts(group)) for group in _list(value["ties"]))
    known = {step.target for step in steps}
    if not all(key in known for group in ties for key in group):
        raise ValueError("a tie between keys that have no step")
    allow_cast = tuple(_texts(value["allow_cast"]))
    for pattern in allow_cast:
        compile_pattern(pattern)
    return Plan(
        sources=sources,
        target=target,
        seed=_whole(value["seed"]),
        steps=steps,
        dropped=tuple(
            Dropped(_number(row["file"], len(sources)), _text(row["source"]), _text(row["reason"])) for row in _rows(value["dropped"])
        ),
        coverage=Coverage.of(
            _metas(step for step in steps if step.sources), _metas(steps), sum(step.filled for step in steps if step.sources)
        ),
        entries=entries,
        module_metadata={name: _local(local) for name, local in _row(value["module_metadata"]).items()},
        versions={name: _local(local) for name, local in _row(value["versions"]).items()},
        loaded=tuple(_texts(value["loaded"])),
        handed={name: _source(_row(source_key), len(sources)) for name, source_key in _row(value.get("handed", {})).items()},
        ties=ties,
        left_behind=tuple(_texts(value["left_behind"])),
        allow_cast=allow_cast,
        findings=tuple(_finding(row) for row in _rows(value["findings"])),
        loose=tuple(_texts(value["loose"])),
        max_shard_size=_whole(value.get("max_shard_size", 0)) or None,
    )


def _metas(steps: Iterable[Step]) -> dict[str, TensorMeta]:
    return {step.target: TensorMeta(step.target, step.dtype, step.shape, ()) for step in steps}


def _list(value: Any) -> list[Any]:
    if type(value) is not list:
        raise TypeError(f"a value {short(value)} where a list belongs")
    return value


def _row(value: Any) -> dict[str, Any]:
    if type(value) is not dict:
        raise TypeError(f"a value {short(value)} where an object belongs")
    return value


def _rows(value: Any) -> list[dict[str, Any]]:
    return [_row(row) for row in _list(value)]


def _text(value: Any) -> str:
    if type(value) is not str:
        raise TypeError(f"a value {short(value)} where text belongs")
    return value


def _texts(value: Any) -> list[str]:
    return [_text(text) for text in _list(value)]


def _whole(value: Any) -> int:
    if not integer(value):
        raise TypeError(f"a value {short(value)} where a whole number belongs")
    return int(value)


def _number(value: Any, count: int) -> int:
    if _whole(value) >= count:
        raise ValueError(f"source {value}, and there are {count}")
    return int(value)


def _source(row: Mapping[str, Any], count: int) -> SourceKey:
    return _number(row["file"], count), _text(row["key"])


def _plan_source(row: Mapping[str, Any]) -> PlanSource:
    prefix = _row(row["prefix"])
    for value in prefix.values():
        _texts(value) if type(value) is list else _text(value)
    data = {name: _digest(row, name) for name in DATA if name in row}
    return PlanSource(_text(row["path"]), _digest(row), _text(row["format"]), _text(row["root"]), prefix, **data)


def _plan_target(row: Mapping[str, Any]) -> PlanTarget:
    data = {name: _digest(row, name) for name in DATA if name in row}
    return PlanTarget(_text(row["spec"]), _digest(row), _text(row["kind"]), _text(row["root"]), **data)


def _digest(row: Mapping[str, Any], name: str = "fingerprint") -> str:
    text = _text(row[name])
    if not _SHA256.fullmatch(text):
        raise ValueError(f"the {name} {short(text)}, which is no SHA-256 in hex")
    return text


def _local(value: Any) -> dict[str, Any]:
    local = _row(value)
    if any(type(item) is list for item in local.values()):
        raise TypeError("module_metadata with more than plain values")
    return {name: _local(item) if type(item) is dict else item for name, item in local.items()}


def _finding(row: Mapping[str, Any]) -> Finding:
    if row["level"] not in LEVELS:
        raise ValueError(f"a finding of level {short(row['level'])}")
    return Finding(_text(row["code"]), _text(row["message"]), None if row["key"] is None else _text(row["key"]), row["level"])


def _step(row: Mapping[str, Any], count: int, target: PlanTarget | None) -> Step:
    unknown = [field for field in row if field not in (*STEP, "partial")]
    if unknown:
        raise ValueError(f"{row.get('target')}: a step has no field {unknown[0][:40]!r}; it has {', '.join(STEP)}")
    name, dtype, action, fresh = _text(row["target"]), _text(row["dtype"]), _text(row["action"]), row["fresh"]
    partial = row.get("partial", False)
    if dtype not in BY_CODE or action not in ACTIONS or type(fresh) is not bool or (action == "init" and not fresh):
        raise ValueError(f"{name}: its dtype, action or fresh is not known, or does not go with the others")
    ops = tuple(_op(name, op) for op in _rows(row["ops"]))
    keys = tuple(_source(source_key, count) for source_key in _rows(row["sources"]))
    reads, chains = ACTIONS[action]
    kinds = tuple(op["op"] if op["op"] in OPS else None for op in ops)
    folded = tuple(kind for index, kind in enumerate(kinds) if kind is not None or index == 0 or kinds[index - 1] is not None)
    if bool(keys) is not reads or (len(keys) > 1 and action not in ("adapt", "load")) or folded not in chains:
        raise ValueError(f"{name}: its action {action!r} does not go with its sources and ops")
    step = Step(name, dtype, tuple(map(_whole, _list(row["shape"]))), action, keys, ops, fresh, _text(row["reason"]), partial is True)  # type: ignore[arg-type]
    kind = None if target is None else target.kind
    if not keys and (kind is None or (action == "keep" and kind in ("model", "skeleton"))):
        raise ValueError(f"{name}: its action {action!r} does not go with the target")
    needs = next((scheme for scheme in step.schemes if scheme in FROM_MODEL), "load" if action == "load" else None)
    from_file = needs == "model" and keys and kind not in (None, "skeleton")  # a file's own value fills the rest up
    if needs is not None and kind != "model" and not from_file:
        raise ValueError(f"{name}: {needs!r} needs a model")
    return step


def _op(name: str, op: dict[str, Any]) -> dict[str, Any]:
    kind = _text(op["op"])
    if kind not in OPS:
        check_fields(op)
        lacks = [field for field in ("arguments", "shape") if is_user_adapter(op) and field not in op]
        if lacks:
            raise ValueError(f"{name}: {kind} lacks {lacks[0]!r}")
    elif not _text(op[OPS[kind]]) or (kind == "cast" and op["dtype"] not in BY_CODE):
        raise ValueError(f"{name}: unknown {OPS[kind]} {op[OPS[kind]][:40]!r}")
    return op


def check_followable(plan: Plan, sources: Sequence[Checkpoint], target: Checkpoint | None) -> None:
    """Raises StaleError when a file or target is not the one that was planned for, PlanError when the plan does not add up with them."""
    if len(plan.sources) != len(sources) or (plan.target is None) != (target is None):
        raise PlanError("the plan is for other sources or another target than are given")
    check_sources(plan, sources)
    if plan.target is not None and target is not None:
        _check_same(plan.target.fingerprint, target)
    steps = {step.target: step for step in plan.steps}
    problems = [
        *(problem for step in plan.steps for problem in _step_problems(step, plan, steps, sources, target)),
        *computed.plan_problems(plan, sources),
        *_entry_problems(plan, sources, target),
        *_target_problems(plan, target),
        *_fate_problems(plan, sources),
    ]
    if not problems:
        refuse_broken(plan.steps, sources, target, plan.allow_cast)
    if problems:
        raise PlanError("the plan does not add up", problems=shortened(problems), hint="it was edited, or damaged: plan again")


def check_sources(plan: Plan, sources: Sequence[Checkpoint]) -> None:
    """Raises StaleError when a source is not the one that was planned for. It is called before the target's module is imported."""
    for planned, source in zip(plan.sources, sources, strict=True):
        _check_same(planned.fingerprint, source)


def _check_same(fingerprint: str, checkpoint: Checkpoint) -> None:
    if fingerprint != checkpoint.fingerprint:
        raise StaleError("has changed since the plan was made", path=checkpoint.path, hint="plan again")


def _step_problems(
    step: Step, plan: Plan, steps: Mapping[str, Step], sources: Sequence[Checkpoint], target: Checkpoint | None
) -> Iterable[str]:
    target_tensor = None if target is None else target.get(step.target)
    if target is not None and target_tensor is None:
        yield f"{step.target}: is not in the target"
        return
    if target_tensor is not None and target_tensor.shape != step.shape:
        yield f"{step.target}: has shape {target_tensor.shape} in the target, {step.shape} in the plan"
    if step.action == "load":
        yield from computed.step_problems(step, plan, sources, target)
        return
    copied = copied_key(step)
    keys = follow(step.target, lambda key: copied_key(steps[key]) if key in steps else None)
    if keys is None or any(key not in steps or steps[key].shape != step.shape for key in keys):
        yield f"{step.target}: copies {copied}, which is not there, has another shape, or copies it in turn"
        return
    tensors = [sources[number].get(key) for number, key in step.sources]
    present = [tensor for tensor in tensors if tensor is not None]
    if len(present) < len(tensors):
        yield f"{step.target}: its source {step.sources[tensors.index(None)][1]} is not there"
        return
    dtypes = {tensor.dtype for tensor in present} or {
        steps[copied].dtype if copied is not None else target_tensor.dtype if target_tensor else step.dtype
    }
    if made_dtype(step.adapters[:1], ""):
        dtypes = {made_dtype(step.adapters, "")}
    try:
        shapes = infer_chain(step.adapters, [tensor.shape for tensor in present])
    except RuleError as error:
        yield f"{step.target}: {error.reason}"
        return
    if present and shapes != (step.shape,):
        words = f"its adapters give {shapes[0] if len(shapes) == 1 else shapes}" if step.adapters else f"has shape {present[0].shape}"
        yield f"{step.target}: {'' if step.adapters else f'its source {step.sources[0][1]} '}{words}, not {step.shape}"
    if len(dtypes) > 1 or (step.cast or next(iter(dtypes))) != step.dtype:
        yield f"{step.target}: its ops give {step.cast or ' and '.join(sorted(dtypes))}, and its dtype says {step.dtype}"
    if not all(can_compute(step.adapters, code) for code in dtypes):
        yield f"{step.target}: its ops compute values, and it is {' and '.join(sorted(dtypes))}"


def _entry_problems(plan: Plan, sources: Sequence[Checkpoint], target: Checkpoint | None) -> Iterable[str]:
    planned = {entry.target for entry in plan.entries}
    if target is not None:
        yield from (f"{key}: has no step" for key in target.entries if key not in planned)
        yield from (f"{key}: is not in the target" for key in planned if key not in target.entries)
    for entry in plan.entries:
        values: Mapping[str, Any] = {} if target is None else target.entries
        key = entry.target
        if entry.source is not None:
            values, key = sources[entry.source[0]].entries, entry.source[1]
        if key not in values or isinstance(values[key], Refused):
            yield f"{entry.target}: its value {key} is not there, or can't be carried"


def _target_problems(plan: Plan, target: Checkpoint | None) -> Iterable[str]:
    if target is None or plan.target is None:
        return
    if plan.target.kind != target.format:
        yield f"the target is a {target.format}, in the plan a {plan.target.kind}"
    if plan.ties != target.ties:
        yield "the target ties other keys than the plan says"
    changing = {path for path, loader in target.loaders.items() if loader.changes}
    if set(plan.versions) != changing or not set(plan.loaded) <= changing:
        yield "other modules of the target load in their own way than the plan says"
    planned = {step.target for step in plan.steps}
    yield from (f"{key}: has no step" for key in target if key not in planned)


def _fate_problems(plan: Plan, sources: Sequence[Checkpoint]) -> Iterable[str]:
    dropped = [(row.file, row.source) for row in plan.dropped]
    used = {source_key for step in plan.steps for source_key in step.sources} | {entry.source for entry in plan.entries}
    keys = {(number, key) for number, source in enumerate(sources) for key in (*source, *source.entries)}
    yield from (f"{key}: is dropped, and is not in the source" for number, key in dropped if (number, key) not in keys)
    yield from (f"{key}: is dropped, and is also used" for number, key in dropped if (number, key) in used)
    if len(set(dropped)) != len(dropped):
        yield "one key is dropped twice"
    yield from (f"{key}: has no fate" for number, key in sorted(keys - used - set(dropped)))
