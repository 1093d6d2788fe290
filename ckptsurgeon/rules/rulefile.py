"""A rules file: TOML text to rules and back. Pure; the caller reads the file.

Each rule is a table `[[rename]] [[drop]] [[keep]] [[adapt]] [[init]]`, and rules of all kinds keep the order of the file. Rules after a
`[[stage]]` see the names that the rules before it made. One table `[set]` gives numbers to the variables in adapters' arguments. All
problems are reported at once, each with its line.
"""

from __future__ import annotations

import re
import shlex
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, repeat
from typing import Any

from ckptsurgeon.errors import LimitError, RuleError, printable
from ckptsurgeon.hints import close_names, shortened
from ckptsurgeon.regular_expressions import one_child
from ckptsurgeon.rules import toml_text, variables
from ckptsurgeon.rules.rules import Kind, Rule, check_choices, compile_rule, linked

_HEADER = re.compile(r"\s*\[\[\s*(?P<quote>[\"']?)(?P<name>[A-Za-z0-9_-]+)(?P=quote)\s*\]\]\s*(#.*)?")
_NAMES = re.compile(r"\s*(?:\[\[?\s*)?(?:(?:\"[^\"\\]*\"|'[^']*'|[A-Za-z0-9_-]+)\s*[].=]\s*)+")  # before a value
_NAME = re.compile(r"\"(?P<double>[^\"\\]*)\"|'(?P<single>[^']*)'|(?P<bare>[A-Za-z0-9_-]+)")
_WRITTEN = re.compile(  # comments and strings
    r'#[^\n]*|\"{3}(?:[^\\]|\\.)*?\"{3,5}|\'{3}.*?\'{3,5}|"(?:[^"\\\n]|\\.)*"|\'[^\'\n]*\'', re.DOTALL
)
_LINE = re.compile(r"line (\d+)")


@dataclass(frozen=True)
class Form:
    """How a kind of rule is written: each choice of fields for the pattern, and the field for the result."""

    patterns: tuple[tuple[str, ...], ...]
    result: str = ""


_EXAMPLE = "write a rule as [[drop]], and in the line below key = 'aux.**'"
FORMS: Mapping[Kind, Form] = {
    "rename": Form((("from", "to"),)),
    "drop": Form((("key",),)),
    "keep": Form((("key",),)),
    "adapt": Form((("key",), ("from", "to")), "op"),
    "init": Form((("key",),), "scheme"),
    "stage": Form(((),)),
}
SET = "set"  # the table of numbers for variables
OPEN = "# Layout open ("  # how the comment of a layout in doubt begins
_JOINT = {"from": " + ", "to": " + ", "key": " + ", "op": " | "}


def left_open(text: str) -> Iterator[str]:
    """What a rules file says of each open layout of which no way has lost its marks."""
    for part in text.replace("\r", "").split("\n\n"):
        if part.startswith(OPEN) and all(line.startswith("#") for line in part.splitlines()):
            yield part.partition(":")[0].removeprefix("# ")


