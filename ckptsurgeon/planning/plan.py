"""Makes a plan: exactly one step for every target key, and for every source key whether it is used or why it is not.

Values that an earlier merge initialised, and that were not trained since, are still fresh.
Pure: no file is opened, no torch imported, nothing printed. `apply` does what the plan says, and nothing else.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ckptsurgeon.command import as_words
from ckptsurgeon.dtypes import BY_CODE, DTYPE_CHOICES, named
from ckptsurgeon.errors import PlanError, RuleError
from ckptsurgeon.hints import shortened
from ckptsurgeon.planning.apply_rules import NO_OUTSIDE, Names, name_sources
from ckptsurgeon.planning.averaging import Weights
from ckptsurgeon.planning.dropped import fates, keys_without_a_rule
from ckptsurgeon.planning.init_rules import InitRule, check_copies, find_init_rules
from ckptsurgeon.planning.keys import SourceKey
from ckptsurgeon.planning.own_loading.computed import Computed, casts, find_computed, refuse
from ckptsurgeon.planning.own_loading.versions import find_versions
from ckptsurgeon.planning.plan_findings import findings, little, refuse_unsafe, replaced, untried
from ckptsurgeon.planning.plan_types import Action, Dropped, Entry, Plan, PlanSource, PlanTarget, Step, digest, viewing_command
from ckptsurgeon.planning.prefixes.rivals import NameChange, rivals_with_rules
from ckptsurgeon.planning.quantised_weights.find import Codes, find
from ckptsurgeon.planning.quantised_weights.refuse import refuse_broken
from ckptsurgeon.planning.resolve import Origin, find_origins, reasons
from ckptsurgeon.report import Coverage
from ckptsurgeon.rules.copied_value import copied
from ckptsurgeon.rules.loading_code import code_of
from ckptsurgeon.rules.patterns import compile_pattern, literal
from ckptsurgeon.rules.rules import Outside, Rule
from ckptsurgeon.tensors import Checkpoint, TensorMeta

WORDS = "fresh since an earlier merge"
__all__ = ["DTYPE_CHOICES", "Action", "Dropped", "Entry", "Plan", "PlanSource", "PlanTarget", "Step", "digest", "make_plan"]


def make_plan(
    sources: Sequence[Checkpoint],
    target: Checkpoint | None,
    rules: Iterable[Rule] = (),
    *,
    dtype: str | None = None,
    seed: int = 0,
    allow_cast: Iterable[str] = (),
    average: Weights | None = None,
    auto: str | None = None,
    dequantize: bool = False,
    outside: Outside = NO_OUTSIDE,
) -> Plan:
    """Decide how every key of `target` gets its value; without a target, convert the one source, or average all sources.

    Args:
        sources: the checkpoints that give values.
        target: the names and shapes of the result, or None.
        rules: rename, drop, keep, adapt and init rules.
        dtype: `target` (the default with a target), `source` (the default without), or a floating dtype that every floating tensor gets.
        seed: the seed of the model's constructor and of init schemes.
        allow_cast: patterns of keys whose casts may lose values.
        average: a weight for each source, or True for equal weights: each key is the weighted mean of all sources' tensors.
        auto: "safe" applies adapters and renames that can't change the meaning of a tensor.
        dequantize: turn quantised weights into values where a formula is known; in BF16 where no dtype is chosen.
        outside: the token lists and own adapters that the rules name.

    Returns:
        The plan.

    Raises:
        RuleError: rules that can't be followed.
        PlanError: a key has no value, or the sources can't be combined.
        CastError: quantised weights would be cast, adapted or separated from their scales.
        UnsafeError: a value inside the state_dict would have to be imported.

    >>> meta = lambda name, n: TensorMeta(name, "F32", (n,), (1,))
    >>> source = Checkpoint("a.pt", "torch-zip", "0", {"w": meta("w", 2), "head": meta("head", 10)})
    >>> target = Checkpoint("net", "model", "1", {"w": meta("w", 2), "head": meta("head", 5)}, kind="model")
    >>> [(step.target, step.action) for step in make_plan([source], target).steps]
    [('w', 'copy'), ('head', 'init')]
    """
    choice = dtype or ("source" if target is None else "target")
    _check(sources, choice, seed)
    allowed = (allow_cast,) if isinstance(allow_cast, str) else tuple(allow_cast)
    for pattern in allowed:
        compile_pattern(pattern)
    rules = tuple(rules)
    names = name_sources(sources, target, rules, outside, average=average, auto=auto)
    _refuse_rivals(sources, rivals_with_rules(sources, target, names, rules, average=average))
    refuse_unsafe(sources, target, names)
    if target is None and (names.inits or names.keeps):
        rule = (*names.inits, *names.keeps)[0].rule
        raise RuleError(f"{rule} is for a target's keys, and there is no target", hint="give the target as the last path")
    codes = _codes(sources, average) if dequantize else {}
    computed = find_computed(sources, target, names, average=average not in (None, False), allowed=allowed)
    refuse(computed, sources[min(outside.taken, default=0)], names)
    origins = find_origins(sources, target, names, auto, codes)
    look = viewing_command(sources[0].path, sources[0].root, sources[0].kind == "model", None if target is None else target.path)
    planner = _Planner(target, names, choice, origins, auto, look, *_scales(sources, target, codes), computed)
    steps, entries = mark_fresh(planner.steps(), sources, target), planner.entries()
    _refuse_unused(sources, target, steps, entries, names)
    refuse_broken(steps, sources, target, allowed, dequantizing=dequantize, averaged=average not in (None, False))
    dropped = fates(sources, target, names, origins, steps, entries, codes)
    covered = {step.target: TensorMeta(step.target, step.dtype, step.shape, ()) for step in steps if step.sources}
    versions = find_versions(sources, target, names, steps, computed.handed)
    whole: Mapping[str, TensorMeta] = target if target is not None else covered
    coverage = Coverage.of(covered, whole, sum(step.filled for step in steps if step.sources))
    return Plan(
        sources=tuple(_plan_source(source, names, number) for number, source in enumerate(sources)),
        target=None if target is None else PlanTarget(target.path, target.fingerprint, target.format, target.root),
        seed=seed,
        steps=steps,
        dropped=dropped,
        coverage=coverage,
        entries=entries,
        module_metadata=versions.recorded,
        versions=versions.stated,
        loaded=versions.loaded,
        handed=computed.handed,
        ties=target.ties if target is not None else (),
        left_behind=tuple(dict.fromkeys(path for source in sources for path in source.left_behind)),
        allow_cast=allowed,
        findings=(
            *little(coverage, sources, look),
            *replaced(sources, target, steps),
            *findings(sources, target, names, steps),
            *versions.notes,
            *casts(computed, target),
            *untried(outside.taken),
        ),
        loose=keys_without_a_rule(names, target, steps, entries, dropped),
    )


def _codes(sources: Sequence[Checkpoint], average: Weights | None) -> dict[SourceKey, Codes]:
    """The quantised weights of all sources that can be dequantized."""
    quantised = {(number, key): weight for number, source in enumerate(sources) for key, weight in find(source).items()}
    codes = {source_key: weight for source_key, weight in quantised.items() if weight.op is not None}
    integer = next(((number, key) for number, key in codes if BY_CODE[sources[number][key].dtype].kind != "float"), None)
    if average not in (None, False) and integer is not None:
        path = sources[integer[0]].path
        hint = f"dequantize each source first: ckptsurgeon merge {shlex.quote(path)} -o values.safetensors --dequantize"
        raise PlanError("is codes in integers, which are not averaged", path=path, key=integer[1], hint=hint)
    return codes


def _scales(
    sources: Sequence[Checkpoint], target: Checkpoint | None, dequantized: Mapping[SourceKey, Codes]
) -> tuple[frozenset[SourceKey], frozenset[str]]:
    """The keys of scales, and of what else belongs to codes that stay codes, in the sources and in the target."""
    quantised = {(number, key): weight for number, source in enumerate(sources) for key, weight in find(source).items()}
    kept = [(number, weight) for (number, key), weight in quantised.items() if (number, key) not in dequantized]
    own = find(target).values() if target is not None else ()
    return (
        frozenset((number, name) for number, weight in kept for name in (*weight.scales, *weight.extras)),
        frozenset(name for weight in own for name in (*weight.scales, *weight.extras)),
    )


def _check(sources: Sequence[Checkpoint], choice: str, seed: int) -> None:
    if choice not in DTYPE_CHOICES:
        words = "is no dtype to choose" if named(choice) is None else "is no floating dtype, and only such are cast to one that is chosen"
        raise PlanError(f"{choice!r} {words}", hint=f"one of {', '.join(DTYPE_CHOICES)}")
    if not 0 <= seed < 1 << 63:
        raise PlanError(f"{seed} is no seed", hint="a whole number from 0 up: seed=0")
    for source in sources:
        if source.kind == "skeleton":
            raise PlanError("is a skeleton and has no values behind its names", path=source.path)


def _refuse_rivals(sources: Sequence[Checkpoint], rivals: Sequence[Sequence[NameChange]]) -> None:
    """Raises PlanError where the names don't decide between two prefixes of a source."""
    for source, changes in zip(sources, rivals, strict=True):
        if changes:
            options = next((change.options for change in changes if change.rules), None)
            key, name = next((pair for change in changes for pair in change.mapping.items() if pair[0] != pair[1]), ("", ""))
            raise PlanError(
                f"its names fit the target's in {len(changes)} ways, and none is chosen unasked"
                if len(changes) > 1
                else "its names fit the target's by a prefix under which two keys would be one",
                path=source.path,
                problems=tuple(map(str, changes)),
                hint=f"choose one: {shlex.join(as_words(options))}"
                if options is not None
                else f"rename each key, beginning with: {shlex.join(as_words([('rename', literal(key), literal(name))]))}",
            )


