"""Collects the rules of a call from its arguments and rules files; reads the label files and imports the code that they name.

User code is imported only when a rule names it, and `note` says so.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from ckptsurgeon.adapters.chain import UserShape
from ckptsurgeon.adapters.table import is_user_adapter, parse_ops
from ckptsurgeon.api._opening import silent, unmissable
from ckptsurgeon.api._options import RuleOptions
from ckptsurgeon.command import Option
from ckptsurgeon.errors import CheckpointError, RuleError
from ckptsurgeon.hints import shortened
from ckptsurgeon.parameter_types import Note, Path
from ckptsurgeon.rules.rules import Outside, Rule, from_arguments, path_of_file, rule_options

if TYPE_CHECKING:
    from ckptsurgeon.adapters.table import UserKernel
    from ckptsurgeon.matching.layouts.choices import Open
    from ckptsurgeon.models.init.user_functions import Fill
    from ckptsurgeon.storage.files import OpenFile

Rules = Path | Rule | Sequence[Path | Rule]


@dataclass(frozen=True)
class Own:
    """User code by name: the kernels of adapters, and the functions of schemes."""

    kernels: Mapping[str, UserKernel] = field(default_factory=dict)
    schemes: Mapping[str, Fill] = field(default_factory=dict)


@dataclass(frozen=True)
class Ruling:
    """The rules of a call in order, and what they refer to: token lists and shapes (`outside`), and user code (`own`).

    `options` are the rules as options of a command; `unused` names the numbers that no rule uses; `open` are the layouts that matching
    leaves in doubt.
    """

    rules: tuple[Rule, ...]
    outside: Outside = field(default_factory=Outside)
    own: Own = field(default_factory=Own)
    options: tuple[Option, ...] = ()
    unused: tuple[str, ...] = ()
    open: tuple[Open, ...] = ()


def load_rules(path: Path, *, reverse: bool = False, numbers: Mapping[str, int] | None = None) -> tuple[Rule, ...]:
    """The rules of a TOML file, reversed with `reverse=True`.

    Args:
        path: a rules file (TOML).
        reverse: use the rules files in the other direction: from the names of their targets to those of their sources.
        numbers: for variables in adapters' arguments, by name: `{"heads": 32}`, as `permute_rope(heads=heads)` needs.

    Returns:
        The rules, in the order of the file.

    Raises:
        RuleError: rules that are not well formed, all at once and with their lines, or that can't be reversed.
        UnreadableError: the file can't be read.

    >>> from pathlib import Path
    >>> _ = Path("rules.toml").write_text('[[rename]]\\nfrom = "fc2.{p}"\\nto = "dense2.{p}"')
    >>> str(load_rules("rules.toml", reverse=True)[0])
    "rename 'dense2.{p}' 'fc2.{p}' (rules.toml:1)"
    """
    used: set[str] = set()
    from ckptsurgeon.rules.variables import checked

    rules = _read(path, checked(numbers or {}), used)
    refuse_unused([name for name in numbers or () if name not in used])
    if not reverse:
        return rules
    from ckptsurgeon.rules.reversing import reverse as turn_round

    return turn_round(rules)


def _read(path: Path, numbers: Mapping[str, int], used: set[str], note: Note = silent) -> tuple[Rule, ...]:
    """The rules of a file. Adds the names of the numbers that they use to `used`, and notes the layouts that it leaves open."""
    from ckptsurgeon.rules import toml_text
    from ckptsurgeon.rules.rulefile import left_open, parse_rules
    from ckptsurgeon.storage.opening import open_regular

    name = os.fspath(path)
    with open_regular(name) as file:
        _refuse_checkpoint(file)
        toml_text.check({"toml-bytes": file.size}, name)
        raw = bytes(file.read(0, file.size))
    try:
        text = raw.removeprefix(b"\xef\xbb\xbf").decode()
        for words in left_open(text):
            note(f"{name}: {words}, and no way is chosen, so that they get no values: take the mark from one")
        return parse_rules(text, name, numbers, used)
    except UnicodeDecodeError as error:
        raise RuleError("is no text", path=name, hint="a rules file is TOML, in UTF-8") from error


def _refuse_checkpoint(file: OpenFile) -> None:
    """Raises RuleError for a file that begins as a checkpoint."""
    from ckptsurgeon.formats.sniff import format_of

    if file.read(0, min(file.size, 64)).lstrip()[:1] in (b"{", b"[", b"#", b""):
        return
    try:
        file_format = format_of(file)
    except CheckpointError:
        return
    raise RuleError(
        f"is a checkpoint ({file_format.name}), not rules", path=file.path, hint="a checkpoint stands before the target, without an option"
    )


def gather(options: RuleOptions, *, schemes: bool = True, note: Note = silent) -> Ruling:
    """The rules of the arguments, then those of `rules` (paths of files, or rules) in order, with what they refer to.

    `reverse` reverses all files as one. `schemes=False` is for verbs that initialise nothing: then no user-defined scheme is imported.
    """
    rules, reverse, numbers = options.rules, options.reverse, options.numbers or {}
    used: set[str] = set()
    arguments = _filled(from_arguments(options.rename, options.drop, options.init, options.adapt, options.keep), numbers, used)
    sources = [rules] if isinstance(rules, (str, os.PathLike)) else [rules] if isinstance(rules, Rule) else list(rules)
    sources = [_filled([item], numbers, used)[0] if isinstance(item, Rule) else item for item in sources]
    if reverse and all(isinstance(item, Rule) for item in sources):
        raise RuleError("there is no rules file to turn round", hint="rules='rules.toml', reverse=True")
    loaded = _loaded(sources, numbers, used, note)
    _refuse_unused(numbers, used, options)
    ruling = bring((*arguments, *_turned(loaded, sources, reverse)), note, schemes=schemes)
    options_of_rules = rule_options([*arguments, *(item if isinstance(item, Rule) else os.fspath(item) for item in sources)])
    files = any(not isinstance(item, Rule) for item in sources)  # they have the variables still
    more: list[Option] = [("set", f"{name}={number}") for name, number in numbers.items() if files or options.match]
    more += [] if options.conversions else [("no-conversions",)]
    unused = tuple(name for name in numbers if name not in used)
    return replace(ruling, options=(*options_of_rules, *([("reverse",)] if reverse else []), *more), unused=unused)


def _filled(rules: Iterable[Rule], numbers: Mapping[str, int], used: set[str]) -> tuple[Rule, ...]:
    """The rules with numbers in place of variables. Raises RuleError for a variable that is not set."""
    rules = tuple(rules)
    if not any(rule.kind == "adapt" for rule in rules):
        return rules
    from ckptsurgeon.rules import variables

    filled = []
    for rule in rules:
        problem = variables.unset(rule.result, numbers) if rule.kind == "adapt" else None
        if problem is not None:
            name = next(name for name in variables.names_in(rule.result) if name not in numbers)
            raise RuleError(f"{rule}: {problem}", hint=f"numbers={{{name!r}: 32}}")
        filled.append(replace(rule, result=variables.filled(rule.result, numbers, used)) if rule.kind == "adapt" else rule)
    return tuple(filled)


def refuse_unused(names: Sequence[str]) -> None:
    """Raises RuleError for variables that are set and not used."""
    if names:
        raise RuleError(
            f"{names[0]!r} is set, and no rule and no layout in doubt uses it",
            hint="leave it out, or use it in an adapter: permute_rope(heads=heads, to='halves')",
        )


def _refuse_unused(numbers: Mapping[str, int], used: set[str], options: RuleOptions) -> None:
    if not options.match:  # matching may use them for the layouts that it finds
        refuse_unused([name for name in numbers if name not in used])


def _loaded(sources: Sequence[Path | Rule], numbers: Mapping[str, int], used: set[str], note: Note) -> list[tuple[Rule, ...]]:
    """The rules of each file, and each `Rule` by itself. Raises one RuleError for the problems of all files."""
    loaded, errors = [], []
    for source in sources:
        try:
            loaded.append((source,) if isinstance(source, Rule) else _read(source, numbers, used, note))
        except RuleError as error:
            errors.append(error)
    if len(errors) == 1:
        raise errors[0]
    if errors:
        problems = [f"{error.path}: {problem}" for error in errors for problem in error.problems or (error.reason,)]
        raise RuleError("rules files that can't be followed", problems=shortened(problems), hint=errors[0].hint)
    return loaded


def _turned(loaded: Sequence[tuple[Rule, ...]], sources: Sequence[Path | Rule], reverse: bool) -> Iterable[Rule]:
    """All rules in order; with `reverse` those of the files reversed as one list, since a stage may continue in the next file."""
    if not reverse:
        return [rule for rules in loaded for rule in rules]
    from ckptsurgeon.rules.reversing import reverse as turn_round

    plain = [source for source in sources if isinstance(source, Rule)]
    read = [rule for source, rules in zip(sources, loaded, strict=True) if not isinstance(source, Rule) for rule in rules]
    return [*plain, *turn_round(read)]


def bring(rules: tuple[Rule, ...], note: Note = silent, *, schemes: bool = True) -> Ruling:
    """Read the label files and import the code that rules name. Rules that are not well formed are left to `compile_rules`, except schemes.

    Raises:
        RuleError: an unknown scheme.
        TargetError: user code that can't be imported.
    """
    labels: dict[str, tuple[str | None, ...]] = {}
    adapters: list[str] = []
    scheme_names: list[str] = []
    named: dict[str, list[str]] = {}  # for each rules file, the code that it names
    for rule in rules:
        own_adapters: list[str] = []
        schemes_here = [rule.result] if rule.kind == "init" else []
        for op in _ops(rule):
            own_adapters += [str(op["op"])] if is_user_adapter(op) else []
            schemes_here += [str(op["scheme"])] if type(op.get("scheme")) is str else []
            for name in ("source", "target"):
                if type(op.get(name)) is str:
                    from ckptsurgeon.formats.labels import read_labels

                    path = path_of_file(rule, op[name])
                    labels[path] = labels.get(path) or read_labels(path)
        adapters += own_adapters
        scheme_names += schemes_here
        if rule.line:
            named.setdefault(rule.file, []).extend(own_code(own_adapters, schemes_here if schemes else ()))
    if scheme_names:
        from ckptsurgeon.models.init.scheme_text import parse_scheme

        for scheme in scheme_names:
            parse_scheme(scheme)
    for file, code in named.items():
        say_code(file, code, unmissable(note))
    shapes, own = load_own(adapters, scheme_names if schemes else (), unmissable(note) if any(named.values()) else note)
    return Ruling(rules, Outside(labels, shapes), own)


def own_code(adapters: Iterable[str], schemes: Iterable[str]) -> list[str]:
    """The adapters, all of them user code, and those of the schemes that are user code; each once."""
    return list(dict.fromkeys([*adapters, *_own(schemes)]))


def _own(schemes: Iterable[str]) -> list[str]:
    """The schemes that are user-defined functions. `scheme_text` is imported only if there is any scheme."""
    names = list(schemes)
    if not names:
        return []
    from ckptsurgeon.models.init.scheme_text import is_own as is_function

    return [scheme for scheme in names if is_function(scheme)]


def say_code(file: str, code: Sequence[str], note: Note) -> None:
    """Note which code a plan or a rules file names, before it is imported."""
    if code:
        note(f"{file} names code, which is imported now: {', '.join(dict.fromkeys(code))}")


def load_own(adapters: Iterable[str], schemes: Iterable[str], note: Note) -> tuple[dict[str, UserShape], Own]:
    """Import user-defined adapters and schemes: the shape functions, and the kernels and schemes. Imports nothing where none is named."""
    names, fills = list(dict.fromkeys(adapters)), _own(schemes)
    if not names and not fills:
        return {}, Own()
    from ckptsurgeon.models.init.user_functions import load_adapter, once, own_schemes

    say = once(note)
    loaded = {name: load_adapter(name, say) for name in names}
    return {name: adapter.shape for name, adapter in loaded.items()}, Own(
        {name: adapter.kernel for name, adapter in loaded.items()}, own_schemes(fills, say)
    )


def _ops(rule: Rule) -> Iterable[Mapping[str, Any]]:
    try:
        return parse_ops(rule.result) if rule.kind == "adapt" and rule.result else ()
    except RuleError:
        return ()  # reported with all others when the rules are compiled
