"""Checks the arguments of the public functions against one table of what a parameter takes, by its annotation.

A wrong argument is an `ArgumentError` that says what the parameter takes and what to write instead. Nothing is read, imported or consumed
here: the items of an iterator are not checked, and a class of a higher floor is known by its name.
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
    """A test for lists, tuples, sets, the keys of a dict and the like, all of whose items fit; an iterator's items are not tested."""

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
    return lambda value: any(base.__name__ == name and base.__module__.startswith("ckptsurgeon.") for base in type(value).__mro__)


def _mapping(fits: Fits) -> Fits:
    return lambda value: isinstance(value, Mapping) and all(_is_text(key) and fits(item) for key, item in value.items())


def _takes_one(value: Any) -> bool:
    """Whether a value is a function, not a class, that takes one argument, as far as Python knows its signature."""
    if not callable(value) or isinstance(value, type):
        return False
    try:
        inspect.signature(value).bind(None)
    except TypeError:
        return False
    except ValueError:  # a function written in C, without a signature
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

# By annotation, without `| None`.
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
# By verb and parameter, or by parameter, where the annotation is too general.
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
    """What a verb's parameter takes, apart from None; None where it is in no table."""
    name, annotation = parameter.name, str(parameter.annotation)
    return NAMED.get(f"{verb}.{name}") or NAMED.get(name) or KINDS.get(annotation.removesuffix(" | None"))


def checked(verb: Callable[P, T]) -> Callable[P, T]:
    """The verb, with its arguments checked first, and with events for its argument `progress`, if it has one.

    Raises:
        ArgumentError: an argument has a wrong type.
        MissingError: torch, or another library that the verb needs, is not installed.

    >>> from ckptsurgeon import open
    >>> open(None)
    Traceback (most recent call last):
    ckptsurgeon.errors.ArgumentError: path: takes a path or an io.BytesIO, and None was given to open
      try: path='net.pt'
    """
    name = verb.__qualname__.removesuffix(".__init__")
    signature = inspect.signature(verb)
    keywords = next((key for key, parameter in signature.parameters.items() if parameter.kind is parameter.VAR_KEYWORD), "")

    @wraps(verb)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            arguments = signature.bind(*args, **kwargs).arguments
        except TypeError as error:
            unbound = f"{name}() {error}{_did_you_mean(kwargs, signature)}"  # Python's own message about an unknown parameter
            raise TypeError(unbound) from None
        named = {key: value for key, value in arguments.items() if key != keywords}
        check_arguments(verb, name, {**named, **arguments.get(keywords, {})})
        with libraries(), _reporting(arguments.get("progress")):
            return verb(*args, **kwargs)

    return call


def _reporting(progress: Any) -> AbstractContextManager[None]:
    """A context in which `progress` gets an event for each step of the work."""
    if progress is None:
        return nullcontext()
    from ckptsurgeon.progress import listening

    return listening(progress)


def _did_you_mean(arguments: Mapping[str, Any], signature: inspect.Signature) -> str:
    """The parameter that was probably meant by the first unknown one, as words."""
    wrong = [parameter for parameter in arguments if parameter not in signature.parameters][:1]
    free = [parameter for parameter in signature.parameters if parameter not in arguments]
    begun = [parameter for parameter in free if wrong and (parameter.startswith(wrong[0]) or wrong[0].startswith(f"{parameter}_"))]
    close = begun or (close_names(wrong[0], free, most=1) if wrong else [])
    return f", did you mean {close[0]}?" if close else ""


def check_arguments(verb: Callable[..., Any], name: str, arguments: Mapping[str, Any]) -> None:
    """Check arguments by name, or the fields of a dataclass. ArgumentError for a wrong type."""
    kinds, optional, rest = _expected(verb, name)
    for parameter, value in arguments.items():
        kind = kinds.get(parameter, rest)
        if kind is not None and not (value is None and parameter in optional) and not kind.fits(value):
            hint = _swapped(name, parameter, arguments, _in_order(verb, kinds)) or _hint(name, parameter, kind, value)
            part, where = _wrong_part(kind, value)
            raise ArgumentError(f"takes {kind.words}, and {described(part)} was given to {name}{where}", key=parameter, hint=hint)


def _wrong_part(kind: Kind, value: Any) -> tuple[Any, str]:
    """The first wrong item of a dict or a list, and its position in words; for other values the value itself."""
    if isinstance(value, Mapping) and kind.fits({}):
        wrong = next((key for key, item in value.items() if not kind.fits({key: item})), None)
        return (value[wrong], f" for {wrong!r}") if _is_text(wrong) else (wrong, " as a key")
    if isinstance(value, (list, tuple)) and kind.fits([]) and not _is_pair(value):
        return next(((item, f" as number {index} of them") for index, item in enumerate(value) if not kind.fits([item])), (value, ""))
    return value, ""


@cache
def _expected(verb: Callable[..., Any], name: str) -> tuple[dict[str, Kind], set[str], Kind | None]:
    """The kinds of a verb's parameters, the parameters that may be None, and the kind of the keywords in `**`."""
    parameters = inspect.signature(verb).parameters
    kinds = {key: kind for key, parameter in parameters.items() if (kind := kind_of(name, parameter)) is not None}
    optional = {key for key, parameter in parameters.items() if parameter.default is None or "None" in str(parameter.annotation)}
    rest = next((kinds.pop(key) for key, parameter in parameters.items() if parameter.kind is parameter.VAR_KEYWORD and key in kinds), None)
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
    """The parameters that may be passed by position: only these can be swapped."""
    parameters = inspect.signature(verb).parameters
    return {
        name: kind for name, kind in kinds.items() if name in parameters and parameters[name].kind is not inspect.Parameter.KEYWORD_ONLY
    }


def _unquoted(value: Any) -> Any:
    """A text as the number, True or False that it contains; any other value unchanged."""
    if not isinstance(value, str):
        return value
    return {"True": True, "False": False}.get(value, next((kind(value) for kind in (int, float) if _is_a(kind, value)), value))


def _is_a(kind: type[int] | type[float], text: str) -> bool:
    try:
        kind(text)
    except ValueError:
        return False
    return True


def _swapped(verb: str, wrong: str, arguments: Mapping[str, Any], kinds: Mapping[str, Kind]) -> str | None:
    """The right order, where two arguments fit when they are swapped."""
    for second, value in arguments.items():
        if second != wrong and second in kinds and wrong in kinds and kinds[wrong].fits(value) and kinds[second].fits(arguments[wrong]):
            order = [name for name in arguments if name in (wrong, second)]
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
