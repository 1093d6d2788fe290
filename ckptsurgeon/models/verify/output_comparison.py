"""Runs two models that should compute the same on the user's inputs, and compares their outputs.

Both run in eval mode, without gradients, under forked random states; each gets copies of the inputs. Equal outputs prove only the weights
that this input reaches.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ckptsurgeon.errors import ModelError, TargetError
from ckptsurgeon.models.target import imports, user_code
from ckptsurgeon.models.target.build import Note, forked, resolve
from ckptsurgeon.models.target.spec import parse
from ckptsurgeon.models.verify.forward import tensors_of
from ckptsurgeon.report import Twins

SIDES = ("source", "target")


def make_inputs(text: str, note: Note) -> tuple[Any, Any]:
    """The inputs for the source's and the target's model, from the user's `module:make_inputs`: the same for both, or one for each."""
    spec = parse(text)
    with imports.search(spec):
        function = resolve(spec, note)
        if not callable(function):
            raise TargetError(
                "is not a function that returns inputs", path=text, hint="write: def make_inputs(): return torch.randn(1, 3, 224, 224)"
            )
        with forked(0):
            inputs = user_code.call(text, function, *spec.args, **spec.kwargs)
    if isinstance(inputs, Mapping) and set(inputs) == set(SIDES):
        return inputs["source"], inputs["target"]
    return inputs, inputs


def compare(source: nn.Module, target: nn.Module, inputs: tuple[Any, Any], tolerance: float) -> Twins:
    """Run both models, and compare each output of the source's with the target's at the same path, else the first of the same shape.

    Raises TargetError if a model fails on its inputs.
    """
    source_outputs, target_outputs = (
        _run(model, sample, side) for model, sample, side in zip((source, target), inputs, SIDES, strict=True)
    )
    if not source_outputs or not target_outputs:
        raise ModelError("gives no tensor to compare", path="the source's model" if not source_outputs else "the target's model")
    rows: list[tuple[str, float | None, float | None]] = []
    unmatched = dict(target_outputs)
    for path, tensor in source_outputs.items():
        same_shape = [name for name, output in unmatched.items() if output.shape == tensor.shape]
        name = path if path in same_shape else same_shape[0] if same_shape else None
        if name is None:
            rows.append((path, None, None))
            continue
        expected, sample = tensor.double(), unmatched.pop(name).double()
        difference = float((expected - sample).abs().max()) if expected.numel() else 0.0
        scale = float(expected.abs().max()) if expected.numel() else 0.0
        rows.append((path if name == path else f"{path} and {name}", difference, scale))
    return Twins((*rows, *((name, None, None) for name in unmatched)), tolerance)


def _run(model: nn.Module, inputs: Any, side: str) -> dict[str, torch.Tensor]:
    """The floating-point outputs by path."""
    args, kwargs = _arguments(copy.deepcopy(inputs))
    name = f"the {side}'s model"
    with torch.no_grad(), forked(0):
        user_code.call(name, model.eval)
        outputs = user_code.call(name, model, *args, **kwargs)
    return {path: tensor for path, tensor in tensors_of(outputs) if tensor.is_floating_point()}


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and named arguments, from one argument, a tuple, a dict by name, or a pair of tuple and dict."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple) and len(inputs) == 2 and isinstance(inputs[0], tuple) and isinstance(inputs[1], Mapping):
        return inputs[0], dict(inputs[1])
    return (inputs if isinstance(inputs, tuple) else (inputs,)), {}
