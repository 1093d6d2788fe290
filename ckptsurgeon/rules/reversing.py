"""Reverses rules: rules that convert one library's layout to another's become rules for the way back.

Text to text. All rules that can't be reversed are reported in one error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from ckptsurgeon.adapters.chain import counted_at, invert_chain
from ckptsurgeon.adapters.table import adapter_of, parse_ops, texts
from ckptsurgeon.errors import RuleError
from ckptsurgeon.hints import shortened
from ckptsurgeon.rules.patterns import choices_of, listed, without_escapes
from ckptsurgeon.rules.rules import Rule, compile_rule, linked

_PART = re.compile(r"\{([^{}]*)\}")
_ANY = re.compile(r"\\.|\{([^{}]*)\}", re.DOTALL)  # a part, or an escaped character
_CHOSEN = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)=([^{}]*)\}")
_MANY = re.compile(r"\{\*\*([A-Za-z_][A-Za-z0-9_]*)\}")
_SHIFT = re.compile(r"\s*(?P<name>[A-Za-z_][A-Za-z0-9_]*)\s*(?P<sign>[+-])\s*(?P<by>[0-9]{1,9})\s*")


def reverse(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The rules that undo these: stages in the opposite order, rules within a stage in the same order.

    Raises RuleError with each rule that can't be reversed, and why.

    >>> reverse([Rule("rename", "encoder_layer_{i}.{p}", "blocks.{i+1}.{p}")])
    (Rule(kind='rename', pattern='blocks.{i}.{p}', result='encoder_layer_{i-1}.{p}'),)
    """
    originals = tuple(rules)
    moves = any(rule.kind == "rename" or (rule.kind == "adapt" and "->" in rule.pattern) for rule in originals)
    before_renames: list[Rule] = []  # adapters of target keys by name, which are undone before the renames
    stages: list[list[Rule]] = [[]]
    problems = []
    for rule in originals:
        if rule.kind == "stage":
            stages.append([])
            continue
        try:
            inverse = _reversed(rule)
            by_name = moves and rule.kind == "adapt" and not linked(rule)[1]
            inverse = _linked_to_itself(inverse) if by_name else inverse
            compile_rule(inverse)  # RuleError for a part that only one side names: it is lost
            (before_renames if by_name else stages[-1]).append(inverse)
        except RuleError as error:
            problems.append(f"{rule}: {error.reason}")
    if problems:
        raise RuleError(
            "rules that can't be turned round", problems=shortened(problems), hint="write the way back by hand, in a file of its own"
        )
    ordered = [*([before_renames] if before_renames else []), *reversed(stages)]
    rows = [rule for stage in ordered for rule in (Rule("stage"), *sorted(stage, key=_width))]
    return tuple(rows[1:])


def _width(rule: Rule) -> int:
    """How many names a rule may match: 0 for one, 1 for choices, 2 for other patterns. A narrow rule must come before a wider one."""
    keys = linked(rule)[0]
    return 1 if _choices(keys) else 2 if any(map(_parts, keys)) else 0


def _parts(text: str) -> list[str]:
    """The contents of the braces in a text."""
    return [match[1] for match in _ANY.finditer(text) if match[1] is not None]


def _linked_to_itself(rule: Rule) -> Rule:
    """An adapter of a target key by name, as a link from the source key of the same name: on the way back the target is the source."""
    keys = linked(rule)[0]
    if len(keys) > 1:
        raise RuleError("adapts several keys by name")
    result = _side(keys[0], set(_MANY.findall(keys[0])), {}, {})
    pattern = _side(result, set(_MANY.findall(result)), {}, _choices(keys))
    return Rule("adapt", f"{pattern} -> {result}", rule.result, rule.file, rule.line)