def parse_rules(text: str, path: str, numbers: Mapping[str, int] = {}, used: set[str] | None = None) -> tuple[Rule, ...]:
    """The rules of a TOML text, in its order. RuleError with a line for each problem.

    `numbers` override those of the text's own `[set]`; the names of variables that rules use are added to `used`.

    >>> parse_rules('[[drop]]\\nkey = "aux.**"', "rules.toml")
    (Rule(kind='drop', pattern='aux.**', file='rules.toml', line=1),)
    """
    try:
        value = toml_text.parse(text, path)
    except ValueError as error:
        line_number = _LINE.search(str(error))
        is_json = text.lstrip().startswith("{")
        hint = f"if it is a plan, follow it: {shlex.join(['ckptsurgeon', 'apply', path, '-o', 'out.pt'])}" if is_json else _EXAMPLE
        raise RuleError(f"is not TOML: {error}", path=f"{path}:{line_number[1]}" if line_number else path, hint=hint) from error
    text = _WRITTEN.sub(lambda match: match[0] if "\n" not in match[0] else "\n" * match[0].count("\n"), text)
    lines = text.split("\n")
    lines_by_name = _lines_by_name(lines)
    lists = {name: tables for name, tables in value.items() if name in FORMS and type(tables) is list}
    known = {name: tables for name, tables in lists.items() if all(type(row) is dict for row in tables)}
    defined, problems = _numbers(value, lines_by_name)
    problems += [f"line {_line_of(lines_by_name, name)}: {_unknown(name)}" for name in value if name not in known and name != SET]
    numbers, filled = {**defined, **numbers}, set[str]()
    rows = list(_rows(lines, known, path))
    _child = one_child()  # keeps one process for the regular expressions of all rules
    rules: list[Rule] = []
    choices = 0
    for line, kind, table in rows:
        field_problems = list(_wrong_fields(lines_by_name, line, kind, table))
        problems += field_problems
        if not field_problems:
            for unfilled in _rules(kind, table, path, line):
                unset = variables.unset(unfilled.result, numbers) if kind == "adapt" else None
                if unset is not None:
                    problems.append(f"line {line}: {unset} (in [{SET}], or by --set NAME=NUMBER)")
                    continue
                rule = replace(unfilled, result=variables.filled(unfilled.result, numbers, filled)) if kind == "adapt" else unfilled
                rules.append(rule)
                malformed, more = _malformed(rule, path)
                problems += malformed
                choices += more
                check_choices(choices)
    unused = [name for name in defined if name not in filled]
    problems += [f"line {_line_of(lines_by_name, name)}: [{SET}] has {name!r}, and no rule uses it" for name in unused]
    if problems:
        example = 'a rule is: [[rename]], then from = "fc2.{p}" and to = "dense2.{p}" on lines of their own'
        hint = "ckptsurgeon guide rules" if rows else example
        raise RuleError("has rules that are not well formed", path=path, problems=shortened(problems), hint=hint)
    if used is not None:
        used |= filled
    return tuple(rules)


def _numbers(value: Mapping[str, Any], lines_by_name: Mapping[str, Sequence[int]]) -> tuple[dict[str, int], list[str]]:
    """The numbers in `[set]`, and its problems."""
    table = value.get(SET, {})
    if type(table) is not dict:
        return {}, [f"line {_line_of(lines_by_name, SET)}: write one table [{SET}], and in it a line for each variable: heads = 32"]
    try:
        return variables.checked(table), []
    except RuleError as error:
        return {}, [f"line {_line_of(lines_by_name, SET)}: [{SET}]: {error.reason}"]


def _unknown(name: str) -> str:
    if name in FORMS:
        return f"write each rule as a table of its own: [[{name}]]"
    close = close_names(name, FORMS, 1)
    return f"there is no rule {name[:60]!r}" + (f"; is it [[{close[0]}]]?" if close else f"; the rules are {', '.join(FORMS)}")


def _rows(lines: Sequence[str], tables: Mapping[str, Any], path: str) -> Iterator[tuple[int, Kind, dict[str, Any]]]:
    """Each table with its line and kind, in the order of the text; parsed TOML keeps the order only within each kind."""
    remaining = {name: iter(rows) for name, rows in tables.items()}
    seen = 0
    for number, line in enumerate(lines, 1):
        header = _HEADER.fullmatch(line)
        if header is None or header["name"] not in remaining:
            continue
        table = next(remaining[header["name"]], None)
        if table is not None:
            seen += 1
            yield number, header["name"], table  # type: ignore[misc]
    if seen != sum(len(rows) for rows in tables.values()):
        raise RuleError(
            "has rules whose order can't be told", path=path, hint="write each as a table of its own, on lines of its own: [[rename]]"
        )


def _lines_by_name(lines: Sequence[str]) -> Mapping[str, Sequence[int]]:
    """By name, the lines that begin with it or with a dotted name that contains it, in order."""
    by_name: dict[str, list[int]] = {}
    for number, line in enumerate(lines, 1):
        head = _NAMES.match(line)
        for match in _NAME.finditer(head[0]) if head is not None else ():
            by_name.setdefault(match["double"] or match["single"] or match["bare"] or "", []).append(number)
    return by_name


def _line_of(lines_by_name: Mapping[str, Sequence[int]], name: str, after: int = 1) -> int:
    """The first line from `after` on that begins with a name; `after` where there is none."""
    lines = lines_by_name.get(name, ())
    index = bisect_left(lines, after)
    return lines[index] if index < len(lines) else after


