"""What a user writes: rename, drop, keep, adapt and init rules, as values. `planning.apply_rules` applies them.

A rule is text, in one form for the command line and rules files: `A -> B` links keys by an adapter, ` + ` separates several keys, `0:`
before a pattern names the only source that it is for, ` | ` separates the adapters of a chain.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ckptsurgeon.adapters.chain import UserShape, counted_at
from ckptsurgeon.adapters.op import Op
from ckptsurgeon.adapters.table import is_user_adapter, parse_ops
from ckptsurgeon.arguments import check_arguments
from ckptsurgeon.command import Option, as_words
from ckptsurgeon.errors import RuleError
from ckptsurgeon.limit_table import allowed, exceeded
from ckptsurgeon.rules.loading_code import Taken
from ckptsurgeon.rules.patterns import Pattern, compile_pattern, without_escapes
from ckptsurgeon.rules.templates import check_template
from ckptsurgeon.shown import Shown

# No user writes the last two: they are reasons in a plan.
Kind = Literal["rename", "drop", "keep", "adapt", "init", "stage", "average", "convert"]
_NUMBERED = re.compile(r"([0-9]{1,4}):(.+)", re.DOTALL)
# Each with what is skipped: a character after a backslash is literal, and a plus in braces is arithmetic.
_ARROW = re.compile(r"\\.|(->)", re.DOTALL)
_SPACED = re.compile(r"\\.|\s++(\+\s++)?", re.DOTALL)
_PLUS = re.compile(r"\\.|\{[^{}]*\}|(\+)", re.DOTALL)
_BRACED = re.compile(r"\{\s*(?:\*\*)?([A-Za-z_][A-Za-z0-9_]*|[1-9][0-9]*)\s*\}")


@dataclass(frozen=True, repr=False)
class Rule(Shown):
    """One rule.

    Attributes:
        kind: `rename`, `drop`, `keep`, `adapt`, `init`, or `stage`: the rules after a stage see the names that the rules before it made.
        pattern: matched with the source's names (rename, drop, and an adapt rule with `->`) or the target's (keep, init, and an adapt rule
            without).
        result: a rename's template or templates, an adapt rule's adapters, an init's scheme.
        file: the rules file in which it is written, or "".
        line: its line there.

    Raises:
        ArgumentError: a field has a wrong type.
    """

    kind: Kind
    pattern: str = ""
    result: str = ""
    file: str = field(default="", compare=False)
    line: int = field(default=0, compare=False)

    def __post_init__(self) -> None:
        check_arguments(Rule, "Rule", vars(self))

    @property
    def option(self) -> Option:
        """The rule as an option of a command."""
        return (self.kind, *(text for text in (self.pattern, self.result) if text))

    def __str__(self) -> str:
        words = " ".join([self.kind, *(repr(text) for text in (self.pattern, self.result) if text)])
        if not self.file:
            return f"--{words}"
        return f"{words} ({self.file}:{self.line})" if self.line else f"{words} ({self.file})"


def rule_options(rules: Iterable[Rule | str]) -> tuple[Option, ...]:
    """Rules, and the paths of rules files, as the options of a command."""
    return tuple(("rules", rule) if isinstance(rule, str) else rule.option for rule in rules)


def option_text(rule: Rule) -> str:
    """A rule as it is written on a command line, with quotes for a shell.

    >>> print(option_text(Rule("adapt", "a.*", "permute_rope(heads=2, to='pairs')")))
    --adapt 'a.*' "permute_rope(heads=2, to='pairs')"
    """
    return " ".join(map(quoted, as_words([rule.option])))


def quoted(text: str) -> str:
    """A word quoted for a shell: in double quotes where it has single quotes and no character that is special within double quotes."""
    return f'"{text}"' if "'" in text and not set(text) & set('"$`\\!') else shlex.quote(text)


@dataclass(frozen=True)
class Outside:
    """What rules need from outside of their text when they are compiled and applied: token lists by path, the shape functions of user
    adapters by name, and by the number of a source what the target's own loading code does with names that the target lacks."""

    labels: Mapping[str, tuple[str | None, ...]] = field(default_factory=dict)
    shapes: Mapping[str, UserShape] = field(default_factory=dict)
    taken: Mapping[int, Taken] = field(default_factory=dict)


@dataclass(frozen=True)
class Match:
    """The match of a rule with a name: the index of the pattern that matched, and the text of each part."""

    which: int
    parts: Mapping[str, str]


