"""Turns rules round, so that what led from one library's layout to another's leads back.

Text to text; the rules that can't be turned are told, all at once.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ckptsurgeon.errors import RuleError
from ckptsurgeon.surgery.adapters.chain import invert_chain
from ckptsurgeon.surgery.adapters.op import Op
from ckptsurgeon.surgery.adapters.table import parse_ops, texts
from ckptsurgeon.surgery.items import shortened
from ckptsurgeon.surgery.rules import Rule, compile_rule, linked

_PART = re.compile(r"\{([^{}]*)\}")
_MANY = re.compile(r"\{\*\*([A-Za-z_][A-Za-z0-9_]*)\}")
_SHIFT = re.compile(r"\s*(?P<name>[A-Za-z_][A-Za-z0-9_]*)\s*(?P<sign>[+-])\s*(?P<by>[0-9]{1,9})\s*")


def reverse(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The rules that undo these: stages in the opposite order, rules within a stage in their own.

    Raises RuleError that names each rule that can't be turned round, and why.

    >>> reverse([Rule("rename", "encoder_layer_{i}.{p}", "blocks.{i+1}.{p}")])
    (Rule(kind='rename', pattern='blocks.{i}.{p}', result='encoder_layer_{i-1}.{p}', file='', line=0),)
    """
    stages: list[list[Rule]] = [[]]
    problems = []
    for rule in rules:
        if rule.kind == "stage":
            stages.append([])
            continue
        try:
            turned = _reversed(rule)
            compile_rule(turned)  # a part that only one side names can't be had back
            stages[-1].append(turned)
        except RuleError as error:
            problems.append(f"{rule}: {error.reason}")
    if problems:
        raise RuleError(
            "rules that can't be turned round", problems=shortened(problems), hint="write the way back by hand, in a file of its own"
        )
    rows = [rule for stage in reversed(stages) for rule in (Rule("stage"), *stage)]
    return tuple(rows[1:])


def _reversed(rule: Rule) -> Rule:
    if rule.kind == "adapt":
        ops = invert_chain(parse_ops(rule.result))
        if ops is None:
            raise RuleError("an adapter of it loses what would be needed to go back")
        sources, results = linked(rule)
        if len(results) > 1 and any(op["op"] == "stack" for op in ops[1:]) and "of" not in ops[0]:
            ops = (_grouped(ops[0], len(results)), *ops[1:])
        text = rule.pattern if not results else " -> ".join((" + ".join(_sides(results, sources)), " + ".join(_sides(sources, results))))
        return Rule("adapt", text, texts(ops), rule.file, rule.line)
    if rule.kind != "rename":
        raise RuleError({"drop": "what is dropped can't be had back"}.get(rule.kind, f"{rule.kind} says what a target's own keys get"))
    sources, results = linked(rule)
    if len(results) > 1:
        raise RuleError("one key goes to several, and no one of them is told to come back")
    (pattern,), (result,) = _sides(results, sources), _sides(sources, results)
    return Rule("rename", pattern, result, rule.file, rule.line)


def _grouped(op: Op, count: int) -> Op:
    """A join of the parts that one key was cut into, before another join joins what is gathered."""
    return {**op, "of": count} if op["op"] in ("concat", "stack") else op


def _sides(turned: list[str], other: list[str]) -> list[str]:
    """One side's texts as the other side's: the parts that count are shifted to where they now are named."""
    many = {name for text in (*turned, *other) for name in _MANY.findall(text)}
    shifts = {found["name"]: found for text in other for part in _PART.findall(text) if (found := _SHIFT.fullmatch(part))}
    return [_side(text, many, shifts, turned) for text in turned]


def _side(text: str, many: set[str], shifts: dict[str, re.Match[str]], turned: list[str]) -> str:
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
