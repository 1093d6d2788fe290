"""Decides: for every target key exactly one step, for every source key exactly one fate, each with its reason.

Pure: no file is opened, no torch imported, nothing printed. What is decided here is all that `apply` will do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ckptsurgeon.dtypes import BY_CODE
from ckptsurgeon.errors import PlanError, RuleError, UnsafeError
from ckptsurgeon.report import Finding
from ckptsurgeon.surgery.compare import Origin, find_origins, find_refused
from ckptsurgeon.surgery.naming import Names, SourceKey, name_sources, shortened
from ckptsurgeon.surgery.patterns import compile_pattern
from ckptsurgeon.surgery.planned import Action, Dropped, Entry, Plan, PlanSource, PlanTarget, Step, digest
from ckptsurgeon.surgery.rules import CompiledRule, Rule, close_names
from ckptsurgeon.tensors import Checkpoint, Coverage, Refused, TensorMeta, find_overlaps

__all__ = ["DTYPE_CHOICES", "Action", "Dropped", "Entry", "Plan", "PlanSource", "PlanTarget", "Step", "digest", "make_plan"]

DTYPE_CHOICES = ("source", "target", "F16", "BF16", "F32", "F64")


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
    if not 0 <= seed < 1 << 63:
        raise PlanError(f"{seed} is no seed", hint="a whole number from 0 up: --seed 0")
    for source in sources:
        if source.format == "skeleton":
            raise PlanError("is a skeleton and has no values behind its names", path=source.path)
    allowed = (allow_cast,) if isinstance(allow_cast, str) else tuple(allow_cast)
    for pattern in allowed:
        compile_pattern(pattern)
    names = name_sources(sources, target, rules)
    _refuse_unsafe(sources, target, names)
    planner = _Planner(sources, target, names, choice, find_origins(sources, target, names) if target is not None else {})
    steps, entries = planner.steps(), planner.entries()
    dropped = planner.dropped(steps, entries)
    covered = {step.target: TensorMeta(step.target, step.dtype, step.shape, ()) for step in steps if step.sources}
    whole: Mapping[str, TensorMeta] = target if target is not None else covered
    return Plan(
        sources=tuple(_plan_source(source, names, number) for number, source in enumerate(sources)),
        target=None if target is None else PlanTarget(target.path, target.fingerprint, target.format, target.root),
        seed=seed,
        steps=steps,
        dropped=dropped,
        coverage=Coverage.of(covered, whole),
        entries=entries,
        module_metadata=_module_metadata(sources, target, names),
        ties=target.ties if target is not None else (),
        left_behind=tuple(dict.fromkeys(place for source in sources for place in source.left_behind)),
        allow_cast=allowed,
        findings=_findings(sources, target, steps),
        loose=planner.loose(steps, entries, dropped),
    )


def _plan_source(source: Checkpoint, names: Names, number: int) -> PlanSource:
    prefix = names.prefixes[number]
    words = {"stripped": prefix.stripped, "added": prefix.added, "unwrapped": list(prefix.unwrapped)}
    return PlanSource(source.path, source.fingerprint, source.format, source.root, words if prefix else {})


def _refuse_unsafe(sources: Sequence[Checkpoint], target: Checkpoint | None, names: Names) -> None:
    """Raises UnsafeError for every value that would have to be carried and can't be."""
    for number, source in enumerate(sources):
        found = find_refused(source, number, names)
        if found:
            raise UnsafeError(
                "has values inside its state_dict that can't be carried",
                path=source.path,
                problems=shortened(f"{key}: {reason}" for key, reason in found.items()),
                hint=f"leave them out: --drop {names.prefixes[number].bare(next(iter(found)))!r}",
            )
    given = set(names.entries.values())
    own = {} if target is None or target.format in ("model", "skeleton") else target.entries
    problems = [f"{key}: {entry.reason}" for key, entry in own.items() if isinstance(entry, Refused) and key not in given]
    if problems and target is not None:
        raise UnsafeError(
            "has values inside its state_dict that can't be kept",
            path=target.path,
            problems=shortened(problems),
            hint="give the model itself, or its skeleton, as the target",
        )


