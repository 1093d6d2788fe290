"""Reverses rules, so that rules from one library's layout to another's lead back.

Text to text. Rules that can't be reversed are reported together, in one error.
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
_ANY = re.compile(r"\\.|\{([^{}]*)\}", re.DOTALL)  # a part, or a character that stands for itself
_CHOSEN = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)=([^{}]*)\}")
_MANY = re.compile(r"\{\*\*([A-Za-z_][A-Za-z0-9_]*)\}")
_SHIFT = re.compile(r"\s*(?P<name>[A-Za-z_][A-Za-z0-9_]*)\s*(?P<sign>[+-])\s*(?P<by>[0-9]{1,9})\s*")


def reverse(rules: Iterable[Rule]) -> tuple[Rule, ...]:
    """The rules that undo these: stages in the opposite order, rules within a stage in their own.

    Raises RuleError that names each rule that can't be turned round, and why.

    >>> reverse([Rule("rename", "encoder_layer_{i}.{p}", "blocks.{i+1}.{p}")])
    (Rule(kind='rename', pattern='blocks.{i}.{p}', result='encoder_layer_{i-1}.{p}'),)
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
    rows = [rule for stage in ordered for rule in (Rule("stage"), *sorted(stage, key=_width))]
    return tuple(rows[1:])


def _width(rule: Rule) -> int:
    """0 for a rule for a single name, which comes before those whose pattern may be as wide as to take it; 1 for one with choices."""
    keys = linked(rule)[0]
    return 1 if _choices(keys) else 2 if any(map(_parts, keys)) else 0


def _parts(text: str) -> list[str]:
    """What stands in the braces of a text."""
    return [found[1] for found in _ANY.finditer(text) if found[1] is not None]


def _linked_to_itself(rule: Rule) -> Rule:
    """An adapter of a target's key as one of a source's, for what is a target's name on the way there is a source's on the way back."""
    keys = linked(rule)[0]
    if len(keys) > 1:
        raise RuleError("adapts several keys by name")
    text = _side(keys[0], set(_MANY.findall(keys[0])), {}, {})
    asked = _side(text, set(_MANY.findall(text)), {}, _choices(keys))
    return Rule("adapt", f"{asked} -> {text}", rule.result, rule.file, rule.line)


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
    shifts = {found["name"]: found for text in other for part in _parts(text) if (found := _SHIFT.fullmatch(part))}
    return [_side(text, many, shifts, _choices(other)) for text in turned]


def _choices(side: list[str]) -> dict[str, str]:
    """What named parts of a side choose from."""
    return {found[1]: found[2] for text in side for found in _CHOSEN.finditer(without_escapes(text))}


def _check_counts(side: list[str]) -> None:
    """Raises RuleError where a side counts with one part in two ways, which no pattern can ask for."""
    counts: dict[str, set[int]] = {}
    for text in side:
        for part in _parts(text):
            shift = _SHIFT.fullmatch(part)
            name, by = (shift["name"], int(shift["sign"] + shift["by"])) if shift else (_bare(part), 0)
            counts.setdefault(name, set()).add(by)
    double = next((name for name, found in counts.items() if len(found) > 1), None)
    if double is not None:
        raise RuleError(f"counts with {{{double}}} in two ways")


def _side(text: str, many: set[str], shifts: dict[str, re.Match[str]], choices: dict[str, str]) -> str:
    """A side's text as the other side's; what it names chooses from what it chose there."""
    bare = _PART.sub("", without_escapes(text))
    if re.match(r"[0-9]{1,4}:", text):
        raise RuleError(f"{text!r} is for one source of several")
    if len(text) > 1 and text[0] == text[-1] == "/":
        raise RuleError(f"{text!r} is a regular expression")
    if "*" in bare:
        raise RuleError(f"{text!r} has a '*' without a name, so that what it stood for is lost")
    left = dict(choices)  # told where a part stands first
    return _ANY.sub(lambda found: found[0] if found[1] is None else _part(text, found[1], many, shifts, left), text)


def _bare(part: str) -> str:
    """The name of a part, without what it chooses from."""
    return part.partition("=")[0].removeprefix("**").strip()


def _part(text: str, part: str, many: set[str], shifts: dict[str, re.Match[str]], choices: dict[str, str]) -> str:
    plain = _bare(part)
    if plain in shifts:
        other = {"+": "-", "-": "+"}[shifts[plain]["sign"]]
        return f"{{{plain}{other}{shifts[plain]['by']}}}"
    shifted = _SHIFT.fullmatch(part)
    name, by = (shifted["name"], int(shifted["sign"] + shifted["by"])) if shifted is not None else (plain, 0)
    if not name.isidentifier():
        raise RuleError(f"{{{part}}} in {text!r} can't be solved for what it counts with")
    if name in choices:
        return f"{{{name}={_shifted(text, choices.pop(name), by)}}}"
    return f"{{**{name}}}" if name in many and not by else f"{{{name}}}"


def _shifted(text: str, choices: str, by: int) -> str:
    """What a part chooses from, after it was counted with."""
    words = choices_of(text, choices)
    if not by:
        return choices
    if not all(word.isdecimal() for word in words):
        raise RuleError(f"{text!r} counts with what are no digits")
    return listed(sorted({int(word) + by for word in words}))
