"""What the parameters of the public functions take: one table, by their annotations, held against the arguments of every call.

A wrong argument is an `ArgumentError` that says what was expected and what to write for this very parameter. Nothing is read, imported or
used up here: of an iterator only that it is one is seen, and a class of a higher floor is known by its name.
"""

from __future__ import annotations

import inspect
import io
import numbers
import operator
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

from ckptsurgeon.errors import ArgumentError, libraries
from ckptsurgeon.hints import close_names
from ckptsurgeon.tensors import Archive, Checkpoint

P = ParamSpec("P")
T = TypeVar("T")
Fits = Callable[[Any], bool]


@dataclass(frozen=True)
class Kind:
    """What a parameter takes: in words, and whether a value fits; whether it can be the path of a `file`, or an `instance` of a class."""

    words: str
    fits: Fits
    file: bool = False
    instance: bool = False


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


def _is_dtype(value: Any) -> bool:
    return isinstance(value, str) or (type(value).__module__ == "torch" and type(value).__name__ == "dtype")


def _is_object(value: Any) -> bool:
    return not isinstance(value, (type, str, bytes, os.PathLike, numbers.Number)) and value is not None


def _all(fits: Fits) -> Fits:
    """Whether a value is a list, a tuple, a set, the keys of a dict and the like, all of it fitting; an iterator is not looked into."""

    def fit(value: Any) -> bool:
        if isinstance(value, Iterator):
            return not hasattr(value, "read")
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


def _ours(name: str) -> Fits:
    return lambda value: any(one.__name__ == name and one.__module__.startswith("ckptsurgeon.") for one in type(value).__mro__)


def _mapping(fits: Fits) -> Fits:
    return lambda value: isinstance(value, Mapping) and all(_is_text(key) and fits(one) for key, one in value.items())


def _takes_one(value: Any) -> bool:
    """Whether a value is a function, no class, that can be called with one argument, as far as Python says how it can be called."""
    if not callable(value) or isinstance(value, type):
        return False
    try:
        inspect.signature(value).bind(None)
    except TypeError:
        return False
    except ValueError:  # one written in C that does not say
        return True
    return True


