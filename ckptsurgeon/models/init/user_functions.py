"""User-defined initialisation schemes and adapters: functions of the user's modules, imported and called.

Only this module imports them; `note` gets one line for each module. `user_code` handles what the functions raise or print. Their results
are checked before they are used.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ckptsurgeon.errors import TargetError
from ckptsurgeon.hints import close_names
from ckptsurgeon.models.init.scheme_text import is_own, parse_scheme
from ckptsurgeon.models.target import build, imports, user_code
from ckptsurgeon.models.target.spec import Spec, parse

Note = Callable[[str], None]
Fill = Callable[..., Any]  # (tensor, generator, **arguments) -> None or a tensor
Shape = tuple[int, ...]


@dataclass(frozen=True)
class OwnAdapter:
    """A user-defined adapter. Both functions raise TargetError if the user's function fails or returns a wrong type.

    Attributes:
        shape: `shape(shapes, **arguments)` returns the output's shape, of whole numbers of at least 0.
        kernel: `kernel(tensors, **arguments)` returns the output, a dense tensor; its random numbers are the same every time.
    """

    shape: Callable[..., Shape]
    kernel: Callable[..., torch.Tensor]


def load(text: str, note: Note) -> Fill:
    """Import the function that a spec names (arguments in parentheses are ignored), and return it wrapped: each call runs through
    `user_code`, with the function's folder first on sys.path.

    Raises:
        TargetError: no such file, module or function (the hint has close names), a failed import, or a value that is not callable.

    >>> load("operator:neg", lambda line: None)(3)
    -3
    """
    spec, function = _resolved(text, note)
    return _guarded(spec, function)


def own_schemes(texts: Iterable[str], note: Note) -> dict[str, Fill]:
    """The functions of the user-defined schemes among `texts`, by name. Each is imported once.

    Raises:
        RuleError: a malformed scheme.
        TargetError: as `load`; or a function that does not take `(tensor, generator)` and the scheme's arguments.

    >>> own_schemes(["zeros", "normal(std=2)"], print)
    {}
    """
    functions: dict[str, tuple[Spec, Callable[..., Any]]] = {}
    note_once = once(note)
    for text in dict.fromkeys(texts):
        name, arguments = parse_scheme(text)
        if is_own(name):
            if name not in functions:
                functions[name] = _resolved(name, note_once)
            _check_takes(text, functions[name][1], 2, arguments)
    return {name: _guarded(*resolved) for name, resolved in functions.items()}


def function_schemes(functions: Iterable[Callable[..., Any]]) -> dict[str, Fill]:
    """Functions as schemes: each wrapped by `user_code`, by a generated name that serves as the scheme's text.

    Raises:
        TargetError: a function that does not take `(tensor, generator)`.

    >>> [name for name in function_schemes([lambda tensor, generator: tensor.zero_()])]
    ['function:scheme0']
    """

    def guarded(name: str, function: Callable[..., Any]) -> Fill:
        _check_takes(name, function, 2, {})
        return lambda *args: user_code.call(name, function, *args)

    return {
        name: guarded(name, function)
        for name, function in ((f"function:scheme{number}", function) for number, function in enumerate(functions))
    }


def load_adapter(text: str, note: Note) -> OwnAdapter:
    """Import a user-defined adapter: a function marked with `ckptsurgeon.adapter(shape=...)`.

    Raises:
        TargetError: as `load`; or the function has no `shape`.
    """
    spec, kernel = _resolved(text, note)
    shape = getattr(kernel, "shape", None)
    if not callable(shape):
        raise TargetError(
            "does not say which shape its result has",
            path=spec.text,
            hint="mark it: @ckptsurgeon.adapter(shape=lambda shapes, **arguments: shapes[0])",
        )
    guarded_shape, guarded_kernel = _guarded(spec, shape), _guarded(spec, kernel)

    def checked_shape(shapes: Sequence[Shape], /, **arguments: Any) -> Shape:
        result = guarded_shape(tuple(map(tuple, shapes)), **arguments)
        if not isinstance(result, (tuple, list)) or not all(type(size) is int and size >= 0 for size in result):
            raise TargetError(f"its shape function gives {result!r:.60}, not a tuple of whole numbers", path=spec.text)
        return tuple(result)

    def checked_kernel(tensors: Sequence[torch.Tensor], /, **arguments: Any) -> torch.Tensor:
        with build.forked(0):
            result = guarded_kernel(list(tensors), **arguments)
        if isinstance(result, (tuple, list)) and len(result) == 1:
            result = result[0]
        return checked_tensor(result, spec.text)

    return OwnAdapter(checked_shape, checked_kernel)


def checked_tensor(value: object, path: str) -> torch.Tensor:
    """The result of a user's function as a dense tensor on the CPU. TargetError, with `path`, for anything else."""
    if not isinstance(value, torch.Tensor):
        raise TargetError(f"gives a {type(value).__name__}, not a tensor", path=path)
    if value.is_meta or value.layout != torch.strided or value.is_quantized:
        kind = "on the meta device, without values" if value.is_meta else "not dense"
        raise TargetError(f"gives a tensor that is {kind}", path=path)
    return value.detach().to("cpu")


def once(note: Note) -> Note:
    """A `note` that passes each line on only once."""
    noted: set[str] = set()

    def note_line(line: str) -> None:
        if line not in noted:
            noted.add(line)
            note(line)

    return note_line


def _resolved(text: str, note: Note) -> tuple[Spec, Callable[..., Any]]:
    spec = parse(text)
    function = build.resolve(spec, note)
    if not callable(function):
        raise TargetError(f"is of the type {type(function).__name__}, not a function", path=spec.text, hint=_close_functions(spec))
    return spec, function


def _close_functions(spec: Spec) -> str | None:
    """A hint with the functions of the spec's module, which is imported already."""
    with imports.search(spec):
        module = vars(imports.load(spec, lambda _line: None))
    names = [name for name, value in module.items() if inspect.isfunction(value) and not name.startswith("_")]
    close = close_names(spec.attribute, names) or names[:3]
    return f"is it {' or '.join(f'{spec.module_or_file}:{name}' for name in close)}?" if close else None


def _guarded(spec: Spec, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with imports.search(spec):
            return user_code.call(spec.text, function, *args, **kwargs)

    return run


def _check_takes(text: str, function: Callable[..., Any], positional: int, arguments: dict[str, Any]) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*[None] * positional, **arguments)
    except TypeError as error:
        name = text.partition("(")[0].rpartition(":")[2]
        raise TargetError(
            f"is called as {name}(tensor, generator, **arguments), which does not fit its signature {signature}: {error}",
            path=text,
            hint=f"define it as {name}(tensor, generator, ...), and name its other arguments in the scheme: {name}(gain=2)",
        ) from None
