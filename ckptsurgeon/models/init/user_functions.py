"""A person's own initialisation schemes and adapters: functions of their modules, found, imported and called.

Importing says what it imports through `note`, each module once, and happens only here; whatever the functions raise or print is
`user_code`'s affair. What comes back from them is checked before anyone uses it.
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
    """A person's own adapter.

    Attributes:
        shape: `shape(shapes, **arguments)`, the shape that comes out, of whole numbers from 0 up.
        kernel: `kernel(tensors, **arguments)`, the tensor that comes out, dense; what it draws at random is the same every time.
        Both raise TargetError where the person's function fails or gives something else.
    """

    shape: Callable[..., Shape]
    kernel: Callable[..., torch.Tensor]


def load(text: str, note: Note) -> Fill:
    """The function that a spec names, imported; calling it runs the person's code guarded, with its folder first on sys.path.

    Args:
        text: `module:function` or `path/to/file.py:function`; arguments in parentheses are not looked at.
        note: takes one line that says what is imported.

    Raises:
        TargetError: no such file, module or function (with close names), a module that fails on import, or nothing that can be called.

    >>> load("operator:neg", lambda line: None)(3)
    -3
    """
    spec, found = _resolved(text, note)
    return _guarded(spec, found)


def own_schemes(texts: Iterable[str], note: Note) -> dict[str, Fill]:
    """The functions of all schemes among `texts` that are a person's own, by name; each is imported once, the others are left alone.

    Raises:
        RuleError: a malformed scheme.
        TargetError: as `load`; or a function that does not take `(tensor, generator)` and the scheme's arguments.

    >>> own_schemes(["zeros", "normal(std=2)"], print)
    {}
    """
    found: dict[str, tuple[Spec, Callable[..., Any]]] = {}
    said = once(note)
    for text in dict.fromkeys(texts):
        name, arguments = parse_scheme(text)
        if is_own(name):
            if name not in found:
                found[name] = _resolved(name, said)
            _check_takes(text, found[name][1], 2, arguments)
    return {name: _guarded(*both) for name, both in found.items()}


def in_hand(functions: Iterable[Callable[..., Any]]) -> dict[str, Fill]:
    """Functions that a person has in hand, as schemes: guarded, each by a name that a scheme's text can be.

    Raises:
        TargetError: a function that does not take `(tensor, generator)`.

    >>> [name for name in in_hand([lambda tensor, generator: tensor.zero_()])]
    ['given:scheme0']
    """

    def guarded(name: str, function: Callable[..., Any]) -> Fill:
        _check_takes(name, function, 2, {})
        return lambda *args: user_code.call(name, function, *args)

    return {name: guarded(name, function) for name, function in ((f"given:scheme{number}", one) for number, one in enumerate(functions))}


def load_adapter(text: str, note: Note) -> OwnAdapter:
    """A person's own adapter, imported: a function marked with `ckptsurgeon.adapter(shape=...)`.

    Raises:
        TargetError: as `load`; or the function tells no shape.
    """
    spec, found = _resolved(text, note)
    shape = getattr(found, "shape", None)
    if not callable(shape):
        raise TargetError(
            "does not say which shape it gives",
            path=spec.text,
            hint="mark it: @ckptsurgeon.adapter(shape=lambda shapes, **arguments: shapes[0])",
        )
    told, made = _guarded(spec, shape), _guarded(spec, found)

    def checked_shape(shapes: Sequence[Shape], /, **arguments: Any) -> Shape:
        given = told(tuple(map(tuple, shapes)), **arguments)
        if not isinstance(given, (tuple, list)) or not all(type(size) is int and size >= 0 for size in given):
            raise TargetError(f"its shape function gives {given!r:.60}, not a tuple of whole numbers", path=spec.text)
        return tuple(given)

    def checked_kernel(tensors: Sequence[torch.Tensor], /, **arguments: Any) -> torch.Tensor:
        with build.forked(0):
            given = made(list(tensors), **arguments)
        if isinstance(given, (tuple, list)) and len(given) == 1:
            given = given[0]
        return checked_tensor(given, spec.text)

    return OwnAdapter(checked_shape, checked_kernel)


def checked_tensor(given: object, path: str) -> torch.Tensor:
    """What a person's function gave, as a dense tensor on the CPU. TargetError, with `path`, for anything else."""
    if not isinstance(given, torch.Tensor):
        raise TargetError(f"gives a {type(given).__name__}, not a tensor", path=path)
    if given.is_meta or given.layout != torch.strided or given.is_quantized:
        kind = "on the meta device, without values" if given.is_meta else "not dense"
        raise TargetError(f"gives a tensor that is {kind}", path=path)
    return given.detach().to("cpu")


def once(note: Note) -> Note:
    """A note that says each line only once."""
    said: set[str] = set()

    def say(line: str) -> None:
        if line not in said:
            said.add(line)
            note(line)

    return say


def _resolved(text: str, note: Note) -> tuple[Spec, Callable[..., Any]]:
    spec = parse(text)
    function = build.resolve(spec, note)
    if not callable(function):
        raise TargetError(f"is of the type {type(function).__name__}, not a function", path=spec.text, hint=_close_functions(spec))
    return spec, function


def _close_functions(spec: Spec) -> str | None:
    """A hint with the functions of the module that has just been imported."""
    with imports.search(spec):
        module = vars(imports.load(spec, lambda _line: None))
    names = [name for name, value in module.items() if inspect.isfunction(value) and not name.startswith("_")]
    close = close_names(spec.attribute, names) or names[:3]
    return f"is it {' or '.join(f'{spec.place}:{name}' for name in close)}?" if close else None


def _guarded(spec: Spec, function: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        with imports.search(spec):
            return user_code.call(spec.text, function, *args, **kwargs)

    return run


def _check_takes(text: str, function: Callable[..., Any], given: int, arguments: dict[str, Any]) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*[None] * given, **arguments)
    except TypeError as error:
        name = text.partition("(")[0].rpartition(":")[2]
        raise TargetError(
            f"is called as {name}(tensor, generator, **arguments), which does not go with its signature {signature}: {error}",
            path=text,
            hint=f"define it as {name}(tensor, generator, ...), and name its other arguments in the scheme: {name}(gain=2)",
        ) from None
