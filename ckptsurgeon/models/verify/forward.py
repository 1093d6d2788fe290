"""One forward pass of a loaded model: inputs from a text such as `1x3x32x32`, the outputs' shapes, and whether they are finite.

The pass runs in eval mode, without gradients, under forked random states; inputs are the same each time. It proves that the model
runs, not that its outputs are right.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ckptsurgeon.dtypes import DType, all_names, named
from ckptsurgeon.errors import ModelError, TargetError
from ckptsurgeon.hints import close_names
from ckptsurgeon.models.target import user_code
from ckptsurgeon.models.target.build import forked
from ckptsurgeon.report import Finding

_INPUT = re.compile(r"(?P<shape>\d+(?:x\d+)*)(?::(?P<dtype>[\w.]+))?")
_FORM = "write 1x3x32x32 for floats, 1x16:I64 for another dtype"
_DEEPEST = 16


def _input_hint(text: str) -> str | None:
    """A hint for a shape with other separators between its numbers, or for a misspelled dtype."""
    shape, _, dtype = text.strip().partition(":")
    sizes = re.fullmatch(r"[(\[]?\s*(\d+(?:\s*[x×X*,; ]\s*\d+)*)\s*,?\s*[)\]]?", shape.strip())
    if sizes is None:
        return None
    meant = "x".join(re.findall(r"\d+", sizes[1]))
    exact = named(dtype) if dtype else None
    close = close_names(dtype, all_names(), 1) if dtype and exact is None else []
    if dtype and exact is None and not close:
        return f"a dtype such as F32, I64 or int64: {meant}:I64"
    return f"is it {meant}{f':{exact.code if exact is not None else close[0]}' if dtype else ''}?"


def parse_input(text: str) -> tuple[tuple[int, ...], DType]:
    """An input's shape and dtype; without a dtype it is F32. ModelError for a text of another form.

    >>> shape, dtype = parse_input("1x16:I64")
    >>> shape, dtype.code
    ((1, 16), 'I64')
    """
    match = _INPUT.fullmatch(text)
    dtype = None if match is None else named(match["dtype"] or "F32")
    if match is None or dtype is None:
        raise ModelError(f"{text!r} is not an input's shape", hint=_input_hint(text) or _FORM)
    return tuple(int(size) for size in match["shape"].split("x")), dtype


def run(model: nn.Module, inputs: tuple[str, ...], device: torch.device, path: str) -> tuple[dict[str, tuple[int, ...]], list[Finding]]:
    """Run the model once; return the outputs' shapes by their paths, and findings of the codes `forward`, `output` and `non-finite`.

    Args:
        inputs: one text per positional argument; floats are standard normal with seed 0, integers and booleans are zeros.
        path: the path in an error: the checkpoint's.

    >>> run(nn.Linear(3, 2), ("4x3",), torch.device("cpu"), "demo")
    ({'output': (4, 2)}, [])
    """
    generator = torch.Generator("cpu").manual_seed(0)
    arguments = [_values(*parse_input(text), generator).to(device) for text in inputs]
    try:
        with torch.no_grad(), forked(0):
            user_code.call(path, model.eval)
            result: Any = user_code.call(path, model, *arguments)
    except TargetError as error:
        working = _input_that_works(model, inputs, device, path)
        more = f"; it works with {' '.join(working)}" if working is not None else ""
        return {}, [Finding("forward", f"the forward pass with {' '.join(inputs)} failed{more}: {error.reason}")]
    outputs = dict(tensors_of(result))
    findings = [
        Finding("non-finite", f"{output} of the forward pass has values that are not finite, shape {tuple(tensor.shape)}")
        for output, tensor in outputs.items()
        if not _is_finite(tensor)
    ]
    if not outputs:
        findings.append(Finding("output", f"the forward pass gives no tensor, but a {type(result).__name__}", level="warning"))
    return {output: tuple(tensor.shape) for output, tensor in outputs.items()}, findings


def _input_that_works(model: nn.Module, inputs: tuple[str, ...], device: torch.device, path: str) -> tuple[str, ...] | None:
    """Similar inputs with which the forward pass works: with a leading batch dimension of 1, as integers like tokens, or both."""
    shapes = [(text.partition(":")[0], text.partition(":")[2]) for text in inputs]
    batched = tuple(f"1x{shape}{f':{dtype}' if dtype else ''}" for shape, dtype in shapes)
    tokens, both = (tuple(f"{first}{shape}:{dtype or 'I64'}" for shape, dtype in shapes) for first in ("", "1x"))
    for candidate in dict.fromkeys((batched, tokens, both)):
        arguments = [_values(*parse_input(text), torch.Generator("cpu").manual_seed(0)).to(device) for text in candidate]
        with contextlib.suppress(TargetError), torch.no_grad(), forked(0):
            user_code.call(path, model, *arguments)
            return candidate if candidate != inputs else None
    return None


def _values(shape: tuple[int, ...], dtype: DType, generator: torch.Generator) -> torch.Tensor:
    kind = getattr(torch, dtype.torch)
    if dtype.kind in ("int", "bool"):
        return torch.zeros(shape, dtype=kind, device="cpu")
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(kind)


def tensors_of(outputs: object) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor in a model's outputs, with its path.

    >>> [path for path, _ in tensors_of({"logits": torch.zeros(1), "extra": (torch.zeros(2), 3)})]
    ['output.logits', 'output.extra[0]']
    """
    return _walk("output", outputs, 0)


def _walk(path: str, value: object, depth: int) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield path, value
    elif depth < _DEEPEST:
        for part, inner in _parts(value):
            yield from _walk(path + part, inner, depth + 1)


def _parts(value: object) -> list[tuple[str, object]]:
    if isinstance(value, Mapping):
        return [(f".{key}" if isinstance(key, str) else f"[{key!r}]", inner) for key, inner in value.items()]
    if isinstance(value, (list, tuple)):
        names = getattr(value, "_fields", None)
        return [(f".{names[index]}" if names else f"[{index}]", inner) for index, inner in enumerate(value)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f".{field.name}", getattr(value, field.name, None)) for field in dataclasses.fields(value)]
    return []


def _is_finite(tensor: torch.Tensor) -> bool:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return True
    dense = tensor.to_dense() if tensor.layout != torch.strided else tensor
    return bool(torch.isfinite(dense.float() if dense.element_size() == 1 else dense).all())