def _refuse_unused(
    sources: Sequence[Checkpoint], target: Checkpoint | None, steps: Sequence[Step], entries: Sequence[Entry], names: Names
) -> None:
    """Raises PlanError where one of several sources is not used at all. With a single source that is a coverage of zero, no error here."""
    used = {number for step in steps for number, _ in step.sources} | {entry.source[0] for entry in entries if entry.source is not None}
    unused = [number for number in range(len(sources)) if number not in used]
    if len(sources) < 2 or not unused:
        return
    source = sources[unused[0]]
    dropped = sum(number == unused[0] for number, _ in names.dropped)
    why = "rules drop all of its keys" if dropped == len(source) + len(source.entries) else "no key of the target takes a value from it"
    more = [f"{sources[number].path}: nothing of it is used either" for number in unused[1:]]
    look = viewing_command(source.path, source.root, source.kind == "model", None if target is None else target.path)
    hint = f"leave it out, or see what is in the way: {look}"
    raise PlanError(
        f"nothing of it is used, and it is one of {len(sources)} sources: {why}", path=source.path, problems=tuple(more), hint=hint
    )


def _plan_source(source: Checkpoint, names: Names, number: int) -> PlanSource:
    prefix = names.prefixes[number]
    words = {"stripped": prefix.stripped, "added": prefix.added, "unwrapped": list(prefix.unwrapped)}
    return PlanSource(source.path, source.fingerprint, source.format, source.root, words if prefix else {})


