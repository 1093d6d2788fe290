"""Turns rules round, so that what led from one library's layout to another's leads back.

Text to text; the rules that can't be turned are told, all at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ckptsurgeon.adapters.chain import counted_at, invert_chain
from ckptsurgeon.adapters.table import adapter_of, parse_ops, texts
from ckptsurgeon.errors import RuleError
from ckptsurgeon.hints import shortened
from ckptsurgeon.rules.rules import Rule, compile_rule, linked

_PART = re.compile(r"\{([^{}]*)\}")
_MANY = re.compile(r"\{\*\*([A-Za-z_][A-Za-z0-9_]*)\}")
_SHIFT = re.compile(r"\s*(?P<name>[A-Za-z_][A-Za-z0-9_]*)\s*(?P<sign>[+-])\s*(?P<by>[0-9]{1,9})\s*")


def reverse(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The rules that undo these: stages in the opposite order, rules within a stage in their own.

    Raises RuleError that names each rule that can't be turned round, and why.

    >>> reverse([Rule("rename", "encoder_layer_{i}.{p}", "blocks.{i+1}.{p}")])
    (Rule(kind='rename', pattern='blocks.{i}.{p}', result='encoder_layer_{i-1}.{p}', file='', line=0),)
    """
    given = tuple(rules)
    moves = any(rule.kind == "rename" or (rule.kind == "adapt" and "->" in rule.pattern) for rule in given)
    first: list[Rule] = []  # adapters of the target's keys by name: undone before the names are
    stages: list[list[Rule]] = [[]]
    problems = []
    for rule in given:
        if rule.kind == "stage":
            stages.append([])
            continue
        try:
            turned = _reversed(rule)
            early = moves and rule.kind == "adapt" and not linked(rule)[1]
            turned = _linked_to_itself(turned) if early else turned
            compile_rule(turned)  # a part that only one side names can't be had back
            (first if early else stages[-1]).append(turned)
        except RuleError as error:
            problems.append(f"{rule}: {error.reason}")
    if problems:
        raise RuleError(
            "rules that can't be turned round", problems=shortened(problems), hint="write the way back by hand, in a file of its own"
        )
    ordered = [*([first] if first else []), *reversed(stages)]
    rows = [rule for stage in ordered for rule in (Rule("stage"), *sorted(stage, key=_has_parts))]
    return tuple(rows[1:])


def _has_parts(rule: Rule) -> bool:
    """Whether a rule is for several names. One for a single name comes before those whose pattern may be as wide as to take it."""
    return any(_PART.search(key) for key in linked(rule)[0])


def _linked_to_itself(rule: Rule) -> Rule:
    """An adapter of a target's key as one of a source's, for what is a target's name on the way there is a source's on the way back."""
    keys = linked(rule)[0]
    if len(keys) > 1:
        raise RuleError("adapts several keys by name")
    text = _side(keys[0], set(_MANY.findall(keys[0])), {})
    return Rule("adapt", f"{text} -> {text}", rule.result, rule.file, rule.line)


def _reversed(rule: Rule) -> Rule:
    if rule.kind == "adapt":
        given = parse_ops(rule.result)
        ops = invert_chain(given)
        if ops is None:
            raise RuleError("an adapter of it loses what would be needed to go back")
        sources, results = linked(rule)
        if len(results) > 1 and counted_at(given[:-1]) is not None and adapter_of(ops[0]).joins and "of" not in ops[0]:
            ops = ({**ops[0], "of": len(results)}, *ops[1:])  # the parts that one key was cut into, before they are gathered
        text = rule.pattern if not results else " -> ".join((" + ".join(_sides(results, sources)), " + ".join(_sides(sources, results))))
        return Rule("adapt", text, texts(ops), rule.file, rule.line)
    if rule.kind != "rename":
        raise RuleError({"drop": "what is dropped can't be had back"}.get(rule.kind, f"{rule.kind} says what a target's own keys get"))
    sources, results = linked(rule)
    if len(results) > 1:
        raise RuleError("one key goes to several, and no one of them is told to come back")
    (result,), (pattern,) = _sides(sources, results), _sides(results, sources)
    return Rule("rename", pattern, result, rule.file, rule.line)


def _sides(turned: list[str], other: list[str]) -> list[str]:
    """One side's texts as the other side's: the parts that count are shifted to where they now are named."""
    many = {name for text in (*turned, *other) for name in _MANY.findall(text)}
    for side in (turned, other):
        _check_counts(side)
    shifts = {found["name"]: found for text in other for part in _PART.findall(text) if (found := _SHIFT.fullmatch(part))}
    return [_side(text, many, shifts) for text in turned]


def _check_counts(side: list[str]) -> None:
    """Raises RuleError where a side counts with one part in two ways, which no pattern can ask for."""
    counts: dict[str, set[int]] = {}
    for text in side:
        for part in _PART.findall(text):
            shift = _SHIFT.fullmatch(part)
            name, by = (shift["name"], int(shift["sign"] + shift["by"])) if shift else (part.removeprefix("**").strip(), 0)
            counts.setdefault(name, set()).add(by)
    double = next((name for name, found in counts.items() if len(found) > 1), None)
    if double is not None:
        raise RuleError(f"counts with {{{double}}} in two ways")


def _side(text: str, many: set[str], shifts: dict[str, re.Match[str]]) -> str:
    bare = _PART.sub("", text)
    if re.match(r"[0-9]{1,4}:", text):
        raise RuleError(f"{text!r} is for one source of several")
    if len(text) > 1 and text[0] == text[-1] == "/":
        raise RuleError(f"{text!r} is a regular expression")
    if "*" in bare:
        raise RuleError(f"{text!r} has a '*' without a name, so that what it stood for is lost")
    return _PART.sub(lambda found: _part(text, found[1], many, shifts), text)


def _part(text: str, part: str, many: set[str], shifts: dict[str, re.Match[str]]) -> str:
    plain = part.removeprefix("**").strip()
    if plain in shifts:
        other = {"+": "-", "-": "+"}[shifts[plain]["sign"]]
        return f"{{{plain}{other}{shifts[plain]['by']}}}"
    shifted = _SHIFT.fullmatch(part)
    if shifted is not None:
        return f"{{{shifted['name']}}}"
    if not plain.isidentifier():
        raise RuleError(f"{{{part}}} in {text!r} can't be solved for what it counts with")
    return f"{{**{plain}}}" if plain in many else f"{{{plain}}}"
