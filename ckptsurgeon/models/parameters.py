"""A model's parameters by name, tied ones once, and patterns held against them. Nothing is changed here.

A tied parameter stands under its first name, in the model's own order (that of registration), and a pattern takes it if it matches any
of its names. A pattern that takes nothing is an error.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn
from torch.nn.parameter import is_lazy

from ckptsurgeon.errors import ModelError
from ckptsurgeon.surgery.patterns import compile_pattern


@dataclass(frozen=True)
class Named:
    """A parameter and all its names, the first first."""

    names: tuple[str, ...]
    parameter: nn.Parameter

    @property
    def trainable(self) -> bool:
        """Whether it requires a gradient now."""
        return self.parameter.requires_grad


def named(model: nn.Module) -> dict[str, Named]:
    """First name to the parameter with all its names, in the model's order.

    Raises:
        ModelError: a lazy parameter, which is replaced by another object at the first forward pass.

    >>> list(named(nn.Linear(3, 2)))
    ['weight', 'bias']
    """
    found: dict[int, tuple[nn.Parameter, list[str]]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if is_lazy(parameter):
            raise ModelError("is lazy: it has no shape before the first forward pass", key=name, hint="run one forward pass first")
        found.setdefault(id(parameter), (parameter, []))[1].append(name)
    return {names[0]: Named(tuple(names), parameter) for parameter, names in found.values()}


def listed(patterns: str | Iterable[str]) -> tuple[str, ...]:
    """One pattern or several, as several.

    >>> listed("fc.*"), listed(["fc.*"])
    (('fc.*',), ('fc.*',))
    """
    return (patterns,) if isinstance(patterns, str) else tuple(patterns)


def taken(patterns: Iterable[str], wanted: Mapping[str, Iterable[str]], others: Iterable[str], other: str) -> dict[str, str]:
    """What each pattern takes: the first that matches wins.

    Args:
        patterns: held against whole names.
        wanted: what may be taken, to the names that it goes by.
        others: names that may not, and `other`, what they are, for the error.

    Returns:
        What was taken to the pattern that took it.

    Raises:
        ModelError: a pattern matches nothing that may be taken; all such patterns are told at once.
        RuleError: a pattern that is not well formed.

    >>> taken(["b*", "*"], {"a": ["a"], "b": ["b"]}, [], "")
    {'b': 'b*', 'a': '*'}
    """
    found: dict[str, str] = {}
    problems = []
    for text in patterns:
        pattern = compile_pattern(text)
        pattern.learn(name for names in wanted.values() for name in names)
        matched = [first for first, names in wanted.items() if any(pattern.match(name) is not None for name in names)]
        for first in matched:
            found.setdefault(first, text)
        if not matched:
            only = any(pattern.match(name) is not None for name in others)
            problems.append((f"the pattern {text!r} matches {f'{other} parameters only' if only else 'no parameter'}", text))
    if problems:
        hint = close_names(problems[0][1], [*(name for names in wanted.values() for name in names), *others])
        if len(problems) == 1:
            raise ModelError(problems[0][0], hint=hint)
        raise ModelError(f"{len(problems)} patterns match nothing", hint=hint, problems=tuple(reason for reason, _ in problems))
    return found


def close_names(text: str, names: Iterable[str]) -> str | None:
    """A hint with the names that look most like `text`, its wildcards left out, or with the first names; None without names.

    >>> close_names("fc9.*", ["conv1.weight", "fc3.bias"]), close_names("zz", ["conv1.weight", "fc3.bias"])
    ('is it fc3.bias?', 'there are conv1.weight, fc3.bias')
    """
    known = list(names)
    plain = text.replace("*", "")
    close = difflib.get_close_matches(plain, known, n=3) or difflib.get_close_matches(plain, known, n=3, cutoff=0.45)
    if close:
        return f"is it {' or '.join(close)}?"
    return f"there are {', '.join(known[:3])}{' …' if len(known) > 3 else ''}" if known else None