@dataclass(frozen=True)
class _Planner:
    """The inputs of a plan, and the steps and entries that they give."""

    target: Checkpoint | None
    names: Names
    choice: str
    origins: Mapping[str, Origin]
    auto: str | None
    look: str
    scales: frozenset[SourceKey]
    own_scales: frozenset[str]
    computed: Computed

    def steps(self) -> tuple[Step, ...]:
        """One step for every tensor of the target; without a target, for every tensor that is converted."""
        if self.target is None:
            return tuple(self._transfer(name, origin) for name, origin in self.origins.items())
        init_rules = find_init_rules(self.target, self.names, self.origins, self.auto, self.look)
        steps = []
        without_value = []
        for key in self.target:
            origin = self.origins.get(key)
            if key in self.computed.made:
                steps.append(self._load(key, self.target[key]))
            elif origin is not None and origin.fits:
                steps.append(self._transfer(key, origin, init_rules.get(key)))
            elif self.target.kind != "skeleton" or (key in init_rules and not init_rules[key].kept):
                steps.append(self._own(key, origin, init_rules.get(key)))
            else:
                without_value.append(key)
        if without_value:
            raise PlanError(
                f"nothing says what {len(without_value)} keys get: the target has no values of its own",
                path=self.target.path,
                problems=shortened(without_value),
                hint=f"say so: init={{{without_value[0]!r}: 'zeros'}} (or another scheme), or give the model itself as the target",
            )
        return check_copies(steps, self.target)

    def _dtype(self, source: str, target: str) -> str:
        """The dtype of a result, from the tensor's dtypes in the source and in the target."""
        if self.choice in ("source", "target"):
            return source if self.choice == "source" else target
        return self.choice if BY_CODE[target].kind == "float" and BY_CODE[source].kind == "float" else target

    def _transfer(self, key: str, origin: Origin, init_rule: InitRule | None = None) -> Step:
        first = origin.source_keys[0]
        dtype = self._dtype(origin.dtype, origin.dtype if self.target is None else self.target[key].dtype)
        if self.choice == "source" and origin.values:
            dtype = "BF16"  # the dtype of the source's codes is no dtype for values
        if self.choice not in ("source", "target") and self.scales.issuperset(origin.source_keys):
            dtype = origin.dtype  # scales of codes keep their dtype
        ops = tuple(_filled_up(op, init_rule) for op in origin.ops)
        if any(op.get("fill") == "init" and copied(str(op.get("scheme"))) is not None for op in ops):
            raise RuleError("an adapter can't fill up from another key", key=key, hint="fill by mean, zeros, or another scheme")
        action: Action = "adapt" if ops else "copy" if first[1] == key else "rename"
        if action == "copy":
            reason = "same name, same shape" if self.target is not None else "converted as it is"
        else:
            words = (
                "dequantized" if origin.values else "",
                reasons(origin.rules) or str(self.names.prefixes[first[0]]),
                f"tied to {origin.tied_to}" if origin.tied_to else "",
            )
            reason = ", ".join(word for word in words if word)
        return Step(key, dtype, origin.shape, action, origin.source_keys, (*ops, *_cast(origin.dtype, dtype)), False, reason)

    def _load(self, key: str, own: TensorMeta) -> Step:
        """The step of a key whose value the target's own loading code computes."""
        dtype, by = self._dtype(own.dtype, own.dtype), self.computed.made[key].by
        ops = ({"op": "load", "by": by}, *_cast(own.dtype, dtype))
        return Step(key, dtype, own.shape, "load", self.computed.source_keys[key], ops, False, f"computed ({code_of(by)})")

    def _own(self, key: str, origin: Origin | None, init_rule: InitRule | None) -> Step:
        """The step of a key that no source gives: kept from a target checkpoint, or initialised by a rule or by the model."""
        assert self.target is not None
        own = self.target[key]
        why = "not in the source"
        if origin is not None:
            source_key = origin.source_keys[0][1]
            why = "the source has another shape" if source_key == key else f"the source's {source_key} has another shape"
        elif key in self.names.names_of_dropped:
            why = "dropped from the source by a rule"
        dtype = own.dtype if key in self.own_scales else self._dtype(own.dtype, own.dtype)
        cast = _cast(own.dtype, dtype)
        if init_rule is not None and init_rule.kept:
            why = str(init_rule.rule)
        if self.target.kind != "model" and (init_rule is None or init_rule.kept):
            return Step(key, dtype, own.shape, "keep", (), cast, False, f"{why}; the target's value stays")
        scheme = "model" if init_rule is None else init_rule.scheme
        reason = why + ("; the model's own value" if init_rule is None or init_rule.kept else f"; {init_rule.rule}")
        ruled = {"ruled": True} if init_rule is not None and scheme == "model" else {}
        return Step(key, dtype, own.shape, "init", (), ({"op": "init", "scheme": scheme, **ruled}, *cast), True, reason)

    def entries(self) -> tuple[Entry, ...]:
        """The values of the result that are not tensors: one for each such key of the target; in a conversion, all of them."""
        sources = self.names.entries
        if self.target is None:
            return tuple(Entry(name, source_key) for name, source_key in sources.items())
        rows = tuple(Entry(key, sources.get(key)) for key in self.target.entries)
        unset = next((row.target for row in rows if row.source is None and self.target.kind == "skeleton"), None)
        if unset is not None:
            raise PlanError(
                "nothing says what this extra state is", path=self.target.path, key=unset, hint="give the model itself as the target"
            )
        return rows


