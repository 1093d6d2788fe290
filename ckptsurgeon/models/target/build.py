"""Builds a model from a spec: imports the user's module, gets the attribute, and constructs the model on meta or on the CPU.

A module is looked up in the current folder first, as `python -m` does; `file.py:Net` first in that file's folder. `note` gets a line for
each import. Afterwards the random states (torch's CPU generator, python, numpy), torch's default dtype, sys.path and modules of the
same name are restored. Nothing here reads a checkpoint.

Memory that a constructor allocates and never writes to is recognised, so that no garbage gets into a file as an initial value: within
`marked()`, every tensor of `torch.empty` and similar functions is filled with one special NaN, whose bits other NaNs don't have, also in a
copy. Dtypes without such a NaN, such as integers, are filled with 0. No random state changes.
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
from torch.utils._python_dispatch import TorchDispatchMode

from ckptsurgeon.errors import TargetError
from ckptsurgeon.hints import close_names
from ckptsurgeon.models.target import imports, user_code
from ckptsurgeon.models.target.source_names import MOST, model_names
from ckptsurgeon.models.target.spec import FORMS, Spec

Note = Callable[[str], None]
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)  # parameters that a keyword can set
_ALLOCATING = ("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided")
_MARKS: dict[torch.dtype, tuple[torch.dtype, int]] = {
    torch.float64: (torch.int64, 0x7FF8_0000_0000_5EED),
    torch.float32: (torch.int32, 0x7FC0_5EED),
    torch.float16: (torch.int16, 0x7E5D),
    torch.bfloat16: (torch.int16, 0x7FDD),
}


def resolve(spec: Spec, note: Note) -> object:
    """Import the spec's module and return the attribute that the spec names, without calling it.

    The import runs under a forked random state with seed 0, so that a model which the module builds at import is always the same.

    Raises:
        TargetError: no such file, module or attribute (the hint has close names), or the import fails.
    """
    with imports.search(spec):
        return _import(spec, note)


def build_meta(spec: Spec, note: Note) -> nn.Module:
    """The model on the meta device: names, dtypes and shapes without memory or values.

    If the constructor fails on meta, the model is built on the CPU, and a note says why. An instance (`module:net`) is returned as it
    is, on its own device.

    Raises:
        TargetError: as `resolve` and `build`; if the constructor fails on the CPU too, that error.
    """
    with imports.search(spec):
        attribute = _import(spec, note)
        if isinstance(attribute, nn.Module):
            return _instance(spec, attribute)
        try:
            with forked(0):
                model = _construct(spec, attribute, "meta")
        except TargetError as error:
            with forked(0):
                model = _construct(spec, attribute, "cpu")
            note(f"{spec.text} is built on the CPU, since its constructor fails on meta: {error.reason}")
        return _usable(spec, model)


def build(spec: Spec, seed: int, note: Note) -> nn.Module:
    """The model with its constructor's values, on the CPU, the same for the same seed. An instance is returned as a deep copy.

    Raises:
        TargetError: as `resolve`; the target needs arguments, fails, gives no nn.Module, has lazy parameters, or leaves tensors on meta.
    """
    with imports.search(spec):
        attribute = _import(spec, note)
        with forked(seed):
            model: nn.Module
            if isinstance(attribute, nn.Module):
                model = copied(_instance(spec, attribute), spec.text)
            else:
                model = _usable(spec, _construct(spec, attribute, "cpu"))
            devices = {name: tensor.device.type for name, tensor in _tensors(model)}
            without_values = [name for name, device in devices.items() if device == "meta"]
            if without_values:
                raise TargetError(
                    f"its constructor leaves {len(without_values)} tensors without values, on the meta device",
                    path=spec.text,
                    key=without_values[0],
                    hint="give it a factory that makes real values, or use another checkpoint as the target",
                )
            if not set(devices.values()) <= {"cpu"}:
                user_code.call(spec.text, model.to, "cpu")
            return model


def copied(model: nn.Module, path: str) -> nn.Module:
    """A deep copy whose tensors share memory with each other as the model's do; `path` is the path in an error.

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
    copied_model: nn.Module = user_code.call(path, copy.deepcopy, model, memo)
    return copied_model