def _wrong_fields(lines_by_name: Mapping[str, Sequence[int]], line: int, kind: Kind, table: Mapping[str, Any]) -> Iterator[str]:
    form = FORMS[kind]
    known = (
        {name for choice in form.patterns for name in choice}
        | ({form.result} if form.result else set())
        | ({"name"} if kind == "stage" else set())
    )
    for name, value in table.items():
        line_of_field = _line_of(lines_by_name, name, line)
        if name not in known:
            close = close_names(name, sorted(known), 1)
            yield f"line {line_of_field}: [[{kind}]] has no {name[:60]!r}" + (
                f"; is it {close[0]!r}?" if close else f"; it has {' and '.join(sorted(known))}"
            )
        elif not _texts(value):
            yield f"line {line_of_field}: {name} is not text, or a list of texts"
    choices = [choice for choice in form.patterns if all(name in table for name in choice)]
    present = {name for choice in form.patterns for name in choice if name in table}
    if not choices or present != set(choices[0]):
        yield f"line {line}: [[{kind}]] needs {' or '.join(' and '.join(choice) for choice in form.patterns)}"
    if form.result and form.result not in table:
        yield f"line {line}: [[{kind}]] needs {form.result}"


def _texts(value: Any) -> bool:
    return type(value) is str or (type(value) is list and bool(value) and all(type(text) is str for text in value))


def _rules(kind: Kind, table: Mapping[str, Any], path: str, line: int) -> Iterator[Rule]:
    """The rules of a table: one for each pattern, where a list of patterns does not make one link."""

    def joined(name: str) -> str:
        value = table[name]
        return value if type(value) is str else _JOINT.get(name, " ").join(value)

    result = joined(FORMS[kind].result) if FORMS[kind].result else ""
    if kind == "stage":
        yield Rule("stage", file=path, line=line)
    elif kind == "rename":
        yield from (Rule("rename", pattern, joined("to"), path, line) for pattern in _as_list(table["from"]))
    elif "from" in table:
        yield Rule(kind, f"{joined('from')} -> {joined('to')}", result, path, line)
    else:
        yield from (Rule(kind, pattern, result, path, line) for pattern in _as_list(table["key"]))


def _as_list(value: str | Sequence[str]) -> Sequence[str]:
    return [value] if isinstance(value, str) else value


def _malformed(rule: Rule, path: str) -> tuple[list[str], int]:
    """The problem of a rule, if any, and how many words and numbers its choices have."""
    try:
        return [], 0 if rule.kind == "stage" else compile_rule(rule).choices
    except RuleError as error:
        return [f"line {rule.line}: {error.reason}" + (f" ({error.hint})" if error.hint else "")], 0
    except LimitError as error:
        error.path = error.path or path
        raise


def to_toml(rules: Iterable[Rule], comments: Iterable[str] = ()) -> str:
    """Rules as the text of a rules file, from which `parse_rules` reads the same rules. `comments` has the comment above each rule, or "".

    >>> print(to_toml([Rule("rename", "fc2.{p}", "dense2.{p}")]))
    [[rename]]
    from = "fc2.{p}"
    to = "dense2.{p}"
    <BLANKLINE>
    """
    above = ([f"# {printable(line)}" for line in text.splitlines()] for text in chain(comments, repeat("")))
    return "\n".join("\n".join([*next(above), f"[[{rule.kind}]]", *_fields(rule), ""]) for rule in rules)


def _fields(rule: Rule) -> Iterator[str]:
    if rule.kind == "stage":
        return
    sources, results = linked(rule)
    if results:
        yield f"from = {_value(sources)}"
        yield f"to = {_value(results)}"
    else:
        yield f"key = {_value([rule.pattern])}"
    if FORMS[rule.kind].result:
        yield f"{FORMS[rule.kind].result} = {_value([rule.result])}"


def _value(texts: Sequence[str]) -> str:
    quoted = [_quoted(text) for text in texts]
    return quoted[0] if len(quoted) == 1 else f"[{', '.join(quoted)}]"


def _quoted(text: str) -> str:
    """A TOML basic string."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(letter if letter.isprintable() else f"\\U{ord(letter):08x}" for letter in escaped) + '"'
