"""What the parameters of the library's verbs take: one table, by their annotations, held against the arguments of every call.

A wrong argument is an `ArgumentError` that says what was expected and what to write. Nothing is read, imported or used up here: of an
iterator only that it is one is seen.
"""

from __future__ import annotations

import inspect
import numbers
import operator
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from dataclasses import dataclass
from functools import wraps
from typing import Any, ParamSpec, TypeVar

from ckptsurgeon.errors import ArgumentError, libraries
from ckptsurgeon.planning.plan import Plan
from ckptsurgeon.rules.rules import Rule
from ckptsurgeon.tensors import Archive, Checkpoint

P = ParamSpec("P")
T = TypeVar("T")
Fits = Callable[[Any], bool]


@dataclass(frozen=True)
class Kind:
    """What a parameter takes: in words, whether a value fits, and an example to write, in which `{name}` is the parameter's."""

    words: str
    fits: Fits
    example: str = ""


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_path(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, os.PathLike) and isinstance(os.fspath(value), str))


def _is_model(value: Any) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.nn.Module)


def _is_number(value: Any) -> bool:
    return not isinstance(value, (bool, str)) and (isinstance(value, numbers.Real) or hasattr(value, "__float__"))


def _is_whole(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and 0 <= operator.index(value) < 1 << 63
    except TypeError:
        return False


def _is_flag(value: Any) -> bool:
    return (isinstance(value, int | numbers.Integral) and value in (0, 1)) or type(value).__name__ in ("bool", "bool_")


def _is_object(value: Any) -> bool:
    return not isinstance(value, (type, str, bytes, os.PathLike, numbers.Number)) and value is not None


def _all(fits: Fits) -> Fits:
    """Whether a value is a list, a tuple, a set, the keys of a dict and the like, all of it fitting; an iterator is not looked into."""

    def fit(value: Any) -> bool:
        if isinstance(value, Iterator):
            return True
        if isinstance(value, (str, bytes, Mapping)) or _is_model(value) or hasattr(value, "read"):
            return False
        if isinstance(value, (list, tuple, Set)):
            return all(map(fits, value))
        return isinstance(value, Iterable)

    return fit


def _list_of(fits: Fits) -> Fits:
    return lambda value: isinstance(value, (list, tuple)) and all(map(fits, value))


def _any(*several: Fits) -> Fits:
    return lambda value: any(fits(value) for fits in several)


def _is(*classes: type) -> Fits:
    return lambda value: isinstance(value, classes)


def _mapping(fits: Fits) -> Fits:
    return lambda value: isinstance(value, Mapping) and all(_is_text(key) and fits(one) for key, one in value.items())


def _is_pair(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_text, value))


def _has_fresh(value: Any) -> bool:
    return not isinstance(value, type) and hasattr(value, "fresh")


_is_rule = _any(_is_path, _is(Rule))
_SOURCE = Kind("a path or a Checkpoint", _any(_is_path, _is(Checkpoint, Archive)), "'net.pt'")
_LIVE = Kind("a path, a Checkpoint, a state_dict or a model", _any(_is_path, _is(Archive, Mapping), _is_model), "'net.pt'")
_TARGET = Kind("a path, a spec such as 'module:Net', a model, a state_dict or a Checkpoint", _any(_is_path, _is(Mapping), _is_model))
_MODEL = Kind("a model, an instance of torch.nn.Module", _is_model)
_TEXT = Kind("text", _is_text)
_PATH = Kind("a path", _is_path, "{name}='net.pt'")
_WORDS = Kind("a pattern or a list of them", _any(_is_text, _all(_is_text)), "{name}=['fc3.*']")
_NUMBER = Kind("a number", _is_number, "{name}=0.01")
_RATES = Kind("a dict of rates by pattern", _mapping(_is_number), "{name}={{'fc3.*': 1e-2}}")
_OBJECT = Kind("an object of yours, no class and no text", _is_object)
_WHOLE = Kind("a whole number from 0 to 2**63 - 1", _is_whole, "{name}=0")
_RECORD = Kind(
    "a report, a plan, a merged checkpoint or its path, or patterns or keys",
    _any(_has_fresh, _is_path, _is(Mapping), _all(_is_text)),
    "the report of transfer, or the merged file",
)
_OPTIMIZER = Kind("an optimizer", lambda value: _is_object(value) and hasattr(value, "param_groups") and hasattr(value, "state_dict"))