def _is_pair(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(map(_is_text, value))


def _has_fresh(value: Any) -> bool:
    return not isinstance(value, type) and hasattr(value, "fresh")


_BYTES = (bytes, bytearray, memoryview)
_is_rule = _any(_is_path, _ours("Rule"))
_SOURCE = Kind("a path or a Checkpoint", _any(_is_path, _is(Checkpoint, Archive)), file=True)
_LIVE = Kind(
    "a path, a Checkpoint, an io.BytesIO, a state_dict or a model",
    _any(_is_path, _is(Archive, Mapping, io.BytesIO), _is_model),
    file=True,
    instance=True,
)
_READ = Kind("a path, an io.BytesIO or a Checkpoint", _any(_SOURCE.fits, _is(io.BytesIO)), file=True)
_TARGET = Kind(
    "a path, a spec such as 'module:Net', a model, a state_dict or a Checkpoint",
    _any(_is_path, _is(Mapping), _is_model),
    file=True,
    instance=True,
)
_MODEL = Kind("a model, an instance of torch.nn.Module", _is_model, instance=True)
_TEXT = Kind("text", _is_text)
_PATH = Kind("a path", _is_path, file=True)
_WORDS = Kind("a pattern or a list of them", _any(_is_text, _all(_is_text)))
_NUMBER = Kind("a number", _is_number)
_OBJECT = Kind("an object of yours, no class and no text", _is_object, instance=True)
_WHOLE = Kind("a whole number from 0 to 2**63 - 1", _is_whole)
_RECORD = Kind(
    "a report, a plan, a merged checkpoint or its path, or patterns or keys",
    _any(_has_fresh, _is_path, _is(Mapping), _all(_is_text)),
    file=True,
)
_OPTIMIZER = Kind(
    "an optimizer", lambda value: _is_object(value) and hasattr(value, "param_groups") and hasattr(value, "state_dict"), instance=True
)
_RULES = ("rename", "drop", "keep", "adapt", "init", "stage", "average", "convert")

# By annotation; `| None` is added to what may be left out.
KINDS: dict[str, Kind] = {
    "Path": _PATH,
    "Path | BytesIO": Kind("a path or an io.BytesIO", _any(_is_path, _is(io.BytesIO)), file=True),
    "str": _TEXT,
    "bool": Kind("True or False", _is_flag),
    "int": _WHOLE,
    "float": _NUMBER,
    "Note": Kind("a function of one text", callable),
    "OnProgress": Kind("a function of one Progress", _takes_one),
    "nn.Module": _MODEL,
    "Optimizer": _OPTIMIZER,
    "torch.optim.Optimizer": _OPTIMIZER,
    "Given": _TARGET,
    "Given | Sequence[Given]": Kind("a path or a Checkpoint, or a list of them", _any(_SOURCE.fits, _list_of(_SOURCE.fits)), file=True),
    "Plan | Path": Kind("a plan, or the path of a plan.json", _any(_ours("Plan"), _is_path), file=True),
    "Path | Iterable[Path]": Kind("a path or a list of them", _any(_is_path, _all(_is_path)), file=True),
    "int | str": Kind("a number of bytes, or text such as '500MB'", _any(_is_whole, _is_text)),
    "Dtype": Kind("a dtype's name such as 'BF16', or torch.bfloat16", _is_dtype),
    "Words": _WORDS,
    "Iterable[str]": _WORDS,
    "str | Iterable[str]": _WORDS,
    "Iterable[str] | Literal['model']": Kind("a list of names, or 'model'", _any(_is_text, _all(_is_text))),
    "Renames": Kind("a dict from patterns to texts, or a list of pairs", _any(_mapping(_is_text), _all(_is_pair))),
    "Rules": Kind("a rules file's path, a Rule, or a list of them", _any(_is_rule, _all(_is_rule)), file=True),
    "Kind": Kind(f"one of {', '.join(map(repr, _RULES[:-2]))}", lambda value: _is_text(value) and value in _RULES),
    "Weights": Kind("True, or a list of numbers", _any(_is_flag, _all(_is_number))),
    "Mapping[str, int]": Kind("a dict of whole numbers by name", _mapping(_is_whole)),
    "Mapping[str, float]": Kind("a dict of rates by pattern", _mapping(_is_number)),
    "NoDecay": Kind("True or False, or patterns", _any(_is_flag, _is_text, _all(_any(_is_flag, _is_text)))),
    "Scheme | Mapping[str, Scheme]": Kind(
        "a scheme's name, a function, or a dict of them by pattern", _any(_is_text, callable, _mapping(_any(_is_text, callable)))
    ),
    "Sequence[Words]": Kind("a list of patterns, one or several for each stage", _all(_WORDS.fits)),
    "int | Sequence[int]": Kind("a whole number, or one for each stage", _any(_is_whole, _all(_is_whole))),
    "object": Kind("a scheduler, or several", lambda value: not isinstance(value, (type, str, bytes, numbers.Number)), instance=True),
    "Callable[..., Any]": Kind("a function", lambda value: callable(value) and not isinstance(value, type)),
}
_CODES = Kind("a code such as 'CK201', a name, or a list of them", _WORDS.fits)
_NAMES = Kind("a name or a list of them", _WORDS.fits)
_DTYPES = Kind("a dtype's name such as 'BF16', torch.bfloat16, or a list of them", _any(_is_dtype, _all(_is_dtype)))
# By verb and parameter, or by parameter, where an annotation says less than is meant.
NAMED: dict[str, Kind] = {
    "transfer.source": _LIVE,
    "diff.source": _READ,
    "source": _SOURCE,
    "checkpoint": _SOURCE,
    "optimizer_from": _LIVE,
    "scheduler_from": _LIVE,
    "initialize.source": _RECORD,
    "param_groups.source": _RECORD,
    "what": _RECORD,
    "unfreeze.what": _WORDS,
    "scheduler": _OBJECT,
    "scaler": _OBJECT,
    "ema": _OBJECT,
    "verify.checkpoint": _PATH,
    "Thaw.scheduler": KINDS["object"],
    "Thaw.load_state_dict.state": Kind(
        "what Thaw.state_dict() gave", lambda value: isinstance(value, Mapping) and {"steps", "stages"} <= set(value)
    ),
    "select": _CODES,
    "ignore": _CODES,
    "allow": _NAMES,
    "dtypes": _DTYPES,
    "inputs": Kind("a shape such as '1x3x32x32', or a list of them", _WORDS.fits),
    "limits.bounds": Kind("a number, or text such as '2GB'", _any(_is(int), _is_text)),
}


def kind_of(verb: str, parameter: inspect.Parameter) -> Kind | None:
    """What a verb's parameter takes, None aside; None where no table says."""
    name, annotation = parameter.name, str(parameter.annotation)
    return NAMED.get(f"{verb}.{name}") or NAMED.get(name) or KINDS.get(annotation.removesuffix(" | None"))


def checked(verb: Callable[P, T]) -> Callable[P, T]:
    """The verb, which holds its arguments against the tables first, and tells its `progress`, where it has one, how far the work is.

    Raises:
        ArgumentError: an argument of another kind.
        MissingError: torch, or another library that the verb needs, is not installed.

    >>> from ckptsurgeon import open
    >>> open(None)
    Traceback (most recent call last):
    ckptsurgeon.errors.ArgumentError: path: takes a path or an io.BytesIO, and None was given to open
      try: path='net.pt'
    """
    name = verb.__qualname__.removesuffix(".__init__")
    signature = inspect.signature(verb)
    named = next((each for each, parameter in signature.parameters.items() if parameter.kind is parameter.VAR_KEYWORD), "")

    @wraps(verb)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            given = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            unbound = f"{name}() {error}{_close(kwargs, signature)}"  # Python's own words for a parameter that there is not
            raise TypeError(unbound) from None
        hold(verb, name, {**{each: value for each, value in given.items() if each != named}, **given.get(named, {})})
        with libraries(), _told(given.get("progress")):
            return verb(*args, **kwargs)

    return call


def _told(progress: Any) -> AbstractContextManager[None]:
    """What tells a verb's `progress` how far the work is."""
    if progress is None:
        return nullcontext()
    from ckptsurgeon.progress import listening

    return listening(progress)


def _close(given: Mapping[str, Any], signature: inspect.Signature) -> str:
    """What the first parameter that there is not may be meant as."""
    wrong = [each for each in given if each not in signature.parameters][:1]
    free = [each for each in signature.parameters if each not in given]
    begun = [each for each in free if wrong and (each.startswith(wrong[0]) or wrong[0].startswith(f"{each}_"))]
    close = begun or (close_names(wrong[0], free, most=1) if wrong else [])
    return f", did you mean {close[0]}?" if close else ""


def hold(verb: Callable[..., Any], name: str, given: Mapping[str, Any]) -> None:
    """Hold arguments by name against the tables; of a dataclass, its fields. ArgumentError for one of another kind."""
    kinds, optional, rest = _expected(verb, name)
    for each, value in given.items():
        kind = kinds.get(each, rest)
        if kind is not None and not (value is None and each in optional) and not kind.fits(value):
            hint = _swapped(name, each, given, _in_order(verb, kinds)) or _hint(name, each, kind, value)
            part, place = _wrong_part(kind, value)
            raise ArgumentError(f"takes {kind.words}, and {described(part)} was given to {name}{place}", key=each, hint=hint)


def _wrong_part(kind: Kind, value: Any) -> tuple[Any, str]:
    """The first value of a dict or a list that is of another kind, and where it stands; the whole of what is neither."""
    if isinstance(value, Mapping) and kind.fits({}):
        wrong = next((key for key, one in value.items() if not kind.fits({key: one})), None)
        return (value[wrong], f" for {wrong!r}") if _is_text(wrong) else (wrong, " as a key")
    if isinstance(value, (list, tuple)) and kind.fits([]) and not _is_pair(value):
        return next(((one, f" as number {place} of them") for place, one in enumerate(value) if not kind.fits([one])), (value, ""))
    return value, ""


@cache
def _expected(verb: Callable[..., Any], name: str) -> tuple[dict[str, Kind], set[str], Kind | None]:
    """The kinds of a verb's parameters, those that may be None, and the kind of what the person names."""
    parameters = inspect.signature(verb).parameters
    kinds = {each: kind for each, parameter in parameters.items() if (kind := kind_of(name, parameter)) is not None}
    optional = {each for each, parameter in parameters.items() if parameter.default is None or "None" in str(parameter.annotation)}
    rest = next((kinds.pop(each) for each, one in parameters.items() if one.kind is one.VAR_KEYWORD and each in kinds), None)
    return kinds, optional, rest


def described(value: Any) -> str:
    """An argument in a few words.

    >>> described(int), described([1, 2]), described("a.pt"), described({}), described(3.5)
    ('the class int', 'a list of 2', "'a.pt'", 'an empty dict', '3.5')
    """
    kind = type(value).__name__
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, _BYTES) and len(value) > 20:
        return f"{kind} of length {len(value)}"
    if value is None or isinstance(value, (str, bytes, numbers.Number)):
        text = repr(value)
        return text if len(text) <= 60 else f"{text[:60]}…"
    an = "an" if kind[:1] in "AEIOUaeiou" else "a"
    if isinstance(value, (list, tuple, dict, set, frozenset)):
        return f"{an} {kind} of {len(value)}" if value else f"an empty {kind}"
    return f"{an} {kind}"


