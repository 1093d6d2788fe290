"""The initialisation schemes as a user writes them: `xavier_normal`, `normal(std=0.02)`, `from(layers.11.weight)`, `mylib:ortho(gain=2)`.

This module parses schemes without torch, so that a plan can check one. Names and parameters are
those of `torch.nn.init`; a name with a colon is a user-defined function, which is not imported here. `schemes.py` makes the values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any, Literal

from ckptsurgeon.call_text import literal_call
from ckptsurgeon.errors import RuleError, TargetError
from ckptsurgeon.hints import close_names
from ckptsurgeon.models.target import spec
from ckptsurgeon.rules.copied_value import copied

NONLINEARITIES = (
    *("linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
    *("sigmoid", "tanh", "relu", "leaky_relu", "selu"),
)
Check = Callable[[Any], bool]
Needs = Literal["nothing", "fans", "model", "layer", "key"]
OWN_FORMS = "mylib:ortho, path/to/file.py:ortho or mylib:ortho(gain=2)"


def _number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _non_negative(value: Any) -> bool:
    return _number(value) and value >= 0


def _name(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _choice(*names: str) -> Check:
    return lambda value: isinstance(value, str) and value in names


@dataclass(frozen=True)
class Scheme:
    """A scheme: its parameters with their checks, and what it needs.

    Attributes:
        words: what the scheme does.
        parameters: its parameters, each with the check of its value.
        required: the parameters that must be given.
        needs: `nothing`, `fans` (a fan-in and a fan-out, so at least two dimensions), `model` (the target's constructor), `layer` (the
            module that owns the tensor, on meta or not) or `key` (another key's value).
        bounds: the defaults of `a` and `b` where they are an interval.
        source: the paper that the scheme is from.
    """

    words: str
    parameters: Mapping[str, Check] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    needs: Needs = "nothing"
    bounds: tuple[float, float] | None = None
    source: str = ""


_GLOROT = "Glorot and Bengio 2010, Understanding the difficulty of training deep feedforward neural networks"
_HE = "He et al. 2015, Delving deep into rectifiers"
_SAXE = "Saxe et al. 2013, Exact solutions to the nonlinear dynamics of learning in deep linear neural networks"
_KAIMING: Mapping[str, Check] = {"a": _number, "mode": _choice("fan_in", "fan_out"), "nonlinearity": _choice(*NONLINEARITIES)}

SCHEMES: dict[str, Scheme] = {
    "model": Scheme("the value of the target's own constructor", needs="model"),
    "per_layer_type": Scheme("by layer type: convolutions xavier_normal, norms 1 and 0, linear N(0, 0.01), biases 0", needs="model"),
    "reset": Scheme("what the layer's own reset_parameters gives, run on a copy of that layer alone", needs="layer"),
    "from": Scheme("the value that another key of the target gets", {"key": _name}, ("key",), needs="key"),
    "zeros": Scheme("0"),
    "ones": Scheme("1"),
    "constant": Scheme("one value", {"value": _number}, ("value",)),
    "normal": Scheme("N(mean, std²), by default N(0, 1)", {"mean": _number, "std": _non_negative}),
    "uniform": Scheme("U(a, b), by default U(0, 1)", {"a": _number, "b": _number}, bounds=(0.0, 1.0)),
    "trunc_normal": Scheme(
        "N(mean, std²) within [a, b], by default N(0, 1) within [-2, 2]",
        {"mean": _number, "std": _non_negative, "a": _number, "b": _number},
        bounds=(-2.0, 2.0),
    ),
    "xavier_normal": Scheme("N(0, gain² · 2 / (fan_in + fan_out))", {"gain": _non_negative}, needs="fans", source=_GLOROT),
    "xavier_uniform": Scheme("U(-x, x), x = gain · √(6 / (fan_in + fan_out))", {"gain": _non_negative}, needs="fans", source=_GLOROT),
    "kaiming_normal": Scheme("N(0, gain² / fan)", _KAIMING, needs="fans", source=_HE),
    "kaiming_uniform": Scheme("U(-x, x), x = gain · √(3 / fan)", _KAIMING, needs="fans", source=_HE),
    "orthogonal": Scheme("a (semi-)orthogonal matrix, times gain", {"gain": _non_negative}, needs="fans", source=_SAXE),
}

# The scheme for a tensor of fewer than two dimensions under a fan-based scheme, by the last segment of its key.
WITHOUT_FANS: dict[str, str] = {"bias": "zeros", "weight": "ones"}


def parse_scheme(text: str) -> tuple[str, dict[str, Any]]:
    """The scheme's name and its arguments by name. A user-defined one's name is `module:function` or `path/to/file.py:function`.

    Raises:
        RuleError: malformed text, an unknown name (with close names and the list), an unknown or unfit argument. Whether a user-defined
            scheme exists and takes its arguments is checked only when it is imported.

    >>> parse_scheme("constant(0.1)"), parse_scheme("kaiming_normal(mode='fan_out')")
    (('constant', {'value': 0.1}), ('kaiming_normal', {'mode': 'fan_out'}))
    >>> parse_scheme("from(layers.11.weight)"), parse_scheme("mylib:ortho(gain=2)")
    (('from', {'key': 'layers.11.weight'}), ('mylib:ortho', {'gain': 2}))
    """
    if is_own(text):
        return _parse_user_scheme(text)
    key = copied(text)
    call = literal_call(text) if key is None else ("from", (key,), {})
    if call is None:
        raise RuleError(
            f"{text!r} is not a scheme", hint="write a name, or a name with literal arguments: normal(std=0.02), from(layers.11.weight)"
        )
    name, args, kwargs = call
    scheme = SCHEMES.get(name)
    if scheme is None:
        close = close_names(name, SCHEMES)
        hint = f"is it {' or '.join(close)}? " if close else ""
        raise RuleError(f"there is no scheme {name!r}", hint=f"{hint}all of them: ckptsurgeon adapters; your own: {OWN_FORMS}")
    names = list(scheme.parameters)
    problems = [f"{word} is given twice" for word in names[: len(args)] if word in kwargs]
    problems += [f"takes no argument {word!r}" for word in kwargs if word not in names]
    problems += [f"takes {len(names)} arguments, not {len(args)}"] if len(args) > len(names) else []
    arguments = {**dict(zip(names, args, strict=False)), **kwargs}
    problems += [f"{word} can't be {value!r}" for word, value in arguments.items() if word in names and not scheme.parameters[word](value)]
    problems += [f"needs {word}" for word in scheme.required if word not in arguments]
    if not problems and scheme.bounds and arguments.get("a", scheme.bounds[0]) > arguments.get("b", scheme.bounds[1]):
        problems = ["has an a that is greater than b"]
    if problems:
        takes = f"{name}({', '.join(f'{word}=...' for word in names)})" if names else f"{name} alone"
        raise RuleError(f"the scheme {text!r} {'; '.join(problems)}", hint=f"write {takes}: {scheme.words}")
    return name, arguments


def is_own(text: str) -> bool:
    """Whether a scheme, given by its name or its whole text, is user-defined.

    >>> is_own("mylib:ortho"), is_own("inits/a.py:ortho(gain=2)"), is_own("normal"), is_own("from('a:b')")
    (True, True, False, False)
    """
    return ":" in text.partition("(")[0]


def needs(text: str) -> Needs:
    """What a scheme needs to make its value; `nothing` for a user-defined one. Raises RuleError as `parse_scheme`.

    >>> needs("reset"), needs("normal(std=2)"), needs("mylib:ortho")
    ('layer', 'nothing', 'nothing')
    """
    name, _ = parse_scheme(text)
    return "nothing" if is_own(name) else SCHEMES[name].needs


def _parse_user_scheme(text: str) -> tuple[str, dict[str, Any]]:
    try:
        parsed = spec.parse(text.strip())
    except TargetError as error:
        raise RuleError(f"the scheme {text!r} {error.reason}", hint=f"a function of your own is named as {OWN_FORMS}") from error
    if parsed.args:
        raise RuleError(f"the scheme {text!r} has arguments without names", hint="name them: mylib:ortho(gain=2)")
    return f"{parsed.module_or_file}:{parsed.attribute}", dict(parsed.kwargs)


def effective_scheme(scheme: str, key: str, shape: tuple[int, ...]) -> str:
    """The scheme that a tensor really gets. Under a fan-based scheme, a 1-d or 0-d bias gets zeros and a 1-d or 0-d weight ones.

    Raises:
        RuleError: as `parse_scheme`; or a fan-based scheme on another tensor of fewer than two dimensions, with its key.

    >>> effective_scheme("xavier_normal", "fc3.bias", (2,)), effective_scheme("xavier_normal", "fc3.weight", (2, 84))
    ('zeros', 'xavier_normal')
    """
    name, _ = parse_scheme(scheme)
    if is_own(name) or SCHEMES[name].needs != "fans" or len(shape) >= 2 or prod(shape) == 0:
        return scheme
    last = key.rpartition(".")[2]
    if last not in WITHOUT_FANS:
        raise RuleError(
            f"{name} needs at least two dimensions, and this tensor has the shape {shape}",
            key=key,
            hint=f"give it a rule of its own, before that one: init={{{key!r}: 'zeros'}}",
        )
    return WITHOUT_FANS[last]