@dataclass(frozen=True)
class CompiledRule:
    """A compiled rule: its patterns (each with the number of the only source that it is for, or None), its results and its ops.

    `gathered` are the parts that the patterns name and the results don't, or use only in arithmetic (`{i//2}`): keys that differ in them
    alone go into one result, in numerical order. `counted` is the part that the results name and no pattern does: it numbers the outputs of
    `unstack`.
    """

    rule: Rule
    patterns: tuple[tuple[int | None, Pattern], ...]
    results: tuple[str, ...] = ()
    ops: tuple[Op, ...] = ()
    gathered: tuple[str, ...] = ()
    counted: str | None = None
    stage: int = 0

    @property
    def of_target(self) -> bool:
        """Whether the patterns are matched with the target's names."""
        return self.rule.kind in ("init", "keep") or (self.rule.kind == "adapt" and not self.results)

    @property
    def choices(self) -> int:
        """How many words and numbers the choices of its patterns have."""
        return sum(pattern.choices for _, pattern in self.patterns)

    def learn(self, names: Iterable[str]) -> None:
        """Announce the names that will be matched, as `Pattern.learn` does."""
        expressions = [pattern for _, pattern in self.patterns if pattern.expression is not None]
        names = list(names) if len(expressions) > 1 else names
        for pattern in expressions:
            pattern.learn(names)

    def match(self, name: str, source: int | None = None) -> Match | None:
        """The first pattern that matches a name (of a source's key), or None."""
        for which, (number, pattern) in enumerate(self.patterns):
            parts = pattern.match(name) if number in (None, source) else None
            if parts is not None:
                return Match(which, parts)
        return None


def compile_rules(rules: Iterable[Rule], outside: Outside = Outside()) -> tuple[CompiledRule, ...]:
    """Compile every rule; one RuleError names all that are not well formed. A stage only raises the stage number of the rules after it."""
    compiled: list[CompiledRule] = []
    problems: list[str] = []
    hint = None
    stage = choices = 0
    for rule in rules:
        if rule.kind == "stage":
            stage += 1
            continue
        try:
            compiled.append(compile_rule(rule, stage, outside))
            choices += compiled[-1].choices
            check_choices(choices)
        except RuleError as error:
            problems.append(f"{rule}: {error.reason}")
            hint = hint or error.hint
    if problems:
        raise RuleError("rules that are not well formed", problems=tuple(problems), hint=hint)
    return tuple(compiled)


def check_choices(number: int) -> None:
    """LimitError where the choices of all rules together have more words and numbers than the limit allows."""
    if number > allowed("choices"):
        raise exceeded("choices", f"rules have more than {allowed('choices')} words and numbers to choose from", number)


def linked(rule: Rule) -> tuple[list[str], list[str]]:
    """The keys on both sides of a rule, as they are written; the second list is empty for a rule without results.

    >>> linked(Rule("adapt", "q.{p} + k.{p} -> qk.{p}", "concat"))
    (['q.{p}', 'k.{p}'], ['qk.{p}'])
    """
    if rule.kind == "rename":
        return [rule.pattern], _several(rule.result)
    if rule.kind != "adapt":
        return [rule.pattern], []
    sides = _split(rule.pattern, _ARROW)
    if len(sides) > 2:
        raise RuleError("has more than one ' -> '", hint="write it as two rules; an arrow of the key itself is written \\->")
    return _several(_stripped(sides[0])), _several(_stripped(sides[1])) if len(sides) == 2 else []


def _several(side: str) -> list[str]:
    """The keys of one side. A regular expression may contain a plus, so the separator needs blanks around it there."""
    if "/" in side:
        return _split(side, _SPACED)
    keys = _split(side, _PLUS)
    return [_stripped(keys[0], False), *map(_stripped, keys[1:-1]), keys[-1].lstrip()] if len(keys) > 1 else keys


def _split(text: str, separator: re.Pattern[str]) -> list[str]:
    """The texts between separators."""
    spans = [match.span() for match in separator.finditer(text) if match[1]]
    ends = [index for span in spans for index in span]
    return [text[start:stop] for start, stop in zip([0, *ends[1::2]], [*ends[::2], len(text)], strict=True)]


def _stripped(text: str, both: bool = True) -> str:
    """A text without the blanks at its end (and its start), except for a blank after a backslash."""
    bare = text.rstrip()
    if (len(bare) - len(bare.rstrip("\\"))) % 2:
        bare = text[: len(bare) + 1]
    return bare.lstrip() if both else bare