def _in_order(verb: Callable[..., Any], kinds: Mapping[str, Kind]) -> dict[str, Kind]:
    """The parameters that may stand without their names, which alone can change places."""
    parameters = inspect.signature(verb).parameters
    return {
        each: kind for each, kind in kinds.items() if each in parameters and parameters[each].kind is not inspect.Parameter.KEYWORD_ONLY
    }


def _unquoted(value: Any) -> Any:
    """What a text is as a number or True or False; the value itself where it is none."""
    if not isinstance(value, str):
        return value
    return {"True": True, "False": False}.get(value, next((kind(value) for kind in (int, float) if _is_a(kind, value)), value))


def _is_a(kind: type[int] | type[float], text: str) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True


def _swapped(verb: str, wrong: str, given: Mapping[str, Any], kinds: Mapping[str, Kind]) -> str | None:
    """The right order, where two arguments fit when they change places."""
    for other, value in given.items():
        if other != wrong and other in kinds and wrong in kinds and kinds[wrong].fits(value) and kinds[other].fits(given[wrong]):
            order = [each for each in given if each in (wrong, other)]
            return f"the other way round: {verb}({', '.join(order)})"
    return None


def _hint(verb: str, name: str, kind: Kind, value: Any) -> str:
    if isinstance(value, type) and kind.instance:
        return f"make one first: {value.__name__}(...)"
    if isinstance(value, _BYTES) and kind.file and kind.fits(io.BytesIO()):
        return f"io.BytesIO({name})"
    if isinstance(value, str) and kind.fits(_unquoted(value)):
        return f"{name}={_unquoted(value)}"
    from ckptsurgeon.argument_examples import CALLS, EXAMPLES

    if (isinstance(value, Mapping) or _is_model(value)) and name in ("path", "source", "sources", "checkpoint"):
        if verb in ("open", "inspect", "diff", "match"):
            return f"ckptsurgeon.skeleton({name}) gives the names and shapes of a model or a state_dict"
        state = name if isinstance(value, Mapping) else f"{name}.state_dict()"
        return f"torch.save({state}, 'net.pt'), and give its path; transfer takes it as it is"
    if (hasattr(value, "read") or isinstance(value, _BYTES)) and kind.file:
        return "write it to a file and give its path; open, inspect, diff and transfer also take an io.BytesIO"
    if kind is KINDS["Renames"] and _is_pair(value):
        return f"{name}={{{value[0]!r}: {value[1]!r}}}"
    if isinstance(value, (list, tuple)) and value and all(map(kind.fits, value)) and verb not in CALLS:
        return "give one of them"
    return CALLS.get(verb) or f"{name}={EXAMPLES.get(f'{verb}.{name}') or EXAMPLES.get(name, 'True')}"
