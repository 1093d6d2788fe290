"""From a spec to a model: import the person's module, get the attribute, construct it on meta or on the CPU.

The module is looked for from the current folder first, as `python -m` does (for `file.py:Net` from that file's own folder), and
what is imported is said through `note`. The random states of torch's CPU, python and numpy, torch's default dtype, sys.path and
modules of the same name that were there before are as they were when this returns. Nothing here reads a checkpoint.
"""

from __future__ import annotations

import copy
import inspect
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from ckptsurgeon.errors import TargetError
from ckptsurgeon.hints import close_names
from ckptsurgeon.models.target import imports, user_code
from ckptsurgeon.models.target.source_names import MOST, model_names
from ckptsurgeon.models.target.spec import FORMS, Spec
from ckptsurgeon.models.target.uninitialized import marked

Note = Callable[[str], None]


def resolve(spec: Spec, note: Note) -> object:
    """Import the spec's module and return the attribute that it names, without calling it.

    The import runs under a forked random state with seed 0, so that a model that the module makes at import is always the same.

    Args:
        note: takes one line that says what is imported, each time.

    Raises:
        TargetError: no such file, module or attribute (with close names), or the module fails on import.
    """
    with imports.search(spec):
        return _import(spec, note)


def build_meta(spec: Spec, note: Note) -> nn.Module:
    """The model on the meta device: names, dtypes and shapes without memory or values.

    Where the constructor fails on meta, it is built on the CPU, and a note says why. An instance (`module:net`) is returned as
    it is, on the device that it has.

    Raises:
        TargetError: as `resolve` and `build`; when the CPU fails as well, its error.
    """
    with imports.search(spec):
        found = _import(spec, note)
        if isinstance(found, nn.Module):
            return _usable(spec, _instance(spec, found))
        try:
            with forked(0):
                model = _construct(spec, found, "meta")
        except TargetError as error:
            with forked(0):
                model = _construct(spec, found, "cpu")
            note(f"{spec.text} is built on the CPU, since its constructor fails on meta: {error.reason}")
        return _usable(spec, model)


def build(spec: Spec, seed: int, note: Note) -> nn.Module:
    """The model with its constructor's values, on the CPU, the same for the same seed.

    Args:
        seed: seeds torch's CPU generator, python's `random` and, where numpy is loaded, its global state.

    An instance is returned as a deep copy.

    Raises:
        TargetError: as `resolve`; the target needs arguments, fails, is not an nn.Module, has lazy parameters, or stays on meta.
    """
    with imports.search(spec):
        found = _import(spec, note)
        with forked(seed):
            model: nn.Module
            if isinstance(found, nn.Module):
                model = copied(_usable(spec, _instance(spec, found)), spec.text)
            else:
                model = _usable(spec, _construct(spec, found, "cpu"))
            devices = {name: tensor.device.type for name, tensor in _tensors(model)}
            left = [name for name, device in devices.items() if device == "meta"]
            if left:
                raise TargetError(
                    f"its constructor leaves {len(left)} tensors without values, on the meta device",
                    path=spec.text,
                    key=left[0],
                    hint="give it a factory that makes real values, or use another checkpoint as the target",
                )
            if not set(devices.values()) <= {"cpu"}:
                user_code.call(spec.text, model.to, "cpu")
            return model