def compile_rule(rule: Rule, stage: int = 0, outside: Outside | None = None) -> CompiledRule:
    """Compile one rule; without `outside` only to check its form. Raises RuleError."""
    if rule.kind in ("init", "adapt") and not rule.result:
        example = "init={'fc3.*': 'xavier_normal'}" if rule.kind == "init" else "adapt={'pos_embed': 'interpolate'}"
        raise RuleError("names no scheme" if rule.kind == "init" else "names no adapter", hint=example)
    keys, results = linked(rule)
    of_target = rule.kind in ("init", "keep") or (rule.kind == "adapt" and not results)
    patterns = tuple(_pattern(rule, key, of_target) for key in keys)
    if rule.kind == "rename":
        for result in results:
            check_template(result, patterns[0][1])
        return CompiledRule(rule, patterns, tuple(results), stage=stage)
    ops = tuple(_with_outside(rule, op, outside) for op in parse_ops(rule.result)) if rule.kind == "adapt" else ()
    gathered, counted = _loose_parts([pattern for _, pattern in patterns], results, ops) if results else ((), None)
    return CompiledRule(rule, patterns, tuple(results), ops, gathered, counted, stage)


def _pattern(rule: Rule, text: str, of_target: bool) -> tuple[int | None, Pattern]:
    numbered = None if of_target else _NUMBERED.fullmatch(text)
    number, text = (int(numbered[1]), numbered[2]) if numbered else (None, text)
    return number, compile_pattern(text, str(rule))


def _loose_parts(patterns: Sequence[Pattern], results: Sequence[str], ops: Sequence[Op]) -> tuple[tuple[str, ...], str | None]:
    """The parts of a link that only its patterns name, and the part that only its results name, if any."""
    parts = patterns[0].parts
    for pattern in patterns:
        if set(pattern.parts) != set(parts):
            raise RuleError(f"{patterns[0].text!r} and {pattern.text!r} name other parts", hint="name the same parts in each: {i}, {p}")
    used = [{part for part in parts if counts_with(result, part)} for result in results]
    unmatched = dict.fromkeys(name for result in results for name in _BRACED.findall(without_escapes(result)) if name not in parts)
    counted = next(iter(unmatched), None) if counted_at(ops) is not None else None
    for result in results:
        check_template(re.sub(rf"\{{{counted}\}}", "0", result) if counted else result, patterns[0])
    if any(parts_used != used[0] for parts_used in used) or (counted and any(f"{{{counted}}}" not in result for result in results)):
        raise RuleError("has results that use other parts", hint="use the same parts in each: {i}, {p}")
    named = {name for result in results for name in _BRACED.findall(without_escapes(result))}
    return tuple(part for part in parts if part not in named), counted


def counts_with(result: str, part: str) -> bool:
    """Whether a result uses a part, by itself or in arithmetic.

    >>> counts_with("h.{i//2}.w", "i"), counts_with("h.{i//2}.w", "w")
    (True, False)
    """
    return any(re.search(rf"\b{part}\b", braced) for braced in re.findall(r"\{[^{}]*\}", without_escapes(result)))


def _with_outside(rule: Rule, op: Op, outside: Outside | None) -> Op:
    """The op with its token lists filled in. RuleError for a user adapter that was not imported."""
    if outside is None:
        return op
    if is_user_adapter(op):
        if op["op"] not in outside.shapes:
            raise RuleError(f"{op['op']!r} was not imported")
        return op
    paths = {name: path_of_file(rule, op[name]) for name in ("source", "target") if type(op.get(name)) is str}
    return {**op, **{name: outside.labels[path] for name, path in paths.items() if path in outside.labels}}


def path_of_file(rule: Rule, path: str) -> str:
    """The path of a file that a rule names: relative to the folder of the rules file, if the rule is in one.

    >>> path_of_file(Rule("adapt", "w", "rows", "conf/rules.toml", 1), "vocab.txt")
    'conf/vocab.txt'
    """
    return path if path.startswith("/") else rule.file[: rule.file.rfind("/") + 1] + path


def from_arguments(
    rename: Mapping[str, str] | Iterable[tuple[str, str]] = (),
    drop: Iterable[str] = (),
    init: Mapping[str, str] | Iterable[tuple[str, str]] = (),
    adapt: Mapping[str, str] | Iterable[tuple[str, str]] = (),
    keep: Iterable[str] = (),
) -> tuple[Rule, ...]:
    """Rules from the library's keyword arguments: drops first, then renames, keeps, adapts and inits, each in the order given.

    >>> from_arguments(rename={"fc2.{p}": "dense2.{p}"})
    (Rule(kind='rename', pattern='fc2.{p}', result='dense2.{p}'),)
    """

    def pairs(kind: Kind, entries: Mapping[str, str] | Iterable[tuple[str, str]]) -> Iterable[Rule]:
        return (Rule(kind, pattern, result) for pattern, result in (entries.items() if isinstance(entries, Mapping) else entries))

    def words(kind: Kind, keys: Iterable[str]) -> Iterable[Rule]:
        return (Rule(kind, pattern) for pattern in ((keys,) if isinstance(keys, str) else keys))

    return (
        *words("drop", drop),
        *pairs("rename", rename),
        *words("keep", keep),
        *pairs("adapt", adapt),
        *pairs("init", init),
    )