# By annotation; `| None` is added to what may be left out.
KINDS: dict[str, Kind] = {
    "Path": _PATH,
    "str": _TEXT,
    "bool": Kind("True or False", _is_flag, "{name}=True"),
    "int": _WHOLE,
    "float": _NUMBER,
    "Note": Kind("a function of one text", callable, "{name}=print"),
    "nn.Module": _MODEL,
    "Optimizer": _OPTIMIZER,
    "torch.optim.Optimizer": _OPTIMIZER,
    "Given": _TARGET,
    "Given | Sequence[Given]": Kind(
        "a path or a Checkpoint, or a list of them",
        _any(_SOURCE.fits, _list_of(_SOURCE.fits)),
    ),
    "Plan | Path": Kind("a plan, or the path of a plan.json", _any(_is(Plan), _is_path), "'plan.json'"),
    "Path | Iterable[Path]": Kind("a path or a list of them", _any(_is_path, _all(_is_path)), "['net.pt']"),
    "int | str": Kind("a number of bytes, or text such as '500MB'", _any(_is_whole, _is_text), "{name}='500MB'"),
    "Words": _WORDS,
    "Patterns": _WORDS,
    "Iterable[str]": _WORDS,
    "str | Iterable[str]": _WORDS,
    "Iterable[str] | Literal['model']": Kind("a list of names", _any(_is_text, _all(_is_text)), "{name}=['fc1.weight', 'fc1.bias']"),
    "Renames": Kind(
        "a dict from patterns to texts, or a list of pairs",
        _any(_mapping(_is_text), _all(_is_pair)),
        "{name}={{'fc2.{{p}}': 'dense2.{{p}}'}}",
    ),
    "Rules": Kind("a rules file's path, a Rule, or a list of them", _any(_is_rule, _all(_is_rule)), "{name}='rules.toml'"),
    "Weights": Kind("True, or a list of numbers", _any(_is_flag, _all(_is_number)), "{name}=[3, 1]"),
    "Mapping[str, float]": _RATES,
    "NoDecay": Kind("True or False, or patterns", _any(_is_flag, _is_text, _all(_any(_is_flag, _is_text))), "{name}=True"),
    "Scheme | Mapping[str, Scheme]": Kind(
        "a scheme's name, a function, or a dict of them by pattern",
        _any(_is_text, callable, _mapping(_any(_is_text, callable))),
        "{name}='xavier_normal'",
    ),
    "Sequence[Patterns]": Kind("a list of patterns, one or several for each stage", _all(_WORDS.fits), "{name}=['layer4.**', 'layer3.**']"),
    "int | Sequence[int]": Kind("a whole number, or one for each stage", _any(_is_whole, _all(_is_whole)), "{name}=1"),
    "object": Kind("a scheduler, or several", lambda value: not isinstance(value, (type, str, bytes, numbers.Number))),
}
# By verb and parameter, or by parameter, where an annotation says less than is meant.
NAMED: dict[str, Kind] = {
    "transfer.source": _LIVE,
    "source": _SOURCE,
    "checkpoint": _SOURCE,
    "optimizer_from": _LIVE,
    "scheduler_from": _LIVE,
    "initialize.source": _RECORD,
    "param_groups.source": _RECORD,
    "what": _RECORD,
    "scheduler": _OBJECT,
    "scaler": _OBJECT,
    "ema": _OBJECT,
    "verify.checkpoint": _PATH,
    "Thaw.scheduler": KINDS["object"],
}


def kind_of(verb: str, parameter: inspect.Parameter) -> Kind | None:
    """What a verb's parameter takes, None aside; None where no table says."""
    name, annotation = parameter.name, str(parameter.annotation)
    return NAMED.get(f"{verb}.{name}") or NAMED.get(name) or KINDS.get(annotation.removesuffix(" | None"))


def checked(verb: Callable[P, T]) -> Callable[P, T]:
    """The verb, which holds its arguments against the tables first.

    Raises:
        ArgumentError: an argument of another kind.
        MissingError: torch, or another library that the verb needs, is not installed.

    >>> from ckptsurgeon import open
    >>> open(None)
    Traceback (most recent call last):
    ckptsurgeon.errors.ArgumentError: path: takes a path, and None was given to open
      try: path='net.pt'
    """
    name = verb.__qualname__.removesuffix(".__init__")
    signature = inspect.signature(verb)
    kinds = {each: kind for each, parameter in signature.parameters.items() if (kind := kind_of(name, parameter)) is not None}
    optional = {
        each for each, parameter in signature.parameters.items() if parameter.default is None or "None" in str(parameter.annotation)
    }

    @wraps(verb)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError:
            return verb(*args, **kwargs)  # Python's own words for a parameter that there is not
        for each, value in given.items():
            if each in kinds and not (value is None and each in optional) and not kinds[each].fits(value):
                hint = _swapped(name, each, given, kinds) or _hint(each, kinds[each], value)
                raise ArgumentError(f"takes {kinds[each].words}, and {described(value)} was given to {name}", key=each, hint=hint)
        with libraries():
            return verb(*args, **kwargs)

    return call


def described(value: Any) -> str:
    """An argument in a few words.

    >>> described(int), described([1, 2]), described("a.pt"), described({}), described(3.5)
    ('the class int', 'a list of 2', "'a.pt'", 'an empty dict', '3.5')
    """
    kind = type(value).__name__
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if value is None or isinstance(value, (str, bytes, numbers.Number)):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:60]}…"
    an = "an" if kind[:1] in "AEIOUaeiou" else "a"
    if isinstance(value, (list, tuple, dict, set, frozenset)):
        return f"{an} {kind} of {len(value)}" if value else f"an empty {kind}"
    return f"{an} {kind}"


def _swapped(verb: str, wrong: str, given: Mapping[str, Any], kinds: Mapping[str, Kind]) -> str | None:
    """The right order, where two arguments fit when they change places."""
    for other, value in given.items():
        if other != wrong and other in kinds and kinds[wrong].fits(value) and kinds[other].fits(given[wrong]):
            order = [each for each in given if each in (wrong, other)]
            return f"the other way round: {verb}({', '.join(order)})"
    return None


def _hint(name: str, kind: Kind, value: Any) -> str | None:
    if isinstance(value, type):
        return f"make one first: {value.__name__}(...)"
    if hasattr(value, "read"):
        return "write it to a file and give its path; nothing is read from memory" + (
            ", or give what torch.load makes of it" if kind is _LIVE else ""
        )
    if kind is KINDS["Renames"] and _is_pair(value):
        return f"{name}={{{value[0]!r}: {value[1]!r}}}"
    if isinstance(value, (list, tuple)) and value and all(map(kind.fits, value)):
        return "give one of them"
    return kind.example.format(name=name) or None