def _filled_up(op: Mapping[str, Any], init_rule: InitRule | None) -> Mapping[str, Any]:
    """The op; one that fills up with initial values and names no scheme gets the scheme of its key's init rule."""
    if op.get("fill") == "init" and op.get("scheme") == "model" and init_rule is not None and not init_rule.kept:
        return {**op, "scheme": init_rule.scheme}
    return op


def _cast(source: str, target: str) -> tuple[Mapping[str, Any], ...]:
    return () if source == target else ({"op": "cast", "dtype": target},)


def mark_fresh(steps: Sequence[Step], sources: Sequence[Checkpoint], target: Checkpoint | None) -> tuple[Step, ...]:
    """The steps; those that take fresh or partly fresh values have `fresh` or `partial` set."""
    files = [*sources, *([target] if target is not None else [])]
    if not any(file.provenance for file in files):
        return tuple(steps)
    fresh = [_recorded(file, "fresh") for file in files]
    partial = [_recorded(file, "partial") for file in files]

    def marked(step: Step) -> Step:
        source_keys = step.sources or (((len(sources), step.target),) if step.action == "keep" else ())
        are_fresh = [key in fresh[number] for number, key in source_keys]
        if are_fresh and all(are_fresh):
            return replace(step, fresh=True, reason=f"{step.reason}; {WORDS}")
        return replace(step, partial=any(are_fresh) or any(key in partial[number] for number, key in source_keys))

    return tuple(map(marked, steps))


def _recorded(file: Checkpoint, kind: str) -> frozenset[str]:
    return frozenset((file.provenance or {}).get(kind, ()))
