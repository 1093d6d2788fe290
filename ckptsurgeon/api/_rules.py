"""Gathers the rules of a call: arguments, rules files, and what they name outside of themselves, which is read and imported here.

A person's own code is imported only when a rule names it, and `note` says so.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ckptsurgeon.adapters.chain import OwnShape
from ckptsurgeon.adapters.table import is_own, parse_ops
from ckptsurgeon.api._opening import silent, unmissable
from ckptsurgeon.api._options import RuleOptions
from ckptsurgeon.command import Option
from ckptsurgeon.errors import CheckpointError, RuleError
from ckptsurgeon.hints import shortened
from ckptsurgeon.parameter_types import Note, Path
from ckptsurgeon.rules.rules import Outside, Rule, from_arguments, path_of_file, rule_options

if TYPE_CHECKING:
    from ckptsurgeon.adapters.table import OwnKernel
    from ckptsurgeon.matching.layouts.choices import Open
    from ckptsurgeon.models.init.user_functions import Fill
    from ckptsurgeon.storage.files import OpenFile

Rules = Path | Rule | Sequence[Path | Rule]


@dataclass(frozen=True)
class Own:
    """A person's own code by name: the kernels of adapters, and the functions of schemes."""

    kernels: Mapping[str, OwnKernel] = field(default_factory=dict)
    schemes: Mapping[str, Fill] = field(default_factory=dict)


@dataclass(frozen=True)
class Ruling:
    """The rules of a call in their order, and what they name outside: token lists and shapes, and a person's own code.

    `options` are the rules as they were given, as options of a command; `unused` are numbers that were set, and that no rule uses; `open`
    is what matching leaves open.
    """

    rules: tuple[Rule, ...]
    outside: Outside = field(default_factory=Outside)
    own: Own = field(default_factory=Own)
    options: tuple[Option, ...] = ()
    unused: tuple[str, ...] = ()
    open: tuple[Open, ...] = ()


def load_rules(path: Path, *, reverse: bool = False, numbers: Mapping[str, int] | None = None) -> tuple[Rule, ...]:
    """The rules of a TOML file, turned round with `reverse`.

    Args:
        path: a rules file (TOML).
        reverse: use the rules files in the other direction: from the names of their targets to those of their sources.
        numbers: for variables in adapters' arguments, by name: `{"heads": 32}`, as `permute_rope(heads=heads)` needs.

    Returns:
        The rules, in the order of the file.

    Raises:
        RuleError: rules that are not well formed, all at once and with their lines, or that can't be turned round.
        UnreadableError: the file can't be read.

    >>> from pathlib import Path
    >>> _ = Path("rules.toml").write_text('[[rename]]\\nfrom = "fc2.{p}"\\nto = "dense2.{p}"')
    >>> str(load_rules("rules.toml", reverse=True)[0])
    "rename 'dense2.{p}' 'fc2.{p}' (rules.toml:1)"
    """
    used: set[str] = set()
    from ckptsurgeon.rules.variables import checked

    found = _read(path, checked(numbers or {}), used)
    refuse_unused([name for name in numbers or () if name not in used])
    if not reverse:
        return found
    from ckptsurgeon.rules.reversing import reverse as turn_round

    return turn_round(found)


def _read(path: Path, numbers: Mapping[str, int], used: set[str]) -> tuple[Rule, ...]:
    """The rules of a file; `used` gets the names of the numbers that they use."""
    from ckptsurgeon.rules import toml_text
    from ckptsurgeon.rules.rulefile import parse_rules
    from ckptsurgeon.storage.opening import open_regular

    name = os.fspath(path)
    with open_regular(name) as file:
        _refuse_checkpoint(file)
        toml_text.check({"toml-bytes": file.size}, name)
        raw = bytes(file.read(0, file.size))
    try:
        return parse_rules(raw.removeprefix(b"\xef\xbb\xbf").decode(), name, numbers, used)
    except UnicodeDecodeError as error:
        raise RuleError("is no text", path=name, hint="a rules file is TOML, in UTF-8") from error


