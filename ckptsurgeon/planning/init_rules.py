"""Finds the keep or init rule of each target key that no source gives.

This module does not know what schemes mean, except `from(KEY)`: the value that another key of the target gets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from ckptsurgeon.errors import RuleError
from ckptsurgeon.hints import close_words, shortened
from ckptsurgeon.planning.apply_rules import Names
from ckptsurgeon.planning.legacy_names import BY, COUNTER, is_counter
from ckptsurgeon.planning.plan_types import FROM_MODEL, Step, copied_key
from ckptsurgeon.planning.resolve import Origin, kept_out
from ckptsurgeon.rules.copied_value import copied, filled_in, follow
from ckptsurgeon.rules.rules import CompiledRule, Rule
from ckptsurgeon.tensors import Checkpoint


@dataclass(frozen=True)
class InitRule:
    """The rule for a key: an init rule with its scheme, or, with `kept`, a rule that leaves the target's own value."""

    rule: Rule
    scheme: str
    kept: bool = False


def find_init_rules(
    target: Checkpoint, names: Names, origins: Mapping[str, Origin], auto: str | None = None, look: str = ""
) -> dict[str, InitRule]:
    """The keep or init rule of each key of the target that no source gives, or that adapters fill up with initial values.

    A rule that names a key also applies to all keys that are tied to it.

    Args:
        auto: with "safe", BatchNorm's counter begins at 0.
        look: the command that shows the keys.

    Raises:
        RuleError: all rules that no key uses, together.
    """
    tied = {key: group for group in target.ties for key in group}
    kept = kept_out(target, names)
    init_rules: dict[str, InitRule] = {}
    named: set[int] = set()
    used: set[int] = set()
    problems = []
    for key in target:
        matching = [
            number for number, rule in enumerate(names.inits) if any(rule.match(name) is not None for name in tied.get(key, (key,)))
        ]
        origin = origins.get(key)
        filled = origin is not None and any(op.get("fill") == "init" for op in origin.ops)
        if key in kept:
            init_rules[key] = InitRule(kept[key], "model", kept=True)
        elif origin is None or not origin.fits or filled:
            named.update(matching)
            if not matching and auto == "safe" and is_counter(key) and target.kind != "file":
                init_rules[key] = InitRule(Rule("init", f"**.{COUNTER}", "zeros", BY), "zeros")
            if matching:
                used.add(matching[0])
                try:
                    init_rules[key] = InitRule(names.inits[matching[0]].rule, _scheme(names.inits[matching[0]], tied.get(key, (key,))))
                except RuleError as error:
                    problems.append(f"{names.inits[matching[0]].rule}: {error.reason}")
        problems += _without_a_value(key, target, origin if filled else None, init_rules.get(key))
    for number, compiled in enumerate(names.inits):
        if number in used:
            continue
        if any(compiled.match(key) is not None for key in kept):
            problems.append(f"{compiled.rule} names keys that {next(iter(kept.values()))} keeps")
        elif number in named:
            problems.append(f"{compiled.rule} never gets a turn: earlier rules name all of its keys")
        elif any(compiled.match(key) is not None for key in target):
            problems.append(f"{compiled.rule} matches only keys that take weights from the source; to initialise them, --drop them too")
        else:
            from ckptsurgeon.rules.meant import meant_words

            problems.append(f"{compiled.rule} matches nothing in the target{meant_words(compiled.rule.pattern, target)}")
    if problems:
        raise RuleError(
            "rules that can't be followed",
            problems=shortened(dict.fromkeys(problems)),
            hint=f"see the target's keys: {look}" if look else None,
        )
    return init_rules


def _without_a_value(key: str, target: Checkpoint, filled: Origin | None, init_rule: InitRule | None) -> Iterator[str]:
    """A problem for a key whose scheme can't give a value: the model's own value without a model, or another key's value to fill up
    with."""
    if init_rule is not None and init_rule.kept:
        return
    own = None if init_rule is None else init_rule.scheme
    fill_schemes = [] if filled is None else [str(op["scheme"]) for op in filled.ops if op.get("fill") == "init"]
    schemes = [own if scheme == "model" and own is not None else scheme for scheme in fill_schemes] if filled is not None else [own]
    by = ", ".join(map(str, (*(filled.rules if filled is not None else ()), *([init_rule.rule] if init_rule is not None else []))))
    for scheme in schemes:
        if filled is not None and scheme == "model" and target.kind == "file":
            continue  # a file's own value is there to fill up with
        if scheme in FROM_MODEL and target.kind != "model":
            yield f"{by}: {key} would get a value of the model itself ({scheme}), and the target is none: name a scheme, such as zeros"
        elif filled is not None and scheme is not None and copied(scheme) is not None:
            yield f"{by}: {key} can't be filled up with another key's value"


def _scheme(compiled: CompiledRule, keys: Sequence[str]) -> str:
    """The rule's scheme, with the matched parts filled in where it is `from(KEY)`."""
    match = next(match for key in keys if (match := compiled.match(key)) is not None)
    return filled_in(compiled.rule.result, compiled.patterns[0][1], dict(match.parts))


def check_copies(steps: Sequence[Step], target: Checkpoint) -> tuple[Step, ...]:
    """The steps, after those of `from(KEY)` were compared with the step that they copy. RuleError for all copies that can't be made."""
    by_key = {step.target: step for step in steps}
    problems = []
    for step in steps:
        key = copied_key(step)
        if key is None:
            continue
        if key not in by_key:
            problems.append(f"{step.target}: copies {key!r}, which is not in the target{close_words(key, target)}")
        elif follow(step.target, lambda name: copied_key(by_key[name]) if name in by_key else None) is None:
            problems.append(f"{step.target}: copies {key!r}, which copies it in turn")
        elif (by_key[key].shape, by_key[key].dtype) != (step.shape, step.dtype):
            problems.append(
                f"{step.target}: is {step.dtype} {step.shape}, and {key!r}, which it copies, {by_key[key].dtype} {by_key[key].shape}"
            )
    if problems:
        raise RuleError("copies that can't be made", problems=shortened(problems))
    return tuple(step if copied_key(step) is None else replace(step, ops=step.ops[:1]) for step in steps)