@contextmanager
def forked(seed: int) -> Iterator[None]:
    """Seed the random states within the block; restore them and torch's default dtype afterwards."""
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
    value, path = module, spec.module_or_file
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
    names = [candidate for candidate in dir(owner) if not candidate.startswith("_")]
    models = [candidate for candidate in names if _is_model(vars(owner).get(candidate) if hasattr(owner, "__dict__") else None)]
    close = close_names(name, names) or models[:5]
    hint = (
        f"is it {' or '.join(f'{spec.module_or_file}:{candidate}' for candidate in close)}?"
        if close and "." not in spec.attribute
        else None
    )
    return TargetError(f"{path} has no {name!r}", path=spec.text, hint=hint or (f"is it {' or '.join(close)}?" if close else None))


def _is_model(value: object) -> bool:
    return isinstance(value, nn.Module) or (isinstance(value, type) and issubclass(value, nn.Module))


def _construct(spec: Spec, attribute: object, device: str) -> nn.Module:
    if not callable(attribute):
        file = getattr(sys.modules.get(spec.module_or_file), "__file__", None) or spec.file
        names = model_names(file or "")[:MOST]
        raise TargetError(
            f"is of the type {type(attribute).__name__}, not a class, a function or a model",
            path=spec.text,
            hint=f"is it {' or '.join(f'{spec.module_or_file}:{name}' for name in names)}?" if names else f"write {FORMS}",
        )
    _check_arguments(spec, attribute)
    arguments = copy.deepcopy((spec.args, dict(spec.kwargs)))
    with torch.device(device), nullcontext() if device == "meta" else marked():
        model = user_code.call(spec.text, attribute, *arguments[0], **arguments[1])
    if not isinstance(model, nn.Module):
        raise TargetError(f"gives a {type(model).__name__}, not a torch.nn.Module", path=spec.text)
    return model


def _check_arguments(spec: Spec, function: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(function)
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
    """The spec with misspelled arguments corrected and `...` for missing ones; None if that does not fit the signature either."""
    free = [name for name, parameter in signature.parameters.items() if parameter.kind in _BY_NAME]
    free = [name for name in free[len(spec.args) :] if name not in spec.kwargs]
    kwargs: dict[str, str] = {}
    for name, value in spec.kwargs.items():
        close = [] if name in signature.parameters else close_names(name, [unused for unused in free if unused not in kwargs], most=1)
        kwargs[close[0] if close else name] = repr(value)
    kwargs |= {name: "..." for name in free if name not in kwargs and signature.parameters[name].default is inspect.Parameter.empty}
    try:
        signature.bind(*spec.args, **kwargs)
    except TypeError:
        return None
    arguments = [*map(repr, spec.args), *(f"{name}={text}" for name, text in kwargs.items())]
    return f"{spec.module_or_file}:{spec.attribute}({', '.join(arguments)})"


def _instance(spec: Spec, model: nn.Module) -> nn.Module:
    if spec.called:
        raise TargetError(
            "is a model already, not a class", path=spec.text, hint=f"leave out the arguments: {spec.module_or_file}:{spec.attribute}"
        )
    return _usable(spec, model)


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


@contextmanager
def marked() -> Iterator[None]:
    """Within the block, fill tensors that are allocated without values.

    >>> with marked():
    ...     is_unset(torch.empty(2)), is_unset(torch.zeros(2)), is_unset(torch.full((2,), float("nan")))
    (True, False, False)
    """
    with _Marking():  # type: ignore[no-untyped-call]
        yield


def is_unset(tensor: torch.Tensor) -> bool:
    """Whether an element of the tensor still has the special NaN of `marked`."""
    if tensor.dtype not in _MARKS or tensor.is_meta or not tensor.numel() or tensor.layout != torch.strided:
        return False
    if tensor.is_neg():
        tensor = torch._neg_view(tensor)  # to see the stored bits, not their negation
    bits, mark = _MARKS[tensor.dtype]
    return bool((tensor.detach().view(bits) == mark).any())


class _Marking(TorchDispatchMode):  # type: ignore[no-untyped-call]
    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # torch would import its compiler for it, which takes longer than building a model

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensor = func(*args, **(kwargs or {}))
        if (
            func.overloadpacket.__name__ in _ALLOCATING
            and type(tensor) is torch.Tensor
            and tensor.layout == torch.strided
            and not tensor.is_meta
        ):
            bits, mark = _MARKS.get(tensor.dtype, (None, 0))
            (tensor.fill_(mark) if bits is None else tensor.view(bits).fill_(mark))
        return tensor