def _refuse_checkpoint(file: OpenFile) -> None:
    """RuleError for a file that begins as a checkpoint."""
    from ckptsurgeon.formats.sniff import format_of

    if file.read(0, min(file.size, 64)).lstrip()[:1] in (b"{", b"[", b"#", b""):
        return
    try:
        form = format_of(file)
    except CheckpointError:
        return
    raise RuleError(
        f"is a checkpoint ({form.name}), not rules", path=file.path, hint="a checkpoint stands before the target, without an option"
    )


def gather(options: RuleOptions, *, schemes: bool = True, note: Note = silent) -> Ruling:
    """The rules of the arguments, then those of `rules` (files' paths, or rules) in order, with what they name.

    `reverse` turns the files round as if they were one; without `schemes`, for verbs that initialise nothing, no own scheme is imported.
    """
    rules, reverse, numbers = options.rules, options.reverse, options.numbers or {}
    used: set[str] = set()
    arguments = _filled(from_arguments(options.rename, options.drop, options.init, options.adapt, options.keep), numbers, used)
    given = [rules] if isinstance(rules, (str, os.PathLike)) else [rules] if isinstance(rules, Rule) else list(rules)
    given = [_filled([one], numbers, used)[0] if isinstance(one, Rule) else one for one in given]
    if reverse and all(isinstance(one, Rule) for one in given):
        raise RuleError("there is no rules file to turn round", hint="rules='rules.toml', reverse=True")
    loaded = _loaded(given, numbers, used)
    _refuse_unused(numbers, used, options)
    found = bring((*arguments, *_turned(loaded, given, reverse)), note, schemes=schemes)
    said = rule_options([*arguments, *(one if isinstance(one, Rule) else os.fspath(one) for one in given)])
    files = any(not isinstance(one, Rule) for one in given)  # they have the variables still
    told: list[Option] = [("set", f"{name}={number}") for name, number in numbers.items() if files]
    told += [] if options.conversions else [("no-conversions",)]
    unused = tuple(name for name in numbers if name not in used)
    return replace(found, options=(*said, *([("reverse",)] if reverse else []), *told), unused=unused)


def _filled(rules: Iterable[Rule], numbers: Mapping[str, int], used: set[str]) -> tuple[Rule, ...]:
    """The rules with numbers for their variables. RuleError for a variable that nothing sets."""
    rules = tuple(rules)
    if not any(rule.kind == "adapt" for rule in rules):
        return rules
    from ckptsurgeon.rules import variables

    found = []
    for rule in rules:
        lacks = variables.unset(rule.result, numbers) if rule.kind == "adapt" else None
        if lacks is not None:
            name = next(name for name in variables.names_in(rule.result) if name not in numbers)
            raise RuleError(f"{rule}: {lacks}", hint=f"numbers={{{name!r}: 32}}")
        found.append(replace(rule, result=variables.filled(rule.result, numbers, used)) if rule.kind == "adapt" else rule)
    return tuple(found)


def refuse_unused(names: Sequence[str]) -> None:
    """RuleError for variables that are set and that nothing uses."""
    if names:
        raise RuleError(
            f"{names[0]!r} is set, and no rule and no layout in doubt uses it",
            hint="leave it out, or use it in an adapter: permute_rope(heads=heads, to='halves')",
        )


def _refuse_unused(numbers: Mapping[str, int], used: set[str], options: RuleOptions) -> None:
    if not options.match:  # matching may use them for the layouts that it finds
        refuse_unused([name for name in numbers if name not in used])


def _loaded(given: Sequence[Path | Rule], numbers: Mapping[str, int], used: set[str]) -> list[tuple[Rule, ...]]:
    """The rules of each file, and each rule that is given as it is. RuleError for the problems of all files at once."""
    found, errors = [], []
    for one in given:
        try:
            found.append((one,) if isinstance(one, Rule) else _read(one, numbers, used))
        except RuleError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        problems = [f"{error.path}: {problem}" for error in errors for problem in error.problems or (error.reason,)]
        raise RuleError("rules files that can't be followed", problems=shortened(problems), hint=errors[0].hint)
    return found