def _reversed(rule: Rule) -> Rule:
    if rule.kind == "adapt":
        original_ops = parse_ops(rule.result)
        ops = invert_chain(original_ops)
        if ops is None:
            raise RuleError("an adapter of it loses what would be needed to go back")
        sources, results = linked(rule)
        if len(results) > 1 and counted_at(original_ops[:-1]) is not None and adapter_of(ops[0]).joins and "of" not in ops[0]:
            ops = ({**ops[0], "of": len(results)}, *ops[1:])  # the number of parts that one key was cut into
        text = rule.pattern if not results else " -> ".join((" + ".join(_sides(results, sources)), " + ".join(_sides(sources, results))))
        return Rule("adapt", text, texts(ops), rule.file, rule.line)
    if rule.kind != "rename":
        raise RuleError({"drop": "what is dropped can't be had back"}.get(rule.kind, f"{rule.kind} says what a target's own keys get"))
    sources, results = linked(rule)
    if len(results) > 1:
        raise RuleError("one key goes to several, and no one of them is told to come back")
    (result,), (pattern,) = _sides(sources, results), _sides(results, sources)
    return Rule("rename", pattern, result, rule.file, rule.line)


def _sides(texts: list[str], opposite: list[str]) -> list[str]:
    """The texts of one side as those of the opposite side; the arithmetic of parts is solved for the names on the new side."""
    many = {name for text in (*texts, *opposite) for name in _MANY.findall(text)}
    for side in (texts, opposite):
        _check_counts(side)
    shifts = {shift["name"]: shift for text in opposite for part in _parts(text) if (shift := _SHIFT.fullmatch(part))}
    return [_side(text, many, shifts, _choices(opposite)) for text in texts]


def _choices(side: list[str]) -> dict[str, str]:
    """The choices of a side's parts, by the part's name."""
    return {match[1]: match[2] for text in side for match in _CHOSEN.finditer(without_escapes(text))}


def _check_counts(side: list[str]) -> None:
    """RuleError where a side uses one part with two different shifts, which no pattern can express."""
    counts: dict[str, set[int]] = {}
    for text in side:
        for part in _parts(text):
            shift = _SHIFT.fullmatch(part)
            name, by = (shift["name"], int(shift["sign"] + shift["by"])) if shift else (_bare(part), 0)
            counts.setdefault(name, set()).add(by)
    double = next((name for name, shifts in counts.items() if len(shifts) > 1), None)
    if double is not None:
        raise RuleError(f"counts with {{{double}}} in two ways")


def _side(text: str, many: set[str], shifts: dict[str, re.Match[str]], choices: dict[str, str]) -> str:
    """A text of one side as the opposite side's; parts get the `choices` that they had on that side."""
    bare = _PART.sub("", without_escapes(text))
    if re.match(r"[0-9]{1,4}:", text):
        raise RuleError(f"{text!r} is for one source of several")
    if len(text) > 1 and text[0] == text[-1] == "/":
        raise RuleError(f"{text!r} is a regular expression")
    if "*" in bare:
        raise RuleError(f"{text!r} has a '*' without a name, so that what it stood for is lost")
    remaining = dict(choices)  # written where a part occurs first
    return _ANY.sub(lambda match: match[0] if match[1] is None else _part(text, match[1], many, shifts, remaining), text)


def _bare(part: str) -> str:
    """The name of a part, without its choices."""
    return part.partition("=")[0].removeprefix("**").strip()


def _part(text: str, part: str, many: set[str], shifts: dict[str, re.Match[str]], choices: dict[str, str]) -> str:
    bare = _bare(part)
    if bare in shifts:
        opposite_sign = {"+": "-", "-": "+"}[shifts[bare]["sign"]]
        return f"{{{bare}{opposite_sign}{shifts[bare]['by']}}}"
    shifted = _SHIFT.fullmatch(part)
    name, by = (shifted["name"], int(shifted["sign"] + shifted["by"])) if shifted is not None else (bare, 0)
    if not name.isidentifier():
        raise RuleError(f"{{{part}}} in {text!r} can't be solved for what it counts with")
    if name in choices:
        return f"{{{name}={_shifted(text, choices.pop(name), by)}}}"
    return f"{{**{name}}}" if name in many and not by else f"{{{name}}}"


def _shifted(text: str, choices: str, by: int) -> str:
    """The choices of a part after a shift."""
    words = choices_of(text, choices)
    if not by:
        return choices
    if not all(word.isdecimal() for word in words):
        raise RuleError(f"{text!r} counts with what are no digits")
    return listed(sorted({int(word) + by for word in words}))