def copied(model: nn.Module, path: str) -> nn.Module:
    """A deep copy whose tensors share memory with each other as the model's do; `path` is what an error shows.

    >>> layer = nn.Linear(2, 2)
    >>> layer.register_buffer("first", layer.weight.detach()[0])
    >>> twin = copied(layer, "layer")
    >>> twin.first.data_ptr() == twin.weight.data_ptr() != layer.weight.data_ptr()
    True
    """
    shared: dict[int, list[torch.Tensor]] = {}
    for tensor in {id(tensor): tensor for _, tensor in _tensors(model)}.values():
        if type(tensor) in (torch.Tensor, nn.Parameter) and not is_lazy(tensor):
            shared.setdefault(tensor.untyped_storage()._cdata, []).append(tensor)
    memo: dict[int, Any] = {}  # deepcopy gives each Parameter memory of its own
    for tensors in shared.values():
        if len(tensors) == 1 or any(tensor.is_conj() or tensor.is_neg() for tensor in tensors):
            continue
        memory = tensors[0].untyped_storage()
        storage = torch.empty(memory.nbytes(), dtype=torch.uint8, device=memory.device).untyped_storage()
        storage.copy_(memory)
        for tensor in tensors:
            view = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            with torch.no_grad():
                view.set_(storage, tensor.storage_offset(), tensor.size(), tensor.stride())
            memo[id(tensor)] = nn.Parameter(view, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else view
    made: nn.Module = user_code.call(path, copy.deepcopy, model, memo)
    return made


@contextmanager
def forked(seed: int) -> Iterator[None]:
    """Seed the random states for the time of the block, then put them, and torch's default dtype, back."""
    numpy: Any = sys.modules.get("numpy")
    torch_state, python_state, dtype = torch.get_rng_state(), random.getstate(), torch.get_default_dtype()
    numpy_state = numpy.random.get_state() if numpy else None
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if numpy:
        numpy.random.seed(seed % 2**32)
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        random.setstate(python_state)
        torch.set_default_dtype(dtype)
        if numpy:
            numpy.random.set_state(numpy_state)


def _import(spec: Spec, note: Note) -> object:
    with forked(0):
        return _attribute(spec, imports.load(spec, note))


def _attribute(spec: Spec, module: object) -> object:
    value, path = module, spec.place
    for name in spec.attribute.split("."):
        try:
            value = user_code.call(spec.text, getattr, value, name)
        except TargetError as error:
            if not isinstance(error.__cause__, AttributeError):
                raise
            raise _no_attribute(spec, value, path, name) from error.__cause__
        path = f"{path}.{name}"
    return value


def _no_attribute(spec: Spec, owner: object, path: str, name: str) -> TargetError:
    names = [other for other in dir(owner) if not other.startswith("_")]
    models = [other for other in names if _is_model(vars(owner).get(other) if hasattr(owner, "__dict__") else None)]
    close = close_names(name, names) or models[:5]
    hint = f"is it {' or '.join(f'{spec.place}:{other}' for other in close)}?" if close and "." not in spec.attribute else None
    return TargetError(f"{path} has no {name!r}", path=spec.text, hint=hint or (f"is it {' or '.join(close)}?" if close else None))


def _is_model(value: object) -> bool:
    return isinstance(value, nn.Module) or (isinstance(value, type) and issubclass(value, nn.Module))


def _instance(spec: Spec, model: nn.Module) -> nn.Module:
    if spec.called:
        raise TargetError("is a model already, not a class", path=spec.text, hint=f"leave out the arguments: {spec.place}:{spec.attribute}")
    return model


def _construct(spec: Spec, found: object, device: str) -> nn.Module:
    if not callable(found):
        file = getattr(sys.modules.get(spec.place), "__file__", None) or spec.file
        names = model_names(file or "")[:MOST]
        raise TargetError(
            f"is of the type {type(found).__name__}, not a class, a function or a model",
            path=spec.text,
            hint=f"is it {' or '.join(f'{spec.place}:{name}' for name in names)}?" if names else f"write {FORMS}",
        )
    _check_arguments(spec, found)
    arguments = copy.deepcopy((spec.args, dict(spec.kwargs)))
    with torch.device(device), nullcontext() if device == "meta" else marked():
        model = user_code.call(spec.text, found, *arguments[0], **arguments[1])
    if not isinstance(model, nn.Module):
        raise TargetError(f"gives a {type(model).__name__}, not a torch.nn.Module", path=spec.text)
    return model


def _check_arguments(spec: Spec, found: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(found)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(*spec.args, **spec.kwargs)
    except TypeError as error:
        reason = "does not take these arguments" if spec.args or spec.kwargs else "needs arguments"
        raise TargetError(
            f"{spec.attribute} {reason} ({error}); its signature is {spec.attribute}{signature}",
            path=spec.text,
            hint=_call_that_fits(spec, signature),
        ) from None


def _call_that_fits(spec: Spec, signature: inspect.Signature) -> str | None:
    """The spec with its arguments under the names that look like theirs, and `...` for what is needed; None where that is no call."""
    free = [name for name, one in signature.parameters.items() if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    free = [name for name in free[len(spec.args) :] if name not in spec.kwargs]
    kwargs: dict[str, str] = {}
    for name, value in spec.kwargs.items():
        close = [] if name in signature.parameters else close_names(name, [one for one in free if one not in kwargs], most=1)
        kwargs[close[0] if close else name] = repr(value)
    kwargs |= {name: "..." for name in free if name not in kwargs and signature.parameters[name].default is inspect.Parameter.empty}
    try:
        signature.bind(*spec.args, **kwargs)
    except TypeError:
        return None
    return f"{spec.place}:{spec.attribute}({', '.join([*map(repr, spec.args), *(f'{name}={text}' for name, text in kwargs.items())])})"


def _usable(spec: Spec, model: nn.Module) -> nn.Module:
    lazy = next((name for name, tensor in _tensors(model) if is_lazy(tensor)), None)
    if lazy is not None:
        raise TargetError(
            "is lazy: it has no shape before the first forward pass",
            path=spec.text,
            key=lazy,
            hint="give it a factory that runs one forward pass and returns the model",
        )
    return model


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)