def _turned(found: Sequence[tuple[Rule, ...]], given: Sequence[Path | Rule], reverse: bool) -> Iterable[Rule]:
    """All rules in order; with `reverse` the files' turned round as one, since a stage of one file goes on in the next."""
    if not reverse:
        return [rule for rules in found for rule in rules]
    from ckptsurgeon.rules.reversing import reverse as turn_round

    plain = [one for one in given if isinstance(one, Rule)]
    read = [rule for one, rules in zip(given, found, strict=True) if not isinstance(one, Rule) for rule in rules]
    return [*plain, *turn_round(read)]


def bring(rules: tuple[Rule, ...], note: Note = silent, *, schemes: bool = True) -> Ruling:
    """What rules name outside: read, or imported. What is not well formed is left to `compile_rules` to tell, save schemes.

    Raises RuleError for a scheme without a meaning, TargetError for a person's own code that can't be had.
    """
    labels: dict[str, tuple[str | None, ...]] = {}
    adapters: list[str] = []
    wanted: list[str] = []
    named: dict[str, list[str]] = {}  # by rules file, the code that it names
    for rule in rules:
        ours: tuple[list[str], list[str]] = ([], [rule.result] if rule.kind == "init" else [])
        for op in _ops(rule):
            ours[0].extend([str(op["op"])] if is_own(op) else [])
            ours[1].extend([str(op["scheme"])] if type(op.get("scheme")) is str else [])
            for name in ("source", "target"):
                if type(op.get(name)) is str:
                    from ckptsurgeon.formats.labels import read_labels

                    path = path_of_file(rule, op[name])
                    labels[path] = labels.get(path) or read_labels(path)
        adapters += ours[0]
        wanted += ours[1]
        if rule.line:
            named.setdefault(rule.file, []).extend(own_code(ours[0], ours[1] if schemes else ()))
    if wanted:
        from ckptsurgeon.models.init.scheme_text import parse_scheme

        for scheme in wanted:
            parse_scheme(scheme)
    for file, code in named.items():
        say_code(file, code, unmissable(note))
    shapes, own = load_own(adapters, wanted if schemes else (), unmissable(note) if any(named.values()) else note)
    return Ruling(rules, Outside(labels, shapes), own)


def own_code(adapters: Iterable[str], schemes: Iterable[str]) -> list[str]:
    """What of the adapters and schemes is a person's own code."""
    return list(dict.fromkeys([*adapters, *_own(schemes)]))


def _own(schemes: Iterable[str]) -> list[str]:
    """Those of the schemes that are a person's own functions; `scheme_text` is loaded where there is a scheme at all."""
    found = list(schemes)
    if not found:
        return []
    from ckptsurgeon.models.init.scheme_text import is_own as is_function

    return [scheme for scheme in found if is_function(scheme)]


def say_code(file: str, code: Sequence[str], note: Note) -> None:
    """Say which code a plan or a rules file names, before any of it is imported."""
    if code:
        note(f"{file} names code, which is imported now: {', '.join(dict.fromkeys(code))}")


def load_own(adapters: Iterable[str], schemes: Iterable[str], note: Note) -> tuple[dict[str, OwnShape], Own]:
    """The shape functions, kernels and schemes of a person's own, imported; nothing is imported where none is named."""
    wanted, fills = list(dict.fromkeys(adapters)), _own(schemes)
    if not wanted and not fills:
        return {}, Own()
    from ckptsurgeon.models.init.user_functions import load_adapter, once, own_schemes

    say = once(note)
    found = {name: load_adapter(name, say) for name in wanted}
    return {name: one.shape for name, one in found.items()}, Own({name: one.kernel for name, one in found.items()}, own_schemes(fills, say))


def _ops(rule: Rule) -> Iterable[Mapping[str, Any]]:
    try:
        return parse_ops(rule.result) if rule.kind == "adapt" and rule.result else ()
    except RuleError:
        return ()  # told with all others when the rules are compiled