@dataclass(frozen=True)
class _Planner:
    """The inputs of one planning, and what they lead to."""

    sources: Sequence[Checkpoint]
    target: Checkpoint | None
    names: Names
    choice: str
    origins: Mapping[str, Origin]

    def steps(self) -> tuple[Step, ...]:
        """One step for every tensor of the target; without a target, for every one that is converted."""
        if self.target is None:
            return tuple(self._transfer(name, Origin(place, True)) for place, name in self.names.landed.items())
        inits = self._inits()
        steps = []
        bare = []
        for key in self.target:
            origin = self.origins.get(key)
            if origin is not None and origin.fits:
                steps.append(self._transfer(key, origin))
            elif key in inits or self.target.format != "skeleton":
                steps.append(self._own(key, origin, inits.get(key)))
            else:
                bare.append(key)
        if bare:
            raise PlanError(
                f"nothing says what {len(bare)} keys get: the target has no values of its own",
                path=self.target.path,
                problems=shortened(bare),
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

    def _transfer(self, key: str, origin: Origin) -> Step:
        place, given = origin.place, self._source(origin.place)
        dtype = self._dtype(given.dtype, given.dtype if self.target is None else self.target[key].dtype)
        action: Action = "copy" if place[1] == key else "rename"
        if action == "rename":
            rule, prefix = self.names.by_rule.get(place), self.names.prefixes[place[0]]
            changes = (str(rule or prefix), f"tied to {origin.tied_to}" if origin.tied_to else "")
            reason = ", ".join(change for change in changes if change)
        else:
            reason = "same name, same shape" if self.target is not None else "converted as it is"
        return Step(key, dtype, given.shape, action, (place,), _cast(given.dtype, dtype), False, reason)

    def _own(self, key: str, origin: Origin | None, init: CompiledRule | None) -> Step:
        """A key that no source gives: kept from a target checkpoint, or initialised by rule or by the model."""
        assert self.target is not None
        wanted = self.target[key]
        why = "not in the source"
        if origin is not None:
            why = f"the source's {origin.place[1]} has shape {self._source(origin.place).shape}"
        elif key in self.names.spared:
            why = "dropped from the source by a rule"
        dtype = self._dtype(wanted.dtype, wanted.dtype)
        cast = _cast(wanted.dtype, dtype)
        if init is None and self.target.format != "model":
            return Step(key, dtype, wanted.shape, "keep", (), cast, False, f"{why}; the target's value stays")
        scheme = "model" if init is None else init.rule.result
        reason = why + ("; the model's own value" if init is None else f"; {init.rule}")
        return Step(key, dtype, wanted.shape, "init", (), ({"op": "init", "scheme": scheme}, *cast), True, reason)

    def _inits(self) -> dict[str, CompiledRule]:
        """The init rule of each key that no source gives. One that names a key holds for all keys that are tied to it.

        Raises RuleError, once for all rules that get no turn.
        """
        assert self.target is not None
        tied = {key: group for group in self.target.ties for key in group}
        found: dict[str, CompiledRule] = {}
        named: set[int] = set()
        used: set[int] = set()
        for key in self.target:
            matching = [i for i, rule in enumerate(self.names.inits) if any(rule.match(name) is not None for name in tied.get(key, (key,)))]
            if key not in self.origins or not self.origins[key].fits:
                named.update(matching)
                if matching:
                    found[key] = self.names.inits[matching[0]]
                    used.add(matching[0])
        problems = []
        for number, compiled in enumerate(self.names.inits):
            if number in used:
                continue
            if number in named:
                problems.append(f"{compiled.rule} never gets a turn: earlier rules name all of its keys")
            elif any(compiled.match(key) is not None for key in self.target):
                problems.append(f"{compiled.rule} matches only keys that take weights from the source; to initialise them, drop those too")
            else:
                problems.append(f"{compiled.rule} matches nothing in the target{close_names(compiled.rule.pattern, self.target)}")
        if problems:
            raise RuleError(
                "rules that can't be followed",
                problems=shortened(problems),
                hint="see the target's keys with: ckptsurgeon diff CKPT TARGET",
            )
        return found

    def entries(self) -> tuple[Entry, ...]:
        """What becomes of the values that are no tensors: a target's own keys, or, converting, all of them."""
        given = {name: place for place, name in self.names.entries.items()}
        if self.target is None:
            return tuple(Entry(name, place) for name, place in given.items())
        rows = tuple(Entry(key, given.get(key)) for key in self.target.entries)
        bare = [row.target for row in rows if row.source is None and self.target.format == "skeleton"]
        if bare:
            raise PlanError(
                "nothing says what this extra state is", path=self.target.path, key=bare[0], hint="give the model itself as the target"
            )
        return rows

    def dropped(self, steps: Sequence[Step], entries: Sequence[Entry]) -> tuple[Dropped, ...]:
        """The fate of every source key that nothing reads."""
        used = {place for step in steps for place in step.sources} | {entry.source for entry in entries}
        return tuple(
            Dropped(number, key, self._why_dropped((number, key)))
            for number, source in enumerate(self.sources)
            for key in (*source, *source.entries)
            if (number, key) not in used
        )

    def _why_dropped(self, place: SourceKey) -> str:
        if place in self.names.dropped:
            return str(self.names.dropped[place])
        name = self.names.landed.get(place, self.names.entries.get(place, ""))
        if self.target is not None and name in self.target:
            if place in self.names.entries:
                return "no tensor, which the target has there"
            return f"shape {self._source(place).shape} does not fit {self.target[name].shape}"
        return "not in the target" if name == place[1] else f"not in the target, as {name}"

    def loose(self, steps: Sequence[Step], entries: Sequence[Entry], dropped: Sequence[Dropped]) -> tuple[str, ...]:
        """Every key that is missing, extra or mismatched without a rule that names it."""

        def named(key: str) -> bool:
            return key in self.names.spared or any(rule.match(key) is not None for rule in self.names.inits)

        def landed(place: SourceKey) -> str:
            return self.names.landed.get(place, self.names.entries.get(place, ""))

        return (
            *(f"{step.target}: {step.reason}" for step in steps if not step.sources and not named(step.target)),
            *(f"{entry.target}: not in the source" for entry in entries if entry.source is None and not named(entry.target)),
            *(
                f"{row.source}: {row.reason}"
                for row in dropped
                if (row.file, row.source) not in self.names.dropped and not named(landed((row.file, row.source)))
            ),
        )


def _cast(given: str, wanted: str) -> tuple[Mapping[str, Any], ...]:
    return () if given == wanted else ({"op": "cast", "dtype": wanted},)


def _module_metadata(sources: Sequence[Checkpoint], target: Checkpoint | None, names: Names) -> Mapping[str, Any]:
    """The target's `_metadata`; where it has none, the sources', each module's renamed as its tensors were."""
    if target is not None and target.module_metadata:
        return {path: _plain(local) for path, local in target.module_metadata.items()}
    metadata: dict[str, Any] = {}
    for number, source in enumerate(sources):
        for path, local in source.module_metadata.items():
            place = names.prefixes[number].place(path)
            if place is not None:
                metadata[place] = _plain(local)
    for (number, key), name in names.landed.items():
        local = sources[number].module_metadata.get(key.rpartition(".")[0])
        if local is not None:
            metadata[name.rpartition(".")[0]] = _plain(local)
    return metadata


def _plain(local: Any) -> dict[str, Any]:
    """A module's `_metadata` without what a plan can't write down; torch's own are numbers and flags."""
    items = local.items() if isinstance(local, Mapping) else ()
    known = (int, str, bool, float, type(None))
    return {
        name: value
        for name, value in items
        if type(name) is str and type(value) in known and not (type(value) is float and not math.isfinite(value))
    }


def _findings(sources: Sequence[Checkpoint], target: Checkpoint | None, steps: Sequence[Step]) -> tuple[Finding, ...]:
    findings = [
        Finding(
            "overlap", f"shares memory with {other} in {source.path} without being the same tensor; they are written apart", key, "note"
        )
        for source in sources
        for key, other in find_overlaps(source)
    ]
    origin = {step.target: step for step in steps}
    leader = {(number, key): (number, group[0]) for number, source in enumerate(sources) for group in source.ties for key in group}
    for group in target.ties if target is not None else ():
        tensors = {leader.get(place, place) for key in group for place in origin[key].sources}
        if len(tensors) > 1:
            findings.append(
                Finding("untied", f"one tensor in the target ({', '.join(group)}), but apart in the source", group[0], "warning")
            )
    for source in sources:
        findings += [Finding("source", f"{source.path}: {note}", None, "note") for note in source.notes]
    return tuple(findings)
