"""Gathers the rules of a call: arguments, rules files, and what they name outside of themselves, which is read and imported here.

A person's own code is imported only when a rule names it, and `note` says so.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from ckptsurgeon.api.opening import Note, Path, silent
from ckptsurgeon.errors import RuleError
from ckptsurgeon.formats.files import open_regular
from ckptsurgeon.formats.labels import read_labels
from ckptsurgeon.surgery.adapters.table import is_own, parse_ops
from ckptsurgeon.surgery.reversing import reverse as turn_round
from ckptsurgeon.surgery.rulefile import parse_rules
from ckptsurgeon.surgery.rules import Outside, Rule, beside

if TYPE_CHECKING:
    from ckptsurgeon.streaming.kernels.table import OwnKernel

Rules = Path | Rule | Sequence[Path | Rule]


@dataclass(frozen=True)
class Ruling:
    """The rules of a call in their order, what they name outside, and the kernels of a person's own adapters."""

    rules: tuple[Rule, ...]
    outside: Outside = field(default_factory=Outside)
    kernels: Mapping[str, OwnKernel] = field(default_factory=dict)


def load_rules(path: Path, *, reverse: bool = False) -> tuple[Rule, ...]:
    """The rules of a TOML file, turned round with `reverse`.

    Raises:
        RuleError: rules that are not well formed, all at once and with their lines, or that can't be turned round.
        UnreadableError: the file can't be read.

    >>> from pathlib import Path
    >>> _ = Path("rules.toml").write_text('[[rename]]\\nfrom = "fc2.{p}"\\nto = "dense2.{p}"')
    >>> str(load_rules("rules.toml", reverse=True)[0])
    "rename 'dense2.{p}' 'fc2.{p}' (rules.toml:1)"
    """
    name = os.fspath(path)
    with open_regular(name) as file:
        raw = bytes(file.read(0, min(file.size, 1 << 22)))
    try:
        found = parse_rules(raw.decode(), name)
    except UnicodeDecodeError as error:
        raise RuleError("is no text", path=name, hint="a rules file is TOML, in UTF-8") from error
    return turn_round(found) if reverse else found


def gather(arguments: Sequence[Rule], rules: Rules, *, reverse: bool = False, note: Note = silent) -> Ruling:
    """The rules of the arguments, then those of `rules` (files' paths, or rules) in order, with what they name. `reverse` is for files."""
    given = [rules] if isinstance(rules, (str, os.PathLike, Rule)) else list(rules)
    chosen = list(arguments)
    for one in given:
        chosen += [one] if isinstance(one, Rule) else load_rules(one, reverse=reverse)
    return bring(tuple(chosen), note)


def bring(rules: tuple[Rule, ...], note: Note = silent) -> Ruling:
    """The token lists and a person's own adapters that rules name; what is not well formed is left to `compile_rules` to tell."""
    labels: dict[str, tuple[str | None, ...]] = {}
    names: dict[str, Any] = {}
    for rule in rules:
        for op in _ops(rule):
            if is_own(op):
                names[str(op["op"])] = None
            for name in ("source", "target"):
                if type(op.get(name)) is str:
                    path = beside(rule, op[name])
                    labels[path] = labels.get(path) or read_labels(path)
    if not names:
        return Ruling(rules, Outside(labels))
    own = load_own(names, note)
    return Ruling(rules, Outside(labels, {name: one.shape for name, one in own.items()}), {name: one.kernel for name, one in own.items()})


def load_own(names: Iterable[str], note: Note) -> dict[str, Any]:
    """A person's own adapters by name, imported. TargetError for one that can't be."""
    from ckptsurgeon.models.own import load_adapter

    return {name: load_adapter(name, note) for name in names}


def _ops(rule: Rule) -> Iterable[Mapping[str, Any]]:
    try:
        return parse_ops(rule.result) if rule.kind == "adapt" and rule.result else ()
    except RuleError:
        return ()  # told with all others when the rules are compiled
