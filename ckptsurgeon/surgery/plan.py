"""Decides: for every target key exactly one step, for every source key exactly one fate, each with its reason.

Pure: no file is opened, no torch imported, nothing printed. What is decided here is all that `apply` will do.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any, Literal

from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.errors import PlanError, RuleError, UnsafeError
from ckptsurgeon.report import Finding
from ckptsurgeon.surgery.compare import tied_to
from ckptsurgeon.surgery.naming import Names, SourceKey, name_sources
from ckptsurgeon.surgery.prefixes import unwrap
from ckptsurgeon.surgery.rules import Rule, close_names
from ckptsurgeon.tensors import Checkpoint, Coverage, Refused, TensorMeta, find_overlaps

Action = Literal["copy", "rename", "adapt", "init", "keep"]
DTYPE_CHOICES = ("source", "target", "F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class PlanSource:
    """A source: its path as given, fingerprint, format, root, and how its names were changed, in words."""

    path: str
    fingerprint: str
    format: str
    root: str = ""
    prefix: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PlanTarget:
    """What the sources must fit: a spec or path, its fingerprint, and its kind (`model`, `skeleton` or a file's format)."""

    spec: str
    fingerprint: str
    kind: str
    root: str = ""


@dataclass(frozen=True)
class Step:
    """How one target key gets its value.

    `sources` are (number of the source, key) pairs, in order; `ops` what is done to them, in order, each a dict with `op`. `dtype` and
    `shape` are the result's.
    """

    target: str
    dtype: str
    shape: tuple[int, ...]
    action: Action
    sources: tuple[SourceKey, ...]
    ops: tuple[Mapping[str, Any], ...]
    fresh: bool
    reason: str

    @property
    def transferred(self) -> bool:
        """Whether the value comes from a source."""
        return bool(self.sources)

    @property
    def cast(self) -> str | None:
        """The dtype that an op casts to, if one does."""
        return next((str(op["dtype"]) for op in self.ops if op["op"] == "cast"), None)


@dataclass(frozen=True)
class Dropped:
    """A source key that goes nowhere, and why."""

    file: int
    source: str
    reason: str


@dataclass(frozen=True)
class Entry:
    """A value that is no tensor (`_extra_state`): carried from a source, or, with `source` None, the model's own."""

    target: str
    source: SourceKey | None


@dataclass(frozen=True)
class Plan:
    """Everything that `apply` will do. `ties` are groups of target keys that share one tensor in the target; `loose` says what `strict`
    refuses: each missing, extra or mismatched key that no rule names."""

    sources: tuple[PlanSource, ...]
    target: PlanTarget | None
    seed: int
    steps: tuple[Step, ...]
    dropped: tuple[Dropped, ...]
    coverage: Coverage
    entries: tuple[Entry, ...] = ()
    module_metadata: Mapping[str, Any] = field(default_factory=dict)
    ties: tuple[tuple[str, ...], ...] = ()
    left_behind: tuple[str, ...] = ()
    allow_cast: tuple[str, ...] = ()
    findings: tuple[Finding, ...] = ()
    loose: tuple[str, ...] = ()
    text: str = field(default="", repr=False, compare=False)

    @property
    def transferred(self) -> tuple[str, ...]:
        """Target keys that take weights from a source."""
        return tuple(step.target for step in self.steps if step.sources)

    @property
    def kept(self) -> tuple[str, ...]:
        """Target keys that stay as a target checkpoint has them."""
        return tuple(step.target for step in self.steps if step.action == "keep")

    @property
    def fresh(self) -> tuple[str, ...]:
        """Target keys that are initialised."""
        return tuple(step.target for step in self.steps if step.fresh)

    @property
    def needs_model(self) -> bool:
        """Whether a value comes from the target model itself."""
        from_model = any(op["op"] == "init" and op["scheme"] in ("model", "per_layer_type") for step in self.steps for op in step.ops)
        return from_model or any(entry.source is None for entry in self.entries)

    def __str__(self) -> str:
        return self.text


def make_plan(
    sources: Sequence[Checkpoint],
    target: Checkpoint | None,
    rules: Iterable[Rule] = (),
    *,
    dtype: str | None = None,
    seed: int = 0,
    allow_cast: Iterable[str] = (),
) -> Plan:
    """Decide how every key of `target` gets its value; without a target, convert the one source.

    `dtype` is `target` (the default with a target), `source` (the default without), or a floating code that every floating tensor gets.
    Raises RuleError for rules that can't be followed, PlanError where nothing says what a key gets, UnsafeError for a value inside the
    state_dict that would have to be imported.

    >>> meta = lambda name, n: TensorMeta(name, "F32", (n,), (1,))
    >>> source = Checkpoint("a.pt", "torch-zip", "0", {"w": meta("w", 2), "head": meta("head", 10)})
    >>> target = Checkpoint("net", "model", "1", {"w": meta("w", 2), "head": meta("head", 5)})
    >>> [(step.target, step.action) for step in make_plan([source], target).steps]
    [('w', 'copy'), ('head', 'init')]
    """
    choice = dtype or ("source" if target is None else "target")
    if choice not in DTYPE_CHOICES:
        raise PlanError(f"{choice!r} is no dtype to choose", hint=f"one of {', '.join(DTYPE_CHOICES)}")
    names = name_sources(sources, target, rules)
    _refuse_unsafe(sources, names)
    planner = _Planner(sources, target, names, choice)
    steps = planner.steps()
    covered = {step.target: TensorMeta(step.target, step.dtype, step.shape, ()) for step in steps if step.sources}
    whole: Mapping[str, TensorMeta] = target if target is not None else covered
    return Plan(
        sources=tuple(_plan_source(source, names, number) for number, source in enumerate(sources)),
        target=None if target is None else PlanTarget(target.path, target.fingerprint, target.format, target.root),
        seed=seed,
        steps=steps,
        dropped=planner.dropped(steps),
        coverage=Coverage.of(covered, whole),
        entries=planner.entries(),
        module_metadata=_module_metadata(sources, target, names),
        ties=target.ties if target is not None else (),
        left_behind=tuple(dict.fromkeys(place for source in sources for place in source.left_behind)),
        allow_cast=tuple(allow_cast),
        findings=_findings(sources, target, steps),
        loose=planner.loose(steps),
    )


def _plan_source(source: Checkpoint, names: Names, number: int) -> PlanSource:
    prefix = names.prefixes[number]
    words = {"stripped": prefix.stripped, "added": prefix.added, "unwrapped": list(prefix.unwrapped)}
    return PlanSource(source.path, source.fingerprint, source.format, source.root, words if prefix else {})


def _refuse_unsafe(sources: Sequence[Checkpoint], names: Names) -> None:
    problems = [
        f"{key}: {entry.reason}"
        for number, source in enumerate(sources)
        for key, entry in source.entries.items()
        if isinstance(entry, Refused) and (number, key) not in names.dropped
    ]
    if problems:
        first = problems[0].partition(":")[0]
        raise UnsafeError(
            "has values inside its state_dict that can't be carried",
            path=sources[0].path,
            problems=tuple(problems),
            hint=f"leave them out: --drop {first!r}",
        )


@dataclass(frozen=True)
class _Planner:
    """The inputs of one planning, and the steps they lead to."""

    sources: Sequence[Checkpoint]
    target: Checkpoint | None
    names: Names
    choice: str

    def steps(self) -> tuple[Step, ...]:
        landed = {name: place for place, name in self.names.landed.items()}
        if self.target is None:
            return tuple(self._transfer(name, self._source(place), place, "") for name, place in landed.items())
        follow = tied_to(self.target, landed)
        steps: list[Step] = []
        bare: list[str] = []
        inits: dict[int, int] = {}
        for key, wanted in self.target.items():
            place = landed.get(key) or landed.get(follow.get(key, ""))
            if place is not None and self._source(place).shape == wanted.shape:
                tie = f", tied to {follow[key]}" if key in follow else ""
                steps.append(self._transfer(key, self._source(place), place, tie))
                continue
            steps.append(self._own(key, wanted, place, inits))
            if steps[-1].action == "init" and steps[-1].ops[0]["scheme"] == "":
                bare.append(key)
        self._check_inits(inits, steps)
        if bare:
            raise PlanError(
                f"nothing says what {len(bare)} keys get: the target has no values of its own",
                path=self.target.path,
                problems=tuple(bare[:20]) + ((f"and {len(bare) - 20} more",) if len(bare) > 20 else ()),
                hint=f"say so: --init {bare[0]!r} zeros (or another scheme), or give the model itself as the target",
            )
        return tuple(steps)

    def _source(self, place: SourceKey) -> TensorMeta:
        return self.sources[place[0]][place[1]]

    def _dtype(self, given: str, wanted: str) -> str:
        """The dtype of a tensor that the source has as `given` and the target as `wanted`."""
        if self.choice in ("source", "target"):
            return given if self.choice == "source" else wanted
        return self.choice if BY_CODE[wanted].kind == "float" and BY_CODE[given].kind == "float" else wanted

    def _transfer(self, key: str, given: TensorMeta, place: SourceKey, tie: str) -> Step:
        wanted = given if self.target is None else self.target[key]
        dtype = self._dtype(given.dtype, wanted.dtype)
        ops: tuple[Mapping[str, Any], ...] = () if dtype == given.dtype else ({"op": "cast", "dtype": dtype},)
        rule, prefix = self.names.by_rule.get(place), self.names.prefixes[place[0]]
        if place[1] == key and not tie:
            action, reason = "copy", "same name, same shape" if self.target is not None else "converted as it is"
        else:
            action = "rename"
            reason = (str(rule) if rule else str(prefix) if prefix else "same shape") + tie
        return Step(key, dtype, wanted.shape, action, (place,), ops, False, reason)  # type: ignore[arg-type]

    def _own(self, key: str, wanted: TensorMeta, place: SourceKey | None, inits: dict[int, int]) -> Step:
        """A key that no source gives: kept from a target checkpoint, or initialised by rule or by the model."""
        assert self.target is not None
        why = "not in the source"
        if place is not None:
            why = f"the source's {place[1]} has shape {self._source(place).shape}"
        dtype = self._dtype(wanted.dtype, wanted.dtype)
        cast: tuple[Mapping[str, Any], ...] = () if dtype == wanted.dtype else ({"op": "cast", "dtype": dtype},)
        for number, compiled in enumerate(self.names.inits):
            if compiled.pattern.match(key) is not None:
                inits[number] = inits.get(number, 0) + 1
                op = {"op": "init", "scheme": compiled.rule.result}
                return Step(key, dtype, wanted.shape, "init", (), (op, *cast), True, f"{why}; {compiled.rule}")
        if self.target.format == "skeleton":
            return Step(key, dtype, wanted.shape, "init", (), ({"op": "init", "scheme": ""},), True, why)
        if self.target.format == "model":
            op = {"op": "init", "scheme": "model"}
            return Step(key, dtype, wanted.shape, "init", (), (op, *cast), True, f"{why}; the model's own value")
        return Step(key, dtype, wanted.shape, "keep", (), cast, False, f"{why}; the target's value stays")

    def _check_inits(self, inits: dict[int, int], steps: Sequence[Step]) -> None:
        problems = []
        for number, compiled in enumerate(self.names.inits):
            if number in inits:
                continue
            matching = [step for step in steps if compiled.pattern.match(step.target) is not None]
            if any(step.fresh for step in matching):
                problems.append(f"{compiled.rule} never gets a turn: earlier rules name all of its keys")
            elif matching:
                problems.append(f"{compiled.rule} matches only keys that take weights from the source; to initialise them, drop those too")
            else:
                problems.append(f"{compiled.rule} matches nothing in the target{close_names(compiled.rule.pattern, self.target or ())}")
        if problems:
            raise RuleError(
                "rules that can't be followed", problems=tuple(problems), hint="see the target's keys with: ckptsurgeon diff CKPT TARGET"
            )

    def dropped(self, steps: Sequence[Step]) -> tuple[Dropped, ...]:
        """The fate of every source key that no step reads."""
        used = {place for step in steps for place in step.sources}
        rows = []
        for number, source in enumerate(self.sources):
            for key, tensor in source.items():
                place = (number, key)
                if place in used:
                    continue
                rule, name = self.names.dropped.get(place), self.names.landed.get(place, "")
                if rule is not None:
                    reason = str(rule)
                elif self.target is not None and name in self.target:
                    reason = f"shape {tensor.shape} does not fit {self.target[name].shape}"
                else:
                    reason = "not in the target" if name == key else f"not in the target, as {name}"
                rows.append(Dropped(number, key, reason))
        return tuple(rows)

    def loose(self, steps: Sequence[Step]) -> tuple[str, ...]:
        """Every key that is missing, extra or mismatched without a rule that names it."""
        named = [compiled.pattern for compiled in self.names.inits]
        bare = [step for step in steps if not step.sources and not any(pattern.match(step.target) is not None for pattern in named)]
        return (
            *(f"{step.target}: {step.reason}" for step in bare),
            *(f"{row.source}: {row.reason}" for row in self.dropped(steps) if (row.file, row.source) not in self.names.dropped),
        )

    def entries(self) -> tuple[Entry, ...]:
        """What becomes of the values that are no tensors: a target's own keys, or, converting, all of them."""
        given = {name: place for place, name in self.names.entries.items()}
        if self.target is None:
            return tuple(Entry(name, place) for name, place in given.items())
        rows = [Entry(key, given.get(key)) for key in self.target.entries]
        bare = [row.target for row in rows if row.source is None and self.target.format == "skeleton"]
        if bare:
            raise PlanError(
                "nothing says what this extra state is", path=self.target.path, key=bare[0], hint="give the model itself as the target"
            )
        return tuple(rows)


def _module_metadata(sources: Sequence[Checkpoint], target: Checkpoint | None, names: Names) -> Mapping[str, Any]:
    """The target's `_metadata`; where it has none, the source's, its paths renamed as their tensors were."""
    if target is not None and target.module_metadata:
        return target.module_metadata
    source = sources[0]
    moved = {key.rpartition(".")[0]: name.rpartition(".")[0] for (number, key), name in names.landed.items() if number == 0}
    prefix = names.prefixes[0]
    metadata = {}
    for path, local in source.module_metadata.items():
        bare = unwrap(path, prefix.unwrapped)
        bare = "" if bare == prefix.stripped.rstrip(".") else bare.removeprefix(prefix.stripped)
        metadata[moved.get(path, (prefix.added + bare).rstrip("."))] = local
    return metadata


def _findings(sources: Sequence[Checkpoint], target: Checkpoint | None, steps: Sequence[Step]) -> tuple[Finding, ...]:
    findings = [
        Finding(
            "overlap", f"shares memory with {other} in {source.path} without being the same tensor; they are written apart", key, "note"
        )
        for source in sources
        for key, other in find_overlaps(source)
    ]
    origin = {step.target: step.sources for step in steps}
    for group in target.ties if target is not None else ():
        spans = {_span(sources, origin[key]) for key in group if key in origin}
        if len(spans) > 1:
            findings.append(
                Finding("untied", f"one tensor in the target ({', '.join(group)}), but apart in the source", group[0], "warning")
            )
    for source in sources:
        findings += [Finding("source", f"{source.path}: {note}", None, "note") for note in source.notes]
    return tuple(findings)


def _span(sources: Sequence[Checkpoint], places: tuple[SourceKey, ...]) -> Any:
    return tuple((sources[number][key].span or key) for number, key in places)


def digest(plan: Plan) -> str:
    """SHA-256 (hex) of what a plan does; the paths of its sources and target do not enter it."""
    body = [
        [[source.fingerprint, source.root] for source in plan.sources],
        None if plan.target is None else plan.target.fingerprint,
        plan.seed,
        [
            [step.target, step.dtype, list(step.shape), step.action, [list(p) for p in step.sources], [dict(op) for op in step.ops]]
            for step in plan.steps
        ],
        [[entry.target, entry.source and list(entry.source)] for entry in plan.entries],
    ]
    return sha256(json.dumps(body, separators=(",", ":"), sort_keys=True).encode()).hexdigest()
