"""What a person writes: rename, drop and init rules, as values. Well-formedness is checked here; what a rule matches, in `plan`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from ckptsurgeon.errors import RuleError
from ckptsurgeon.surgery.patterns import Pattern, check_template, compile_pattern

Kind = Literal["rename", "drop", "keep", "adapt", "init", "stage"]
_NUMBERED = re.compile(r"([0-9]{1,4}):(.+)", re.DOTALL)


@dataclass(frozen=True)
class Rule:
    """One rule.

    `pattern` is held against the source's names (rename, drop) or the target's (init); `result` is a rename's template or an init's scheme.
    A rename or drop holds for every source, or, as `1:fc.*`, for the source of that number, the first being 0.
    """

    kind: Kind
    pattern: str
    result: str = ""
    file: str = field(default="", compare=False)
    line: int = field(default=0, compare=False)

    def __str__(self) -> str:
        words = f"{self.kind} {self.pattern!r}" + (f" {self.result!r}" if self.result else "")
        return f"{words} ({self.file}:{self.line})" if self.file else f"--{words}"


@dataclass(frozen=True)
class CompiledRule:
    """A rule with its pattern ready to match, and the number of the only source that it is for."""

    rule: Rule
    pattern: Pattern
    source: int | None = None

    def match(self, name: str, source: int | None = None) -> dict[str, str] | None:
        """What the pattern's parts stand for in a name (of a source's key), or None."""
        return self.pattern.match(name) if self.source in (None, source) else None


def compile_rules(rules: Iterable[Rule]) -> tuple[CompiledRule, ...]:
    """Compile every rule; one RuleError names all that are not well formed."""
    compiled: list[CompiledRule] = []
    problems: list[str] = []
    hint = None
    for rule in rules:
        try:
            compiled.append(_compile(rule))
        except RuleError as error:
            problems.append(f"{rule}: {error.reason}")
            hint = hint or error.hint
    if problems:
        raise RuleError("rules that are not well formed", problems=tuple(problems), hint=hint)
    return tuple(compiled)


def _compile(rule: Rule) -> CompiledRule:
    if rule.kind == "init":
        if not rule.result:
            raise RuleError("names no scheme", hint="--init 'fc3.*' xavier_normal")
        return CompiledRule(rule, compile_pattern(rule.pattern))
    numbered = _NUMBERED.fullmatch(rule.pattern)
    pattern = compile_pattern(numbered[2] if numbered else rule.pattern)
    if rule.kind == "rename":
        check_template(rule.result, pattern)
    return CompiledRule(rule, pattern, int(numbered[1]) if numbered else None)


def from_arguments(
    rename: Mapping[str, str] | Iterable[tuple[str, str]] = (),
    drop: Iterable[str] = (),
    init: Mapping[str, str] | Iterable[tuple[str, str]] = (),
) -> tuple[Rule, ...]:
    """Rules from the library's keyword arguments: drops first, then renames, then inits, each in the order given.

    >>> from_arguments(rename={"fc2.{p}": "dense2.{p}"})
    (Rule(kind='rename', pattern='fc2.{p}', result='dense2.{p}'),)
    """
    pairs = rename.items() if isinstance(rename, Mapping) else rename
    inits = init.items() if isinstance(init, Mapping) else init
    drops = (drop,) if isinstance(drop, str) else drop
    return (
        *(Rule("drop", pattern) for pattern in drops),
        *(Rule("rename", pattern, result) for pattern, result in pairs),
        *(Rule("init", pattern, scheme) for pattern, scheme in inits),
    )


def close_names(name: str, names: Iterable[str], most: int = 3) -> str:
    """A few of `names` that are close to `name`, as words to end a sentence with, or `""`.

    >>> close_names("fc4.*", ["conv1.weight", "fc1.weight"])
    ' (close: fc1.weight)'
    """
    pool = list(dict.fromkeys(names))
    plain = re.sub(r"[*{}]", "", name)
    found = difflib.get_close_matches(plain, pool[:5000], n=most, cutoff=0.5)
    head = re.split(r"[.0-9]", plain)[0]
    if not found and head:
        found = [key for key in pool if key.startswith(head)][:most]
    return f" (close: {', '.join(found)})" if found else ""
